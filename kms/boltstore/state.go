package boltstore

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sort"

	bolt "go.etcd.io/bbolt"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/kms"
	"github.com/quietline/quietline/kms/audit"
)

// state is what the newest durable commit left, but for slots and data keys.
// Commits are checked against it; it is read from the database at Open.
type state struct {
	fence       kms.Fence
	incarnation uint64
	epoch       uint64
	position    kms.Position
	memories    map[etsi014.KMEID]kms.Memory
	links       map[kms.LinkID]linkRecord
	segments    map[kms.SegmentID]*liveSegment
}

// liveSegment is a segment with its grants and claims. One that stands in the
// state is not changed: a commit works on a copy.
type liveSegment struct {
	kms.Segment
	key    []byte       // in the buckets
	epoch  uint64       // that its data key is wrapped under
	grants []kms.Grant  // in the order of their slots
	claims []kms.Bitmap // by role+1; nil = none yet

	dirty, gone bool
	newGrants   []kms.Grant
	claimed     []int // roles whose bitmaps this commit changes, and so owns
}

// fork is a copy for a commit.
func (s *liveSegment) fork() *liveSegment {
	c := *s
	c.claims = slices.Clone(s.claims)
	return &c
}

// settle ends the commit that the copy was for.
func (s *liveSegment) settle() { s.dirty, s.newGrants, s.claimed = false, nil, nil }

// grantAfter finds the first grant that ends after the slot, and its place.
func (s *liveSegment) grantAfter(slot int) (*kms.Grant, int) {
	i := sort.Search(len(s.grants), func(i int) bool {
		return s.grants[i].First+s.grants[i].Slots > slot
	})
	if i == len(s.grants) {
		return nil, i
	}
	return &s.grants[i], i
}

// bitmap is the role's bitmap for the commit to change.
func (s *liveSegment) bitmap(role int) kms.Bitmap {
	for len(s.claims) <= role+1 {
		s.claims = append(s.claims, nil)
	}
	if !slices.Contains(s.claimed, role) {
		s.claimed = append(s.claimed, role)
		b := kms.NewBitmap(s.Slots)
		copy(b, s.claims[role+1])
		s.claims[role+1] = b
	}
	return s.claims[role+1]
}

// readState reads all of it but the names.
func readState(tx *bolt.Tx) (st state, err error) {
	meta := tx.Bucket(bMeta)
	st = state{fence: kms.Fence(getUint64(meta, kFence)), incarnation: getUint64(meta, kBoot),
		epoch: getUint64(meta, kEpoch), memories: map[etsi014.KMEID]kms.Memory{},
		links: map[kms.LinkID]linkRecord{}, segments: map[kms.SegmentID]*liveSegment{}}
	if st.position, err = parsePosition(meta.Get(kPosition)); err != nil {
		return st, err
	}
	c := meta.Cursor()
	for k, v := c.Seek([]byte(pPeer)); hasPrefix(k, []byte(pPeer)); k, v = c.Next() {
		m, err := parseMemory(etsi014.KMEID(k[len(pPeer):]), v)
		if err != nil {
			return st, err
		}
		st.memories[m.Peer] = m
	}
	err = tx.Bucket(bLinks).ForEach(func(k, v []byte) error {
		l, err := parseLink(v)
		st.links[kms.LinkID(k)] = l
		return err
	})
	if err != nil {
		return st, err
	}
	return st, readSegments(tx, st.segments)
}

func readSegments(tx *bolt.Tx, segments map[kms.SegmentID]*liveSegment) error {
	keys, grants, claims := tx.Bucket(bKeys), tx.Bucket(bGrants).Cursor(), tx.Bucket(bClaims).Cursor()
	return tx.Bucket(bSegments).ForEach(func(k, v []byte) error {
		seg, err := parseSegment(v)
		if err != nil {
			return err
		}
		s := &liveSegment{Segment: seg, key: segmentKey(seg.ID)}
		if string(s.key) != string(k) {
			return fmt.Errorf("segment %s: %w: it stands under another name", seg.ID, kms.ErrCorrupt)
		}
		segments[seg.ID] = s
		if s.hasBytes() {
			w, err := parseWrapped(keys.Get(k))
			if err != nil {
				return fmt.Errorf("segment %s: %w", seg.ID, err)
			}
			s.epoch = w.Epoch
		}
		if seg.State != kms.StateOpen {
			return nil
		}
		return errors.Join(s.readGrants(grants), s.readClaims(claims))
	})
}

// hasBytes tells whether slots and a data key stand in the store.
func (s *liveSegment) hasBytes() bool {
	return s.State == kms.StateNew || s.State == kms.StateConfirmed || s.State == kms.StateOpen
}

func (s *liveSegment) readGrants(c *bolt.Cursor) error {
	end := 0
	for k, v := c.Seek(s.key); hasPrefix(k, s.key); k, v = c.Next() {
		g, err := parseGrant(v)
		if err != nil {
			return fmt.Errorf("segment %s: %w", s.ID, err)
		}
		if len(k) != len(s.key)+4 || g.First < end || g.Slots <= 0 || g.First+g.Slots > s.Slots ||
			binary.BigEndian.Uint32(k[len(s.key):]) != uint32(g.First+g.Slots) {
			return fmt.Errorf("segment %s: %w: grants do not fit", s.ID, kms.ErrCorrupt)
		}
		end = g.First + g.Slots
		s.grants = append(s.grants, g)
	}
	return nil
}

func (s *liveSegment) readClaims(c *bolt.Cursor) error {
	for k, v := c.Seek(s.key); hasPrefix(k, s.key); k, v = c.Next() {
		if len(k) != len(s.key)+1 || len(v) != len(kms.NewBitmap(s.Slots)) {
			return fmt.Errorf("segment %s: %w: claims do not fit", s.ID, kms.ErrCorrupt)
		}
		copy(s.bitmap(int(k[len(s.key)])-1), v)
	}
	s.settle()
	return nil
}

// readNames finds the commitment of every name.
func readNames(tx *bolt.Tx) (map[etsi014.SAEID]audit.Commitment, error) {
	names := map[etsi014.SAEID]audit.Commitment{}
	err := tx.Bucket(bNames).ForEach(func(k, v []byte) error {
		c, err := parseName(v)
		names[etsi014.SAEID(k)] = c
		return err
	})
	return names, err
}

func parseName(v []byte) (audit.Commitment, error) {
	if len(v) != len(audit.Salt{})+len(audit.Commitment{}) {
		return audit.Commitment{}, fmt.Errorf("salt of a name: %w", kms.ErrCorrupt)
	}
	return audit.Commitment(v[len(audit.Salt{}):]), nil
}
