package peer

import (
	"context"
	"encoding/binary"
	"maps"
	"math"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/kms"
	"github.com/quietline/quietline/kms/storetest"
)

// simDisk is a store and the two slots of epoch keys beside it.
type simDisk struct {
	*storetest.Memory
	slots [2]uint64 // epoch whose key stands there; 0 = none, or torn
}

// torn is what a slot holds that was being written when the power went.
const torn = math.MaxUint64

func (d simDisk) clone() simDisk { return simDisk{d.Memory.Clone(), d.slots} }

type simSite struct {
	w     *world
	n     int
	id    etsi014.KMEID
	disk  simDisk
	old   []simDisk // copies to restore
	m     *Machine
	fence kms.Fence
	alive bool
	epoch uint64
	dek   uint64 // counts data keys
	life  int    // counts incarnations of any kind
	inc   Incarnation
	conn  bool // as the machine was told
	ready time.Duration
	skew  time.Duration // of its clock, which only goes forward
	full  time.Duration // until then the disk takes nothing
	wake  time.Duration
	inbox []uint64 // block numbers the device holds unacknowledged
	asked map[uint64]waitingDraw
	read  map[uint64]uint64 // ticket to block number
	fetch map[uint64]Fetch
	loop  map[kms.SegmentID]uint64 // which bits this process filled the pool with
	late  []Input                  // segments of the pool that come a commit later
	held  []Input                  // what shares a commit with the next

	several bool                              // answers leave with this commit
	used    map[kms.SegmentID]map[uint64]bool // data keys of keys delivered for good
}

var (
	zeroSlots = make([]byte, simSlots*SlotBytes)
	loopZeros = make([]byte, loopLong*SlotBytes)
)

func (s *simSite) ingest() {
	if !s.alive || len(s.inbox) == 0 {
		return
	}
	w := s.w
	number, changed := s.inbox[0], false
	if w.faults && number > 3 && w.chance(3) { // a device that repeats itself
		number -= uint64(1 + w.rng.IntN(3))
		changed = w.chance(30) // and not the same
	}
	for _, n := range s.read {
		if n == number {
			return
		}
	}
	seg := s.cut(number, changed)
	w.ticket++
	s.read[w.ticket] = number
	s.feed(Ingested{Ticket: w.ticket, Segment: seg, Sealed: kms.Sealed{
		Key: kms.Wrapped{Epoch: s.epoch, Bytes: s.newKey()}, Slots: zeroSlots}})
}

// cut is what the KME makes of a block.
func (s *simSite) cut(number uint64, changed bool) kms.Segment {
	w := s.w
	seg, ok := w.cuts[s.n][number]
	if ok && !changed {
		return seg
	}
	bits := w.bits(s.n, number)
	if changed {
		bits[Reserved+9] ^= 1
	}
	id := kms.SegmentID{Link: simLink, Generation: 1, Number: number}
	seg, _, err := Cut(id, s.id, w.sites[1-s.n].id, Weights{}, false, bits)
	if err != nil {
		w.fail("cut: %v", err)
	}
	if !changed {
		w.cuts[s.n][number] = seg
	}
	return seg
}

// spoil makes an unopened segment unreadable on one disk.
func (s *simSite) spoil() {
	for _, seg := range s.m.links[simLink].sorted() {
		if seg.State == kms.StateConfirmed && s.w.chance(30) {
			s.feed(Spoiled{seg.ID})
			return
		}
	}
}

func (s *simSite) newKey() []byte {
	s.dek++
	return binary.BigEndian.AppendUint64(nil, s.dek)
}

// turn moves the epoch on as the owner goroutine does, with a crash now and
// then between its steps.
func (s *simSite) turn() {
	w := s.w
	if !s.alive {
		return
	}
	next := s.epoch + 1
	before := s.disk.slots[(next+1)%2]
	s.disk.slots[(next+1)%2] = next
	if w.faults && (w.now < s.full || w.chance(10)) {
		s.disk.slots[(next+1)%2] = []uint64{before, torn, next}[w.rng.IntN(3)]
		s.crash("in a turn, before the commit")
		return
	}
	out := s.m.Step(s.clock(), Turn{next})
	for i := range out.Changes {
		switch c := &out.Changes[i]; c.Op {
		case kms.OpRewrap:
			_, _, key := s.disk.Segment(c.Segment)
			c.Key = kms.Wrapped{Epoch: next, Bytes: key.Bytes}
		case kms.OpReseal:
			c.Sealed = kms.Sealed{Key: kms.Wrapped{Epoch: next, Bytes: s.newKey()}, Slots: zeroSlots}
			if c.Segment.Link == kms.Loopback {
				c.Sealed.Slots = loopZeros[:s.m.loop.find(c.Segment).Slots*SlotBytes]
			}
		case kms.OpLink:
			c.IDKey = kms.Wrapped{Epoch: next, Bytes: out.IDKeys[c.Segment.Link]}
		}
	}
	pos, err := s.disk.Commit(context.Background(), s.fence, out.Changes)
	if err != nil {
		w.fail("store of %s: turn: %v", s.id, err)
	}
	if w.faults && w.chance(10) {
		s.disk.slots[next%2] = []uint64{s.epoch, torn, 0}[w.rng.IntN(3)]
		s.crash("in a turn, after the commit")
		return
	}
	s.disk.slots[next%2] = 0
	s.epoch = next
	for id, keys := range s.used {
		if _, _, key := s.disk.Segment(id); len(key.Bytes) == 8 &&
			keys[binary.BigEndian.Uint64(key.Bytes)] {
			w.fail("I10: %s segment %s is still sealed under the data key of delivered keys", s.id, id)
		}
	}
	clear(s.used)
	s.logChanges(out.Changes)
	s.wake = out.Wake
	s.feed(append(s.release(&out), Durable{pos})...)
}

func (s *simSite) drawKeys() {
	if !s.alive {
		return
	}
	w := s.w
	var local, far []etsi014.SAEID
	for _, x := range simSAEs {
		if x.site == s.n {
			local = append(local, x.id)
		} else {
			far = append(far, x.id)
		}
	}
	w.ticket++
	d := Draw{Ticket: w.ticket, Initiator: local[w.rng.IntN(3)], Number: 1 + w.rng.IntN(3),
		SizeBits: simSizes[w.rng.IntN(len(simSizes))]}
	here := slices.DeleteFunc(local, func(l etsi014.SAEID) bool { return l == d.Initiator })
	d.Targets = []etsi014.SAEID{far[w.rng.IntN(3)]}
	switch w.rng.IntN(12) {
	case 0:
		d.Targets = far[:2]
	case 1:
		d.Targets = append(d.Targets, here...)
	case 2: // of this site alone: from its loopback pool
		d.Targets = here[:1+w.rng.IntN(2)]
	}
	s.asked[d.Ticket] = waitingDraw{d, w.now}
	s.feed(d)
}

func (s *simSite) cancelOne() {
	if !s.alive || len(s.asked) == 0 {
		return
	}
	s.feed(Cancel{Ticket: slices.Min(slices.Collect(maps.Keys(s.asked)))})
}

// fetchKeys asks for keys that were drawn, sometimes by the wrong SAE, twice,
// or together with an unknown ID.
func (s *simSite) fetchKeys() {
	w := s.w
	if !s.alive || len(w.keys) == 0 {
		return
	}
	recent := w.keys[max(0, len(w.keys)-12):]
	k := recent[w.rng.IntN(len(recent))]
	target := k.targets[w.rng.IntN(len(k.targets))]
	if w.siteOf(target) != s.n {
		return
	}
	f := Fetch{Target: target, Initiator: k.initiator, IDs: []etsi014.KeyID{k.ref.ID}}
	for _, o := range recent {
		if o != k && o.initiator == k.initiator && slices.Contains(o.targets, target) && w.chance(40) &&
			!o.fetched[target] {
			f.IDs = append(f.IDs, o.ref.ID)
		}
	}
	switch w.rng.IntN(12) {
	case 0:
		f.IDs = append(f.IDs, etsi014.KeyID{byte(w.rng.Uint32())})
	case 1:
		f.Target = simSAEs[w.rng.IntN(len(simSAEs))].id
		if w.siteOf(f.Target) != s.n {
			return
		}
	}
	w.ticket++
	f.Ticket = w.ticket
	s.fetch[f.Ticket] = f
	s.feed(f)
}

// clock is the site's own; the two agree in nothing but their direction.
func (s *simSite) clock() time.Duration { return s.w.now + s.skew }

// boot starts a process on the site's disk.
func (s *simSite) boot() {
	w := s.w
	ctx := context.Background()
	lease, err := s.disk.Lease(ctx, "", 0)
	if err != nil {
		w.fail("lease: %v", err)
	}
	if epoch := max(lease.Epoch, 1); s.disk.slots[(epoch+1)%2] != epoch {
		w.fail("L: %s is in epoch %d, its epoch keys are %v", s.id, epoch, s.disk.slots)
	} else {
		s.disk.slots[epoch%2] = 0 // the other half of a turn
		s.epoch = epoch
	}
	link, err := s.disk.Lease(ctx, simLink, -1)
	if err != nil {
		w.fail("lease: %v", err)
	}
	loop, err := s.disk.Lease(ctx, kms.Loopback, -1)
	if err != nil {
		w.fail("lease: %v", err)
	}
	snap := Snapshot{KME: lease, IDKeys: map[kms.LinkID][]byte{},
		Links: map[kms.LinkID]kms.Lease{simLink: link, kms.Loopback: loop}}
	if link.IDKey.Epoch != 0 {
		snap.IDKeys[simLink] = link.IDKey.Bytes
	}
	cfg := Config{KME: s.id, Links: []Link{{ID: simLink, Peer: w.sites[1-s.n].id}},
		SAEs: map[etsi014.SAEID]etsi014.KMEID{}, TrustDisks: w.h.trust,
		Retention: simRetention, ConfirmWithin: 5 * time.Second, Rand: simRand{w.rng},
		MaxSegments: simCap}
	for _, x := range simSAEs {
		cfg.SAEs[x.id] = w.sites[x.site].id
	}
	if s.m, err = New(cfg, snap); err != nil {
		w.fail("new: %v", err)
	}
	s.m.aheadLeast = 0    // grant ahead though each pair draws seldom
	s.inc = Incarnation{} // of an earlier process
	s.alive, s.conn, s.fence, s.wake = true, false, lease.Fence, 0
	// A process reads a clock that began anywhere.
	s.skew = time.Duration(1+w.rng.IntN(1_000_000))*time.Millisecond - w.now
	s.loop, s.late, s.held = map[kms.SegmentID]uint64{}, nil, nil
	s.asked, s.read, s.fetch = map[uint64]waitingDraw{}, map[uint64]uint64{}, map[uint64]Fetch{}
	w.log("%s boots, incarnation %d, log %d", s.id, lease.Incarnation, lease.Position.Length)
	s.feed(Boot{})
}

type simRand struct{ rng *rand.Rand }

func (r simRand) Read(b []byte) (int, error) {
	for i := range b {
		b[i] = byte(r.rng.Uint32())
	}
	return len(b), nil
}

// crash ends the process; the disk may be put back to an older copy.
func (s *simSite) crash(when string) {
	w := s.w
	if !s.alive {
		return
	}
	w.log("%s crashes %s", s.id, when)
	s.alive, s.conn, s.m = false, false, nil
	s.ready = w.now + time.Duration(w.rng.IntN(3000))*time.Millisecond
	w.linked = false
	other := w.sites[1-s.n]
	if w.h.restores && len(s.old) > 0 && w.chance(40) {
		i := w.rng.IntN(len(s.old))
		if w.h.bothOld || other.alive {
			w.log("%s is restored to log %d", s.id, len(s.old))
			s.disk = s.old[i].clone()
			clear(s.used) // a copy brings back what was erased (rule 11)
		}
	}
	if other.alive && other.conn {
		other.conn = false
		other.feed(Disconnected{Peer: s.id})
	}
}

// feed steps the machine, commits, and releases, as the owner goroutine does.
// A crash may come in the middle of a commit, which leaves it whole or not at
// all, and nothing released.
func (s *simSite) feed(inputs ...Input) {
	w := s.w
	if s.shares(inputs[0]) {
		s.held = append(s.held, inputs...)
		return
	}
	inputs = append(s.held, inputs...)
	s.held = nil
	for len(inputs) > 0 && s.alive {
		if _, ok := inputs[0].(Boot); !ok && s.wake == 0 {
			s.wake = s.clock()
		}
		all := s.step(inputs)
		inputs = s.late
		s.late = nil
		if len(all.Changes) > 0 {
			full := w.now < s.full // a KME stops when a commit fails
			if w.faults && (full || w.rng.IntN(250) == 0) {
				s.crash("before the commit")
				return
			}
			pos, err := s.disk.Commit(context.Background(), s.fence, all.Changes)
			if err != nil {
				w.fail("store of %s: %v", s.id, err)
			}
			s.logChanges(all.Changes)
			inputs = append(inputs, Durable{pos})
			if w.faults && w.rng.IntN(250) == 0 {
				s.crash("after the commit")
				return
			}
			s.check()
		}
		inputs = append(inputs, s.release(&all)...)
	}
}

// release lets go what had to wait for the commit, and returns what follows.
func (s *simSite) release(all *Output) (next []Input) {
	w := s.w
	for _, m := range all.Messages {
		s.lawful(m)
		w.send(1-s.n, m.Data)
	}
	s.several = len(all.Answers) > 1
	for _, a := range all.Answers {
		s.answered(a)
	}
	for _, l := range all.Lookups {
		hash, ok := s.disk.HashAt(l.Length)
		next = append(next, Looked{Peer: l.Peer, Length: l.Length, Hash: hash, Found: ok})
	}
	for _, e := range all.Events {
		w.log("%s   event: %s %s", s.id, e.Text, e.Reason)
	}
	return next
}

// shares tells whether an input waits to share its commit with the next one.
func (s *simSite) shares(in Input) bool {
	switch in.(type) {
	case Received, Draw, Fetch, Cancel:
		return s.alive && s.w.faults && s.w.rng.IntN(12) == 0
	}
	return false
}

// step steps the machine with inputs that share a commit. What the loopback
// pool asks for joins them, or comes a commit later.
func (s *simSite) step(inputs []Input) (all Output) {
	w := s.w
	for len(inputs) > 0 {
		stale, heard := s.stale(inputs)
		out := s.m.Step(s.clock(), inputs...)
		if stale && s.m.ordered[0].heard != heard {
			w.fail("rule 14: %s acts on %s of another session", s.id, describe(inputs[0]))
		}
		for i := range out.Changes {
			if c := &out.Changes[i]; c.Op == kms.OpLink {
				c.IDKey = kms.Wrapped{Epoch: s.epoch, Bytes: out.IDKeys[c.Segment.Link]}
			}
		}
		if w.h.traceOnly {
			for _, in := range inputs {
				w.log("%s %s", s.id, describe(in))
			}
		}
		inputs = nil
		for _, seg := range out.Fill {
			w.filled++
			s.loop[seg.ID] = w.filled
			fill := Ingested{Segment: seg, Sealed: kms.Sealed{
				Key: kms.Wrapped{Epoch: s.epoch, Bytes: s.newKey()}, Slots: loopZeros[:seg.Slots*SlotBytes]}}
			if w.faults && w.chance(20) {
				s.late = append(s.late, fill)
			} else {
				inputs = append(inputs, fill)
			}
		}
		s.wake = out.Wake
		if all.Wake == 0 {
			all = out
			continue
		}
		all.Changes = append(all.Changes, out.Changes...)
		all.Messages = append(all.Messages, out.Messages...)
		all.Answers = append(all.Answers, out.Answers...)
		all.Lookups = append(all.Lookups, out.Lookups...)
		all.Events = append(all.Events, out.Events...)
	}
	return all
}

func (s *simSite) logChanges(changes []kms.Change) {
	if !s.w.h.traceOnly {
		return
	}
	for _, c := range changes {
		s.w.log("%s   %s", s.id, describeChange(c))
	}
}
