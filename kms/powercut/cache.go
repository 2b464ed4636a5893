//go:build linux

package powercut

import (
	"fmt"
	"maps"
	"math"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	blockSize  = 4096 // ext4's block, and a page
	sectorSize = 512  // what a disk writes whole or not at all
	tornOneIn  = 8    // of the unflushed blocks that still reach the disk
)

type block [blockSize]byte

// cache is a disk with a volatile write cache. A write is kept in memory and
// seen by later reads; a flush makes the writes before it durable.
type cache struct {
	bytes     int64
	flushTime time.Duration
	flushes   sync.Mutex // one at a time

	mu       sync.Mutex
	durable  *os.File
	dirty    map[int64]*block // by block number
	flushing map[int64]*block // taken by the flush under way; older than dirty
	cut      bool
}

func newCache(durable *os.File, bytes int64, flushTime time.Duration) *cache {
	return &cache{durable: durable, bytes: bytes, flushTime: flushTime,
		dirty: map[int64]*block{}}
}

func (c *cache) size() int64 { return c.bytes }

func (c *cache) truncate(int64) syscall.Errno { return syscall.EPERM }

// look returns a block as the computer sees it; nil if it is as on the disk.
func (c *cache) look(n int64) *block {
	if b := c.dirty[n]; b != nil {
		return b
	}
	return c.flushing[n]
}

func (c *cache) read(b []byte, off int64) syscall.Errno {
	c.mu.Lock()
	defer c.mu.Unlock()
	if n, err := c.durable.ReadAt(b, off); n < len(b) {
		return syscall.EIO // the image has its full size from the start
	} else if err != nil {
		return syscall.EIO
	}
	for at := off; at < off+int64(len(b)); at += blockSize - at%blockSize {
		if held := c.look(at / blockSize); held != nil {
			copy(b[at-off:], held[at%blockSize:])
		}
	}
	return 0
}

// write goes on after a cut, unheard: the file system above may close in peace.
func (c *cache) write(b []byte, off int64) syscall.Errno {
	c.mu.Lock()
	defer c.mu.Unlock()
	if off < 0 || off+int64(len(b)) > c.bytes {
		return syscall.ENOSPC
	}
	for len(b) > 0 {
		n := off / blockSize
		held := c.dirty[n]
		if held == nil {
			held = new(block)
			if under := c.flushing[n]; under != nil {
				*held = *under
			} else if _, err := c.durable.ReadAt(held[:], n*blockSize); err != nil {
				return syscall.EIO
			}
			c.dirty[n] = held
		}
		k := copy(held[off%blockSize:], b)
		b, off = b[k:], off+int64(k)
	}
	return 0
}

// flush covers the writes that were complete when it began. After a cut it
// fails, so that nobody acknowledges what is not on the disk.
func (c *cache) flush() syscall.Errno {
	c.flushes.Lock()
	defer c.flushes.Unlock()
	c.mu.Lock()
	c.flushing, c.dirty = c.dirty, map[int64]*block{}
	c.mu.Unlock()
	time.Sleep(c.flushTime)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.cut {
		return syscall.EIO
	}
	for n, b := range c.flushing {
		if _, err := c.durable.WriteAt(b[:], n*blockSize); err != nil {
			return syscall.EIO
		}
	}
	c.flushing = nil
	return 0
}

// Loss is what a power cut did to the blocks that no flush had covered.
type Loss struct {
	Unflushed int // blocks in the cache
	Written   int // of these, blocks that still reached the disk
	Torn      int // of the written ones, with some sectors new and some old
}

// pending is a block in the cache, with its place.
type pending struct {
	n int64
	b *block
}

// powerOff ends all durability and gives the blocks that still reach the disk,
// in the order in which they do, as masks of their sectors.
func (c *cache) powerOff(fraction float64, seed uint64) (reach []pending, sectors []uint8, loss Loss) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.cut = true
	var all []pending
	for _, part := range []map[int64]*block{c.flushing, c.dirty} { // older first
		for _, n := range slices.Sorted(maps.Keys(part)) {
			copied := *part[n]
			all = append(all, pending{n, &copied})
		}
	}
	rng := rand.New(rand.NewPCG(seed, 0))
	chosen := rng.Perm(len(all))[:int(math.Round(fraction*float64(len(all))))]
	slices.Sort(chosen)
	for _, i := range chosen {
		mask := uint8(0xff)
		if rng.IntN(tornOneIn) == 0 {
			mask = uint8(1 + rng.IntN(0xfe)) // some, not all, not none
			loss.Torn++
		}
		reach, sectors = append(reach, all[i]), append(sectors, mask)
	}
	loss.Unflushed, loss.Written = len(all), len(chosen)
	return reach, sectors, loss
}

// cutTo takes the power away and leaves in image what the disk then holds.
func (c *cache) cutTo(image *os.File, fraction float64, seed uint64) (Loss, error) {
	reach, sectors, loss := c.powerOff(fraction, seed)
	if err := copySparse(image, c.durable, c.bytes); err != nil {
		return Loss{}, fmt.Errorf("copy disk: %w", err)
	}
	for i, p := range reach {
		for s := range blockSize / sectorSize {
			if sectors[i]&(1<<s) == 0 {
				continue
			}
			at := s * sectorSize
			_, err := image.WriteAt(p.b[at:at+sectorSize], p.n*blockSize+int64(at))
			if err != nil {
				return Loss{}, fmt.Errorf("write block: %w", err)
			}
		}
	}
	return loss, nil
}

// copySparse copies size bytes and keeps the holes.
func copySparse(dst, src *os.File, size int64) error {
	if err := dst.Truncate(size); err != nil {
		return err
	}
	buf := make([]byte, 1<<20)
	for at := int64(0); at < size; {
		from, err := unix.Seek(int(src.Fd()), at, unix.SEEK_DATA)
		if err == unix.ENXIO { // only a hole is left
			return nil
		} else if err != nil {
			return err
		}
		to, err := unix.Seek(int(src.Fd()), from, unix.SEEK_HOLE)
		if err != nil {
			return err
		}
		for from < to {
			n := min(int64(len(buf)), to-from)
			if _, err := src.ReadAt(buf[:n], from); err != nil {
				return err
			}
			if _, err := dst.WriteAt(buf[:n], from); err != nil {
				return err
			}
			from += n
		}
		at = to
	}
	return nil
}
