package rekey

import (
	"bytes"
	"crypto/sha512"
	"encoding/binary"
	"fmt"
	"io"
	"net/netip"
	"time"

	"github.com/quietline/quietline/secret"
	"github.com/quietline/quietline/tunnel"
)

// Times of the handshake. Those without another word are from handshake.md 4.5.
const (
	resendFirst = 500 * time.Millisecond
	resendMax   = 10 * time.Second
	helloLife   = 60 * time.Second // M1 is repeated so long, then made anew
	// choiceLife is how long M3 is repeated: it outlasts the peer's call to its
	// key manager, and is shorter than abandonAfter.
	choiceLife   = 10 * time.Second
	replyLife    = 10 * time.Second
	pendingLife  = 10 * time.Second // covers our key manager's answer and lost M3s
	maxPending   = 8
	maxAttempts  = 3
	maxKeyBudget = 5 * time.Second // less than choiceLife
	// bootGrace lets the scheduled initiator go first when neither end has an
	// epoch; an end that restarted alone is up after this and two round trips.
	bootGrace = time.Second
	// abandonAfter is when the peer has surely given up, or installed, an epoch
	// of ours that it has not used: longer than choiceLife twice.
	abandonAfter = 25 * time.Second
	overlapMax   = 10 * time.Second // DESIGN.md section 7
	// keyMemory is how long a key_ID is remembered as used.
	keyMemory = time.Hour
)

// Machine is one end of a line's handshake. It does no I/O, reads no clock and
// is not safe for concurrent use: one goroutine owns it.
//
// The end whose SHA-384(static public key) is smaller is the scheduled
// initiator: it starts every handshake and draws the QKD keys. The other end
// starts one only when the epoch is overdue, when it has no epoch (after a
// second, so that an end that restarted need not wait for the other to
// notice), or when its operator or its volume limit asks for one.
type Machine struct {
	cfg        Config
	kem        kem
	name       string // protocol name
	self, peer []byte // static public keys
	scheduled  bool
	boot       [16]byte
	env        envelope

	now time.Time // of the present Step
	out *Output   // of the present Step

	inbox    []event
	requests []*KeyRequest
	asked    map[uint64]asker
	lastAsk  uint64

	init    *initiation
	pending map[uint32]*pending
	replies map[[32]byte]reply

	line
	chains [2]chain                   // newest first; the second until the peer confirmed the first
	used   map[tunnel.KeyID]time.Time // when each key_ID was named in a handshake
	// usedList holds the same, oldest first.
	usedList []tunnel.KeyID
	source   source
	stock    stock

	notBefore  time.Time // no handshake of ours starts earlier
	wanted     bool      // by operator or volume
	freshAt    time.Time // when the last QKD key went into an epoch; the first Step before
	handshakes uint64
	number     uint64 // of the newest epoch made
	rtt        time.Duration
	lead       time.Duration // what our last handshake took: the next starts so much earlier
	took       time.Duration // by our last good handshake
	peerIntro  intro         // of the last proven peer
	alarms     map[string]bool
	failure    string // why the last handshake of ours failed
	stats      Stats
}

// event is an input that may install an epoch; there is one a Step.
type event struct {
	datagram []byte
	from     netip.AddrPort
	load     bool
	keys     *KeyAnswer
}

// New checks cfg, takes ownership of its secrets (also on error: then they are
// cleared) and returns a machine without an epoch. The first Step starts it.
func New(cfg Config) (*Machine, error) {
	cfg.setDefaults()
	m, err := newMachine(cfg)
	if err != nil {
		cfg.StaticSeed.Clear()
		cfg.LinkSecret.Clear()
		return nil, fmt.Errorf("set up rekey: %w", err)
	}
	return m, nil
}

func newMachine(cfg Config) (*Machine, error) {
	if err := cfg.check(); err != nil {
		return nil, err
	}
	k, name, err := suiteKEM(cfg.Suite)
	if err != nil {
		return nil, err
	}
	m := &Machine{cfg: cfg, kem: k, name: name, peer: bytes.Clone(cfg.PeerStatic), rtt: cfg.RTT,
		asked: map[uint64]asker{}, pending: map[uint32]*pending{}, replies: map[[32]byte]reply{},
		used: map[tunnel.KeyID]time.Time{}, alarms: map[string]bool{}}
	m.cfg.PeerStatic = nil
	if m.self, err = k.public(cfg.StaticSeed); err != nil {
		return nil, err
	}
	// A bad peer key shall show now rather than at the first handshake.
	if err := CheckPublic(cfg.Suite, m.peer); err != nil {
		return nil, fmt.Errorf("%w: peer's static key: %w", ErrConfig, err)
	}
	ours, theirs := sha512.Sum384(m.self), sha512.Sum384(m.peer)
	order := bytes.Compare(ours[:], theirs[:])
	if order == 0 {
		return nil, fmt.Errorf("%w: both ends have the same static key", ErrConfig)
	}
	m.scheduled = order < 0
	if _, err := io.ReadFull(cfg.Rand, m.boot[:]); err != nil {
		return nil, fmt.Errorf("read random: %w", err)
	}
	out, in := byte(0), byte(1) // direction: 0 = from the scheduled initiator
	if !m.scheduled {
		out, in = in, out
	}
	m.env = envelope{suite: cfg.Suite, rand: cfg.Rand,
		out:  macKey(cfg.LinkSecret, "mac1", out, theirs),
		in:   macKey(cfg.LinkSecret, "mac1", in, ours),
		bake: macKey(cfg.LinkSecret, "cookie", out, theirs),
		eat:  macKey(cfg.LinkSecret, "cookie", in, ours)}
	return m, nil
}

// Clear wipes every secret the machine holds; it does nothing afterwards.
// Epochs handed out stay the caller's to clear.
func (m *Machine) Clear() {
	m.init.clear()
	for _, p := range m.pending {
		p.clear()
	}
	for _, e := range m.inbox {
		e.keys.clear()
	}
	for _, c := range m.chains {
		c.rk.Clear()
	}
	for _, keys := range append(m.stock.sets, m.stock.foretold) {
		wipe(keys)
	}
	m.cfg.StaticSeed.Clear()
	m.cfg.LinkSecret.Clear()
	for _, s := range [...]secret.Bytes{m.env.in, m.env.out, m.env.bake, m.env.eat,
		m.env.cookie.value, m.env.jar.secrets[0], m.env.jar.secrets[1]} {
		s.Clear()
	}
	*m = Machine{cfg: Config{Policy: m.cfg.Policy}, stats: m.stats}
}

// Step takes what happened and the present time, and returns what to do. Call
// it with an empty Input first, then at every input and at Output.Wake. Time
// must not run backwards (monotonic). The input's datagram is not kept.
func (m *Machine) Step(now time.Time, in Input) Output {
	var out Output
	if m.kem == nil {
		in.Keys.clear()
		return out
	}
	m.start(now)
	jump := clockJump(m.now, now)
	m.now, m.out = now, &out
	defer func() { m.out = nil }()
	switch {
	case in.Restored:
		m.restart("this machine was restored from a snapshot")
	case jump > jumpMax:
		m.restart("the wall clock has jumped: suspended, or restored from a snapshot")
	}
	m.wanted = m.wanted || in.Rekey
	if in.Heard != 0 {
		m.heard(in.Heard)
	}
	m.sent(in.Sent)
	if in.Keys != nil {
		m.inbox = append(m.inbox, event{keys: in.Keys})
	}
	if in.Datagram != nil {
		m.inbox = append(m.inbox, event{datagram: in.Datagram, from: in.From, load: in.Load})
	}
	for len(m.inbox) > 0 && out.Install == nil {
		e := m.inbox[0]
		m.inbox = m.inbox[1:]
		if e.keys != nil {
			m.answered(e.keys)
		} else {
			m.datagram(e)
		}
	}
	for i := range m.inbox {
		m.inbox[i].datagram = bytes.Clone(m.inbox[i].datagram)
	}
	m.tick()
	if len(m.requests) > 0 {
		out.Request, m.requests = m.requests[0], m.requests[1:]
	}
	out.Wake = m.wake()
	return out
}

// start notes the time of the first Step.
func (m *Machine) start(now time.Time) {
	if !m.line.began.IsZero() {
		return
	}
	m.line.began, m.line.idle, m.freshAt = now, now, now
	m.line.level, m.line.since, m.line.why = Blocked, now, "no epoch yet"
}

func (m *Machine) datagram(e event) {
	load := e.load || len(m.pending) > loadPending
	msg, fault := m.env.unwrap(m.now, e.datagram, e.from, load)
	switch fault {
	case faultLoad:
		m.needCookie(e.datagram, e.from)
	case faultForm:
		m.stats.BadForm++
	case faultMAC:
		m.stats.BadMAC++
	}
	if msg == nil {
		return
	}
	if r, ok := m.replies[msg.digest()]; ok {
		m.stats.Repeated++
		m.repeat(r.datagrams)
		return
	}
	var err error
	switch msg.kind {
	case kindM1:
		err = m.takeM1(msg)
	case kindM2:
		err = m.takeM2(msg)
	case kindM3:
		err = m.takeM3(msg)
	case kindM4:
		err = m.takeM4(msg)
	case kindCookie:
		err = m.takeCookie(msg)
	}
	if err != nil {
		m.stats.BadMessages++ // not answered and not logged: anybody can replay
	}
}

// tick does all that is due by now.
func (m *Machine) tick() {
	m.ageEpochs()
	m.ageStock()
	m.forget()
	m.tickSource()
	if m.init != nil {
		m.tickInitiation()
	}
	if m.init == nil && m.startAt() != never && !m.startAt().After(m.now) {
		if err := m.initiate(); err != nil {
			m.fail(fmt.Sprintf("cannot start a handshake: %v", err), m.cfg.ProbeEvery)
		}
	}
	m.ahead()
	if !m.line.confirmAt.IsZero() && !m.line.confirmAt.After(m.now) {
		m.confirm()
	}
}

// never is a time for what no timer waits for.
var never time.Time

// earliest returns the earlier of two times, taking never as the latest.
func earliest(a, b time.Time) time.Time {
	if a == never || b != never && b.Before(a) {
		return b
	}
	return a
}

func (m *Machine) wake() time.Time {
	if len(m.inbox) > 0 || len(m.requests) > 0 {
		return m.now
	}
	w := earliest(m.line.wake(m.cfg.HoldMax), m.source.probeAt)
	w = earliest(w, m.aheadAt())
	if len(m.stock.until) > 0 {
		w = earliest(w, m.stock.until[0])
	}
	if len(m.stock.foretold) > 0 {
		w = earliest(w, m.stock.expires)
	}
	if m.init != nil {
		w = earliest(w, earliest(m.init.resendAt, m.init.until))
	} else {
		w = earliest(w, m.startAt())
	}
	for _, p := range m.pending {
		w = earliest(w, p.until)
	}
	return w
}

// forget drops what has timed out at the responder, and old key_IDs.
func (m *Machine) forget() {
	for i, p := range m.pending {
		if p.until.After(m.now) {
			continue
		}
		if p.phase != collecting {
			m.dropPending(i)
			continue
		}
		// No answer of our key manager: the initiator may go on without.
		m.setSource(sourceDown)
		p.until = m.now.Add(pendingLife)
		m.refuse(p, verdict{status: refusedDown})
	}
	for d, r := range m.replies {
		if !r.until.After(m.now) && (m.next == nil || m.next.reply != d) {
			delete(m.replies, d)
		}
	}
	for len(m.usedList) > 0 && m.now.Sub(m.used[m.usedList[0]]) > keyMemory {
		delete(m.used, m.usedList[0])
		m.usedList = m.usedList[1:]
	}
}

// freshIndex draws a receive index that names nothing of ours yet.
func (m *Machine) freshIndex() (uint32, error) {
	for {
		var b [4]byte
		if _, err := io.ReadFull(m.cfg.Rand, b[:]); err != nil {
			return 0, fmt.Errorf("read random: %w", err)
		}
		i := binary.BigEndian.Uint32(b[:])
		if _, taken := m.pending[i]; i != 0 && !taken && !m.line.holds(i) &&
			(m.init == nil || m.init.index != i) {
			return i, nil
		}
	}
}

// jitter spreads a duration evenly over 75 to 125 percent: ends that failed
// together shall not try again together.
func (m *Machine) jitter(d time.Duration) time.Duration {
	return d*3/4 + m.random(d/2)
}

// random is an even duration in [0, d); zero if randomness fails, for it only
// spreads timers.
func (m *Machine) random(d time.Duration) time.Duration {
	var b [8]byte
	if _, err := io.ReadFull(m.cfg.Rand, b[:]); err != nil || d <= 0 {
		return 0
	}
	return time.Duration(binary.BigEndian.Uint64(b[:]) % uint64(d))
}

func (m *Machine) event(kind string, level Level, reason string) {
	m.out.Events = append(m.out.Events, Event{Kind: kind, Level: level, Reason: reason})
}

// alarm tells a reason once, until a good handshake clears it.
func (m *Machine) alarm(reason string) {
	if m.alarms[reason] {
		return
	}
	m.alarms[reason] = true
	m.event("alarm", m.line.level, reason)
}

// send puts a message into the output and returns its datagrams for repeats.
func (m *Machine) send(msg message) ([][]byte, error) {
	d, err := m.env.wrap(m.now, msg)
	if err != nil {
		return nil, err
	}
	m.repeat(d)
	return d, nil
}

// repeat sends datagrams again, as copies: the caller owns what it was given.
func (m *Machine) repeat(datagrams [][]byte) {
	var again [][]byte
	for _, d := range datagrams {
		again = append(again, bytes.Clone(d))
	}
	m.env.stamp(m.now, again)
	m.out.Datagrams = append(m.out.Datagrams, again...)
}

func (a *KeyAnswer) clear() {
	if a != nil {
		wipe(a.Keys)
	}
}
