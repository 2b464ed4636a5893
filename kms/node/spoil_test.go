package node

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	bolt "go.etcd.io/bbolt"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/kms"
	"github.com/quietline/quietline/kms/boltstore"
	"github.com/quietline/quietline/kms/peer"
)

// spoiling is a store that reads back damaged bytes.
type spoiling struct {
	kms.Store
	mu  sync.Mutex
	bad map[kms.SegmentID]func(*kms.Sealed) error
}

func (s *spoiling) Load(ctx context.Context, id kms.SegmentID) (kms.Sealed, []kms.Bitmap, error) {
	sealed, claims, err := s.Store.Load(ctx, id)
	s.mu.Lock()
	defer s.mu.Unlock()
	if spoil := s.bad[id]; spoil != nil && err == nil {
		err = spoil(&sealed)
	}
	return sealed, claims, err
}

func (s *spoiling) spoil(id kms.SegmentID, how func(*kms.Sealed) error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.bad[id] = how
}

func (s *site) drawOne(t *testing.T) (etsi014.Container, error) {
	t.Helper()
	return s.KME().Keys(t.Context(), etsi014.Caller{SAE: "sae-a"},
		etsi014.KeyRequest{Targets: []etsi014.SAEID{"sae-b"}, Number: 1})
}

func (s *site) turnNow(t *testing.T) {
	t.Helper()
	var err error
	if aerr := s.owner.ask(t.Context(), func(*peer.Machine) { err = s.owner.turn(t.Context()) }); aerr !=
		nil || err != nil {
		t.Fatalf("turn: %v, %v", aerr, err)
	}
}

// segmentsIn lists a site's segments in a state.
func (s *site) segmentsIn(t *testing.T, state kms.State) (ids []kms.Segment) {
	t.Helper()
	lease, err := s.store.Lease(t.Context(), "link", -1)
	if err != nil {
		t.Fatal(err)
	}
	for _, seg := range lease.Segments {
		if seg.State == state {
			ids = append(ids, seg)
		}
	}
	return ids
}

// TestUnreadableOpenSegment: bytes of the segment that keys are drawn from
// cannot be read, at a draw or when the epoch turns. It is void at both sites,
// with an alarm, and keys come from the next one.
func TestUnreadableOpenSegment(t *testing.T) {
	flip := func(b []byte) error { b[len(b)-1] ^= 1; return nil }
	for name, c := range map[string]struct {
		how  func(*kms.Sealed) error
		turn bool // the damage is met at a turn, else at a draw
	}{
		"data key at a draw": {func(s *kms.Sealed) error { return flip(s.Key.Bytes) }, false},
		"slots at a draw": {func(s *kms.Sealed) error {
			for i := range s.Slots {
				s.Slots[i] ^= 1
			}
			return nil
		}, false},
		"record at a draw":   {func(*kms.Sealed) error { return kms.ErrCorrupt }, false},
		"data key at a turn": {func(s *kms.Sealed) error { return flip(s.Key.Bytes) }, true},
		"slots at a turn":    {func(s *kms.Sealed) error { return flip(s.Slots) }, true},
		"nothing at a turn":  {func(*kms.Sealed) error { return kms.ErrNoSegment }, true},
	} {
		t.Run(strings.ReplaceAll(name, " ", "-"), func(t *testing.T) {
			a, b := newPair(t, 4096)
			b.start(t)
			a.cfg.Peers[0].Addr = b.ListenAddr().String()
			disk, err := boltstore.Open(filepath.Join(t.TempDir(), "kms.db"), "kme-a",
				boltstore.Options{})
			if err != nil {
				t.Fatal(err)
			}
			store := &spoiling{Store: disk, bad: map[kms.SegmentID]func(*kms.Sealed) error{}}
			a.startOver(t, store)
			a.driver.allow(9)
			b.driver.allow(9)
			a.stored(t, "sae-a", "sae-b", 400)
			if _, err := a.drawOne(t); err != nil {
				t.Fatal(err)
			}
			var hit kms.SegmentID
			for _, s := range a.segmentsIn(t, kms.StateOpen) {
				if s.Owner == "kme-a" {
					hit = s.ID
				}
			}
			store.spoil(hit, c.how)
			if c.turn {
				a.turnNow(t)
			} else {
				// The opener that stands in memory is good; it is dropped, as after
				// a turn.
				if err := a.owner.ask(t.Context(), func(*peer.Machine) { clear(a.owner.openers) }); err != nil {
					t.Fatal(err)
				}
				var down *etsi014.Error
				if got, err := a.drawOne(t); !errors.As(err, &down) || down.Kind != etsi014.ErrDown ||
					down.RetryAfter == 0 || len(got.Keys) != 0 {
					t.Fatalf("draw of what cannot be read: %d keys, %v", len(got.Keys), err)
				}
			}
			a.isVoid(t, hit)
			b.isVoid(t, hit)
			if _, err := a.drawOne(t); err != nil {
				t.Errorf("draw afterwards: %v", err)
			}
			a.turnNow(t)
			if alarms := strings.Join(a.Stats().Alarms, "\n"); !strings.Contains(alarms,
				"segment cannot be read") {
				t.Errorf("no alarm: %q", alarms)
			}
		})
	}
}

// startOver runs a site over a given store.
func (s *site) startOver(t *testing.T, store kms.Store) {
	t.Helper()
	if err := os.MkdirAll(s.cfg.Dir, 0o700); err != nil {
		t.Fatal(err)
	}
	s.startWith(t, func() (*Node, error) { return open(s.cfg, store) })
}

// isVoid waits until a site has that segment no more.
func (s *site) isVoid(t *testing.T, id kms.SegmentID) {
	t.Helper()
	eventually(t, "segment is void at "+string(s.cfg.KME), func() bool {
		_, _, err := s.store.Load(t.Context(), id)
		return errors.Is(err, kms.ErrNoSegment)
	})
}

// TestUnreadableAtStart: two data keys and the slots of a third segment are
// damaged in the store file. The KME starts, turns its epoch and serves; the
// three are void.
func TestUnreadableAtStart(t *testing.T) {
	a, b := newPair(t, 4096)
	startPair(t, a, b)
	a.driver.allow(13)
	b.driver.allow(13)
	eventually(t, "confirmed", func() bool { return segments(a.Stats(), kms.StateConfirmed) == 12 })
	var ours, theirs []kms.SegmentID
	for _, s := range a.segmentsIn(t, kms.StateConfirmed) {
		if s.Owner == "kme-a" {
			ours = append(ours, s.ID)
		} else {
			theirs = append(theirs, s.ID)
		}
	}
	a.stop(t)
	spoilFile(t, filepath.Join(a.cfg.Dir, "kms.db"), "keys", ours[1].Number)
	spoilFile(t, filepath.Join(a.cfg.Dir, "kms.db"), "keys", theirs[1].Number)
	spoilFile(t, filepath.Join(a.cfg.Dir, "kms.db"), "slots", ours[0].Number)
	a.cfg.Links[0].Driver = newStream(1, 13, 4096)
	a.start(t)
	a.stored(t, "sae-a", "sae-b", 300)
	a.turnNow(t)
	for _, id := range []kms.SegmentID{ours[1], theirs[1]} {
		a.isVoid(t, id)
		b.isVoid(t, id)
	}
	good := 0
	for try := 0; good < 100 && try < 200; try++ {
		_, err := a.drawOne(t)
		switch {
		case err == nil:
			good++
		case !errors.Is(err, etsi014.ErrDown):
			t.Fatal(err)
		}
	}
	if good < 100 {
		t.Errorf("only %d keys could be drawn", good)
	}
	a.isVoid(t, ours[0])
	a.turnNow(t)
	if n := strings.Count(strings.Join(a.Stats().Alarms, "\n"), "segment cannot be read"); n != 3 {
		t.Errorf("%d alarms, want 3", n)
	}
	if err := a.Health(); err != nil {
		t.Error(err)
	}
}

// spoilFile changes every tenth byte of what a store file holds for a segment.
func spoilFile(t *testing.T, path, bucket string, number uint64) {
	t.Helper()
	db, err := bolt.Open(path, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	hit := false
	if err := db.Update(func(tx *bolt.Tx) error {
		keys := tx.Bucket([]byte(bucket))
		return keys.ForEach(func(k, v []byte) error {
			if k[len(k)-1] != byte(number) {
				return nil
			}
			hit = true
			v = append([]byte(nil), v...)
			for i := len(v) - 1; i > 12; i -= 10 {
				v[i] ^= 1
			}
			return keys.Put(k, v)
		})
	}); err != nil || !hit {
		t.Fatalf("spoil %s of segment %d: found %v, %v", bucket, number, hit, err)
	}
}
