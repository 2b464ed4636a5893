package boltstore

import (
	"context"
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

// Commit implements kms.Store: one audit entry, one write to the journal and
// one flush, whatever the number of changes. Where slots or data keys change,
// or the journal is full, it is one transaction of the database with its two
// flushes. Callers gather changes to share them.
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
	if s.fence != fence {
		return pos, fmt.Errorf("%w: fence is %d, writer has %d", kms.ErrFenced, s.fence, fence)
	}
	t := newTransaction(s)
	for i := range changes {
		if err := t.apply(&changes[i]); err != nil {
			return pos, fmt.Errorf("change %d of %d (op %d, segment %s): %w",
				i+1, len(changes), changes[i].Op, changes[i].Segment, err)
		}
	}
	if pos, err = t.end(changes); err != nil {
		return pos, err
	}
	if err := s.write(t, pos); err != nil {
		return pos, fmt.Errorf("write: %w: %w", kms.ErrStopped, err)
	}
	t.install(pos)
	return pos, nil
}

// write makes a transaction durable.
func (s *Store) write(t *transaction, pos kms.Position) error {
	switch n := len(t.batch) - journalHead; {
	case n == 0:
		return nil
	case t.heavy || !s.journal.fits(n):
		s.journal.keep(t.batch)
		return s.writeBack(t.batch[journalHead:], pos)
	}
	if err := s.journal.write(t.batch); err != nil {
		return err
	}
	return s.waiting.add(t.batch[journalHead:])
}

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
}

func newTransaction(s *Store) *transaction {
	return &transaction{
		Store: s, incarnation: s.incarnation, epoch: s.epoch, batch: s.journal.begin(),
		seen:     make(map[kms.SegmentID]*liveSegment, 4),
		linkRecs: make(map[kms.LinkID]*linkRecord, 2),
	}
}

func (t *transaction) apply(c *kms.Change) error {
	switch c.Op {
	case kms.OpBoot:
		if c.Incarnation <= t.incarnation {
			return fmt.Errorf("%w: incarnation goes back to %d", kms.ErrChange, c.Incarnation)
		}
		t.incarnation = c.Incarnation
		return nil
	case kms.OpRemember:
		if t.remembered == nil {
			t.remembered = map[etsi014.KMEID]kms.Memory{}
		}
		t.remembered[c.Memory.Peer] = c.Memory
		return nil
	case kms.OpLink:
		l, err := t.link(c.Segment.Link)
		if err == nil {
			l.idKey = kms.Wrapped{Epoch: c.IDKey.Epoch, Bytes: slices.Clone(c.IDKey.Bytes)}
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
		t.destroy(seg)
		return nil
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
	if t.epoch != 0 && c.Sealed.Key.Epoch != t.epoch {
		return fmt.Errorf("%w: data key of epoch %d, this is %d", kms.ErrChange,
			c.Sealed.Key.Epoch, t.epoch)
	}
	l.generation, l.floor = id.Generation, id.Number+1
	s := &liveSegment{Segment: m, key: segmentKey(id), epoch: c.Sealed.Key.Epoch, dirty: true}
	t.add(s)
	t.putKey(s, c.Sealed.Key)
	t.batch = appendPut(t.batch, inSlots, s.key, c.Sealed.Slots)
	return nil
}

// putKey writes a segment's data key.
func (t *transaction) putKey(s *liveSegment, w kms.Wrapped) {
	s.epoch, t.heavy = w.Epoch, true
	t.batch = appendPut(t.batch, inKeys, s.key, appendWrapped(nil, w))
}

// reseal replaces a segment's data key, and for OpReseal its slots too.
func (t *transaction) reseal(seg *liveSegment, c *kms.Change) error {
	if !seg.hasBytes() {
		return fmt.Errorf("%w: reseal of a %s segment", kms.ErrState, seg.State)
	}
	if c.Op == kms.OpRewrap {
		t.putKey(seg, c.Key)
		return nil
	}
	old := 0
	err := t.db.View(func(tx *bolt.Tx) error {
		old = len(tx.Bucket(bSlots).Get(seg.key))
		return nil
	})
	if err != nil {
		return err
	}
	if old == 0 { // ingested by this commit
		old = len(c.Sealed.Slots)
	}
	if len(c.Sealed.Slots) != old {
		return fmt.Errorf("%w: %d sealed bytes for %d", kms.ErrChange, len(c.Sealed.Slots), old)
	}
	t.putKey(seg, c.Sealed.Key)
	t.batch = appendPut(t.batch, inSlots, seg.key, c.Sealed.Slots)
	return nil
}

// turn moves the epoch on. It is refused if any key would be left behind: the
// key of the epoch before is destroyed next.
func (t *transaction) turn(epoch uint64) error {
	if epoch <= t.epoch {
		return fmt.Errorf("%w: epoch goes back to %d", kms.ErrChange, epoch)
	}
	for id, s := range t.segments {
		if t.seen[id] == nil && s.hasBytes() && s.epoch != epoch {
			return fmt.Errorf("%w: the data key of segment %s is left in epoch %d", kms.ErrChange, id,
				s.epoch)
		}
	}
	for _, s := range t.order {
		if !s.gone && s.hasBytes() && s.epoch != epoch {
			return fmt.Errorf("%w: the data key of segment %s is left in epoch %d", kms.ErrChange, s.ID,
				s.epoch)
		}
	}
	for id := range t.links {
		if _, err := t.link(id); err != nil {
			return err
		}
	}
	for id, l := range t.linkRecs {
		if l.idKey.Epoch != 0 && l.idKey.Epoch != epoch {
			return fmt.Errorf("%w: the ID key of link %s is left in epoch %d", kms.ErrChange, id,
				l.idKey.Epoch)
		}
	}
	t.epoch, t.heavy = epoch, true
	return nil
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
	have, at := seg.grantAfter(g.First)
	if have != nil && have.First < g.First+g.Slots {
		return fmt.Errorf("%w: slots %d+%d overlap %d+%d", kms.ErrGrant,
			g.First, g.Slots, have.First, have.Slots)
	}
	g.Targets = slices.Clone(g.Targets)
	if have == nil { // behind what the state's own slice shows
		seg.grants = append(seg.grants, g)
	} else {
		seg.grants = slices.Insert(slices.Clone(seg.grants), at, g)
	}
	seg.newGrants = append(seg.newGrants, g)
	return nil
}

func (t *transaction) claim(seg *liveSegment, c *kms.Change) error {
	if err := seg.openUnder(c.Session); err != nil {
		return err
	}
	if c.Slots <= 0 || c.First < 0 || c.Slots > seg.Slots-c.First {
		return fmt.Errorf("%w: slots %d+%d of %d", kms.ErrGrant, c.First, c.Slots, seg.Slots)
	}
	g, _ := seg.grantAfter(c.First)
	if g == nil {
		return fmt.Errorf("%w: slots %d+%d", kms.ErrGrant, c.First, c.Slots)
	}
	per := max(1, kms.KeySlots(g.SizeBits, seg.SlotBytes))
	if c.First < g.First || c.First+c.Slots > g.First+g.Slots || (c.First-g.First)%per != 0 ||
		c.Slots%per != 0 {
		return fmt.Errorf("%w: slots %d+%d", kms.ErrGrant, c.First, c.Slots)
	}
	switch {
	case c.Role == kms.RoleInitiator:
		if seg.Owner != t.self || c.SAE != g.Initiator || c.Op != kms.OpClaim {
			return fmt.Errorf("%w: draw by another than the owner's initiator", kms.ErrGrant)
		}
	case c.Role < 0 || c.Role >= len(g.Targets) || g.Targets[c.Role] != c.SAE:
		return fmt.Errorf("%w: fetch by another than the target", kms.ErrGrant)
	}
	bits := seg.bitmap(c.Role)
	for i := c.First; i < c.First+c.Slots; i++ {
		if bits.Get(i) {
			return fmt.Errorf("%w: slot %d, role %d", kms.ErrClaimed, i, c.Role)
		}
		bits.Set(i)
	}
	return nil
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
