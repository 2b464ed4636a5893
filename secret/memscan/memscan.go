// Package memscan counts the copies of a secret in the process's own memory,
// for tests which prove that a key is gone after use. It is no part of the
// product; only tests import it.
//
// [Hide] takes a needle while the secret is known, [Scan] looks for it later:
//
//	needle := memscan.Hide(key)
//	… deliver the key, clear it, runtime.GC() …
//	report, err := memscan.Scan(needle)
//
// A caller must keep in mind: a needle holds the secret masked, so it does not
// find itself, but the caller's own variables, a string it compared with, a
// bytes.Buffer or a pooled TLS record do count, which is the point. So does a
// key in a local array, twice once the stack has grown: the old stack is freed
// as it is, and now and then a key that lay in the registers of a preempted
// goroutine. Freed Go memory keeps its bytes until it is used again, so
// collecting garbage does not lower the count. Only whole copies are found:
// hide the halves of a key as needles of their own to find broken ones. Linux
// only, and not after secret.Harden unless the process is root.
package memscan

import (
	"bufio"
	"bytes"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// MinLen is the least length of a needle in bytes: 64 random bits turn up by
// chance once in 10^10 scans of a gigabyte.
const MinLen = 8

// Needle is a secret to look for. It holds the secret masked by random bytes.
type Needle struct{ raw, base64 masked }

// masked is a pattern, XORed with a mask of its own length. Only the first two
// bytes are kept plainly, as the scan's index.
type masked struct {
	bytes, mask []byte
	first       uint16
}

// Hide makes a needle of raw, at least [MinLen] bytes, which stays the
// caller's to clear. No whole copy of it exists in between.
func Hide(raw []byte) Needle {
	if len(raw) < MinLen {
		panic(fmt.Sprintf("memscan: needle of %d bytes, at least %d are needed", len(raw), MinLen))
	}
	text := newMasked(base64.RawStdEncoding.EncodedLen(len(raw)))
	var four [4]byte
	for i := 0; i < len(raw); i += 3 {
		three := raw[i:min(i+3, len(raw))]
		base64.RawStdEncoding.Encode(four[:], three)
		text.put(i/3*4, four[:base64.RawStdEncoding.EncodedLen(len(three))])
	}
	clear(four[:])
	plain := newMasked(len(raw))
	plain.put(0, raw)
	return Needle{raw: plain, base64: text}
}

func newMasked(n int) masked {
	m := masked{bytes: make([]byte, n), mask: make([]byte, n)}
	_, _ = rand.Read(m.mask) // never fails, see crypto/rand
	return m
}

func (m *masked) put(at int, b []byte) {
	for i, c := range b {
		m.bytes[at+i] = c ^ m.mask[at+i]
	}
	if at == 0 {
		m.first = uint16(b[0]) | uint16(b[1])<<8
	}
}

// at tells whether b begins with the pattern.
func (m *masked) at(b []byte) bool {
	if len(b) < len(m.bytes) {
		return false
	}
	for i, c := range m.bytes {
		if b[i]^m.mask[i] != c {
			return false
		}
	}
	return true
}

// Count is what a scan found of one needle.
type Count struct {
	Raw    int      // copies of the bytes
	Base64 int      // copies in standard base64, its padding left out
	Where  []string // address and mapping of the first eight
}

// Report is the result of a scan.
type Report struct {
	Counts     []Count // one a needle, in order
	Scanned    int64   // bytes read
	Unreadable int64   // bytes the kernel would not show, as of memfd_secret
}

// Total adds up the copies of all needles.
func (r Report) Total() (raw, base64 int) {
	for _, c := range r.Counts {
		raw += c.Raw
		base64 += c.Base64
	}
	return raw, base64
}

// window is how much is read at a time; no needle may be longer.
const window = 1 << 20

var page = uint64(os.Getpagesize())

// scan is one pass over memory. Its window lies outside the Go heap and is
// left out of the pass, or each copy would count twice.
type scan struct {
	mem     *os.File
	pagemap *os.File
	entries []byte // of pagemap, for one window
	window  []byte // what was kept of the last one, and one more
	needles []Needle
	longest int
	index   [1 << 16]bool // first two bytes of some pattern
	report  Report
}

// Scan reads the process's writable memory once, while other goroutines go on,
// and counts the needles in it; pages never written are passed over.
func Scan(needles ...Needle) (Report, error) {
	mem, err := os.Open("/proc/self/mem")
	if err != nil {
		return Report{}, fmt.Errorf("scan own memory: %w", err)
	}
	defer mem.Close()
	pagemap, err := os.Open("/proc/self/pagemap")
	if err != nil {
		return Report{}, fmt.Errorf("scan own memory: %w", err)
	}
	defer pagemap.Close()
	w, err := unix.Mmap(-1, 0, 2*window, unix.PROT_READ|unix.PROT_WRITE,
		unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return Report{}, fmt.Errorf("scan own memory: map window: %w", err)
	}
	defer func() { clear(w); _ = unix.Munmap(w) }()
	s := scan{mem: mem, pagemap: pagemap, entries: make([]byte, window/page*8),
		window: w, needles: needles}
	s.report.Counts = make([]Count, len(needles))
	for _, n := range needles {
		s.index[n.raw.first], s.index[n.base64.first] = true, true
		s.longest = max(s.longest, len(n.raw.bytes), len(n.base64.bytes))
	}
	if s.longest > window {
		return Report{}, errors.New("scan own memory: needle is too long")
	}
	regions, err := writable(w)
	if err != nil {
		return Report{}, fmt.Errorf("scan own memory: %w", err)
	}
	for _, r := range regions {
		s.region(r)
	}
	return s.report, nil
}

// region is a run of writable mappings without a hole.
type region struct {
	from, to uint64
	name     string
}

// writable lists the process's writable memory without the window.
func writable(window []byte) ([]region, error) {
	f, err := os.Open("/proc/self/maps")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	skip := uint64(uintptr(unsafe.Pointer(unsafe.SliceData(window))))
	var out []region
	for lines := bufio.NewScanner(f); lines.Scan(); {
		var r region
		var perms string
		if _, err := fmt.Sscanf(lines.Text(), "%x-%x %s", &r.from, &r.to, &perms); err != nil {
			return nil, fmt.Errorf("read maps: %w", err)
		}
		if !strings.HasPrefix(perms, "rw") {
			continue
		}
		r.name = "anonymous"
		if fields := strings.Fields(lines.Text()); len(fields) > 5 {
			r.name = fields[5]
		}
		before := r
		if before.to = min(r.to, skip); before.from < before.to {
			out = appendRegion(out, before)
		}
		after := r
		if after.from = max(r.from, skip+uint64(len(window))); after.from < after.to {
			out = appendRegion(out, after)
		}
	}
	return out, nil
}

func appendRegion(out []region, r region) []region {
	if n := len(out); n > 0 && out[n-1].to == r.from {
		out[n-1].to = r.to
		return out
	}
	return append(out, r)
}

// region searches one region, window by window, each beginning with the last
// bytes of the one before, so that no copy is cut in two.
func (s *scan) region(r region) {
	kept := 0
	for at := r.from; at < r.to; {
		from, to := s.present(at, min(r.to, at+window))
		if from > at {
			kept = 0
		}
		n, err := s.mem.ReadAt(s.window[kept:kept+int(to-from)], int64(from))
		s.report.Scanned += int64(n)
		filled := kept + n
		s.search(s.window[:filled], kept, from-uint64(kept), r.name)
		at = from + uint64(n)
		if err != nil { // a page the kernel does not show, or gone since
			s.report.Unreadable += int64(page - at%page)
			at += page - at%page
			kept = 0
			continue
		}
		kept = copy(s.window, s.window[filled-min(filled, s.longest-1):filled])
	}
}

// present finds the first run of pages in [from, to) that hold anything: most
// of what a Go process maps was never written. Where there is none, the run is
// empty and lies at to.
func (s *scan) present(from, to uint64) (uint64, uint64) {
	entries := s.entries[:(to-from)/page*8]
	if n, _ := s.pagemap.ReadAt(entries, int64(from/page*8)); n < len(entries) {
		return from, to // not known: read all
	}
	// The top two bits of an entry: in memory, swapped out (proc_pid_pagemap(5)).
	first := 0
	for first < len(entries) && entries[first+7]>>6 == 0 {
		first += 8
	}
	last := first
	for last < len(entries) && entries[last+7]>>6 != 0 {
		last += 8
	}
	return from + uint64(first)/8*page, from + uint64(last)/8*page
}

// zeros is what most of a Go heap is; stepping over it makes a scan quick.
var zeros [4096]byte

// search counts the copies in b, which lies at base; a copy that ends within
// the first old bytes was counted before.
func (s *scan) search(b []byte, old int, base uint64, name string) {
	for i := 0; i+1 < len(b); i++ {
		if i%len(zeros) == 0 && bytes.HasPrefix(b[i:], zeros[:]) && s.longest < len(zeros) {
			i += len(zeros) - s.longest // no needle lies in zeros alone
			continue
		}
		if !s.index[uint16(b[i])|uint16(b[i+1])<<8] {
			continue
		}
		for k := range s.needles {
			n, c := &s.needles[k], &s.report.Counts[k]
			if n.raw.at(b[i:]) && i+len(n.raw.bytes) > old {
				c.Raw++
				c.note("raw", base+uint64(i), name)
			}
			if n.base64.at(b[i:]) && i+len(n.base64.bytes) > old {
				c.Base64++
				c.note("base64", base+uint64(i), name)
			}
		}
	}
}

func (c *Count) note(form string, at uint64, name string) {
	if len(c.Where) < 8 {
		c.Where = append(c.Where, fmt.Sprintf("%s at %#x in %s", form, at, name))
	}
}
