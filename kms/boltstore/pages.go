package boltstore

import (
	"encoding/binary"
	"fmt"
	"os"
	"time"

	bolt "go.etcd.io/bbolt"

	"github.com/quietline/quietline/kms"
)

// The pages of a store file, as in bbolt's internal/common/page.go: number (8),
// flags (2), count of elements (2), further pages (4), then the elements of 16
// bytes, each with the distance from itself to its key:
//
//	branch: distance (4) key (4) page (8)
//	leaf:   flags (4) distance (4) key (4) value (4)
//
// The value of a bucket is its root page (8) and a sequence (8); with root 0 its
// only page follows.
const (
	pageHead    = 16
	elementLen  = 16
	pageBranch  = 0x01
	pageLeaf    = 0x02
	leafBucket  = 0x01
	bucketHead  = 16
	firstOfTree = 2 // after the two heads
	headRootAt  = 16
)

// checkPages walks the tree of a store file as the engine will when it opens
// it to write. The engine does so in a goroutine of its own, where a page that
// leads out of the file ends the process; here it is an error.
func checkPages(path string, open openFile, wait time.Duration) error {
	var f *os.File
	db, err := bolt.Open(path, 0o600, &bolt.Options{Timeout: wait, ReadOnly: true,
		OpenFile: func(name string, flag int, mode os.FileMode) (_ *os.File, err error) {
			f, err = whole(open)(name, flag, mode)
			return f, err
		}})
	if err != nil {
		return openError(err)
	}
	defer db.Close() // and with it f; until then nobody writes
	head := int64(0)
	size, length, tx := readHead(f, 0)
	if s, l, t := readHead(f, int64(db.Info().PageSize)); s > 0 && (size == 0 || t > tx) {
		head, size, length = s, s, l
	}
	var root [8]byte
	if _, err := f.ReadAt(root[:], head+headAt+headRootAt); err != nil {
		return err
	}
	w := pageWalk{f: f, size: size, pages: uint64(length / size), seen: map[uint64]bool{}}
	return w.tree(binary.NativeEndian.Uint64(root[:]), true)
}

// pageWalk visits every page that is in use, once.
type pageWalk struct {
	f     *os.File
	size  int64
	pages uint64
	seen  map[uint64]bool
}

func damaged(page uint64, what string) error {
	return fmt.Errorf("%w: page %d: %s; keep the file for inspection and start with an empty folder",
		kms.ErrCorrupt, page, what)
}

// tree visits a page and all below it. Only leaves of the top bucket may hold
// buckets.
func (w *pageWalk) tree(id uint64, top bool) error {
	if id < firstOfTree || id >= w.pages {
		return damaged(id, "it lies outside the file")
	}
	if w.seen[id] {
		return damaged(id, "it is used twice")
	}
	w.seen[id] = true
	b := make([]byte, w.size)
	if _, err := w.f.ReadAt(b, int64(id)*w.size); err != nil {
		return err
	}
	order := binary.NativeEndian
	if order.Uint64(b) != id {
		return damaged(id, "it bears another number")
	}
	further := uint64(order.Uint32(b[12:]))
	if further >= w.pages-id {
		return damaged(id, "it reaches beyond the file")
	}
	for next := id + 1; next <= id+further; next++ {
		if w.seen[next] {
			return damaged(next, "it is used twice")
		}
		w.seen[next] = true
	}
	return w.elements(id, b, (int64(further)+1)*w.size, top)
}

// elements checks those of a page of which b is the beginning and span the
// whole length, and visits what they lead to.
func (w *pageWalk) elements(id uint64, b []byte, span int64, top bool) error {
	order := binary.NativeEndian
	flags, count := order.Uint16(b[8:]), int64(order.Uint16(b[10:]))
	if flags != pageBranch && flags != pageLeaf || flags == pageBranch && count == 0 ||
		pageHead+count*elementLen > span {
		return damaged(id, "neither branch nor leaf")
	}
	if need := pageHead + count*elementLen; need > int64(len(b)) {
		return damaged(id, "more elements than fit")
	}
	for i := range count {
		at := pageHead + i*elementLen
		e := b[at:]
		if flags == pageBranch {
			if at+int64(order.Uint32(e))+int64(order.Uint32(e[4:])) > span {
				return damaged(id, "a key lies outside the page")
			}
			if err := w.tree(order.Uint64(e[8:]), top); err != nil {
				return err
			}
			continue
		}
		value := at + int64(order.Uint32(e[4:])) + int64(order.Uint32(e[8:]))
		length := int64(order.Uint32(e[12:]))
		if value+length > span {
			return damaged(id, "a value lies outside the page")
		}
		if order.Uint32(e)&leafBucket != 0 {
			if !top {
				return damaged(id, "a bucket in a bucket")
			}
			if err := w.bucket(id, b, value, length); err != nil {
				return err
			}
		}
	}
	return nil
}

// bucket visits a bucket whose record lies at a place of a page.
func (w *pageWalk) bucket(id uint64, b []byte, at, length int64) error {
	if length < bucketHead || at+length > int64(len(b)) {
		return damaged(id, "a bucket's record is cut short")
	}
	root := binary.NativeEndian.Uint64(b[at:])
	if root != 0 {
		return w.tree(root, false)
	}
	inside := b[at+bucketHead : at+length]
	if len(inside) < pageHead {
		return damaged(id, "a bucket's record is cut short")
	}
	return w.elements(id, inside, int64(len(inside)), false)
}
