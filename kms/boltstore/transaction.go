package boltstore

import (
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"maps"
	"slices"

	bolt "go.etcd.io/bbolt"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/kms"
	"github.com/quietline/quietline/kms/audit"
)

// transaction applies the changes of one commit to copies of what they touch.
type transaction struct {
	*Store
	incarnation, epoch uint64
	seen               map[kms.SegmentID]*liveSegment
	order              []*liveSegment // those of seen
	linkRecs           map[kms.LinkID]*linkRecord
	remembered         map[etsi014.KMEID]kms.Memory
	newNames           map[etsi014.SAEID]audit.Commitment

	batch []byte // the journal's record
	heavy bool   // slots or data keys change
	block bool   // there is an ingest
}

func newTransaction(s *Store) *transaction {
	return &transaction{
		Store: s, incarnation: s.incarnation, epoch: s.epoch, batch: s.journal.begin(),
		seen:     make(map[kms.SegmentID]*liveSegment, 4),
		linkRecs: make(map[kms.LinkID]*linkRecord, 2),
	}
}

func (t *transaction) link(id kms.LinkID) (*linkRecord, error) {
	if l := t.linkRecs[id]; l != nil {
		return l, nil
	}
	if id == "" || len(id) > 64 {
		return nil, fmt.Errorf("%w: link name of %d bytes", kms.ErrChange, len(id))
	}
	l := t.links[id]
	t.linkRecs[id] = &l
	return &l, nil
}

func (t *transaction) segment(id kms.SegmentID) (*liveSegment, error) {
	s := t.seen[id]
	if s == nil {
		have := t.segments[id]
		if have == nil {
			return nil, kms.ErrNoSegment
		}
		s = have.fork()
		t.add(s)
	}
	if s.gone {
		return nil, kms.ErrNoSegment
	}
	return s, nil
}

func (t *transaction) add(s *liveSegment) {
	t.seen[s.ID] = s
	t.order = append(t.order, s)
}

// destroy drops key, slots, grants and claims. The pages keep their bytes;
// what makes them unreadable is the end of the epoch key.
func (t *transaction) destroy(s *liveSegment) {
	b := appendDelete(t.batch, inKeys, s.key)
	b = appendDelete(b, inSlots, s.key)
	for i := range s.grants {
		b = appendDelete(b, inGrants, grantKey(s.key, s.grants[i].First+s.grants[i].Slots))
	}
	for i := range s.claims {
		b = appendDelete(b, inClaims, claimKey(s.key, i-1))
	}
	s.grants, s.newGrants, s.claims, s.claimed = nil, nil, nil, nil
	t.batch = b
}

// destroyBad drops what stands under a segment's name, readable or not.
func (t *transaction) destroyBad(s *liveSegment) error {
	t.destroy(s)
	return t.db.View(func(tx *bolt.Tx) error {
		for _, bucket := range []byte{inGrants, inClaims} {
			c := tx.Bucket(buckets[bucket]).Cursor()
			for k, _ := c.Seek(s.key); hasPrefix(k, s.key); k, _ = c.Next() {
				t.batch = appendDelete(t.batch, bucket, k)
			}
		}
		return nil
	})
}

// end appends to the batch what the changes left, and the audit entry.
func (t *transaction) end(changes []kms.Change) (kms.Position, error) {
	for _, s := range t.order {
		for i := range s.newGrants {
			g := &s.newGrants[i]
			t.batch = appendPut(t.batch, inGrants, grantKey(s.key, g.First+g.Slots), appendGrant(nil, g))
		}
		for _, role := range s.claimed {
			t.batch = appendPut(t.batch, inClaims, claimKey(s.key, role), s.claims[role+1])
		}
		switch {
		case s.gone:
			t.batch = appendDelete(t.batch, inSegments, s.key)
		case s.dirty:
			t.batch = appendPut(t.batch, inSegments, s.key, appendSegment(nil, &s.Segment))
		}
	}
	for id, l := range t.linkRecs {
		t.batch = appendPut(t.batch, inLinks, []byte(id), l.append(nil))
	}
	for peer, m := range t.remembered {
		t.batch = appendPut(t.batch, inMeta, []byte(pPeer+string(peer)), appendMemory(nil, m))
	}
	number := func(key []byte, v, before uint64) {
		if v != before {
			t.batch = appendPut(t.batch, inMeta, key, binary.BigEndian.AppendUint64(nil, v))
		}
	}
	number(kBoot, t.incarnation, t.Store.incarnation)
	number(kEpoch, t.epoch, t.Store.epoch)
	return t.record(changes)
}

func (t *transaction) record(changes []kms.Change) (kms.Position, error) {
	if !slices.ContainsFunc(changes, func(c kms.Change) bool { return audit.Logged(c.Op) }) {
		return t.position, nil
	}
	entry, next, err := audit.Append(t.position, t.now(), changes, t.name)
	if err != nil {
		return t.position, err
	}
	t.batch = appendPut(t.batch, inLog, logKey(next.Length), entry)
	return next, nil
}

// name is the commitment of an SAE's name; a new name gets its salt here, in
// the same commit as its first mention.
func (t *transaction) name(sae etsi014.SAEID) (audit.Commitment, error) {
	if c, ok := t.names[sae]; ok {
		return c, nil
	}
	if c, ok := t.newNames[sae]; ok {
		return c, nil
	}
	var salt audit.Salt
	if _, err := rand.Read(salt[:]); err != nil {
		return audit.Commitment{}, err
	}
	c := audit.Commit(salt, sae)
	t.batch = appendPut(t.batch, inNames, []byte(sae), append(salt[:], c[:]...))
	if t.newNames == nil {
		t.newNames = map[etsi014.SAEID]audit.Commitment{}
	}
	t.newNames[sae] = c
	return c, nil
}

// install makes the copies the state: they are durable.
func (t *transaction) install(pos kms.Position) {
	s := t.Store
	s.incarnation, s.epoch, s.position = t.incarnation, t.epoch, pos
	for _, seg := range t.order {
		if seg.gone {
			delete(s.segments, seg.ID)
			continue
		}
		seg.settle()
		s.segments[seg.ID] = seg
	}
	for id, l := range t.linkRecs {
		s.links[id] = *l
	}
	maps.Copy(s.memories, t.remembered)
	maps.Copy(s.names, t.newNames)
}
