package pad

import (
	"crypto/rand"
	"fmt"
	"io"
	"time"

	"github.com/quietline/quietline/secret"
	"github.com/quietline/quietline/tunnel"
)

// Config of one end's pad. Zero fields take the default named with them.
type Config struct {
	// Target is how much pad is held ready for sending, bytes, 64 KiB to
	// 64 MiB; the marks count from it. Default 1 MiB.
	Target int
	// BlockLen is the size of a block, bytes, 2 KiB to 64 KiB; default 16 KiB
	// (handshake.md 4.9). A block may be smaller where keys come slowly.
	BlockLen int
	// Budget is the time one call to the key manager may take; default 2 s.
	Budget time.Duration
	// ProbeEvery is the pause after a call that failed; default 10 s.
	ProbeEvery time.Duration
	// Rand draws the boot identifier; nil = crypto/rand.
	Rand io.Reader
}

// Times of the protocol.
const (
	resendFirst = 500 * time.Millisecond // as a handshake's, handshake.md 4.5
	resendMax   = 10 * time.Second
	draftLife   = 60 * time.Second
	// overlap is how long a block stays after the peer was seen on a later one,
	// for records that the network holds back: as an old epoch at most.
	overlap = 10 * time.Second
	// patience is how long a block waits to become full, if it could be used.
	patience   = 60 * time.Second
	helloEvery = time.Second
	// leastBlock holds r, and a record of the largest bucket on a path of 1500
	// bytes.
	leastBlock = 2048
	maxBlock   = 64 << 10
	// maxDrafts blocks are under way to the peer at a time.
	maxDrafts = 4
	// maxHeld blocks of the peer's are held: 64 MiB at most.
	maxHeld = 1024
)

// Input is one thing that happened. Any combination of fields may be set.
type Input struct {
	// Live says that the line carries records and both ends want pad; set it
	// at every Step.
	Live    bool
	Control []byte  // body of a CONTROL record of the peer, not of type STATE
	Answer  *Answer // to an earlier Request, exactly one for each
	// Stray says that a record named a block that is not held here.
	Stray bool
	// Void says that another copy of this memory may exist: all pad goes.
	Void bool
}

// Request asks the caller to draw keys (New), collect them (IDs), or, with
// neither, for the status of the key source.
type Request struct {
	ID       uint64
	New      int
	IDs      []tunnel.KeyID
	SizeBits int
	Budget   time.Duration
}

// Answer is the outcome; the machine takes ownership of Keys.
type Answer struct {
	ID    uint64
	Keys  []tunnel.Key
	Stock tunnel.Stock // of a status
	Err   error        // wraps one of tunnel.ErrKey…
}

// Event is something an operator may want to see.
type Event struct {
	Alarm  bool
	Reason string
}

// Output is what the caller must do.
type Output struct {
	Send     [][]byte // bodies of CONTROL records to the peer
	Requests []Request
	Events   []Event
	Wake     time.Time // call Step again at this time; zero = no need
}

// draft is a block of ours on its way to the peer.
type draft struct {
	number  uint32
	bits    secret.Bytes // of BlockLen; the first n bytes are there
	n       int
	keyLen  int
	parts   [][]tunnel.KeyID
	began   time.Time
	request uint64 // under way; 0 = none

	closed   bool // nothing is drawn for it any more: announced
	ready    bool
	until    time.Time
	gap      time.Duration
	resendAt time.Time
}

// arrival is a block of the peer's on its way to us.
type arrival struct {
	parts    [][]tunnel.Key
	asked    []bool
	got      int
	keyLen   int
	refused  bool
	until    time.Time
	requests []uint64
}

// asker is what a request was made for.
type asker struct {
	draft  *draft
	block  uint32 // of an arrival
	part   int
	ids    []tunnel.KeyID // of that part
	status bool
}

// Machine is one end's pad: it draws, announces, collects, retires. It does no
// I/O, reads no clock, and one goroutine owns it; Out and In of it may be used
// by others at the same time.
type Machine struct {
	cfg  Config
	out  Out
	in   In
	boot boot
	peer boot // zero = not met

	now time.Time
	res *Output

	live     bool
	drafts   []*draft // by number
	arrivals map[uint32]*arrival
	ids      idMemory
	asked    map[uint64]asker
	lastAsk  uint64
	number   uint32 // of the last draft

	keyLen    int // bytes of a key to draw; 0 = the key source has not been asked
	perCall   int
	simulated bool
	notBefore time.Time // nothing is drawn earlier
	trouble   string    // why nothing is drawn; "" = all is well
	helloAt   time.Time // no HELLO earlier
	seen      uint32    // newest block in use by the peer …
	seenAt    time.Time // … and since when

	meter meter
	mark  Mark
	up    bool
	stats Stats
}

// Stats counts since the machine was made; all but the last two are bytes.
type Stats struct {
	Drawn, Lost       uint64 // of keys; lost = voided before a record could use it
	Collected         uint64
	Sealed, Opened    uint64 // records
	Blocks, Collision uint64 // blocks taken into use; key_IDs or sizes that were wrong
}

// New checks cfg and returns a machine without pad.
func New(cfg Config) (*Machine, error) {
	def(&cfg.Target, 1<<20)
	def(&cfg.BlockLen, 16<<10)
	def(&cfg.Budget, 2*time.Second)
	def(&cfg.ProbeEvery, 10*time.Second)
	if cfg.Rand == nil {
		cfg.Rand = rand.Reader
	}
	switch {
	case cfg.Target < 64<<10 || cfg.Target > 64<<20:
		return nil, fmt.Errorf("set up pad: %w: %d bytes to hold, 64 KiB to 64 MiB are possible",
			ErrConfig, cfg.Target)
	case cfg.BlockLen < leastBlock || cfg.BlockLen > maxBlock || cfg.BlockLen%unit != 0:
		return nil, fmt.Errorf("set up pad: %w: block of %d bytes", ErrConfig, cfg.BlockLen)
	case cfg.Budget <= 0 || cfg.ProbeEvery <= 0:
		return nil, fmt.Errorf("set up pad: %w: a time is negative", ErrConfig)
	}
	m := &Machine{cfg: cfg, arrivals: map[uint32]*arrival{}, asked: map[uint64]asker{},
		out: Out{target: cfg.Target, at: rLen}, in: In{blocks: map[uint32]*incoming{}}}
	if _, err := io.ReadFull(cfg.Rand, m.boot[:]); err != nil {
		return nil, fmt.Errorf("set up pad: %w", err)
	}
	return m, nil
}

func def[T comparable](field *T, value T) {
	var zero T
	if *field == zero {
		*field = value
	}
}

// Out is the pad for sending, In that of what the peer sends.
func (m *Machine) Out() *Out { return &m.out }

// In is the pad of what the peer sends.
func (m *Machine) In() *In { return &m.in }

// Step takes what happened and the present time, and returns what to do.
func (m *Machine) Step(now time.Time, in Input) Output {
	var res Output
	m.now, m.res = now, &res
	defer func() { m.res = nil }()
	if in.Void {
		m.void()
	}
	if in.Answer != nil {
		m.answered(in.Answer)
	}
	if in.Control != nil {
		m.control(in.Control)
	}
	if in.Live && (!m.live || in.Stray) {
		m.hello()
	}
	if in.Live && !m.live {
		m.notBefore = now
	}
	m.live = in.Live
	m.tick()
	res.Wake = m.wake()
	return res
}

// Clear wipes all pad; the machine does nothing useful afterwards.
func (m *Machine) Clear() {
	m.drop()
	m.live = false
}

// drop wipes all pad of both directions, and what is on its way.
func (m *Machine) drop() {
	m.out.void()
	m.in.void()
	for _, d := range m.drafts {
		m.lose(d)
	}
	m.drafts = nil
	for n := range m.arrivals {
		m.forget(n)
	}
	clear(m.asked) // answers to come are wiped
	m.seen, m.up = 0, false
}

// void begins a new life, which the peer will see.
func (m *Machine) void() {
	m.drop()
	m.event(true, "all one-time pad is void: another copy of this memory may exist")
	// Without randomness the peer would keep its pad, which is void here.
	if _, err := io.ReadFull(m.cfg.Rand, m.boot[:]); err != nil {
		m.boot[0]++
	}
	m.helloAt = time.Time{}
	if m.live {
		m.hello()
	}
}

func (m *Machine) event(alarm bool, format string, args ...any) {
	m.res.Events = append(m.res.Events, Event{alarm, fmt.Sprintf(format, args...)})
}

func (m *Machine) send(msg message) {
	msg.boot = m.boot
	m.res.Send = append(m.res.Send, msg.append(nil))
}

// hello shows our boot, at most once a second.
func (m *Machine) hello() {
	if m.now.Before(m.helloAt) {
		return
	}
	m.helloAt = m.now.Add(helloEvery)
	m.send(message{kind: kindHello})
}

func (m *Machine) ask(r Request, who asker) uint64 {
	m.lastAsk++
	r.ID, r.Budget = m.lastAsk, m.cfg.Budget
	m.asked[r.ID] = who
	m.res.Requests = append(m.res.Requests, r)
	return r.ID
}

// tick does all that is due by now.
func (m *Machine) tick() {
	m.retire()
	m.measure()
	for n, a := range m.arrivals {
		if !a.until.After(m.now) {
			m.forget(n)
		}
	}
	if !m.live {
		return
	}
	m.tickDrafts()
	m.plan()
}

// retire wipes the blocks that the peer has left behind.
func (m *Machine) retire() {
	newest, _ := m.in.state()
	if newest != m.seen {
		m.seen, m.seenAt = newest, m.now
	}
	if m.seen != 0 && m.now.Sub(m.seenAt) >= overlap {
		m.in.retire(m.seen)
	}
}

// wake is when something is due. Marks and rates are looked at once a second,
// for nothing else tells that packets use pad up.
func (m *Machine) wake() time.Time {
	if !m.live {
		return time.Time{}
	}
	w := m.now.Add(time.Second)
	for _, d := range m.drafts {
		if d.closed && !d.ready && d.resendAt.Before(w) {
			w = d.resendAt
		}
	}
	return w
}
