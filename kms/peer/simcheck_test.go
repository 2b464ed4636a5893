package peer

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/kms"
)

// What the simulator checks, and where. Everything is looked at as soon as it
// leaves a KME or stands on its disk.
//
//	I1   drawn: a slot of key goes to one master answer over both sites
//	I2   fetched, fetchRefused: one answer a target; a refusal takes nothing
//	I3   fetched: the same bits at both ends, none of a block that differs
//	I4   drawn: one site draws from a segment; the store asks for the owner
//	I5   durable: the claim is in the newest record when an answer leaves
//	     lawful: a message says what the disk holds
//	I6   check: no incarnation twice; drawn: no key_ID twice
//	I7   settled: both sites hold the same in the end
//	I8   drawn: as I1, for a pad is slots of key
//	I9   check: ledgers balance and agree with the segments
//	I10  turn: no data key of what was delivered wraps anything any more
//	L    fetchRefused, drawn: what must be there is there
//	L1   settled: draws are answered and stock flows again
//	r14  step: what is of another session is not acted on
//
// The store beneath (storetest.Memory) refuses each change that breaks a rule,
// and a refusal fails the history.

// goneForGood notes under which data key a key was sealed that nobody may read
// at this site any more.
func (s *simSite) goneForGood(id kms.SegmentID) {
	if _, _, key := s.disk.Segment(id); len(key.Bytes) == 8 {
		if s.used[id] == nil {
			s.used[id] = map[uint64]bool{}
		}
		s.used[id][binary.BigEndian.Uint64(key.Bytes)] = true
	}
}

// stale tells whether a message is of another session than the one that stands:
// it must not even count as a sign of life.
func (s *simSite) stale(inputs []Input) (bool, time.Duration) {
	r, ok := inputs[0].(Received)
	if !ok || len(inputs) > 1 {
		return false, 0
	}
	at := s.m.ordered[0]
	return kind(r.Data[1]) != kHello && kms.Session(r.Data[2:18]) != at.session, at.heard
}

// answered checks what leaves the KME.
func (s *simSite) answered(a Answer) {
	w := s.w
	if number, ok := s.read[a.Ticket]; ok {
		delete(s.read, a.Ticket)
		if a.Err == nil || errors.Is(a.Err, kms.ErrSeen) {
			s.inbox = slices.DeleteFunc(s.inbox, func(n uint64) bool { return n == number })
		}
		return
	}
	if d, ok := s.asked[a.Ticket]; ok {
		delete(s.asked, a.Ticket)
		s.drawn(d.Draw, a)
		return
	}
	f, ok := s.fetch[a.Ticket]
	if !ok {
		w.fail("%s answers ticket %d twice", s.id, a.Ticket)
	}
	delete(s.fetch, a.Ticket)
	s.fetched(f, a)
}

func (s *simSite) drawn(d Draw, a Answer) {
	w := s.w
	local := !slices.ContainsFunc(d.Targets, func(t etsi014.SAEID) bool { return w.siteOf(t) != s.n })
	if a.Err != nil {
		if local && !errors.Is(a.Err, ErrCanceled) {
			w.fail("L: %s refuses a draw from its own pool: %v", s.id, a.Err)
		}
		return
	}
	s.durable(d.Initiator, a.Keys)
	if len(a.Keys) != d.Number {
		w.fail("draw of %d keys got %d", d.Number, len(a.Keys))
	}
	for _, k := range a.Keys {
		w.delivered++
		if !w.faults && !local && w.now > w.calm+20*time.Second {
			w.quietGot[s.n]++
		}
		if k.SizeBits != d.SizeBits || k.Slots != kms.KeySlots(d.SizeBits, SlotBytes) {
			w.fail("key of %d bits in %d slots, asked %d", k.SizeBits, k.Slots, d.SizeBits)
		}
		if local != (k.Segment.Link == kms.Loopback) {
			w.fail("key of %s for %v is of %s", d.Initiator, d.Targets, k.Segment)
		}
		bits := s.bitsOf(k.Segment)
		for i := k.First; i < k.First+k.Slots; i++ {
			at := simSlot{bits, i}
			if before := w.mastered[at]; before != 0 {
				w.fail("I1: slot %d of %s went to draw %d and to draw %d", i, k.Segment, before, d.Ticket)
			}
			w.mastered[at] = d.Ticket
		}
		if owner, ok := w.ownerOf[k.Segment]; ok && owner != s.n && !local {
			w.fail("I4: both sites draw from %s", k.Segment)
		}
		w.ownerOf[k.Segment] = s.n
		if w.byID[k.ID] != nil {
			w.fail("I6: key_ID %s came twice", k.ID)
		}
		rec := &drawnKey{ref: k, initiator: d.Initiator, targets: d.Targets, site: s.n, at: w.now,
			lives: [2]int{w.sites[0].life, w.sites[1].life}, bits: bits,
			session: s.m.ordered[0].session, fetched: map[etsi014.SAEID]bool{}}
		w.byID[k.ID] = rec
		if !slices.ContainsFunc(d.Targets, func(t etsi014.SAEID) bool { return w.siteOf(t) == s.n }) {
			s.goneForGood(k.Segment)
		}
		w.keys = append(w.keys, rec)
	}
}

// bitsOf numbers the bits that a segment holds at this site: a block of the
// link is the same everywhere, a segment of the pool is this process's.
func (s *simSite) bitsOf(id kms.SegmentID) uint64 {
	if id.Link == kms.Loopback {
		return s.loop[id] << 32
	}
	return id.Number
}

func (s *simSite) fetched(f Fetch, a Answer) {
	w := s.w
	if a.Err != nil {
		s.fetchRefused(f, a.Err)
		return
	}
	s.durable(f.Target, a.Keys)
	if len(a.Keys) != len(f.IDs) {
		w.fail("fetch of %d keys got %d", len(f.IDs), len(a.Keys))
	}
	for i, k := range a.Keys {
		rec := w.byID[f.IDs[i]]
		switch {
		case rec == nil:
			w.fail("I2: %s got a key that nobody drew", f.Target)
		case !slices.Contains(rec.targets, f.Target) || rec.initiator != f.Initiator:
			w.fail("I2: %s is not entitled to a key of %s", f.Target, rec.initiator)
		case rec.fetched[f.Target]:
			w.fail("I2: %s got key %s twice", f.Target, k.ID)
		case k != rec.ref, s.bitsOf(k.Segment) != rec.bits:
			w.fail("I3: initiator has %+v, target has %+v", rec.ref, k)
		case !rec.local() && w.corrupt[k.Segment.Number]:
			w.fail("I3: block %d differs and was used", k.Segment.Number)
		}
		rec.fetched[f.Target] = true
		w.taken++
		if !slices.ContainsFunc(rec.targets, func(t etsi014.SAEID) bool {
			return w.siteOf(t) == s.n && !rec.fetched[t]
		}) {
			s.goneForGood(k.Segment)
		}
	}
}

// durable: nothing leaves before its claim and the record of it are on the disk
// (I5). They are in the newest entry, for an answer leaves with its commit.
func (s *simSite) durable(sae etsi014.SAEID, keys []KeyRef) {
	last, _ := s.disk.Last()
	for _, k := range keys {
		if !slices.ContainsFunc(last.Changes, func(c kms.Change) bool {
			return c.Op == kms.OpClaim && c.Segment == k.Segment && c.SAE == sae &&
				c.First <= k.First && k.First+k.Slots <= c.First+c.Slots
		}) {
			s.w.fail("I5: %s answers %s with slots %d+%d of %s before the claim is durable", s.id, sae,
				k.First, k.Slots, k.Segment)
		}
	}
}

// lawful: a message says only what is on the disk.
func (s *simSite) lawful(m Message) {
	switch kind(m.Data[1]) {
	case kBeat, kHello, kConfirmed, kOffer, kGive, kGiveAck, kOpen, kOpenAck, kGrant, kGrantAck:
	default:
		return // says nothing that a disk must hold
	}
	msg, err := decode(m.Data)
	if err != nil {
		s.w.fail("%s sends what it cannot read: %v", s.id, err)
	}
	seg, grants, _ := s.disk.Segment(msg.id)
	ok := true
	switch msg.kind {
	case kBeat:
		hash, there := s.disk.HashAt(msg.at.Length)
		ok = msg.at.Length == 0 || there && hash == msg.at.Hash
	case kHello:
		hash, there := s.disk.HashAt(msg.hello.position.Length)
		ok = msg.hello.position.Length == 0 || there && hash == msg.hello.position.Hash
	case kConfirmed:
		ok = seg.State >= kms.StateConfirmed
	case kOffer:
		ok = seg.State >= kms.StateNew && (!msg.have || seg.State >= kms.StateConfirmed)
	case kGive:
		ok = seg.Owner == s.w.sites[1-s.n].id && seg.Given
	case kGiveAck:
		ok = seg.Owner == s.id
	case kOpen, kOpenAck:
		ok = seg.State == kms.StateOpen && seg.Session == msg.session
	case kGrant:
		ok = slices.ContainsFunc(grants, func(g kms.Grant) bool { return sameGrant(g, msg.grant) })
	case kGrantAck:
		ok = slices.ContainsFunc(grants, func(g kms.Grant) bool { return g.First == msg.first })
	}
	if !ok && !s.gone(msg.id) {
		s.w.fail("I5: %s says %s of %s and has %s on its disk", s.id, msg.kind, msg.id, seg.State)
	}
}

// gone tells whether the newest commit ended a segment: what else it did with
// it before may be told, for a peer that acts on it is refused.
func (s *simSite) gone(id kms.SegmentID) bool {
	last, _ := s.disk.Last()
	return slices.ContainsFunc(last.Changes, func(c kms.Change) bool {
		return c.Segment == id && (c.Op == kms.OpVoid || c.Op == kms.OpFinish)
	})
}

// fetchRefused: a key that was drawn, is wanted by who may have it, in time
// and without a restart between, must be there. And a refused call must not
// have taken the good keys with it.
func (s *simSite) fetchRefused(f Fetch, err error) {
	w := s.w
	good := 0
	for _, id := range f.IDs {
		rec := w.byID[id]
		if rec != nil && !rec.fetched[f.Target] && slices.Contains(rec.targets, f.Target) &&
			rec.initiator == f.Initiator && w.now < rec.at+simRetention && s.lastsFor(rec) {
			good++
			if s.several { // another call of this commit may have taken it since
				continue
			}
			if _, ok := s.m.index[id]; !ok {
				w.fail("L: key %s of segment %s was drawn at %v and is gone at %v", id, rec.ref.Segment,
					rec.at, w.now)
			}
			at := s.m.index[id]
			if ro := at.grant.roleOf(f.Target); ro == nil || ro.done.Get(at.key) {
				w.fail("I2: a refused fetch took key %s", id)
			}
		}
	}
	if good == len(f.IDs) && !s.several {
		w.fail("L: %s may have all %d keys and is refused: %v", f.Target, good, err)
	}
}

// lastsFor tells whether no restart and no jump of a clock has come between.
// The other site has no part in a key of this one's pool.
func (s *simSite) lastsFor(k *drawnKey) bool {
	now := [2]int{s.w.sites[0].life, s.w.sites[1].life}
	if k.local() {
		return k.site == s.n && k.lives[s.n] == now[s.n]
	}
	return k.session == s.m.ordered[0].session && k.lives == now
}

// counters compares what a segment counts with what it holds: a count that is
// off would keep it open for ever, or close it over keys that are still owed.
func (s *simSite) counters(seg *segment) {
	owed, undrawn := 0, 0
	for _, g := range seg.grants {
		if g.shape != nil && !g.dead && g.drawn < g.keys {
			undrawn++
		}
		for i := range g.roles {
			for k := range g.drawn {
				if !g.roles[i].done.Get(k) {
					owed++
				}
			}
		}
	}
	if owed != seg.owed || undrawn != seg.undrawn && len(seg.grants) > 0 {
		s.w.fail("L: %s segment %s owes %d keys and counts %d, has %d grants to draw and counts %d",
			s.id, seg.ID, owed, seg.owed, undrawn, seg.undrawn)
	}
}

// check looks at the machine after a commit.
func (s *simSite) check() {
	w := s.w
	if s.m.self != s.inc {
		s.inc = s.m.self
		s.life++
		name := fmt.Sprint(s.n, s.inc)
		if w.lives[name] {
			w.fail("I6: incarnation %d of %s came twice", s.inc.Counter, s.id)
		}
		w.lives[name] = true
	}
	for _, l := range s.m.links {
		if !l.ledger.Balanced() {
			w.fail("I9: ledger of %s: %+v", s.id, l.ledger)
		}
		left := 0
		for _, seg := range l.segments {
			left += seg.left * seg.SlotBytes * 8
			s.counters(seg)
			if seg.left < 0 || seg.State == kms.StateClosed && seg.left != 0 {
				w.fail("I9: %s has %d slots left of %s segment %s", s.id, seg.left, seg.State, seg.ID)
			}
		}
		if uint64(left) != l.ledger.Stored {
			w.fail("I9: %s stores %d bits, ledger says %d", s.id, left, l.ledger.Stored)
		}
	}
}
