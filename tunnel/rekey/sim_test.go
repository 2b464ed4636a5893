package rekey

import (
	"bytes"
	"container/heap"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"time"

	"github.com/quietline/quietline/secret"
	"github.com/quietline/quietline/tunnel"
)

// world is two machines, two key managers and a network, all in virtual time
// from one seed.
type world struct {
	rng   *rand.Rand
	now   time.Time
	queue events
	seq   int
	ends  [2]*end
	net   network
	kme   keyStore
	log   func(format string, args ...any)
	fault error                       // the first broken promise
	toy   bool                        // see toyKEM
	drop  func(e *end, d []byte) bool // loses a datagram, or a record (nil)
	bent  func(*end)                  // plants a bug into each end
	keys  map[[32]byte]bool           // every send key ever installed
}

// network says what happens to a datagram or record on its way.
type network struct {
	loss, dup   float64
	delay, vary time.Duration
	cut         [2]bool // from end i
}

// end is one machine and the data plane around it, as small as can be: it
// keeps the keys of the epochs and seals numbered records.
type end struct {
	w       *world
	id      int
	m       *Machine
	life    int // restarts
	recv    map[uint32]*Epoch
	heard   map[uint32]bool
	send    *Epoch
	blocked bool
	ever    map[uint32]bool // epochs held at any time of this life
	gone    map[uint32]bool // epochs dropped at HoldMax
	wake    time.Time
	events  []Event
	run     int // epochs in a row without a QKD key of their own
	opened  int
	lost    int
	ups     int
	cfg     func() Config
	usedIDs map[tunnel.KeyID]bool
	mute    bool               // no records but what the machine asks for
	loaded  func() bool        // says that datagrams pile up
	keys    func([]tunnel.Key) // sees what the key manager gives
	trace   func(d []byte)
	clock   *time.Duration          // gathers what Step takes
	bend    func(*Output)           // plants a bug
	tamper  func(to *end, d []byte) // sees each datagram that arrives
}

type item struct {
	at  time.Time
	seq int
	do  func()
}

type events []item

func (e events) Len() int { return len(e) }
func (e events) Less(i, j int) bool {
	return e[i].at.Before(e[j].at) || e[i].at.Equal(e[j].at) && e[i].seq < e[j].seq
}
func (e events) Swap(i, j int) { e[i], e[j] = e[j], e[i] }
func (e *events) Push(x any)   { *e = append(*e, x.(item)) }
func (e *events) Pop() any     { old := *e; x := old[len(old)-1]; *e = old[:len(old)-1]; return x }

// epochZero is when virtual time starts.
var epochZero = time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)

func seeds(i int) secret.Bytes {
	return secret.Copy(bytes.Repeat([]byte{byte(i + 1)}, seedSize))
}

func linkSecret() secret.Bytes { return secret.Copy(bytes.Repeat([]byte{0x5c}, 32)) }

// publics caches the two static keys: deriving them is slow.
var publics = func() (p [2][]byte) {
	for i := range p {
		p[i], _ = Public(XWing, seeds(i))
	}
	return p
}()

// config is a configuration of end i with randomness from the world.
func (w *world) config(i int, p Policy) Config {
	return Config{LinkID: [16]byte{7}, StaticSeed: seeds(i), PeerStatic: publics[1-i],
		LinkSecret: linkSecret(), Policy: p, Rand: rngReader{w.rng}}
}

type rngReader struct{ *rand.Rand }

func (r rngReader) Read(b []byte) (int, error) {
	n := len(b)
	for ; len(b) >= 8; b = b[8:] {
		binary.LittleEndian.PutUint64(b, r.Uint64())
	}
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return n, nil
}

func newWorld(seed uint64) *world {
	w := &world{rng: rand.New(rand.NewPCG(seed, 1)), now: epochZero,
		kme:  keyStore{keys: map[tunnel.KeyID][]byte{}, drawn: map[tunnel.KeyID]bool{}},
		keys: map[[32]byte]bool{}, net: network{delay: 10 * time.Millisecond}, log: func(string, ...any) {}}
	return w
}

// start makes both ends. tweak may change each configuration.
func (w *world) start(p Policy, tweak func(i int, c *Config)) {
	for i := range w.ends {
		e := &end{w: w, id: i, usedIDs: map[tunnel.KeyID]bool{}}
		e.cfg = func() Config {
			c := w.config(i, p)
			if tweak != nil {
				tweak(i, &c)
			}
			return c
		}
		if w.bent != nil {
			w.bent(e)
		}
		w.ends[i] = e
	}
	for _, e := range w.ends {
		e.boot()
	}
}

func (w *world) at(d time.Duration, do func()) {
	w.seq++
	heap.Push(&w.queue, item{w.now.Add(d), w.seq, do})
}

// run lets virtual time pass.
func (w *world) run(d time.Duration) {
	end := w.now.Add(d)
	for len(w.queue) > 0 && !w.queue[0].at.After(end) && w.fault == nil {
		it := heap.Pop(&w.queue).(item)
		w.now = it.at
		it.do()
	}
	w.now = end
}

// until runs in steps until cond holds, at most d; it tells whether it does.
func (w *world) until(d time.Duration, cond func() bool) bool {
	end := w.now.Add(d)
	for !cond() && w.fault == nil {
		if len(w.queue) == 0 || w.queue[0].at.After(end) {
			w.now = end
			return cond()
		}
		it := heap.Pop(&w.queue).(item)
		w.now = it.at
		it.do()
	}
	return cond()
}

func (w *world) broken(format string, args ...any) {
	if w.fault == nil {
		w.fault = fmt.Errorf("at %v: %s", w.now.Sub(epochZero), fmt.Sprintf(format, args...))
	}
}

func (w *world) scheduled() *end {
	for _, e := range w.ends {
		if e.m.scheduled {
			return e
		}
	}
	return nil
}

func (w *world) other(e *end) *end { return w.ends[1-e.id] }

// boot starts or restarts an end without any memory.
func (e *end) boot() {
	if e.m != nil {
		e.m.Clear()
	}
	m, err := New(e.cfg())
	if err != nil {
		panic(err)
	}
	if e.w.toy {
		m.toys(seeds(1 - e.id))
	}
	e.m, e.life = m, e.life+1
	e.gone, e.ever = map[uint32]bool{}, map[uint32]bool{}
	e.recv, e.heard, e.send, e.blocked = map[uint32]*Epoch{}, map[uint32]bool{}, nil, true
	e.step(Input{})
}

func (e *end) step(in Input) {
	began := time.Now()
	out := e.m.Step(e.w.now, in)
	if e.clock != nil {
		*e.clock += time.Since(began)
	}
	e.obey(out)
}

func (e *end) obey(out Output) {
	w := e.w
	if e.bend != nil {
		e.bend(&out)
	}
	e.describe(&out)
	if out.Install != nil {
		if key := [32]byte(out.Install.SendKey.Expose()); w.keys[key] {
			w.broken("end %d installs a key that was used before", e.id)
		} else {
			w.keys[key] = true
		}
		if e.recv[out.Install.RecvIndex] != nil {
			w.broken("end %d installs index %x twice", e.id, out.Install.RecvIndex)
		}
		e.recv[out.Install.RecvIndex] = out.Install
		e.ever[out.Install.RecvIndex] = true
		for _, id := range out.Install.KeyIDs {
			if e.usedIDs[id] {
				w.broken("end %d uses key_ID %x twice", e.id, id)
			}
			e.usedIDs[id] = true
		}
	}
	if out.Send != 0 {
		if e.send = e.recv[out.Send]; e.send == nil {
			w.broken("end %d sends with an epoch it does not hold", e.id)
			return
		}
		e.blocked = false
		e.ups++
		e.count(e.send)
	}
	if out.Confirm {
		e.record()
	}
	for _, i := range out.Retire {
		if e.recv[i] == nil {
			w.broken("end %d retires unknown index %x", e.id, i)
		} else if e.send == e.recv[i] && !out.Stop && out.Send == 0 {
			w.broken("end %d retires its sending epoch", e.id)
		}
		if ep := e.recv[i]; ep != nil && w.now.Sub(ep.Made) >= e.m.cfg.HoldMax {
			e.gone[i] = true
		}
		delete(e.recv, i)
	}
	// The old epoch may still be there while the new one is installed in the
	// same step, so the limit holds after the step.
	if len(e.recv) > 2 {
		w.broken("end %d holds %d receive epochs", e.id, len(e.recv))
	}
	if out.Stop {
		e.blocked, e.send = true, nil
	}
	for _, d := range out.Datagrams {
		if len(d) > maxDatagram {
			w.broken("datagram of %d bytes", len(d))
		}
		e.carry(d, func(to *end) {
			if e.tamper != nil {
				e.tamper(to, d)
			}
			to.step(Input{Datagram: d, From: addrOf(e.id), Load: to.loaded != nil && to.loaded()})
		})
	}
	if out.Request != nil {
		e.request(*out.Request)
	}
	e.events = append(e.events, out.Events...)
	for _, ev := range out.Events {
		e.note("event: %s %s %s", ev.Kind, ev.Level, ev.Reason)
	}
	if !out.Wake.IsZero() {
		life, at := e.life, out.Wake
		e.wake = at
		w.at(max(at.Sub(w.now), 0), func() {
			if e.life == life && e.wake.Equal(at) {
				e.wake = time.Time{}
				e.step(Input{})
			}
		})
	}
}

// count follows the chain from outside: how many epochs in a row came
// without a fresh QKD key.
func (e *end) count(ep *Epoch) {
	if len(ep.KeyIDs) > 0 {
		e.run = 0
		return
	}
	e.run++
	if c := e.m.cfg; c.Policy == QKDRequired && e.run > c.MaxChain {
		e.w.broken("end %d chains %d epochs, %d are allowed", e.id, e.run, c.MaxChain)
	}
}

// note writes a line into the world's log: I is the scheduled initiator.
func (e *end) note(format string, args ...any) {
	name := "R"
	if e.m.scheduled {
		name = "I"
	}
	e.w.log("%8.3f %s %s", e.w.now.Sub(epochZero).Seconds(), name, fmt.Sprintf(format, args...))
}

// describe notes what a step told its caller to do.
func (e *end) describe(out *Output) {
	if ep := out.Install; ep != nil {
		e.note("installs epoch %d, %s, %d keys", ep.Number, ep.Level, len(ep.KeyIDs))
	}
	if ep := e.recv[out.Send]; ep != nil {
		e.note("sends in epoch %d", ep.Number)
	} else if out.Send != 0 {
		e.note("sends in it")
	}
	for _, i := range out.Retire {
		if ep := e.recv[i]; ep != nil {
			e.note("retires epoch %d", ep.Number)
		}
	}
	if out.Stop {
		e.note("stops")
	}
	kinds := map[byte]int{}
	for i, d := range out.Datagrams {
		if kinds[d[0]] += len(d); i == len(out.Datagrams)-1 || out.Datagrams[i+1][0] != d[0] {
			e.note("-> M%d, %d bytes", d[0], kinds[d[0]])
		}
	}
	switch r := out.Request; {
	case r == nil:
	case r.New > 0:
		e.note("draws %d keys", r.New)
	case len(r.IDs) > 0:
		e.note("collects %d keys", len(r.IDs))
	default:
		e.note("probes its key manager")
	}
}

func addrOf(i int) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, byte(i)}), 4500)
}

// carry moves something over the network; f runs once per copy that arrives.
func (e *end) carry(d []byte, f func(to *end)) {
	w := e.w
	to := w.other(e)
	copies := 1
	if w.rng.Float64() < w.net.dup {
		copies = 2
	}
	if e.trace != nil {
		e.trace(d)
	}
	if w.drop != nil && w.drop(e, d) {
		return
	}
	for range copies {
		if w.net.cut[e.id] || w.rng.Float64() < w.net.loss {
			continue
		}
		delay := w.net.delay
		if w.net.vary > 0 {
			delay += time.Duration(w.rng.Int64N(int64(w.net.vary)))
		}
		w.at(delay, func() { f(to) })
	}
}

// record seals one data record and carries it. It checks that the other end
// holds the epoch, unless that end has lost its memory or is blocked.
func (e *end) record() {
	w := e.w
	if e.send == nil {
		w.broken("end %d seals a record while it is blocked", e.id)
		return
	}
	ep := e.send
	to := w.other(e)
	life := to.life
	e.judge(ep, to)
	e.carry(nil, func(to *end) {
		if to.life != life {
			return
		}
		peer := to.recv[ep.SendIndex]
		switch {
		case peer == nil:
			to.lost++
		case !bytes.Equal(peer.RecvKey.Expose(), ep.SendKey.Expose()) ||
			!bytes.Equal(peer.RecvIV.Expose(), ep.SendIV.Expose()) ||
			!bytes.Equal(peer.SendKey.Expose(), ep.RecvKey.Expose()) ||
			peer.Level != ep.Level || peer.Number != ep.Number:
			w.broken("ends disagree about epoch %d", ep.Number)
		default:
			to.opened++
			if !to.heard[ep.SendIndex] {
				to.heard[ep.SendIndex] = true
				to.step(Input{Heard: ep.SendIndex})
			}
		}
	})
}

// judge checks at the moment of sealing that the epoch may be used and that
// the other end can open it, unless that end has lost it for a good reason.
func (e *end) judge(ep *Epoch, to *end) {
	w := e.w
	if age := w.now.Sub(ep.Made); age > e.m.cfg.HoldMax {
		w.broken("end %d seals with an epoch of age %v", e.id, age)
	}
	if p := e.m.cfg.Policy; ep.Level < min(p.floor(), QKD) || ep.Level == QKD && len(ep.KeyIDs) == 0 {
		w.broken("end %d seals without a QKD key under %v", e.id, p)
	}
	restarted := to.life > 1 && !to.ever[ep.SendIndex]
	if to.recv[ep.SendIndex] == nil && !to.gone[ep.SendIndex] && !restarted {
		w.broken("end %d seals in epoch %d, which the other end has dropped", e.id, ep.Number)
	}
}

// up tells whether both ends send with the same epoch.
func (w *world) up() bool {
	a, b := w.ends[0], w.ends[1]
	return a.send != nil && b.send != nil && a.send.Number == b.send.Number &&
		a.send.RecvIndex == b.send.SendIndex && b.send.RecvIndex == a.send.SendIndex
}
