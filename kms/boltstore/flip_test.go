package boltstore

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/quietline/quietline/kms"
	"github.com/quietline/quietline/kms/storetest"
)

// TestFlippedBits: bits of both files are flipped anywhere. Open or the first
// use tells of it, or what is read is right: never a claim forgotten that its
// log tells of, never other slots, never a panic.
func TestFlippedBits(t *testing.T) {
	if raced {
		t.Skip("the engine's check of keys out of order goes on in a goroutine while Open fails")
	}
	path := filepath.Join(t.TempDir(), "kms.db")
	s, _ := journalOf(t, path, 9)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = openAt(t, path, Options{})
	l, err := s.Lease(t.Context(), "", 0)
	if err != nil {
		t.Fatal(err)
	}
	for i := range 5 {
		if _, err := s.Commit(t.Context(), l.Fence, []kms.Change{drawOf(drawnID, 9+i)}); err != nil {
			t.Fatal(err)
		}
	}
	im := takeImage(t, path)
	used := int(s.journal.at)
	s.Close()
	least := promised(t, path)
	im.db = im.db[:least]
	const flips = 300
	seed := uint64(time.Now().UnixNano())
	rng := rand.New(rand.NewPCG(seed, 0))
	dir := t.TempDir()
	told := 0
	for i := range flips {
		bad := image{bytes.Clone(im.db), bytes.Clone(im.journal)}
		var where string
		if i%4 == 0 {
			// Not in the last record: damage there cannot be told from a torn write.
			at := rng.IntN(used - used/5)
			bad.journal[at] ^= 1 << rng.IntN(8)
			where = fmt.Sprint("journal ", at)
		} else {
			at := rng.IntN(int(least))
			bad.db[at] ^= 1 << rng.IntN(8)
			where = fmt.Sprint("database ", at)
		}
		again := filepath.Join(dir, "kms.db")
		bad.write(t, again)
		err := useAll(again)
		switch {
		case err == nil:
		case !errors.Is(err, kms.ErrCorrupt) && !errors.Is(err, kms.ErrNewer) &&
			!errors.Is(err, kms.ErrOlder) && !errors.Is(err, kms.ErrForeign):
			t.Errorf("seed %d, %s: %v, want ErrCorrupt", seed, where, err)
		case strings.Contains(err.Error(), "\n"):
			t.Errorf("seed %d, %s: more than one line: %v", seed, where, err)
		default:
			told++
		}
	}
	if told == 0 {
		t.Errorf("seed %d: nothing was found: the test cannot fail", seed)
	}
	t.Logf("%d of %d flipped bits told, the others did no harm", told, flips)
}

// useAll opens the store and reads all there is. The error says what is wrong
// with it.
func useAll(path string) error {
	s, err := Open(path, storetest.Self, Options{})
	if err != nil {
		return err
	}
	defer s.Close()
	ctx := context.Background()
	l, err := s.Lease(ctx, drawn, -1)
	if err != nil {
		return err
	}
	if len(l.Unreadable) > 0 {
		return fmt.Errorf("%w: %d segments cannot be read", kms.ErrCorrupt, len(l.Unreadable))
	}
	logged := 0
	for rec, err := range s.Scan(ctx, 0) {
		if err != nil {
			return err
		}
		for _, c := range rec.Changes {
			logged += c.Slots * btoi(c.Op == kms.OpClaim)
		}
	}
	sealed, claims, err := s.Load(ctx, drawnID)
	if err != nil {
		return err
	}
	if !bytes.Equal(sealed.Slots, openedSegment(drawnID)[0].Sealed.Slots) {
		// The store passes on what the seal over each slot is there to find.
		return fmt.Errorf("%w: slots", kms.ErrCorrupt)
	}
	claimed := 0
	for i := range 1024 {
		claimed += btoi(len(claims) > 0 && claims[0].Get(i))
	}
	if claimed != logged || claimed != 14 {
		return fmt.Errorf("%d slots are claimed and %d logged, of 14", claimed, logged)
	}
	return nil
}
