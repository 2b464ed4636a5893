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

	bad error // its records cannot be read: nothing but OpVoid is allowed

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
	st = state{memories: map[etsi014.KMEID]kms.Memory{}, links: map[kms.LinkID]linkRecord{},
		segments: map[kms.SegmentID]*liveSegment{}}
	fence, err := number(tx, kFence)
	if err != nil {
		return st, err
	}
	st.fence = kms.Fence(fence)
	if st.incarnation, err = number(tx, kBoot); err != nil {
		return st, err
	}
	if st.epoch, err = number(tx, kEpoch); err != nil {
		return st, err
	}
	position, err := get(tx, inMeta, kPosition)
	if err == nil {
		st.position, err = parsePosition(position)
	}
	if err != nil {
		return st, err
	}
	c := tx.Bucket(bMeta).Cursor()
	for k, v := c.Seek([]byte(pPeer)); hasPrefix(k, []byte(pPeer)); k, v = c.Next() {
		v, err := sound(inMeta, k, v)
		if err != nil {
			return st, err
		}
		m, err := parseMemory(etsi014.KMEID(k[len(pPeer):]), v)
		if err != nil {
			return st, err
		}
		st.memories[m.Peer] = m
	}
	err = each(tx, inLinks, func(k, v []byte) error {
		l, err := parseLink(v)
		st.links[kms.LinkID(k)] = l
		return err
	})
	if err != nil {
		return st, err
	}
	return st, tx.Bucket(bSegments).ForEach(func(k, v []byte) error {
		id, err := parseSegmentKey(k)
		if err != nil {
			return err
		}
		s := &liveSegment{Segment: kms.Segment{ID: id}, key: slices.Clone(k)}
		st.segments[id] = s
		if err := s.read(tx, v); err != nil {
			s.unread(tx, err)
		}
		return nil
	})
}

// read fills a segment in from its records.
func (s *liveSegment) read(tx *bolt.Tx, v []byte) error {
	v, err := sound(inSegments, s.key, v)
	if err != nil {
		return err
	}
	seg, err := parseSegment(v)
	if err != nil || seg.ID != s.ID {
		return errors.Join(err, fmt.Errorf("segment under another name: %w", kms.ErrCorrupt))
	}
	s.Segment = seg
	if s.hasBytes() {
		v, err := get(tx, inKeys, s.key)
		if err != nil {
			return err
		}
		w, err := parseWrapped(v)
		if err != nil {
			return err
		}
		s.epoch = w.Epoch
	}
	if seg.State != kms.StateOpen {
		return nil
	}
	if err := s.readGrants(tx); err != nil {
		return err
	}
	return s.readClaims(tx)
}

// unread leaves of a segment what can be said without its records: it waits to
// be given up.
func (s *liveSegment) unread(tx *bolt.Tx, why error) {
	*s = liveSegment{Segment: kms.Segment{ID: s.ID}, key: s.key, bad: why}
	s.BlockBytes = len(tx.Bucket(bSlots).Get(s.key))
}

// hasBytes tells whether slots and a data key stand in the store.
func (s *liveSegment) hasBytes() bool {
	return s.State == kms.StateNew || s.State == kms.StateConfirmed || s.State == kms.StateOpen
}

func (s *liveSegment) readGrants(tx *bolt.Tx) error {
	end := 0
	return under(tx, inGrants, s.key, func(k, v []byte) error {
		g, err := parseGrant(v)
		if err != nil {
			return err
		}
		if len(k) != 4 || g.First < end || g.Slots <= 0 || g.First+g.Slots > s.Slots ||
			binary.BigEndian.Uint32(k) != uint32(g.First+g.Slots) {
			return fmt.Errorf("grants do not fit: %w", kms.ErrCorrupt)
		}
		end = g.First + g.Slots
		s.grants = append(s.grants, g)
		return nil
	})
}

func (s *liveSegment) readClaims(tx *bolt.Tx) error {
	defer s.settle()
	return under(tx, inClaims, s.key, func(k, v []byte) error {
		if len(k) != 1 || len(v) != len(kms.NewBitmap(s.Slots)) {
			return fmt.Errorf("claims do not fit: %w", kms.ErrCorrupt)
		}
		copy(s.bitmap(int(k[0])-1), v)
		return nil
	})
}

// under calls f for the records whose keys begin so, with the rest of the key.
func under(tx *bolt.Tx, bucket byte, prefix []byte, f func(rest, value []byte) error) error {
	c := tx.Bucket(buckets[bucket]).Cursor()
	for k, v := c.Seek(prefix); hasPrefix(k, prefix); k, v = c.Next() {
		v, err := sound(bucket, k, v)
		if err == nil {
			err = f(k[len(prefix):], v)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// readNames finds the commitment of every name.
func readNames(tx *bolt.Tx) (map[etsi014.SAEID]audit.Commitment, error) {
	names := map[etsi014.SAEID]audit.Commitment{}
	err := each(tx, inNames, func(k, v []byte) error {
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
