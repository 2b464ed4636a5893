package storetest

import (
	"context"
	"fmt"
	"iter"
	"maps"
	"slices"
	"time"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/kms"
	"github.com/quietline/quietline/kms/audit"
)

// Memory is a kms.Store without a disk: the plain statement of what a store
// must do, for simulations and to compare other stores with. It holds the
// rules of a commit in the simplest form and is not for concurrent use.
type Memory struct {
	Self etsi014.KMEID
	At   time.Time // of audit records

	fence       kms.Fence
	incarnation uint64
	epoch       uint64
	position    kms.Position
	memories    map[etsi014.KMEID]kms.Memory
	links       map[kms.LinkID]*memLink
	segments    map[kms.SegmentID]*memSegment
	log         [][]byte // entries, shared between clones: never changed
	hashes      [][32]byte
	names       map[audit.Commitment]etsi014.SAEID
	commits     map[etsi014.SAEID]audit.Commitment
	closed      bool
}

type memLink struct {
	generation, floor uint64
	idKey             kms.Wrapped
	ledger            kms.Ledger
}

type memSegment struct {
	kms.Segment
	sealed kms.Sealed
	grants []kms.Grant
	claims map[int]kms.Bitmap
}

var _ kms.Store = (*Memory)(nil)

// NewMemory is an empty store of that KME.
func NewMemory(self etsi014.KMEID) *Memory {
	return &Memory{Self: self, memories: map[etsi014.KMEID]kms.Memory{},
		links: map[kms.LinkID]*memLink{}, segments: map[kms.SegmentID]*memSegment{},
		names:   map[audit.Commitment]etsi014.SAEID{},
		commits: map[etsi014.SAEID]audit.Commitment{}}
}

// Clone is a copy as a disk image is one: it shares nothing that changes.
func (s *Memory) Clone() *Memory {
	c := *s
	c.memories = make(map[etsi014.KMEID]kms.Memory, len(s.memories))
	for k, v := range s.memories {
		c.memories[k] = v
	}
	c.links = make(map[kms.LinkID]*memLink, len(s.links))
	for k, v := range s.links {
		l := *v
		c.links[k] = &l
	}
	c.segments = make(map[kms.SegmentID]*memSegment, len(s.segments))
	for k, v := range s.segments {
		c.segments[k] = v.clone()
	}
	c.log, c.hashes = slices.Clip(s.log), slices.Clip(s.hashes)
	c.names = make(map[audit.Commitment]etsi014.SAEID, len(s.names))
	c.commits = make(map[etsi014.SAEID]audit.Commitment, len(s.commits))
	for k, v := range s.names {
		c.names[k], c.commits[v] = v, k
	}
	return &c
}

func (s *memSegment) clone() *memSegment {
	c := *s
	c.grants = slices.Clone(s.grants)
	c.claims = make(map[int]kms.Bitmap, len(s.claims))
	for k, v := range s.claims {
		c.claims[k] = slices.Clone(v)
	}
	return &c
}

// Lease implements kms.Store.
func (s *Memory) Lease(ctx context.Context, link kms.LinkID, n int) (kms.Lease, error) {
	var l kms.Lease
	switch {
	case ctx.Err() != nil:
		return l, ctx.Err()
	case s.closed:
		return l, kms.ErrStopped
	case link == "":
		s.fence++
		l = kms.Lease{Fence: s.fence, Incarnation: s.incarnation, Epoch: s.epoch, Position: s.position}
		for _, m := range s.memories {
			l.Memories = append(l.Memories, m)
		}
		l.Links = slices.Sorted(maps.Keys(s.links))
		slices.SortFunc(l.Memories, func(a, b kms.Memory) int {
			if a.Peer < b.Peer {
				return -1
			}
			return 1
		})
		return l, nil
	}
	if rec := s.links[link]; rec != nil {
		l.Generation, l.Floor, l.IDKey, l.Ledger = rec.generation, rec.floor, rec.idKey, rec.ledger
	}
	for id, seg := range s.segments {
		if id.Link == link {
			l.Segments = append(l.Segments, seg.Segment)
		}
	}
	slices.SortFunc(l.Segments, func(a, b kms.Segment) int {
		if a.ID.Less(b.ID) {
			return -1
		}
		return 1
	})
	if n >= 0 && len(l.Segments) > n {
		l.Segments = l.Segments[:n]
	}
	return l, nil
}

// Commit implements kms.Store. What a refused commit touched is put back.
func (s *Memory) Commit(ctx context.Context, fence kms.Fence, changes []kms.Change) (
	kms.Position, error) {
	switch {
	case ctx.Err() != nil:
		return kms.Position{}, ctx.Err()
	case s.closed:
		return kms.Position{}, kms.ErrStopped
	case fence != s.fence:
		return kms.Position{}, fmt.Errorf("commit: %w: fence is %d, writer has %d",
			kms.ErrFenced, s.fence, fence)
	}
	u := undo{store: s, incarnation: s.incarnation, epoch: s.epoch}
	for i := range changes {
		if err := s.apply(&changes[i], &u); err != nil {
			u.back()
			return kms.Position{}, fmt.Errorf("commit: change %d of %d (op %d, segment %s): %w",
				i+1, len(changes), changes[i].Op, changes[i].Segment, err)
		}
	}
	logged := slices.ContainsFunc(changes, func(c kms.Change) bool { return audit.Logged(c.Op) })
	if !logged {
		return s.position, nil
	}
	entry, next, err := audit.Append(s.position, s.At, changes, s.commitment)
	if err != nil {
		u.back()
		return kms.Position{}, err
	}
	s.log, s.hashes, s.position = append(s.log, entry), append(s.hashes, next.Hash), next
	return next, nil
}

func (s *Memory) commitment(name etsi014.SAEID) (audit.Commitment, error) {
	c, ok := s.commits[name]
	if !ok {
		c = audit.Commit(audit.Salt{1}, name)
		s.commits[name], s.names[c] = c, name
	}
	return c, nil
}

func (s *Memory) apply(c *kms.Change, u *undo) error {
	switch c.Op {
	case kms.OpBoot:
		if c.Incarnation <= s.incarnation {
			return kms.ErrChange
		}
		s.incarnation = c.Incarnation
		return nil
	case kms.OpRemember:
		u.memory(c.Memory.Peer)
		s.memories[c.Memory.Peer] = c.Memory
		return nil
	case kms.OpNote:
		return nil
	case kms.OpTurn:
		return s.turn(c.Epoch)
	case kms.OpLink, kms.OpTally, kms.OpIngest:
		if id := c.Segment.Link; id == "" || len(id) > 64 {
			return kms.ErrChange
		}
		return s.applyLink(c, u)
	}
	seg := s.segments[c.Segment]
	if seg == nil {
		return kms.ErrNoSegment
	}
	u.segment(c.Segment)
	return s.applySegment(seg, c)
}

func (s *Memory) applyLink(c *kms.Change, u *undo) error {
	l := u.link(c.Segment.Link)
	switch c.Op {
	case kms.OpLink:
		l.idKey = kms.Wrapped{Epoch: c.IDKey.Epoch, Bytes: slices.Clone(c.IDKey.Bytes)}
	case kms.OpTally:
		if !c.Ledger.Balanced() {
			return kms.ErrChange
		}
		l.ledger = c.Ledger
	case kms.OpIngest:
		id, m := c.Segment, c.Meta
		if id.Generation < l.generation || id.Generation == l.generation && id.Number < l.floor {
			return kms.ErrSeen
		}
		if m.ID != id || m.State != kms.StateNew || m.Slots <= 0 || m.SlotBytes <= 0 ||
			len(c.Sealed.Slots)%m.Slots != 0 || len(c.Sealed.Slots)/m.Slots < m.SlotBytes ||
			id.Number+1 == 0 {
			return kms.ErrChange
		}
		if s.epoch != 0 && c.Sealed.Key.Epoch != s.epoch {
			return kms.ErrChange
		}
		u.segment(id)
		l.generation, l.floor = id.Generation, id.Number+1
		s.segments[id] = &memSegment{Segment: m, claims: map[int]kms.Bitmap{}, sealed: kms.Sealed{
			Key:   kms.Wrapped{Epoch: c.Sealed.Key.Epoch, Bytes: slices.Clone(c.Sealed.Key.Bytes)},
			Slots: slices.Clone(c.Sealed.Slots)}}
	}
	return nil
}

func (s *Memory) applySegment(seg *memSegment, c *kms.Change) error {
	to := map[kms.Op]kms.State{kms.OpConfirm: kms.StateConfirmed, kms.OpOpen: kms.StateOpen,
		kms.OpClose: kms.StateClosed, kms.OpFinish: kms.StateFinished, kms.OpVoid: kms.StateVoid}[c.Op]
	switch c.Op {
	case kms.OpGive:
		if seg.State != kms.StateConfirmed || seg.Given {
			return kms.ErrState
		}
		seg.Owner, seg.Given = c.Owner, true
		return nil
	case kms.OpGrant:
		return seg.grant(c)
	case kms.OpClaim, kms.OpExpire:
		return seg.claim(c, s.Self)
	case kms.OpReseal, kms.OpRewrap:
		return seg.reseal(c)
	}
	if to == 0 {
		return kms.ErrChange
	}
	if !seg.State.May(to) {
		return kms.ErrState
	}
	seg.State = to
	switch c.Op {
	case kms.OpOpen:
		seg.Session = c.Session
	case kms.OpClose:
		seg.sealed, seg.grants, seg.claims = kms.Sealed{}, nil, map[int]kms.Bitmap{}
	case kms.OpFinish, kms.OpVoid:
		delete(s.segments, seg.ID)
	}
	return nil
}

func (seg *memSegment) reseal(c *kms.Change) error {
	if seg.sealed.Slots == nil {
		return kms.ErrState
	}
	key := c.Key
	if c.Op == kms.OpReseal {
		if len(c.Sealed.Slots) != len(seg.sealed.Slots) {
			return kms.ErrChange
		}
		key, seg.sealed.Slots = c.Sealed.Key, slices.Clone(c.Sealed.Slots)
	}
	seg.sealed.Key = kms.Wrapped{Epoch: key.Epoch, Bytes: slices.Clone(key.Bytes)}
	return nil
}

func (s *Memory) turn(epoch uint64) error {
	if epoch <= s.epoch {
		return kms.ErrChange
	}
	for _, seg := range s.segments {
		if seg.sealed.Slots != nil && seg.sealed.Key.Epoch != epoch {
			return kms.ErrChange
		}
	}
	for _, l := range s.links {
		if l.idKey.Epoch != 0 && l.idKey.Epoch != epoch {
			return kms.ErrChange
		}
	}
	s.epoch = epoch
	return nil
}

func (seg *memSegment) openUnder(session kms.Session) error {
	if seg.State != kms.StateOpen {
		return kms.ErrState
	}
	if seg.Session != session {
		return kms.ErrSession
	}
	return nil
}

func (seg *memSegment) grant(c *kms.Change) error {
	if err := seg.openUnder(c.Session); err != nil {
		return err
	}
	g := c.Grant
	if g.SizeBits <= 0 || g.First < 0 || g.Slots <= 0 || g.First+g.Slots > seg.Slots ||
		g.Slots%kms.KeySlots(g.SizeBits, seg.SlotBytes) != 0 || len(g.Targets) == 0 ||
		len(g.Targets) > 254 {
		return kms.ErrGrant
	}
	for _, have := range seg.grants {
		if g.First < have.First+have.Slots && have.First < g.First+g.Slots {
			return kms.ErrGrant
		}
	}
	g.Targets = slices.Clone(g.Targets)
	seg.grants = append(seg.grants, g)
	return nil
}

func (seg *memSegment) claim(c *kms.Change, self etsi014.KMEID) error {
	if err := seg.openUnder(c.Session); err != nil {
		return err
	}
	for _, g := range seg.grants {
		if c.First < g.First || c.Slots <= 0 || c.First+c.Slots > g.First+g.Slots {
			continue
		}
		per := kms.KeySlots(g.SizeBits, seg.SlotBytes)
		if (c.First-g.First)%per != 0 || c.Slots%per != 0 {
			return kms.ErrGrant
		}
		if c.Role == kms.RoleInitiator {
			if c.SAE != g.Initiator || seg.Owner != self || c.Op != kms.OpClaim {
				return kms.ErrGrant
			}
		} else if c.Role < 0 || c.Role >= len(g.Targets) || g.Targets[c.Role] != c.SAE {
			return kms.ErrGrant
		}
		return seg.set(c)
	}
	return kms.ErrGrant
}

func (seg *memSegment) set(c *kms.Change) error {
	bits := seg.claims[c.Role]
	if bits == nil {
		bits = kms.NewBitmap(seg.Slots)
		seg.claims[c.Role] = bits
	}
	for i := c.First; i < c.First+c.Slots; i++ {
		if bits.Get(i) {
			return kms.ErrClaimed
		}
		bits.Set(i)
	}
	return nil
}

// Load implements kms.Store.
func (s *Memory) Load(ctx context.Context, id kms.SegmentID) (kms.Sealed, []kms.Bitmap, error) {
	seg := s.segments[id]
	switch {
	case ctx.Err() != nil:
		return kms.Sealed{}, nil, ctx.Err()
	case seg == nil || seg.sealed.Slots == nil:
		return kms.Sealed{}, nil, fmt.Errorf("load segment %s: %w", id, kms.ErrNoSegment)
	}
	var claims []kms.Bitmap
	for role, bits := range seg.claims {
		for len(claims) <= role+1 {
			claims = append(claims, nil)
		}
		claims[role+1] = slices.Clone(bits)
	}
	sealed := seg.sealed
	sealed.Slots = slices.Clone(sealed.Slots)
	sealed.Key.Bytes = slices.Clone(sealed.Key.Bytes)
	return sealed, claims, nil
}

// Last is the newest audit record and how far the log goes.
func (s *Memory) Last() (kms.Record, kms.Position) {
	if len(s.log) == 0 {
		return kms.Record{}, s.position
	}
	prev := kms.Position{Length: uint64(len(s.log)) - 1}
	if prev.Length > 0 {
		prev.Hash = s.hashes[prev.Length-1]
	}
	rec, err := audit.Parse(prev, s.log[prev.Length], func(c audit.Commitment) (etsi014.SAEID, bool) {
		n, ok := s.names[c]
		return n, ok
	})
	if err != nil {
		return kms.Record{}, s.position
	}
	return rec, s.position
}

// Segment is what stands of a live segment: itself, its grants, and the data
// key it is sealed under.
func (s *Memory) Segment(id kms.SegmentID) (kms.Segment, []kms.Grant, kms.Wrapped) {
	seg := s.segments[id]
	if seg == nil {
		return kms.Segment{}, nil, kms.Wrapped{}
	}
	return seg.Segment, seg.grants, seg.sealed.Key
}

// HashAt is the chain's hash at a length, zero where there is none.
func (s *Memory) HashAt(length uint64) (hash [32]byte, ok bool) {
	if length == 0 || length > uint64(len(s.hashes)) {
		return hash, false
	}
	return s.hashes[length-1], true
}

// Scan implements kms.Store.
func (s *Memory) Scan(ctx context.Context, from uint64) iter.Seq2[kms.Record, error] {
	return func(yield func(kms.Record, error) bool) {
		for i := from; i < uint64(len(s.log)); i++ {
			prev := kms.Position{Length: i}
			if i > 0 {
				prev.Hash = s.hashes[i-1]
			}
			rec, err := audit.Parse(prev, s.log[i], func(c audit.Commitment) (etsi014.SAEID, bool) {
				n, ok := s.names[c]
				return n, ok
			})
			if err == nil {
				err = ctx.Err()
			}
			if err != nil {
				yield(kms.Record{}, err)
				return
			}
			if !yield(rec, nil) {
				return
			}
		}
	}
}

// Close implements kms.Store.
func (s *Memory) Close() error { s.closed = true; return nil }
