package lab

import (
	"bufio"
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"slices"
	"time"
)

// Found is the outcome of a search.
type Found struct {
	Packets uint64 // packets searched
	Bytes   uint64 // bytes in them
	Streams int    // TCP byte streams put together and searched
	// InPackets and InStreams are how many of the patterns appear in a single
	// packet and in a stream.
	InPackets, InStreams int
}

// Any tells whether any pattern was found anywhere.
func (f Found) Any() bool { return f.InPackets+f.InStreams > 0 }

// Sample returns n pieces of data, each of size bytes (16 or more tell a
// finding from chance), from places that are spread evenly with a random
// shift: patterns for [Search].
func Sample(data []byte, n, size int) [][]byte {
	n = min(n, len(data)/size)
	var out [][]byte
	for i := range n {
		slot := len(data) / n
		at := i*slot + rand.IntN(slot-size+1)
		out = append(out, bytes.Clone(data[at:at+size]))
	}
	return out
}

// Search looks for patterns of at least 8 bytes in a capture: in each packet,
// and in the TCP payload put together in the order of its sequence numbers, so
// that a pattern cut in two by a packet's end is found as well.
func Search(path string, patterns [][]byte) (Found, error) {
	find, err := newFinder(patterns)
	if err != nil {
		return Found{}, fmt.Errorf("search %s: %w", path, err)
	}
	found, err := search(path, find)
	if err != nil {
		return Found{}, fmt.Errorf("search %s: %w", path, err)
	}
	return found, nil
}

func search(path string, find *finder) (Found, error) {
	var f Found
	streams := map[flow]*stream{}
	inPackets := find.hits()
	err := ReadCapture(path, func(p Packet) error {
		f.Packets++
		f.Bytes += uint64(len(p.Data))
		find.in(p.Data, inPackets)
		if fl, seq, payload, ok := tcpSegment(p); ok && len(payload) > 0 {
			if streams[fl] == nil {
				streams[fl] = &stream{}
			}
			streams[fl].add(seq, payload)
		}
		return nil
	})
	if err != nil {
		return Found{}, err
	}
	inStreams := find.hits()
	for _, s := range streams {
		for _, run := range s.join() {
			find.in(run, inStreams)
		}
	}
	f.Streams = len(streams)
	f.InPackets, f.InStreams = count(inPackets), count(inStreams)
	return f, nil
}

func count(hits []bool) int {
	n := 0
	for _, h := range hits {
		if h {
			n++
		}
	}
	return n
}

// ReadCapture calls f with each packet of a capture in turn.
func ReadCapture(path string, f func(Packet) error) error {
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	defer file.Close()
	r := bufio.NewReaderSize(file, blockLen)
	var h [24]byte
	if _, err := io.ReadFull(r, h[:]); err != nil {
		return fmt.Errorf("%w: %w", ErrCapture, err)
	}
	if binary.LittleEndian.Uint32(h[:]) != pcapMagic {
		return ErrCapture
	}
	raw := binary.LittleEndian.Uint32(h[20:]) == linkRaw
	var buf []byte
	for {
		_, err := io.ReadFull(r, h[:16])
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("%w: %w", ErrCapture, err)
		}
		n := binary.LittleEndian.Uint32(h[8:])
		if n > snapLen {
			return fmt.Errorf("%w: packet of %d bytes", ErrCapture, n)
		}
		buf = slices.Grow(buf[:0], int(n))[:n]
		if _, err := io.ReadFull(r, buf); err != nil {
			return fmt.Errorf("%w: %w", ErrCapture, err)
		}
		at := time.Unix(int64(binary.LittleEndian.Uint32(h[0:])),
			int64(binary.LittleEndian.Uint32(h[4:])))
		if err := f(Packet{At: at, Data: buf, raw: raw}); err != nil {
			return err
		}
	}
}

// finder looks for many patterns in one pass.
type finder struct {
	patterns [][]byte
	first    [1 << 16]bool    // first two bytes of some pattern
	byHead   map[uint64][]int // first eight bytes -> patterns
}

func newFinder(patterns [][]byte) (*finder, error) {
	f := &finder{patterns: patterns, byHead: map[uint64][]int{}}
	for i, p := range patterns {
		if len(p) < 8 {
			return nil, fmt.Errorf("pattern %d has %d bytes, 8 are needed", i, len(p))
		}
		f.first[binary.LittleEndian.Uint16(p)] = true
		head := binary.LittleEndian.Uint64(p)
		f.byHead[head] = append(f.byHead[head], i)
	}
	return f, nil
}

func (f *finder) hits() []bool { return make([]bool, len(f.patterns)) }

// in marks in hits the patterns that b holds.
func (f *finder) in(b []byte, hits []bool) {
	for i := 0; i+8 <= len(b); i++ {
		if !f.first[binary.LittleEndian.Uint16(b[i:])] {
			continue
		}
		for _, n := range f.byHead[binary.LittleEndian.Uint64(b[i:])] {
			if bytes.HasPrefix(b[i:], f.patterns[n]) {
				hits[n] = true
			}
		}
	}
}

// stream is one direction of a TCP connection.
type stream struct {
	segments []segment
}

type segment struct {
	at   int64 // place in the stream, from the first segment seen
	data []byte
	seq  uint32
}

func (s *stream) add(seq uint32, payload []byte) {
	at := int64(0)
	if n := len(s.segments); n > 0 {
		last := s.segments[n-1]
		at = last.at + int64(int32(seq-last.seq)) // sequence numbers wrap
	}
	s.segments = append(s.segments, segment{at, bytes.Clone(payload), seq})
}

// join returns the runs of bytes without a gap.
func (s *stream) join() [][]byte {
	slices.SortStableFunc(s.segments, func(a, b segment) int { return cmp.Compare(a.at, b.at) })
	var runs [][]byte
	var end int64
	for i, g := range s.segments {
		if i == 0 || g.at > end {
			runs = append(runs, nil)
			end = g.at
		}
		if skip := end - g.at; skip < int64(len(g.data)) {
			runs[len(runs)-1] = append(runs[len(runs)-1], g.data[skip:]...)
			end = g.at + int64(len(g.data))
		}
	}
	return runs
}
