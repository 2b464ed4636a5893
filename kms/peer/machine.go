// Package peer turns equal blocks of a link into keys that two KMEs deliver
// once: the two-site protocol, from comparing blocks to closing what is used up.
//
// The main type is [Machine]: the protocol of one KME with all its peers. It is
// stepped with inputs (messages, blocks, draws, fetches, time) and answers with
// an [Output]. [Cut] makes the slots and tags of a block, [KeyID] names a key.
// The messages stand at kHello.
//
// A caller must keep in mind: Output.Changes go into one commit, and nothing
// else of the Output may leave before that commit is durable; after a failed
// commit the Machine is ahead of its disk and must be thrown away. Every commit
// is told by [Durable]. A Machine does no I/O, reads no clock and is stepped by
// one goroutine; time must never go back. It sees slots as numbers only: the
// bytes of keys stay sealed in the store, where the caller opens them.
package peer

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"time"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/kms"
)

// Incarnation names one life of a KME: a durable counter and a nonce that only
// the living process has. A restored disk brings back the counter, never the
// nonce.
type Incarnation struct {
	Counter uint64
	Nonce   [16]byte
}

// sessionOf is the session of two incarnations, the same at both ends.
func sessionOf(a etsi014.KMEID, ai Incarnation, b etsi014.KMEID, bi Incarnation) kms.Session {
	if a > b {
		ai, bi = bi, ai
	}
	sum := sha256.Sum256(appendIncarnation(appendIncarnation([]byte("quietline session 1"), ai), bi))
	return kms.Session(sum[:16])
}

// Link is a link of this KME: where its other end is and who owns what share.
type Link struct {
	ID      kms.LinkID
	Peer    etsi014.KMEID
	Weights Weights
}

// Config is what a Machine knows from the start.
type Config struct {
	KME   etsi014.KMEID
	Links []Link
	SAEs  map[etsi014.SAEID]etsi014.KMEID // every SAE of the network and the KME that serves it
	// TrustDisks keeps stock when both KMEs restarted between two sessions, so
	// that neither can witness that the other's disk is not an old copy.
	TrustDisks bool
	// Retention is how long a drawn key waits for its target; 0 = 600 s.
	Retention time.Duration
	// ConfirmWithin is how long a block that the peer says it has not may
	// still come there; 0 = 30 s.
	ConfirmWithin time.Duration
	// MaxSegments bounds the unopened segments of a link, whoever owns them; 0 =
	// no bound. Blocks beyond it are answered kms.ErrFull.
	MaxSegments int
	// Reserve is how many keys of KeySizeBits in the stock with each peer are
	// kept for SAEs of this KME: no segment is given away from them.
	Reserve int
	// KeySizeBits is the size for which grants are kept ready; 0 = 256.
	KeySizeBits int
	// Rand yields nonces and ID keys; crypto/rand but in simulations.
	Rand io.Reader
}

// Times of the protocol. They bound waiting, not safety: every message is
// idempotent.
const (
	retryFirst   = 500 * time.Millisecond // first repetition of what was not acknowledged
	retryMost    = 8 * time.Second        // repetitions slow down to this
	beatEvery    = time.Second            // BEAT on an idle session
	silence      = 5 * beatEvery          // a session so long silent is not served from
	surveyEvery  = 30 * time.Second       // INVENTORY
	beatLeast    = 100 * time.Millisecond // between BEATs that tell of commits
	openAheadAge = 5 * time.Second        // age of a session before segments are opened unasked
)

func (c Config) withDefaults() Config {
	if c.Retention == 0 {
		c.Retention = 600 * time.Second
	}
	if c.ConfirmWithin == 0 {
		c.ConfirmWithin = 30 * time.Second
	}
	if c.KeySizeBits == 0 {
		c.KeySizeBits = 256
	}
	return c
}

// Snapshot is what the store holds when a Machine begins.
type Snapshot struct {
	KME    kms.Lease
	Links  map[kms.LinkID]kms.Lease // kms.Loopback among them
	IDKeys map[kms.LinkID][]byte    // unwrapped, IDKeySize bytes, where one can be read
}

// Input is one event that the Machine is stepped with: one of the types below.
type Input interface{ input() }

type (
	// Boot is the first input: take a new incarnation, abandon what was open.
	Boot struct{}
	// Connected says that an authenticated channel to the peer stands.
	Connected struct{ Peer etsi014.KMEID }
	// Disconnected says that it is gone.
	Disconnected struct{ Peer etsi014.KMEID }
	// Received is a message from the peer. Data may be reused afterwards.
	Received struct {
		Peer etsi014.KMEID
		Data []byte
	}
	// Ingested is a block of a driver, cut and sealed. An answer with the
	// Ticket follows: nil when it may be acknowledged to the driver.
	Ingested struct {
		Ticket  uint64
		Segment kms.Segment
		Sealed  kms.Sealed
	}
	// Draw asks for new keys. The answer may take a round trip.
	Draw struct {
		Ticket    uint64
		Initiator etsi014.SAEID
		Targets   []etsi014.SAEID
		Number    int
		SizeBits  int
	}
	// Fetch asks for keys by ID.
	Fetch struct {
		Ticket    uint64
		Target    etsi014.SAEID
		Initiator etsi014.SAEID
		IDs       []etsi014.KeyID
	}
	// Cancel ends a Draw whose caller went away: it is answered ErrCanceled
	// unless it was answered before.
	Cancel struct{ Ticket uint64 }
	// Durable tells the log's position after a commit.
	Durable struct{ Position kms.Position }
	// Looked answers a Lookup: the log's hash at that length.
	Looked struct {
		Peer   etsi014.KMEID
		Length uint64
		Hash   [32]byte
		Found  bool
	}
	// Noted asks for an audit record of something outside the protocol.
	Noted struct{ Change kms.Change }
	// Spoiled says that a segment's stored bytes do not open: it is void.
	Spoiled struct{ Segment kms.SegmentID }
	// Turn asks for what must be sealed anew in the next epoch (rule 11). It
	// must share its commit with no other input.
	Turn struct{ Epoch uint64 }
	// Tick says that the time named by Output.Wake has come.
	Tick struct{}
)

func (Boot) input()         {}
func (Connected) input()    {}
func (Disconnected) input() {}
func (Received) input()     {}
func (Ingested) input()     {}
func (Draw) input()         {}
func (Fetch) input()        {}
func (Cancel) input()       {}
func (Durable) input()      {}
func (Looked) input()       {}
func (Noted) input()        {}
func (Turn) input()         {}
func (Spoiled) input()      {}
func (Tick) input()         {}

// ErrCanceled answers a canceled Draw.
var ErrCanceled = errors.New("draw was canceled")

// Message is bytes for a peer.
type Message struct {
	To   etsi014.KMEID
	Data []byte
}

// KeyRef says where a key's bytes are: Slots slots of SlotBytes from First on,
// cut to SizeBits.
type KeyRef struct {
	ID           etsi014.KeyID
	Segment      kms.SegmentID
	First, Slots int
	SlotBytes    int
	SizeBits     int
}

// Answer ends a Draw, Fetch or Ingested.
type Answer struct {
	Ticket uint64
	Keys   []KeyRef
	Err    error // kms sentinel, *etsi014.Error or one of its sentinels
}

// Lookup asks for the hash of this KME's own log at a length.
type Lookup struct {
	Peer   etsi014.KMEID
	Length uint64
}

// Event is for the log and the eye: constant text, and about whom.
type Event struct {
	Alarm   bool
	Text    string
	Peer    etsi014.KMEID
	Link    kms.LinkID
	Segment kms.SegmentID
	Reason  string
}

// Output is what one Step wants done, in this order: Changes in one commit;
// then, and only if that succeeded, Messages, Answers, and the rest. Several
// Outputs may share one commit.
type Output struct {
	Changes  []kms.Change
	Messages []Message
	Answers  []Answer
	Lookups  []Lookup
	Events   []Event
	// Fill are segments of the loopback pool that the caller fills with random
	// bits, seals, and hands back as Ingested, best within the same commit.
	Fill []kms.Segment
	// IDKeys are new ID keys to wrap: the OpLink change of that link lacks
	// its IDKey, which the caller fills in.
	IDKeys map[kms.LinkID][]byte
	// Gone are the slots to leave out of the OpReseal change of that segment,
	// whose Sealed the caller fills in, as it does the Key of each OpRewrap.
	Gone map[kms.SegmentID]kms.Bitmap
	// Wake is when Tick is due; it replaces the Wake of the Output before.
	Wake time.Duration
}

// Machine is the protocol of one KME with all its peers. It does no I/O and
// reads no clock. Not for concurrent use.
type Machine struct {
	cfg     Config
	self    Incarnation
	booted  uint64 // incarnation in the store before Boot
	durable kms.Position

	peers   map[etsi014.KMEID]*remote
	links   map[kms.LinkID]*link
	ordered []*remote // by ID, as each one's links, so that steps repeat exactly
	loop    *link     // the loopback pool; its remote is the last of ordered
	index   map[etsi014.KeyID]keyAt
	waiting map[uint64]*draw // by ticket

	now    time.Duration
	wakeAt time.Duration // when tick is due; 0 = in this step
	out    *Output
	buf    Output  // of the step under way
	most   int     // changes that it probably makes: draws of a batch share theirs
	msg    message // the one being read

	aheadLeast float64 // but in simulations, which draw seldom, the constant
}

// New makes the machine of a KME from what its store holds.
func New(cfg Config, snap Snapshot) (*Machine, error) {
	m := &Machine{
		cfg:     cfg.withDefaults(),
		booted:  snap.KME.Incarnation,
		durable: snap.KME.Position,
		peers:   map[etsi014.KMEID]*remote{},
		links:   map[kms.LinkID]*link{},
		index:   map[etsi014.KeyID]keyAt{},
		waiting: map[uint64]*draw{},

		aheadLeast: aheadLeast,
	}
	for _, c := range cfg.Links {
		if err := m.addLink(c, snap); err != nil {
			return nil, fmt.Errorf("add link %s: %w", c.ID, err)
		}
	}
	for _, id := range slices.Sorted(maps.Keys(m.peers)) {
		m.ordered = append(m.ordered, m.peers[id])
	}
	m.addLoop(snap.Links[kms.Loopback])
	for _, mem := range snap.KME.Memories {
		if r := m.peers[mem.Peer]; r != nil {
			r.memory, r.remembered = mem, mem
		}
	}
	return m, nil
}

func (m *Machine) addLink(c Link, snap Snapshot) error {
	switch {
	case c.ID == kms.Loopback:
		return fmt.Errorf("the name %q is kept for keys between SAEs of one KME", c.ID)
	case c.Peer == m.cfg.KME:
		return fmt.Errorf("peer has our own KME ID %q; every KME needs its own", c.Peer)
	}
	r := m.peers[c.Peer]
	if r == nil {
		r = newRemote(c.Peer)
		m.peers[c.Peer] = r
	}
	l := newLink(c, r, snap.Links[c.ID])
	if key := snap.IDKeys[c.ID]; key != nil {
		var err error
		if l.names, err = newNamer(key); err != nil {
			return err
		}
		l.idKey, l.stale = slices.Clone(key), false
	}
	m.links[c.ID] = l
	slices.SortFunc(r.links, func(a, b *link) int {
		if a.ID < b.ID {
			return -1
		}
		return 1
	})
	return nil
}

// Step takes inputs that share a commit, at a time that never goes back. The
// Output belongs to the caller. What many of them say of the same claim or
// ledger is one change.
func (m *Machine) Step(now time.Duration, inputs ...Input) Output {
	m.now, m.out, m.most = now, &m.buf, min(len(inputs)+1, 4)
	for _, in := range inputs {
		m.input(in)
	}
	m.settle()
	if m.wakeAt == 0 || now >= m.wakeAt {
		m.tick()
	}
	m.tally()
	out := m.buf
	m.buf = Output{}
	out.Wake, m.out = m.wakeAt, nil
	return out
}

func (m *Machine) input(in Input) {
	switch in := in.(type) {
	case Boot:
		m.boot()
	case Connected:
		m.connected(in.Peer)
	case Disconnected:
		m.disconnected(in.Peer)
	case Received:
		m.received(in)
	case Ingested:
		m.ingested(in)
	case Draw:
		m.draw(in)
	case Fetch:
		m.fetch(in)
	case Cancel:
		if d := m.waiting[in.Ticket]; d != nil {
			m.failDraw(d, ErrCanceled)
		}
	case Durable:
		m.durableAt(in.Position)
	case Looked:
		m.looked(in)
	case Noted:
		m.change(in.Change)
	case Spoiled:
		m.spoiled(in.Segment)
	case Turn:
		m.turn(in.Epoch)
	case Tick:
		m.wakeAt = 0
	}
}

func (m *Machine) boot() {
	m.incarnate(m.booted+1, "start")
	for _, r := range m.ordered {
		for _, l := range r.links {
			m.mend(l)
		}
	}
}

// incarnate takes a new incarnation and abandons what was opened in an
// earlier one (rule 10, void-open).
func (m *Machine) incarnate(counter uint64, why string) {
	m.self.Counter = counter
	if m.self.Nonce == ([16]byte{}) {
		if _, err := io.ReadFull(m.cfg.Rand, m.self.Nonce[:]); err != nil {
			panic("read randomness: " + err.Error()) // crypto/rand never fails
		}
	}
	m.change(kms.Change{Op: kms.OpBoot, Incarnation: counter, Reason: why})
	for _, r := range m.ordered {
		if r.local {
			m.renewLoop()
		} else {
			m.failWaiting(r)
			r.leave()
		}
		for _, l := range r.links {
			m.abandon(l, "opened in an earlier session")
		}
	}
}

// tick does what time has made due.
func (m *Machine) tick() {
	m.wakeAt = m.now + beatEvery
	for _, r := range m.ordered {
		for _, l := range r.links {
			m.expireKeys(l)
		}
		m.tickPeer(r)
		m.pump(r)
		m.wake(r.due)
	}
}

// wake asks for a Tick at the given time.
func (m *Machine) wake(at time.Duration) {
	if at > 0 && at < m.wakeAt {
		m.wakeAt = max(at, m.now+time.Millisecond)
	}
}

func (m *Machine) change(c kms.Change) {
	if m.out.Changes == nil {
		m.out.Changes = make([]kms.Change, 0, m.most)
	}
	m.out.Changes = append(m.out.Changes, c)
}

func (m *Machine) event(e Event) { m.out.Events = append(m.out.Events, e) }

func (m *Machine) answer(a Answer) { m.out.Answers = append(m.out.Answers, a) }

// send sends in the session that stands; without one the message is dropped,
// because its like is sent again when there is one.
func (m *Machine) send(r *remote, msg message) {
	if !r.up() || r.local {
		return
	}
	msg.session = r.session
	m.out.Messages = append(m.out.Messages, Message{To: r.id, Data: msg.encode()})
}

// tally makes the ledgers that a step changed durable with it.
func (m *Machine) tally() {
	for _, r := range m.ordered {
		for _, l := range r.links {
			if l.counted {
				l.counted = false
				m.change(kms.Change{Op: kms.OpTally, Segment: kms.SegmentID{Link: l.ID},
					Ledger: l.ledger})
			}
		}
	}
}
