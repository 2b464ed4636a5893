package boltstore

import (
	"bytes"
	"errors"
	"path/filepath"
	"testing"

	bolt "go.etcd.io/bbolt"

	"github.com/quietline/quietline/kms"
)

// TestUnreadableSegment: a record of one segment is damaged. It is told with
// the link's lease, takes nothing but OpVoid, and holds up no other segment.
func TestUnreadableSegment(t *testing.T) {
	hit := kms.SegmentID{Link: drawn, Generation: 1, Number: 2}
	rewrap := func(n uint64) kms.Change {
		return kms.Change{Op: kms.OpRewrap, Segment: kms.SegmentID{Link: drawn, Generation: 1, Number: n},
			Key: kms.Wrapped{Epoch: 2, Bytes: []byte{2}}}
	}
	turn := kms.Change{Op: kms.OpTurn, Epoch: 2}
	for _, bucket := range []byte{inSegments, inKeys, inGrants, inClaims} {
		t.Run(string(buckets[bucket]), func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "kms.db")
			s, fence := journalOf(t, path, 0)
			for n := uint64(2); n <= 3; n++ {
				id := kms.SegmentID{Link: drawn, Generation: 1, Number: n}
				if _, err := s.Commit(t.Context(), fence, append(openedSegment(id),
					drawOf(id, 0))); err != nil {
					t.Fatal(err)
				}
			}
			if err := s.db.Update(func(tx *bolt.Tx) error {
				k, v := tx.Bucket(buckets[bucket]).Cursor().Seek(segmentKey(hit))
				bad := bytes.Clone(v)
				bad[len(bad)/2] ^= 2
				return tx.Bucket(buckets[bucket]).Put(bytes.Clone(k), bad)
			}); err != nil {
				t.Fatal(err)
			}
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			s = openAt(t, path, Options{})
			defer func() { _ = s.Close() }()
			kme, err := s.Lease(t.Context(), "", 0)
			if err != nil {
				t.Fatal(err)
			}
			l, err := s.Lease(t.Context(), drawn, -1)
			if err != nil || len(l.Segments) != 2 || len(l.Unreadable) != 1 ||
				l.Unreadable[0].ID != hit || l.Unreadable[0].BlockBytes != 1024*48 {
				t.Fatalf("lease: %d segments, unreadable %+v, %v", len(l.Segments), l.Unreadable, err)
			}
			if _, _, err := s.Load(t.Context(), hit); !errors.Is(err, kms.ErrCorrupt) {
				t.Errorf("Load: %v, want ErrCorrupt", err)
			}
			commit := func(changes ...kms.Change) error {
				_, err := s.Commit(t.Context(), kme.Fence, changes)
				return err
			}
			for name, c := range map[string]kms.Change{"claim": drawOf(hit, 5),
				"close": {Op: kms.OpClose, Segment: hit}, "rewrap": rewrap(2),
				"confirm": {Op: kms.OpConfirm, Segment: hit}} {
				if err := commit(c); !errors.Is(err, kms.ErrState) {
					t.Errorf("%s: %v, want ErrState", name, err)
				}
			}
			if err := commit(rewrap(1), rewrap(3), turn); !errors.Is(err, kms.ErrChange) {
				t.Errorf("turn with a segment that cannot be read: %v, want ErrChange", err)
			}
			if err := commit(drawOf(drawnID, 7)); err != nil {
				t.Errorf("claim of another segment: %v", err)
			}
			void := kms.Change{Op: kms.OpVoid, Segment: hit, Reason: "unreadable"}
			if err := commit(void, rewrap(1), rewrap(3), turn); err != nil {
				t.Errorf("void and turn: %v", err)
			}
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			s = openAt(t, path, Options{})
			if err := s.db.View(func(tx *bolt.Tx) error {
				for _, b := range buckets[inSegments : inClaims+1] {
					if k, _ := tx.Bucket(b).Cursor().Seek(segmentKey(hit)); hasPrefix(k, segmentKey(hit)) {
						t.Errorf("%s still has a record of it", b)
					}
				}
				return nil
			}); err != nil {
				t.Fatal(err)
			}
			if l, err := s.Lease(t.Context(), drawn, -1); err != nil || len(l.Segments) != 2 ||
				len(l.Unreadable) != 0 {
				t.Errorf("lease afterwards: %+v, %v", l, err)
			}
		})
	}
}
