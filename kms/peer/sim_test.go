package peer

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/kms"
	"github.com/quietline/quietline/kms/storetest"
)

// The simulator runs two KMEs, their disks, devices, network and callers in
// one goroutine from one seed, and checks the invariants after every step. A
// history has a part with faults and a quiet part in which stock must flow
// again. What is not the protocol (disk, network, callers) is here in its
// plainest form.

// histories sets what may go wrong.
type histories struct {
	steps     int
	restores  bool // one disk at a time is put back to an older copy
	bothOld   bool // both are, before either lives again
	trust     bool // trust_disks
	traceOnly bool
}

type simSAE struct {
	id   etsi014.SAEID
	site int
}

var simSAEs = []simSAE{{"a1", 0}, {"a2", 0}, {"b1", 1}, {"b2", 1}}

// drawnKey is a key that an initiator was answered.
type drawnKey struct {
	ref       KeyRef
	initiator etsi014.SAEID
	targets   []etsi014.SAEID
	site      int
	at        time.Duration
	lives     [2]int // of the sites, when it was drawn
	session   kms.Session
	fetched   map[etsi014.SAEID]bool
}

type simSlot struct {
	segment kms.SegmentID
	slot    int
}

type packet struct {
	to   int
	data []byte
	at   time.Duration
}

type waitingDraw struct {
	Draw
	since time.Duration
}

// simDisk is a store and the two slots of epoch keys beside it.
type simDisk struct {
	*storetest.Memory
	slots [2]uint64 // epoch whose key stands there; 0 = none
}

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
	used  map[kms.SegmentID]map[uint64]bool // data keys of keys delivered for good
}

type world struct {
	h       histories
	seed    uint64
	rng     *rand.Rand
	now     time.Duration
	sites   [2]*simSite
	net     []packet
	linked  bool
	faults  bool
	ticket  uint64
	block   uint64
	corrupt map[uint64]bool
	cuts    [2]map[uint64]kms.Segment // of good blocks: tags take long to compute

	keys      []*drawnKey
	byID      map[etsi014.KeyID]*drawnKey
	mastered  map[simSlot]uint64 // to the draw that got it
	ownerOf   map[kms.SegmentID]int
	lives     map[string]bool
	delivered int
	taken     int
	calm      time.Duration // when faults stopped
	quietGot  [2]int        // keys drawn when things should have settled
	trace     []string
}

const (
	simSlots     = 8
	simRetention = 20 * time.Second
	simCap       = 6 // unopened segments
	simLink      = kms.LinkID("l")
)

func newWorld(seed uint64, h histories) *world {
	w := &world{h: h, seed: seed, rng: rand.New(rand.NewPCG(seed, 0x9e3779b97f4a7c15)),
		now: time.Millisecond, faults: true,
		corrupt: map[uint64]bool{}, byID: map[etsi014.KeyID]*drawnKey{},
		cuts:     [2]map[uint64]kms.Segment{{}, {}},
		mastered: map[simSlot]uint64{}, ownerOf: map[kms.SegmentID]int{}, lives: map[string]bool{}}
	for i, id := range []etsi014.KMEID{"a", "b"} {
		w.sites[i] = &simSite{w: w, n: i, id: id, disk: simDisk{storetest.NewMemory(id), [2]uint64{1}},
			used: map[kms.SegmentID]map[uint64]bool{}}
	}
	return w
}

// violation is a broken invariant; it ends the history.
type violation struct{ text string }

func (w *world) fail(format string, args ...any) {
	panic(violation{fmt.Sprintf(format, args...)})
}

func (w *world) log(format string, args ...any) {
	if w.h.traceOnly {
		w.trace = append(w.trace, fmt.Sprintf("%8.3f ", w.now.Seconds())+fmt.Sprintf(format, args...))
	}
}

// run plays the history; nil means all invariants held.
func (w *world) run() (err error) {
	defer func() {
		if p := recover(); p != nil {
			v, ok := p.(violation)
			if !ok {
				panic(p)
			}
			err = errors.New(v.text)
		}
	}()
	for _, s := range w.sites {
		s.boot()
	}
	for range w.h.steps {
		w.step()
	}
	w.quiet()
	return nil
}

func (w *world) chance(percent int) bool { return w.rng.IntN(100) < percent }

// step is one random event.
func (w *world) step() {
	s := w.sites[w.rng.IntN(2)]
	switch x := w.rng.IntN(100); {
	case x < 44:
		w.deliver()
	case x < 54:
		w.advance()
	case x < 60:
		w.makeBlock()
	case x < 68:
		s.ingest()
	case x < 80:
		s.drawKeys()
	case x < 93:
		s.fetchKeys()
	case x < 95:
		if w.linked {
			w.cut()
		} else {
			w.join()
		}
	case x == 95:
		if w.chance(30) {
			s.crash("at rest")
		} else {
			s.turn()
		}
	case x == 96:
		s.cancelOne()
	case x == 97:
		if s.alive {
			s.spoil()
		}
	case x == 98:
		if s.alive && len(s.old) < 3 {
			s.old = append(s.old, s.disk.clone())
		}
	default:
		switch w.rng.IntN(10) {
		case 0: // a machine that slept, or was moved
			s.skew += time.Duration(w.rng.IntN(100)) * time.Second
			s.life++ // what it held for a target may have aged
		case 1:
			s.full = w.now + time.Duration(w.rng.IntN(5000))*time.Millisecond
		}
		w.now += time.Duration(w.rng.IntN(8000)) * time.Millisecond
		w.advance()
	}
	for _, s := range w.sites {
		if !s.alive && w.now >= s.ready {
			s.boot()
		}
	}
	if !w.linked && w.chance(10) {
		w.join()
	}
}

// advance moves time to what is due next.
func (w *world) advance() {
	next := w.now + 500*time.Millisecond
	for _, s := range w.sites {
		if s.alive && s.wake > s.clock() {
			next = min(next, s.wake-s.skew)
		}
		if !s.alive {
			next = min(next, max(s.ready, w.now))
		}
	}
	w.now = max(next, w.now+time.Millisecond)
	for _, s := range w.sites {
		if s.alive && s.wake <= s.clock() {
			s.feed(Tick{})
		}
	}
}

// deliver hands over one packet whose time has come, in any order.
func (w *world) deliver() {
	if len(w.net) == 0 {
		w.advance()
		return
	}
	i := w.rng.IntN(len(w.net))
	if !w.faults { // oldest first, so that the quiet part is quick
		i = 0
	}
	p := w.net[i]
	if p.at > w.now {
		if w.faults && w.chance(70) {
			return
		}
		w.now = p.at
	}
	w.net = slices.Delete(w.net, i, i+1)
	if s := w.sites[p.to]; s.alive && s.conn {
		s.feed(Received{Peer: w.sites[1-p.to].id, Data: p.data})
	}
}

func (w *world) send(to int, data []byte) {
	copies := 1
	delay := func() time.Duration { return time.Duration(1+w.rng.IntN(20)) * time.Millisecond }
	if w.faults {
		switch x := w.rng.IntN(100); {
		case x < 10:
			copies = 0
		case x < 20:
			copies = 2
		}
	}
	for range copies {
		at := w.now + delay()
		if w.faults && w.chance(5) {
			at += time.Duration(w.rng.IntN(10000)) * time.Millisecond
		}
		w.net = append(w.net, packet{to, data, at})
	}
	if len(w.net) > 400 {
		w.net = slices.Delete(w.net, 0, len(w.net)-400)
	}
}

func (w *world) cut() {
	w.linked = false
	for _, s := range w.sites {
		if s.alive && s.conn {
			s.conn = false
			s.feed(Disconnected{Peer: w.sites[1-s.n].id})
		}
	}
	if w.chance(50) {
		w.net = nil // else some of it comes after the reconnect
	}
}

func (w *world) join() {
	if !w.sites[0].alive || !w.sites[1].alive {
		return
	}
	w.linked = true
	for _, s := range w.sites {
		if s.alive {
			s.conn = true
			s.feed(Connected{Peer: w.sites[1-s.n].id})
		}
	}
}

// makeBlock lets the devices finish a block; one may miss it, or have another.
func (w *world) makeBlock() {
	if len(w.sites[0].inbox) > 12 || len(w.sites[1].inbox) > 12 {
		return
	}
	w.block++
	if w.faults && w.chance(3) {
		w.corrupt[w.block] = true
	}
	for _, s := range w.sites {
		if !w.faults || !w.chance(4) {
			s.inbox = append(s.inbox, w.block)
		}
	}
}

func (w *world) bits(site int, number uint64) []byte {
	b := make([]byte, Reserved+simSlots*SlotBytes)
	for i := range b {
		b[i] = byte(number>>(8*(i%3))) + byte(i*7)
	}
	if w.corrupt[number] && site == 1 {
		b[Reserved+3] ^= 4
	}
	return b
}

var zeroSlots = make([]byte, simSlots*SlotBytes)

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
	s.disk.slots[(next+1)%2] = next
	if w.faults && (w.now < s.full || w.chance(10)) {
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
		case kms.OpLink:
			c.IDKey = kms.Wrapped{Epoch: next, Bytes: out.IDKeys[c.Segment.Link]}
		}
	}
	pos, err := s.disk.Commit(context.Background(), s.fence, out.Changes)
	if err != nil {
		w.fail("store of %s: turn: %v", s.id, err)
	}
	if w.faults && w.chance(10) {
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
	s.feed(Durable{pos})
}

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
	d := Draw{Ticket: w.ticket, Initiator: local[w.rng.IntN(2)], Number: 1 + w.rng.IntN(3),
		SizeBits: []int{256, 256, 256, 128, 512, 768}[w.rng.IntN(6)]}
	d.Targets = []etsi014.SAEID{far[w.rng.IntN(2)]}
	switch w.rng.IntN(10) {
	case 0:
		d.Targets = far
	case 1:
		for _, l := range local {
			if l != d.Initiator {
				d.Targets = append(d.Targets, l)
			}
		}
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

func (w *world) siteOf(sae etsi014.SAEID) int {
	for _, x := range simSAEs {
		if x.id == sae {
			return x.site
		}
	}
	return -1
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
	snap := Snapshot{KME: lease, Links: map[kms.LinkID]kms.Lease{simLink: link},
		IDKeys: map[kms.LinkID][]byte{}}
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
	s.alive, s.conn, s.fence, s.wake = true, false, lease.Fence, 0
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

// feed steps the machine, commits, and releases, as the owner goroutine does;
// a crash may come before or after the commit.
func (s *simSite) feed(inputs ...Input) {
	w := s.w
	for len(inputs) > 0 && s.alive {
		if _, ok := inputs[0].(Boot); !ok && s.wake == 0 {
			s.wake = s.clock()
		}
		var all Output
		for i, in := range inputs {
			stale, heard := s.stale(in)
			out := s.m.Step(s.clock(), in)
			if stale && s.m.ordered[0].heard != heard {
				w.fail("rule 14: %s acts on %s of another session", s.id, describe(in))
			}
			for i := range out.Changes {
				if c := &out.Changes[i]; c.Op == kms.OpLink {
					c.IDKey = kms.Wrapped{Epoch: s.epoch, Bytes: out.IDKeys[c.Segment.Link]}
				}
			}
			if i == 0 {
				all = out
			} else {
				all.Changes = append(all.Changes, out.Changes...)
				all.Messages = append(all.Messages, out.Messages...)
				all.Answers = append(all.Answers, out.Answers...)
				all.Lookups = append(all.Lookups, out.Lookups...)
				all.Events = append(all.Events, out.Events...)
			}
			s.wake = out.Wake
			if w.h.traceOnly {
				w.log("%s %s", s.id, describe(in))
			}
		}
		inputs = inputs[:0:0]
		if w.faults && len(all.Changes) > 0 && (w.now < s.full || w.rng.IntN(250) == 0) {
			s.crash("before the commit") // a KME stops when a commit fails
			return
		}
		if len(all.Changes) > 0 {
			pos, err := s.disk.Commit(context.Background(), s.fence, all.Changes)
			if err != nil {
				w.fail("store of %s: %v", s.id, err)
			}
			for _, c := range all.Changes {
				if !w.h.traceOnly {
					break
				}
				w.log("%s   %s", s.id, describeChange(c))
			}
			inputs = append(inputs, Durable{pos})
			if w.faults && w.rng.IntN(250) == 0 {
				s.crash("after the commit")
				return
			}
		}
		if len(all.Changes) > 0 {
			s.check()
		}
		for _, m := range all.Messages {
			s.lawful(m)
			w.send(1-s.n, m.Data)
		}
		for _, a := range all.Answers {
			s.answered(a)
		}
		for _, l := range all.Lookups {
			hash, ok := s.disk.HashAt(l.Length)
			inputs = append(inputs, Looked{Peer: l.Peer, Length: l.Length, Hash: hash, Found: ok})
		}
		for _, e := range all.Events {
			w.log("%s   event: %s %s", s.id, e.Text, e.Reason)
		}
	}
}

// stale tells whether a message is of another session than the one that stands:
// it must not even count as a sign of life.
func (s *simSite) stale(in Input) (bool, time.Duration) {
	r, ok := in.(Received)
	if !ok {
		return false, 0
	}
	at := s.m.ordered[0]
	msg, err := decode(r.Data)
	return err == nil && msg.kind != kHello && msg.session != at.session, at.heard
}

func describe(in Input) string {
	if r, ok := in.(Received); ok {
		msg, err := decode(r.Data)
		if err != nil {
			return "bad message"
		}
		return fmt.Sprintf("got %s %v", msg.kind, msg.id.Number)
	}
	if b, ok := in.(Ingested); ok {
		return fmt.Sprintf("block %d", b.Segment.ID.Number)
	}
	return strings.TrimPrefix(fmt.Sprintf("%T %+v", in, in), "peer.")
}

func describeChange(c kms.Change) string {
	return fmt.Sprintf("op %d segment %d slots %d+%d role %d %s", c.Op, c.Segment.Number, c.First,
		c.Slots, c.Role, c.Reason)
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
	if a.Err != nil {
		return
	}
	s.durable(d.Initiator, a.Keys)
	if len(a.Keys) != d.Number {
		w.fail("draw of %d keys got %d", d.Number, len(a.Keys))
	}
	for _, k := range a.Keys {
		w.delivered++
		if !w.faults && w.now > w.calm+20*time.Second {
			w.quietGot[s.n]++
		}
		if k.SizeBits != d.SizeBits || k.Slots != kms.KeySlots(d.SizeBits, SlotBytes) {
			w.fail("key of %d bits in %d slots, asked %d", k.SizeBits, k.Slots, d.SizeBits)
		}
		for i := k.First; i < k.First+k.Slots; i++ {
			at := simSlot{k.Segment, i}
			if before := w.mastered[at]; before != 0 {
				w.fail("I1: slot %d of %s went to draw %d and to draw %d", i, k.Segment, before, d.Ticket)
			}
			w.mastered[at] = d.Ticket
		}
		if owner, ok := w.ownerOf[k.Segment]; ok && owner != s.n {
			w.fail("I4: both sites draw from %s", k.Segment)
		}
		w.ownerOf[k.Segment] = s.n
		if w.byID[k.ID] != nil {
			w.fail("I6: key_ID %s came twice", k.ID)
		}
		rec := &drawnKey{ref: k, initiator: d.Initiator, targets: d.Targets, site: s.n, at: w.now,
			lives:   [2]int{w.sites[0].life, w.sites[1].life},
			session: s.m.ordered[0].session,
			fetched: map[etsi014.SAEID]bool{}}
		w.byID[k.ID] = rec
		if !slices.ContainsFunc(d.Targets, func(t etsi014.SAEID) bool { return w.siteOf(t) == s.n }) {
			s.goneForGood(k.Segment)
		}
		w.keys = append(w.keys, rec)
	}
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
		case k != rec.ref:
			w.fail("I3: initiator has %+v, target has %+v", rec.ref, k)
		case w.corrupt[k.Segment.Number]:
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
	if !ok {
		s.w.fail("I5: %s says %s of %s and has %s on its disk", s.id, msg.kind, msg.id, seg.State)
	}
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
			rec.initiator == f.Initiator && w.now < rec.at+simRetention &&
			rec.session == s.m.ordered[0].session &&
			rec.lives == [2]int{w.sites[0].life, w.sites[1].life} {
			good++
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
	if good == len(f.IDs) {
		w.fail("L: %s may have all %d keys and is refused: %v", f.Target, good, err)
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
			if seg.left < 0 || seg.State == kms.StateClosed && seg.left != 0 {
				w.fail("I9: %s has %d slots left of %s segment %s", s.id, seg.left, seg.State, seg.ID)
			}
		}
		if uint64(left) != l.ledger.Stored {
			w.fail("I9: %s stores %d bits, ledger says %d", s.id, left, l.ledger.Stored)
		}
	}
}

// quiet stops all faults and demands that stock flows again (L1) and both
// sides agree (I7).
func (w *world) quiet() {
	w.faults = false
	w.log("quiet")
	w.calm = w.now
	began, next := w.now, w.now
	for w.now < began+50*time.Second {
		for _, s := range w.sites {
			if !s.alive && w.now >= s.ready {
				s.boot()
			}
		}
		if !w.linked {
			w.join()
		}
		if w.now >= next {
			next = w.now + time.Second
			if w.now < began+28*time.Second {
				w.makeBlock()
			}
			for _, s := range w.sites {
				for n := len(s.inbox); n > 0 && w.now < began+30*time.Second; n-- {
					s.ingest()
				}
				if w.now > began+8*time.Second && w.now < began+30*time.Second && w.drawsHere(s.n) {
					s.drawKeys()
				}
				s.fetchKeys()
			}
		}
		for len(w.net) > 0 && w.net[0].at <= w.now {
			w.deliver()
		}
		w.advance()
	}
	for _, s := range w.sites {
		for _, d := range s.asked {
			w.fail("L1: draw %d of %s waits since %v, it is %v", d.Ticket, s.id, d.since, w.now)
		}
		if w.quietGot[s.n] == 0 && w.drawsHere(s.n) {
			w.fail("L1: nothing could be drawn at %s after faults stopped: %s", s.id, s.dump())
		}
	}
	a, b := w.sites[0].unopened(), w.sites[1].unopened()
	if a != b {
		w.fail("I7: the sites disagree:\na holds %s\nb holds %s", a, b)
	}
}

// drawsHere: in a third of the histories each only one site has callers in the
// end, so that stock of the other's must come over.
func (w *world) drawsHere(site int) bool { return w.seed%3 == 2 || int(w.seed%3) == site }

func (s *simSite) unopened() string {
	var out []string
	for _, seg := range s.m.links[simLink].sorted() {
		if seg.State == kms.StateConfirmed {
			out = append(out, fmt.Sprintf("%d %s of %s", seg.ID.Number, seg.State, seg.Owner))
		}
	}
	return strings.Join(out, ", ")
}

func (s *simSite) dump() string {
	r := s.m.ordered[0]
	return fmt.Sprintf("up %v, reason %q, segments %s", r.up(), r.reason, s.unopened())
}
