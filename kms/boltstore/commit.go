package boltstore

import (
	"context"
	"errors"
	"fmt"
	"slices"

	bolt "go.etcd.io/bbolt"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/kms"
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
	if err := s.write(t, pos); errors.Is(err, kms.ErrSpace) {
		return pos, err
	} else if err != nil {
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
		// Half of what is kept is left to blocks that did not ask, see Room.
		if err := s.room(n, spare/2); err != nil && t.block {
			return err
		}
		return s.writeBack(t.batch[journalHead:], pos)
	}
	if err := s.journal.write(t.batch); err != nil {
		return err
	}
	return s.waiting.add(t.batch[journalHead:])
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
	if seg.bad != nil {
		if c.Op != kms.OpVoid {
			return fmt.Errorf("%w: segment cannot be read: %v", kms.ErrState, seg.bad)
		}
		seg.gone = true
		return t.destroyBad(seg)
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
	t.block = true
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
	left := func(s *liveSegment) error {
		if s.gone || s.bad == nil && (!s.hasBytes() || s.epoch == epoch) {
			return nil
		}
		return fmt.Errorf("%w: the data key of segment %s is left in epoch %d", kms.ErrChange, s.ID,
			s.epoch)
	}
	for id, s := range t.segments {
		if t.seen[id] == nil {
			if err := left(s); err != nil {
				return err
			}
		}
	}
	for _, s := range t.order {
		if err := left(s); err != nil {
			return err
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
