package peer

import (
	"time"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/kms"
)

// remote is what the machine knows of one peer.
type remote struct {
	id    etsi014.KMEID
	links []*link
	local bool // the loopback pool: there is no peer, and always a session

	connected bool
	inc       Incarnation // adopted: it is the peer that lives now
	session   kms.Session
	agreed    bool        // the peer has adopted us too
	proven    bool        // its log goes on from where we remember it
	firstMet  Incarnation // of the first session in this process
	reason    string      // why no session, for the eye

	memory     kms.Memory   // newest known of the peer
	remembered kms.Memory   // durable
	proof      Looked       // hash of our log that the peer asked for
	asked      hello        // waiting for a lookup; kme is empty if none is
	forsaken   kms.Position // of ours, as the peer remembered it: our disk lost it
	news       bool         // the next HELLO says more than the last

	upSince  time.Duration
	heard    time.Duration
	helloAt  time.Duration // next HELLO while there is no session
	saidAt   time.Duration // last HELLO
	helloTry int
	beatAt   time.Duration
	surveyAt time.Duration
	beaten   time.Duration
	told     kms.Position // last told by BEAT
	rtt      time.Duration
	wantAt   time.Duration
	due      time.Duration // earliest time something is to do

	shapes map[shapeID]*shape
	ready  int     // slots granted ahead of demand and not drawn
	queue  []*draw // draws that wait, oldest first

	stirred bool     // something may have changed for them in this step
	asking  []*shape // drawn from in this step
	pass    int      // of serve

	demandAt time.Duration // when to look at all shapes again
	demand   int           // slots that all shapes should have ahead
	drawn    bool          // some shape was, lately
}

func newRemote(id etsi014.KMEID) *remote {
	return &remote{id: id, memory: kms.Memory{Peer: id}, shapes: map[shapeID]*shape{},
		rtt: 10 * time.Millisecond, reason: "not connected"}
}

// up tells whether a session stands and the peer is there to speak to.
func (r *remote) up() bool { return r.connected && r.agreed && r.proven }

// leave ends the session on our side.
func (r *remote) leave() {
	r.agreed, r.proven = false, false
	r.session = kms.Session{}
	r.inc = Incarnation{}
}

func (m *Machine) connected(id etsi014.KMEID) {
	r := m.peers[id]
	if r == nil {
		return
	}
	r.connected, r.agreed = true, false // the peer must tell again that it knows us
	r.heard, r.helloTry, r.reason = m.now, 0, "no answer to HELLO"
	m.sendHello(r)
}

func (m *Machine) disconnected(id etsi014.KMEID) {
	if r := m.peers[id]; r != nil {
		r.connected, r.agreed, r.reason = false, false, "not connected"
		m.failWaiting(r)
	}
}

// sendHello tells who we are and what we know of the peer.
func (m *Machine) sendHello(r *remote) {
	if m.self.Counter == m.booted || !r.connected || r.local {
		return
	}
	h := &hello{
		kme: m.cfg.KME, self: m.self, echo: r.inc, position: m.durable, known: r.memory,
		witness:    r.firstMet != (Incarnation{}) && r.firstMet != r.inc,
		trustDisks: m.cfg.TrustDisks, forsaken: r.forsaken, settled: r.up(),
	}
	if !r.agreed {
		h.refusal = r.reason
	}
	if r.proof.Found {
		h.proofLength, h.proof = r.proof.Length, r.proof.Hash
	}
	for _, l := range r.links {
		h.links = append(h.links, linkTerms{l.ID, l.Weights, l.generation})
	}
	r.helloAt, r.saidAt, r.news = m.now+backoff(r.helloTry), m.now, false
	r.helloTry++
	msg := message{kind: kHello, hello: h}
	m.out.Messages = append(m.out.Messages, Message{To: r.id, Data: msg.encode()})
}

func backoff(try int) time.Duration { return min(retryFirst<<min(try, 10), retryMost) }

// helloReceived begins with what the peer remembers of us: our own log at that
// length must be what it saw.
func (m *Machine) helloReceived(r *remote, h *hello) {
	if h.kme != r.id {
		r.reason = "peer calls itself " + string(h.kme)
		m.event(Event{Alarm: true, Text: "peer is refused", Peer: r.id, Reason: r.reason})
		return
	}
	if known := h.known.Position; known.Length > 0 && known.Length <= m.durable.Length {
		r.asked = *h
		m.out.Lookups = append(m.out.Lookups, Lookup{Peer: r.id, Length: known.Length})
		return
	}
	m.judge(r, h, h.known.Position.Length > m.durable.Length)
}

func (m *Machine) looked(in Looked) {
	r := m.peers[in.Peer]
	if r == nil || r.asked.kme == "" || r.asked.known.Position.Length != in.Length {
		return
	}
	h := r.asked
	r.asked = hello{}
	r.news = r.news || r.proof != in
	r.proof = in
	m.judge(r, &h, !in.Found || in.Hash != h.known.Position.Hash)
}

// judge goes through a HELLO whose view of our log is known: oldDisk says that
// the peer saw more of it, or another.
func (m *Machine) judge(r *remote, h *hello, oldDisk bool) {
	if oldDisk && h.known.Position == r.forsaken {
		oldDisk = false // an echo of what we acted on
	}
	twin := h.known.Incarnation == m.self.Counter && h.echo.Counter == m.self.Counter &&
		h.echo.Nonce != m.self.Nonce
	if oldDisk || twin || h.known.Incarnation > m.self.Counter {
		m.fallBack(r, h, oldDisk)
		return
	}
	if why := m.refusal(r, h); why != "" {
		if r.reason != why {
			r.reason = why
			m.event(Event{Alarm: true, Text: "peer is refused", Peer: r.id, Reason: why})
		}
		m.reply(r, h)
		return
	}
	if h.self != r.inc {
		m.adopt(r, h)
	}
	r.heard = m.now
	m.prove(r, h)
	if h.echo == m.self {
		m.agree(r, h)
	}
	if h.refusal != "" && !r.up() {
		r.reason = "peer refuses us: " + h.refusal
	}
	m.reply(r, h)
}

// reply answers a peer that has no session yet: at once when there is news,
// else no faster than replyEvery, so that two KMEs that cannot agree do not
// spin.
func (m *Machine) reply(r *remote, h *hello) {
	if h.settled && r.up() {
		return
	}
	if r.news || m.now >= r.saidAt+replyEvery {
		m.sendHello(r)
	}
}

// replyEvery bounds answers to HELLOs that change nothing.
const replyEvery = 100 * time.Millisecond

// refusal is why no session with the peer can be; empty if one can.
func (m *Machine) refusal(r *remote, h *hello) string {
	switch {
	case h.self.Counter < r.memory.Incarnation:
		return "peer shows an incarnation older than known"
	case h.self.Counter == r.memory.Incarnation && r.inc != (Incarnation{}) && h.self != r.inc:
		return "peer shows a second incarnation of the same number"
	case r.inc != (Incarnation{}) && h.self != r.inc && r.up() && m.now < r.heard+silence:
		return "a second live incarnation of the peer"
	}
	return m.terms(r, h)
}

// terms compares what must be set the same at both KMEs.
func (m *Machine) terms(r *remote, h *hello) string {
	theirs := map[kms.LinkID]Weights{}
	for _, l := range h.links {
		theirs[l.id] = l.weights
	}
	for _, l := range r.links {
		w, ok := theirs[l.ID]
		if !ok {
			return "peer does not know link " + string(l.ID)
		}
		if w != l.Weights {
			return "weights of link " + string(l.ID) + " differ"
		}
		delete(theirs, l.ID)
	}
	for id := range theirs {
		return "peer has link " + string(id) + ", we do not"
	}
	return ""
}

// adopt takes h as the life of the peer that counts from now on. What was
// opened with an earlier one is abandoned.
func (m *Machine) adopt(r *remote, h *hello) {
	met := r.inc != (Incarnation{})
	r.inc, r.news = h.self, true
	r.session = sessionOf(m.cfg.KME, m.self, r.id, r.inc)
	r.agreed, r.proven = false, false
	for _, l := range r.links {
		l.idAgreed = false
		if met {
			m.abandon(l, "peer restarted")
		}
		for _, s := range l.segments {
			s.peerConfirmed = false
			l.pending[s] = struct{}{}
		}
		l.mine, l.mineSlots = nil, 0
	}
	m.failWaiting(r)
	r.shapes = map[shapeID]*shape{}
	r.memory.Incarnation = h.self.Counter
	m.remember(r)
}

// prove checks the peer's log against what we remember of it. A peer whose
// disk fell behind says so, and what we remembered of it is void.
func (m *Machine) prove(r *remote, h *hello) {
	if r.proven {
		return
	}
	want := r.memory.Position
	switch {
	case want.Length == 0, h.proofLength == want.Length && h.proof == want.Hash:
		r.proven = true
	case h.forsaken == want:
		m.event(Event{Alarm: true, Text: "peer's disk is old", Peer: r.id})
		r.memory.Position = h.position
		r.proven, r.news = true, true
		m.remember(r)
	default:
		r.reason = "peer has not shown that its log goes on from where we remember it"
	}
}

// agree brings the session up once both know each other.
func (m *Machine) agree(r *remote, h *hello) {
	if r.agreed || !r.proven || !r.connected {
		return
	}
	r.agreed, r.reason, r.helloTry = true, "", 0
	r.upSince, r.surveyAt, r.beatAt = m.now, m.now, m.now+beatEvery
	if r.firstMet == (Incarnation{}) {
		r.firstMet = r.inc
	}
	if !h.settled {
		m.sendHello(r) // before all else, so that the peer can read what follows
	}
	witness := h.witness || r.firstMet != r.inc
	for _, l := range r.links {
		if !witness && !(m.cfg.TrustDisks && h.trustDisks) {
			m.voidLoaded(l, "no witness that the disks are not old copies")
		}
		m.agreeIDKey(l)
		for s := range l.pending {
			s.due, s.tries = m.now, 0
			if s.State == kms.StateConfirmed && !s.giving {
				s.due += retryFirst // the inventories settle most of these
			}
		}
	}
	m.event(Event{Text: "session stands", Peer: r.id})
	m.wakeAt = 0
}

// voidLoaded gives up what came from our disk when nobody can say whether both
// disks are old copies (rule 1).
func (m *Machine) voidLoaded(l *link, why string) {
	for _, s := range l.sorted() {
		if s.loaded && s.State.May(kms.StateVoid) {
			m.void(s, why)
		}
	}
}

// fallBack acts on the news that our own disk is old, or that a twin of us
// lives: a new incarnation above all that the peer knows. Nothing is served
// until the peer has adopted it; what the peer no longer holds it will tell.
func (m *Machine) fallBack(r *remote, h *hello, oldDisk bool) {
	if oldDisk {
		r.forsaken = h.known.Position
	}
	m.event(Event{Alarm: true, Text: "our disk is old or copied", Peer: r.id,
		Reason: "the peer remembers more of us than we have"})
	m.change(kms.Change{Op: kms.OpNote, Memory: kms.Memory{Peer: r.id}, Count: 1,
		Reason: "own disk is older than the peer's memory of it"})
	m.incarnate(max(h.known.Incarnation, m.self.Counter)+1, "old disk")
	for _, p := range m.ordered {
		p.helloTry = 0
		m.sendHello(p)
	}
}

// remember makes what we know of the peer durable.
func (m *Machine) remember(r *remote) {
	if r.memory != r.remembered {
		r.remembered = r.memory
		m.change(kms.Change{Op: kms.OpRemember, Memory: r.memory})
	}
}

// beatReceived notes the peer's position.
func (m *Machine) beatReceived(r *remote, at kms.Position) {
	if at.Length > r.memory.Position.Length {
		r.memory.Position = at
	}
}

// tickPeer repeats HELLO, BEAT and INVENTORY, and notices silence.
func (m *Machine) tickPeer(r *remote) {
	r.due = 0
	if !r.connected || r.local {
		return
	}
	if !r.up() {
		if m.now >= r.helloAt {
			m.sendHello(r)
		}
		r.due = r.helloAt
		return
	}
	if m.now >= r.heard+silence {
		r.agreed, r.reason = false, "peer is silent"
		m.failWaiting(r)
		m.sendHello(r)
		r.due = r.helloAt
		return
	}
	if m.now >= r.beatAt {
		m.remember(r)
		m.sendMarks(r)
		m.beat(r)
	}
	if m.now >= r.surveyAt {
		r.surveyAt = m.now + surveyEvery
		m.sendInventory(r)
	}
	r.due = min(r.beatAt, r.surveyAt, r.heard+silence)
	m.resend(r, false)
}

// beat tells the peer that we live and how far our log is durable.
func (m *Machine) beat(r *remote) {
	r.beatAt, r.beaten, r.told = m.now+beatEvery, m.now, m.durable
	m.send(r, message{kind: kBeat, at: m.durable})
}

// durableAt takes a new position and tells it on, though not with every one of
// many quick commits.
func (m *Machine) durableAt(at kms.Position) {
	m.durable = at
	for _, r := range m.ordered {
		if r.up() && !r.local && r.told != at && m.now >= r.beaten+beatLeast {
			m.beat(r)
		}
	}
}
