package peer

import (
	"errors"
	"fmt"
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

var simSAEs = []simSAE{{"a1", 0}, {"a2", 0}, {"a3", 0}, {"b1", 1}, {"b2", 1}, {"b3", 1}}

// simSizes are asked for: mostly the usual one, also less than a slot, a cut
// last slot, and a whole segment.
var simSizes = []int{256, 256, 256, 256, 256, 128, 512, 768, 64, 1000, 2048}

// drawnKey is a key that an initiator was answered.
type drawnKey struct {
	ref       KeyRef
	initiator etsi014.SAEID
	targets   []etsi014.SAEID
	site      int
	at        time.Duration
	lives     [2]int // of the sites, when it was drawn
	session   kms.Session
	bits      uint64 // which bits: the same number, the same key
	fetched   map[etsi014.SAEID]bool
}

// local tells whether the key is of its site's loopback pool.
func (k *drawnKey) local() bool { return k.ref.Segment.Link == kms.Loopback }

// simSlot is a slot of bits that exist once, whatever number their segment has.
type simSlot struct {
	bits uint64
	slot int
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
	filled    uint64 // counts segments of loopback pools
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

func (w *world) siteOf(sae etsi014.SAEID) int {
	for _, x := range simSAEs {
		if x.id == sae {
			return x.site
		}
	}
	return -1
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
