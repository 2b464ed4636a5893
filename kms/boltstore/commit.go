package boltstore

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"

	bolt "go.etcd.io/bbolt"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/kms"
	"github.com/quietline/quietline/kms/audit"
)

// Commit implements kms.Store: one transaction, one audit entry, two fsyncs,
// whatever the number of changes. Callers gather changes to share them.
func (s *Store) Commit(ctx context.Context, fence kms.Fence, changes []kms.Change) (
	pos kms.Position, err error) {
	if err := ctx.Err(); err != nil {
		return pos, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopped.Load() {
		return pos, kms.ErrStopped
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("commit: %w", err)
			if !kms.Refused(err) {
				s.stopped.Store(true)
			}
		}
	}()
	defer guard(&err)()
	btx, err := s.db.Begin(true)
	if err != nil {
		return pos, err
	}
	defer btx.Rollback()
	t := newTransaction(btx, s)
	if have := kms.Fence(getUint64(t.meta, kFence)); have != fence {
		return pos, fmt.Errorf("%w: fence is %d, writer has %d", kms.ErrFenced, have, fence)
	}
	for i := range changes {
		if err := t.apply(&changes[i]); err != nil {
			return pos, fmt.Errorf("change %d of %d (op %d, segment %s): %w",
				i+1, len(changes), changes[i].Op, changes[i].Segment, err)
		}
	}
	if pos, err = t.end(changes); err != nil {
		return pos, err
	}
	if err := s.finish(btx); err != nil {
		return pos, err
	}
	for name, c := range t.newNames {
		s.names[name] = c
	}
	return pos, nil
}

// transaction applies the changes of one commit. Records that several changes
// touch are read once and written once, at the end.
type transaction struct {
	store                                                          *Store
	meta, links, segments, keys, slots, grants, claims, log, names *bolt.Bucket

	seen     map[kms.SegmentID]*liveSegment
	linkRecs map[kms.LinkID]*linkRecord
	newNames map[etsi014.SAEID]audit.Commitment
}

type liveSegment struct {
	kms.Segment
	key    []byte
	dirty  bool
	gone   bool
	claims map[int]kms.Bitmap // by role, as they will be written
	grant  kms.Grant          // the last one looked up; Slots 0 = none
}

func newTransaction(tx *bolt.Tx, s *Store) *transaction {
	t := &transaction{
		store: s,
		meta:  tx.Bucket(bMeta), links: tx.Bucket(bLinks), segments: tx.Bucket(bSegments),
		keys: tx.Bucket(bKeys), slots: tx.Bucket(bSlots), grants: tx.Bucket(bGrants),
		claims: tx.Bucket(bClaims), log: tx.Bucket(bLog), names: tx.Bucket(bNames),
		seen:     map[kms.SegmentID]*liveSegment{},
		linkRecs: map[kms.LinkID]*linkRecord{},
		newNames: map[etsi014.SAEID]audit.Commitment{},
	}
	t.log.FillPercent = 1      // entries come in order and are never changed
	t.segments.FillPercent = 1 // as do segments
	return t
}

func (t *transaction) apply(c *kms.Change) error {
	switch c.Op {
	case kms.OpBoot:
		if c.Incarnation <= getUint64(t.meta, kBoot) {
			return fmt.Errorf("%w: incarnation goes back to %d", kms.ErrChange, c.Incarnation)
		}
		return putUint64(t.meta, kBoot, c.Incarnation)
	case kms.OpRemember:
		return t.meta.Put([]byte(pPeer+string(c.Memory.Peer)), appendMemory(nil, c.Memory))
	case kms.OpLink:
		l, err := t.link(c.Segment.Link)
		if err == nil {
			l.idKey = c.IDKey
		}
		return err
	case kms.OpTally:
		if !c.Ledger.Balanced() {
			return fmt.Errorf("%w: ledger does not balance: %+v", kms.ErrChange, c.Ledger)
		}
		l, err := t.link(c.Segment.Link)
		if err == nil {
			l.ledger = c.Ledger
		}
		return err
	case kms.OpIngest:
		return t.ingest(c)
	case kms.OpTurn:
		return t.turn(c.Epoch)
	case kms.OpNote:
		return nil
	}
	return t.change(c)
}

// change applies what concerns a live segment.
func (t *transaction) change(c *kms.Change) error {
	seg, err := t.segment(c.Segment)
	if err != nil {
		return err
	}
	switch c.Op {
	case kms.OpConfirm:
		return seg.move(kms.StateConfirmed)
	case kms.OpGive:
		if seg.State != kms.StateConfirmed || seg.Given {
			return fmt.Errorf("%w: give of a %s segment, given before: %v", kms.ErrState, seg.State,
				seg.Given)
		}
		seg.Owner, seg.Given, seg.dirty = c.Owner, true, true
		return nil
	case kms.OpOpen:
		seg.Session = c.Session
		return seg.move(kms.StateOpen)
	case kms.OpGrant:
		return t.grant(seg, c)
	case kms.OpClaim, kms.OpExpire:
		return t.claim(seg, c)
	case kms.OpClose, kms.OpVoid:
		to := kms.StateClosed
		if c.Op == kms.OpVoid {
			to, seg.gone = kms.StateVoid, true
		}
		if err := seg.move(to); err != nil {
			return err
		}
		return t.destroy(seg)
	case kms.OpReseal, kms.OpRewrap:
		return t.reseal(seg, c)
	case kms.OpFinish:
		seg.gone = true
		return seg.move(kms.StateFinished)
	}
	return fmt.Errorf("%w: op %d", kms.ErrChange, c.Op)
}

func (s *liveSegment) move(to kms.State) error {
	if !s.State.May(to) {
		return fmt.Errorf("%w: from %s to %s", kms.ErrState, s.State, to)
	}
	s.State, s.dirty = to, true
	return nil
}

func (t *transaction) link(id kms.LinkID) (*linkRecord, error) {
	if l := t.linkRecs[id]; l != nil {
		return l, nil
	}
	if id == "" || len(id) > 64 {
		return nil, fmt.Errorf("%w: link name of %d bytes", kms.ErrChange, len(id))
	}
	l, err := parseLink(t.links.Get([]byte(id)))
	if err != nil {
		return nil, err
	}
	t.linkRecs[id] = &l
	return &l, nil
}

func (t *transaction) segment(id kms.SegmentID) (*liveSegment, error) {
	if s := t.seen[id]; s != nil {
		if s.gone {
			return nil, kms.ErrNoSegment
		}
		return s, nil
	}
	key := segmentKey(id)
	v := t.segments.Get(key)
	if v == nil {
		return nil, kms.ErrNoSegment
	}
	seg, err := parseSegment(v)
	if err != nil {
		return nil, err
	}
	s := &liveSegment{Segment: seg, key: key, claims: map[int]kms.Bitmap{}}
	t.seen[id] = s
	return s, nil
}

func (t *transaction) ingest(c *kms.Change) error {
	l, err := t.link(c.Segment.Link)
	if err != nil {
		return err
	}
	id, m := c.Segment, c.Meta
	if id.Generation < l.generation || id.Generation == l.generation && id.Number < l.floor {
		return kms.ErrSeen
	}
	if m.ID != id || m.State != kms.StateNew || m.Slots <= 0 || m.SlotBytes <= 0 ||
		len(c.Sealed.Slots)%m.Slots != 0 || len(c.Sealed.Slots)/m.Slots < m.SlotBytes ||
		id.Number+1 == 0 {
		return fmt.Errorf("%w: segment and slots do not fit", kms.ErrChange)
	}
	if e := getUint64(t.meta, kEpoch); e != 0 && c.Sealed.Key.Epoch != e {
		return fmt.Errorf("%w: data key of epoch %d, this is %d", kms.ErrChange,
			c.Sealed.Key.Epoch, e)
	}
	l.generation, l.floor = id.Generation, id.Number+1
	s := &liveSegment{Segment: m, key: segmentKey(id), dirty: true, claims: map[int]kms.Bitmap{}}
	t.seen[id] = s
	if err := t.keys.Put(s.key, appendWrapped(nil, c.Sealed.Key)); err != nil {
		return err
	}
	return t.slots.Put(s.key, c.Sealed.Slots)
}

// reseal replaces a segment's data key, and for OpReseal its slots too.
func (t *transaction) reseal(seg *liveSegment, c *kms.Change) error {
	old := t.slots.Get(seg.key)
	if old == nil {
		return fmt.Errorf("%w: reseal of a %s segment", kms.ErrState, seg.State)
	}
	if c.Op == kms.OpRewrap {
		return t.keys.Put(seg.key, appendWrapped(nil, c.Key))
	}
	if len(c.Sealed.Slots) != len(old) {
		return fmt.Errorf("%w: %d sealed bytes for %d", kms.ErrChange, len(c.Sealed.Slots), len(old))
	}
	if err := t.keys.Put(seg.key, appendWrapped(nil, c.Sealed.Key)); err != nil {
		return err
	}
	return t.slots.Put(seg.key, c.Sealed.Slots)
}

// turn moves the epoch on. It is refused if any key would be left behind: the
// key of the epoch before is destroyed next.
func (t *transaction) turn(epoch uint64) error {
	if epoch <= getUint64(t.meta, kEpoch) {
		return fmt.Errorf("%w: epoch goes back to %d", kms.ErrChange, epoch)
	}
	err := t.keys.ForEach(func(_, v []byte) error {
		if w, err := parseWrapped(v); err != nil || w.Epoch != epoch {
			return errors.Join(err, fmt.Errorf("%w: a data key is left in epoch %d", kms.ErrChange,
				w.Epoch))
		}
		return nil
	})
	if err != nil {
		return err
	}
	err = t.links.ForEach(func(k, _ []byte) error {
		l, err := t.link(kms.LinkID(k))
		if err == nil && l.idKey.Epoch != 0 && l.idKey.Epoch != epoch {
			err = fmt.Errorf("%w: an ID key is left in epoch %d", kms.ErrChange, l.idKey.Epoch)
		}
		return err
	})
	if err != nil {
		return err
	}
	return putUint64(t.meta, kEpoch, epoch)
}

func (s *liveSegment) openUnder(session kms.Session) error {
	if s.State != kms.StateOpen {
		return fmt.Errorf("%w: segment is %s", kms.ErrState, s.State)
	}
	if s.Session != session {
		return kms.ErrSession
	}
	return nil
}

func (t *transaction) grant(seg *liveSegment, c *kms.Change) error {
	if err := seg.openUnder(c.Session); err != nil {
		return err
	}
	g := c.Grant
	per := 0
	if g.SizeBits > 0 {
		per = kms.KeySlots(g.SizeBits, seg.SlotBytes)
	}
	if per == 0 || g.First < 0 || g.Slots <= 0 || g.Slots%per != 0 ||
		g.Slots > seg.Slots-g.First || len(g.Targets) == 0 || len(g.Targets) > 254 {
		return fmt.Errorf("%w: slots %d+%d of %d, %d bits", kms.ErrGrant,
			g.First, g.Slots, seg.Slots, g.SizeBits)
	}
	if have, err := t.grantAfter(seg, g.First); err != nil {
		return err
	} else if have.Slots > 0 && have.First < g.First+g.Slots {
		return fmt.Errorf("%w: slots %d+%d overlap %d+%d", kms.ErrGrant,
			g.First, g.Slots, have.First, have.Slots)
	}
	return t.grants.Put(grantKey(seg.key, g.First+g.Slots), appendGrant(nil, &g))
}

// grantAfter finds the segment's first grant that ends after the slot.
func (t *transaction) grantAfter(seg *liveSegment, slot int) (kms.Grant, error) {
	k, v := t.grants.Cursor().Seek(grantKey(seg.key, slot+1))
	if len(k) != len(seg.key)+4 || !bytes.HasPrefix(k, seg.key) {
		return kms.Grant{}, nil
	}
	return parseGrant(v)
}

func (t *transaction) claim(seg *liveSegment, c *kms.Change) error {
	if err := seg.openUnder(c.Session); err != nil {
		return err
	}
	if c.Slots <= 0 || c.First < 0 || c.Slots > seg.Slots-c.First {
		return fmt.Errorf("%w: slots %d+%d of %d", kms.ErrGrant, c.First, c.Slots, seg.Slots)
	}
	if g := &seg.grant; g.Slots == 0 || c.First < g.First || c.First+c.Slots > g.First+g.Slots {
		var err error
		if seg.grant, err = t.grantAfter(seg, c.First); err != nil {
			return err
		}
	}
	g := &seg.grant
	per := max(1, kms.KeySlots(g.SizeBits, seg.SlotBytes))
	if c.First < g.First || c.First+c.Slots > g.First+g.Slots || (c.First-g.First)%per != 0 || c.Slots%per != 0 {
		return fmt.Errorf("%w: slots %d+%d", kms.ErrGrant, c.First, c.Slots)
	}
	switch {
	case c.Role == kms.RoleInitiator:
		if seg.Owner != t.store.self || c.SAE != g.Initiator || c.Op != kms.OpClaim {
			return fmt.Errorf("%w: draw by another than the owner's initiator", kms.ErrGrant)
		}
	case c.Role < 0 || c.Role >= len(g.Targets) || g.Targets[c.Role] != c.SAE:
		return fmt.Errorf("%w: fetch by another than the target", kms.ErrGrant)
	}
	bits := t.bitmap(seg, c.Role)
	for i := c.First; i < c.First+c.Slots; i++ {
		if bits.Get(i) {
			return fmt.Errorf("%w: slot %d, role %d", kms.ErrClaimed, i, c.Role)
		}
		bits.Set(i)
	}
	return nil
}

func (t *transaction) bitmap(seg *liveSegment, role int) kms.Bitmap {
	b, ok := seg.claims[role]
	if !ok {
		b = kms.NewBitmap(seg.Slots)
		copy(b, t.claims.Get(claimKey(seg.key, role)))
		seg.claims[role] = b
	}
	return b
}

// destroy drops key, slots, grants and claims. The pages keep their bytes;
// what makes them unreadable is the end of the epoch key.
func (t *transaction) destroy(seg *liveSegment) error {
	clear(seg.claims)
	if err := t.keys.Delete(seg.key); err != nil {
		return err
	}
	if err := t.slots.Delete(seg.key); err != nil {
		return err
	}
	for _, b := range []*bolt.Bucket{t.grants, t.claims} {
		var keys [][]byte
		c := b.Cursor()
		for k, _ := c.Seek(seg.key); hasPrefix(k, seg.key); k, _ = c.Next() {
			keys = append(keys, slices.Clone(k))
		}
		for _, k := range keys {
			if err := b.Delete(k); err != nil {
				return err
			}
		}
	}
	return nil
}

// end writes what the changes left, and the audit entry.
func (t *transaction) end(changes []kms.Change) (kms.Position, error) {
	for _, s := range t.seen {
		for role, bits := range s.claims {
			if err := t.claims.Put(claimKey(s.key, role), bits); err != nil {
				return kms.Position{}, err
			}
		}
		switch {
		case s.gone:
			if err := t.segments.Delete(s.key); err != nil {
				return kms.Position{}, err
			}
		case s.dirty:
			if err := t.segments.Put(s.key, appendSegment(nil, &s.Segment)); err != nil {
				return kms.Position{}, err
			}
		}
	}
	for id, l := range t.linkRecs {
		if err := t.links.Put([]byte(id), l.append(nil)); err != nil {
			return kms.Position{}, err
		}
	}
	return t.record(changes)
}

func (t *transaction) record(changes []kms.Change) (kms.Position, error) {
	pos, err := parsePosition(t.meta.Get(kPosition))
	if err != nil || !slices.ContainsFunc(changes, func(c kms.Change) bool {
		return audit.Logged(c.Op)
	}) {
		return pos, err
	}
	entry, next, err := audit.Append(pos, t.store.now(), changes, t.name)
	if err != nil {
		return pos, err
	}
	if err := t.log.Put(logKey(next.Length), entry); err != nil {
		return pos, err
	}
	return next, t.meta.Put(kPosition, appendPosition(nil, next))
}

// name is the commitment of an SAE's name; a new name gets its salt here, in
// the same commit as its first mention.
func (t *transaction) name(sae etsi014.SAEID) (audit.Commitment, error) {
	if c, ok := t.store.names[sae]; ok {
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
	if err := t.names.Put([]byte(sae), append(salt[:], c[:]...)); err != nil {
		return c, err
	}
	t.newNames[sae] = c
	return c, nil
}
