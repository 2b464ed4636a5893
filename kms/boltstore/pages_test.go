package boltstore

import (
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/quietline/quietline/kms"
)

// TestDamagedPages overwrites each field of each page that leads elsewhere.
// Every one of them is told in an error: a fault in the engine's own goroutine
// would end this process.
func TestDamagedPages(t *testing.T) {
	if raced {
		t.Skip("as TestFlippedBits")
	}
	path := filepath.Join(t.TempDir(), "kms.db")
	s, _ := journalOf(t, path, 14)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	size, _, _ := readHead(f, 0)
	im := takeImage(t, path)
	im.db = im.db[:promised(t, path)]
	if err := checkPages(path, os.OpenFile, lockWait); err != nil {
		t.Fatalf("a sound store: %v", err)
	}
	order := binary.NativeEndian
	again := filepath.Join(t.TempDir(), "kms.db")
	told, fields := 0, 0
	for page := firstOfTree; page < len(im.db)/int(size); page++ {
		at := page * int(size)
		if order.Uint64(im.db[at:]) != uint64(page) {
			continue // inside a value
		}
		for _, field := range []struct{ at, width int }{
			{0, 8}, {8, 2}, {10, 2}, {12, 4}, // head
			{16, 4}, {20, 4}, {24, 4}, {28, 4}, // first element
		} {
			bad := image{append([]byte(nil), im.db...), im.journal}
			for i := range field.width {
				bad.db[at+field.at+i] = 0x7f
			}
			bad.write(t, again)
			fields++
			if err := useAll(again); errors.Is(err, kms.ErrCorrupt) {
				told++
			} else if err != nil {
				t.Errorf("page %d, byte %d: %v, want ErrCorrupt", page, field.at, err)
			}
		}
	}
	// What is not told lies in pages that are free.
	if told < fields/4 {
		t.Errorf("%d of %d fields told", told, fields)
	}
	t.Logf("%d of %d fields told, the others are in free pages", told, fields)
}

// TestPageCycle: a page that leads back to itself must not be walked for ever.
func TestPageCycle(t *testing.T) {
	path := filepath.Join(t.TempDir(), "kms.db")
	s, _ := journalOf(t, path, 14)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	im := takeImage(t, path)
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	size, _, first := readHead(f, 0)
	head := int64(0)
	if _, _, second := readHead(f, size); second > first {
		head = size
	}
	order := binary.NativeEndian
	top := order.Uint64(im.db[head+headAt+headRootAt:])
	b := im.db[int64(top)*size:]
	value := pageHead + order.Uint32(b[pageHead+4:]) + order.Uint32(b[pageHead+8:])
	order.PutUint64(b[value:], top) // the first bucket's root
	im.write(t, path)
	if err := useAll(path); !errors.Is(err, kms.ErrCorrupt) {
		t.Errorf("a page below itself: %v, want ErrCorrupt", err)
	}
}
