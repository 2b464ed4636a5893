package boltstore

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/quietline/quietline/kms"
	"github.com/quietline/quietline/kms/storetest"
)

// bigStore makes a store of many pages and returns its path and content.
func bigStore(t *testing.T) (string, []byte) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "kms.db")
	s := openAt(t, path, Options{})
	l, err := s.Lease(t.Context(), "", 0)
	if err != nil {
		t.Fatal(err)
	}
	for i := range uint64(20) {
		id := kms.SegmentID{Link: "l", Generation: 1, Number: i}
		c := kms.Change{Op: kms.OpIngest, Segment: id, Meta: kms.Segment{ID: id,
			State: kms.StateNew, BlockBytes: 9000, SlotBytes: 32, Slots: 256, Owner: storetest.Self},
			Sealed: kms.Sealed{Key: kms.Wrapped{Epoch: 1, Bytes: []byte{1}},
				Slots: bytes.Repeat([]byte{byte(i)}, 256*48)}}
		if _, err := s.Commit(t.Context(), l.Fence, []kms.Change{c}); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return path, data
}

// promised is how long the file must be.
func promised(t *testing.T, path string) int64 {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	size, length, first := readHead(f, 0)
	_, other, second := readHead(f, size)
	if size != int64(os.Getpagesize()) || first == second {
		t.Fatalf("heads: pages of %d bytes, transactions %d and %d", size, first, second)
	}
	if second > first {
		length = other
	}
	return length
}

// TestCutShort: a file that lost its end is refused with an error that names
// it, wherever it was cut; the process lives.
func TestCutShort(t *testing.T) {
	path, data := bigStore(t)
	least := promised(t, path)
	page := int64(os.Getpagesize())
	if least > int64(len(data)) || least < 30*page {
		t.Fatalf("head promises %d bytes of %d", least, len(data))
	}
	for _, at := range []int64{1, 16, 79, 80, page - 1, page, page + 79, page + 80, 2*page - 1,
		2 * page, 3 * page, 4 * page, 5*page + 7, least / 2, least - 10*page, least - page, least - 1} {
		t.Run(fmt.Sprint(at), func(t *testing.T) {
			cut := filepath.Join(t.TempDir(), "kms.db")
			if err := os.WriteFile(cut, data[:at], 0o600); err != nil {
				t.Fatal(err)
			}
			s, err := Open(cut, storetest.Self, Options{})
			if err == nil {
				s.Close()
			}
			if r, rerr := OpenRead(cut, storetest.Self); !errors.Is(rerr, kms.ErrCorrupt) {
				t.Errorf("OpenRead: %v, want ErrCorrupt", rerr)
				if rerr == nil {
					r.Close()
				}
			}
			if !errors.Is(err, kms.ErrCorrupt) || !strings.Contains(err.Error(), cut) ||
				!strings.Contains(err.Error(), "empty folder") {
				t.Errorf("Open: %v, want ErrCorrupt with file and next step", err)
			}
			if now, err := os.ReadFile(cut); err != nil || !bytes.Equal(now, data[:at]) {
				t.Errorf("the damaged file was changed (%v)", err)
			}
		})
	}
	if err := os.Truncate(path, least); err != nil {
		t.Fatal(err)
	}
	s := openAt(t, path, Options{})
	defer s.Close()
	if l, err := s.Lease(t.Context(), "l", -1); err != nil || len(l.Segments) != 20 {
		t.Errorf("a whole file has %d segments (%v), want 20", len(l.Segments), err)
	}
}

// TestCutShortWithOneHead: the head that is left tells the length, be it the
// first or the second.
func TestCutShortWithOneHead(t *testing.T) {
	path, data := bigStore(t)
	least := promised(t, path)
	for n := range 2 {
		cut := filepath.Join(t.TempDir(), "kms.db")
		bad := bytes.Clone(data[:least/2])
		bad[n*os.Getpagesize()+headAt+headPagesAt] ^= 1
		if err := os.WriteFile(cut, bad, 0o600); err != nil {
			t.Fatal(err)
		}
		s, err := Open(cut, storetest.Self, Options{})
		if err == nil {
			s.Close()
		}
		if !errors.Is(err, kms.ErrCorrupt) || !strings.Contains(err.Error(), "cut short") {
			t.Errorf("head %d damaged: %v, want ErrCorrupt", n, err)
		}
	}
}

// TestCutShortWhileOpen: reading what is gone is an error, not a signal.
func TestCutShortWhileOpen(t *testing.T) {
	path, _ := bigStore(t)
	s := openAt(t, path, Options{})
	if err := os.Truncate(path, int64(2*os.Getpagesize())); err != nil {
		t.Fatal(err)
	}
	if _, _, err := s.Load(t.Context(), kms.SegmentID{Link: "l", Generation: 1,
		Number: 7}); !errors.Is(err, kms.ErrCorrupt) {
		t.Errorf("Load: %v, want ErrCorrupt", err)
	}
	var scanned error
	for _, err := range s.Scan(t.Context(), 0) {
		scanned = errors.Join(scanned, err)
	}
	if !errors.Is(scanned, kms.ErrCorrupt) {
		t.Errorf("Scan: %v, want ErrCorrupt", scanned)
	}
	ingest := []kms.Change{{Op: kms.OpIngest, Segment: kms.SegmentID{Link: "m"}, Meta: kms.Segment{
		ID: kms.SegmentID{Link: "m"}, State: kms.StateNew, SlotBytes: 32, Slots: 1},
		Sealed: kms.Sealed{Key: kms.Wrapped{Epoch: 1, Bytes: []byte{1}}, Slots: make([]byte, 48)}}}
	if _, err := s.Commit(t.Context(), 1, ingest); !errors.Is(err, kms.ErrCorrupt) ||
		kms.Refused(err) {
		t.Errorf("Commit: %v, want ErrCorrupt", err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}
