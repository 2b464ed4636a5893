package peer

import (
	"crypto/subtle"
	"maps"
	"slices"
	"time"

	"github.com/quietline/quietline/kms"
)

type segmentNumber struct{ generation, number uint64 }

// link is what the machine knows of one link.
type link struct {
	Link
	remote *remote
	ledger kms.Ledger
	// counted: the ledger changed in this step.
	counted bool

	generation, floor uint64 // below: finished, void or never seen, unless live
	segments          map[segmentNumber]*segment
	simulated         int                   // of them, how many came from no photons
	pending           map[*segment]struct{} // with something to repeat
	mine              []*segment            // CONFIRMED by both, ours to open, oldest first
	mineSlots         int                   // in them
	open              []*segment            // OPEN and ours, oldest first
	served            []*segment            // OPEN and the peer's
	slots             int                   // in all live segments
	asked             int                   // slots that are being filled; loopback only
	damaged           []kms.SegmentID       // that the store cannot read
	lost              uint64                // slots that were left in them

	idKey    []byte
	stale    bool // the store has an ID key that is not ours to use
	names    *namer
	idAgreed bool // in this session
	idDue    time.Duration
	idTries  int
}

// segment is a live segment: NEW to CLOSED.
type segment struct {
	kms.Segment
	link          *link
	loaded        bool          // came from disk at the start
	since         time.Duration // ingested; the start of the machine if loaded
	peerConfirmed bool
	giving        bool // GIVE is not acknowledged yet
	acked         bool // OPEN is acknowledged; our own segments only
	closing       bool // the owner's CLOSE has come
	idBlock       [16]byte

	buried  kms.Bitmap    // slots delivered or destroyed to the last role here
	touched bool          // some were since the last turn
	left    int           // slots not yet delivered, burnt, expired or void
	next    int           // first slot not granted; our own segments only
	grants  []*grant      // by first slot
	undrawn int           // of them, those with keys to draw; our own segments only
	owed    int           // keys drawn that a target served here has not had yet
	final   []mark        // of CLOSE; our own segments only
	drawAt  time.Duration // last draw

	due   time.Duration // next repetition
	tries int
}

// newLink takes over what the store holds of a link.
func newLink(c Link, r *remote, lease kms.Lease) *link {
	l := &link{
		Link: c, remote: r, ledger: lease.Ledger,
		generation: lease.Generation, floor: lease.Floor,
		segments: map[segmentNumber]*segment{},
		pending:  map[*segment]struct{}{},
	}
	l.Weights = c.Weights.orDefault()
	l.stale = lease.IDKey.Epoch != 0
	l.load(lease)
	r.links = append(r.links, l)
	return l
}

func (l *link) key(id kms.SegmentID) segmentNumber { return segmentNumber{id.Generation, id.Number} }

func (l *link) find(id kms.SegmentID) *segment { return l.segments[l.key(id)] }

// load takes the segments of the store over. How much is left of the open ones
// is what the ledger stores beyond the others; they are abandoned at once, so
// that their sum is all that matters.
func (l *link) load(lease kms.Lease) {
	stored := lease.Ledger.Stored / (8 * SlotBytes)
	for _, s := range lease.Segments {
		if s.State == kms.StateNew || s.State == kms.StateConfirmed {
			stored -= uint64(s.Slots)
		}
	}
	for _, s := range lease.Segments {
		x := &segment{Segment: s, link: l, loaded: true}
		switch s.State {
		case kms.StateNew, kms.StateConfirmed:
			x.left = s.Slots
		case kms.StateOpen:
			x.left = int(min(uint64(s.Slots), stored))
			stored -= uint64(x.left)
		}
		l.add(x)
	}
	for _, s := range lease.Unreadable {
		l.damaged, l.lost = append(l.damaged, s.ID), stored
	}
}

// mend gives up what of a link could not be read at the start, each with an
// alarm, so that the rest is served: segments are void, and an ID key is
// replaced, which renames nothing, because nothing is open.
func (m *Machine) mend(l *link) {
	for _, id := range l.damaged {
		m.event(Event{Alarm: true, Text: "segment cannot be read", Link: l.ID, Segment: id})
		m.change(kms.Change{Op: kms.OpVoid, Segment: id, Reason: "its record cannot be read"})
		bits := 8 * SlotBytes * l.lost // of all of them, counted with the first
		l.ledger.Stored -= bits
		l.ledger.Void += bits
		l.lost, l.counted = 0, true
	}
	l.damaged = nil
	if !l.stale {
		return
	}
	if l != m.loop {
		m.event(Event{Alarm: true, Text: "ID key cannot be read", Link: l.ID,
			Reason: "the link gets a new one"})
	}
	m.drawIDKey(l) // what is stored must turn with the epoch, so it cannot stay
	l.stale = false
}

func (l *link) add(s *segment) {
	l.segments[l.key(s.ID)] = s
	l.slots += s.Slots
	if !l.remote.local {
		l.pending[s] = struct{}{}
	}
	if s.Simulated {
		l.simulated++
	}
}

// gone tells whether a segment that is not live can never come: the floor.
func (l *link) gone(id kms.SegmentID) bool {
	return id.Generation < l.generation || id.Generation == l.generation && id.Number < l.floor
}

// sorted are the live segments, oldest first.
func (l *link) sorted() []*segment {
	return slices.SortedFunc(maps.Values(l.segments), compareAge)
}

func compareAge(a, b *segment) int {
	switch {
	case a.ID.Less(b.ID):
		return -1
	case b.ID.Less(a.ID):
		return 1
	}
	return 0
}

func (m *Machine) owns(s *segment) bool { return s.Owner == m.cfg.KME }

// unopened is how many segments the link has in stock. Those in use do not
// count: they may wait long for a target, and new stock must not wait with them.
func (l *link) unopened() int { return len(l.segments) - len(l.open) - len(l.served) }

// ingested takes a block over: rule 2.
func (m *Machine) ingested(in Ingested) {
	id := in.Segment.ID
	l := m.links[id.Link]
	switch {
	case l == nil:
		m.answer(Answer{Ticket: in.Ticket, Err: kms.ErrNoSegment})
		return
	case l == m.loop:
		m.filled(l, in)
		return
	case l.gone(id):
		m.ingestedAgain(l, in)
		return
	case m.cfg.MaxSegments > 0 && l.unopened() >= m.cfg.MaxSegments:
		m.answer(Answer{Ticket: in.Ticket, Err: kms.ErrFull})
		return
	}
	s := &segment{Segment: in.Segment, link: l, since: m.now, left: in.Segment.Slots}
	l.generation, l.floor = id.Generation, id.Number+1
	l.add(s)
	blockBits, slotBits := uint64(8*s.BlockBytes), uint64(8*s.SlotBytes*s.Slots)
	l.ledger.Ingested += blockBits
	l.ledger.Tag += 8 * Reserved
	l.ledger.Stored += slotBits
	l.ledger.Burnt += blockBits - 8*Reserved - slotBits
	l.counted = true
	m.change(kms.Change{Op: kms.OpIngest, Segment: id, Meta: in.Segment, Sealed: in.Sealed})
	m.answer(Answer{Ticket: in.Ticket})
	m.repeat(s, true)
}

// ingestedAgain compares a block number seen before. The tag depends on every
// bit of the block. Whatever comes second is dropped: the first is what the
// peer compared, or will.
func (m *Machine) ingestedAgain(l *link, in Ingested) {
	s := l.find(in.Segment.ID)
	if s != nil && (s.Sent != in.Segment.Sent || s.Expected != in.Segment.Expected) {
		m.event(Event{Alarm: true, Text: "device repeated a block number with other bits",
			Link: l.ID, Segment: s.ID})
	}
	m.answer(Answer{Ticket: in.Ticket, Err: kms.ErrSeen})
}

// repeat sends what of a segment is not yet acknowledged, or notes that
// nothing is.
func (m *Machine) repeat(s *segment, first bool) {
	r := s.link.remote
	if first {
		s.tries = 0
	}
	switch {
	case r.local:
		if s.State == kms.StateClosed { // nobody else has to know
			m.finish(s)
		}
		return
	case s.State == kms.StateNew, s.State == kms.StateConfirmed && !s.peerConfirmed:
		m.send(r, message{kind: kOffer, offer: s.Segment, have: s.State == kms.StateConfirmed})
	case s.State == kms.StateConfirmed && s.giving:
		m.send(r, message{kind: kGive, id: s.ID})
	case s.State == kms.StateOpen && m.owns(s) && !s.acked:
		m.send(r, message{kind: kOpen, id: s.ID})
	case s.State == kms.StateOpen && m.owns(s) && m.sendGrants(s):
	case s.State == kms.StateClosed && m.owns(s):
		m.send(r, message{kind: kClose, id: s.ID, marks: s.final})
	default:
		delete(s.link.pending, s)
		return
	}
	s.link.pending[s] = struct{}{}
	s.due = m.now + backoff(s.tries)
	s.tries++
}

// resend repeats what is due, or everything.
func (m *Machine) resend(r *remote, all bool) {
	for _, l := range r.links {
		m.repeatIDKey(l, all)
		for _, s := range slices.SortedFunc(maps.Keys(l.pending), compareAge) {
			if all || m.now >= s.due {
				m.repeat(s, all)
			}
			if _, ok := l.pending[s]; ok {
				r.due = min(r.due, s.due)
			}
		}
	}
}

// offerReceived compares the peer's view of a block with ours: rule 3.
func (m *Machine) offerReceived(l *link, msg *message) {
	s := l.find(msg.id)
	switch {
	case s == nil && (l.gone(msg.id) || msg.have):
		m.refuse(l.remote, kOffer, msg.id, 0, dead)
	case s == nil: // our device is behind; the peer repeats itself
	case s.State != kms.StateNew:
		if !msg.have {
			m.send(l.remote, message{kind: kOffer, offer: s.Segment, have: true})
			return
		}
		m.bothConfirmed(s)
		m.send(l.remote, message{kind: kConfirmed, id: s.ID})
	case !sameOffer(s, &msg.offer):
		m.event(Event{Alarm: true, Text: "blocks differ", Link: l.ID, Segment: s.ID,
			Reason: "tag or terms of the peer's block are others"})
		m.void(s, "block differs from the peer's")
		m.refuse(l.remote, kOffer, s.ID, 0, differs)
	default:
		s.State = kms.StateConfirmed
		m.change(kms.Change{Op: kms.OpConfirm, Segment: s.ID})
		if msg.have {
			m.bothConfirmed(s)
			m.send(l.remote, message{kind: kConfirmed, id: s.ID})
		} else {
			m.repeat(s, true)
		}
	}
}

func sameOffer(s *segment, o *kms.Segment) bool {
	return o.BlockBytes == s.BlockBytes && o.SlotBytes == s.SlotBytes && o.Slots == s.Slots &&
		o.Owner == s.Owner && o.Simulated == s.Simulated &&
		subtle.ConstantTimeCompare(o.Sent[:], s.Expected[:]) == 1
}

func (m *Machine) confirmedReceived(l *link, id kms.SegmentID) {
	s := l.find(id)
	switch {
	case s == nil:
		m.refuse(l.remote, kConfirmed, id, 0, dead)
	case s.State == kms.StateNew: // its OFFER, which it repeats, is under way
	default:
		m.bothConfirmed(s)
	}
}

// bothConfirmed: from now on the owner may open it.
func (m *Machine) bothConfirmed(s *segment) {
	if s.peerConfirmed || s.State != kms.StateConfirmed {
		return
	}
	s.peerConfirmed = true
	m.repeat(s, true)
	if m.owns(s) {
		s.link.enlist(s)
	}
}

// enlist puts a segment among those we may open, in order of age.
func (l *link) enlist(s *segment) {
	i, found := slices.BinarySearchFunc(l.mine, s, compareAge)
	if !found {
		l.mine = slices.Insert(l.mine, i, s)
		l.mineSlots += s.Slots
	}
}

// void destroys a segment before its time.
func (m *Machine) void(s *segment, why string) {
	m.change(kms.Change{Op: kms.OpVoid, Segment: s.ID, Reason: why})
	m.spend(s, s.left, &s.link.ledger.Void)
	s.State = kms.StateVoid
	m.forget(s)
}

// spend moves whole slots of a segment from the stock to another account.
func (m *Machine) spend(s *segment, slots int, to *uint64) {
	bits := uint64(8 * s.SlotBytes * slots)
	s.left -= slots
	s.link.ledger.Stored -= bits
	*to += bits
	s.link.counted = true
}

// forget drops what memory holds of a segment that is no longer live.
func (m *Machine) forget(s *segment) {
	l := s.link
	if l.find(s.ID) == s && s.Simulated {
		l.simulated--
	}
	delete(l.segments, l.key(s.ID))
	delete(l.pending, s)
	l.slots -= s.Slots
	m.unlist(s)
}

// unlist takes a segment out of what may be drawn and fetched.
func (m *Machine) unlist(s *segment) {
	l := s.link
	is := func(o *segment) bool { return o == s }
	if i, found := slices.BinarySearchFunc(l.mine, s, compareAge); found {
		l.mine = slices.Delete(l.mine, i, i+1)
		l.mineSlots -= s.Slots
	}
	l.open = slices.DeleteFunc(l.open, is)
	l.served = slices.DeleteFunc(l.served, is)
	for _, g := range s.grants {
		m.dropGrant(g)
	}
	s.grants = nil
}

// abandon gives up what was opened in a session that is over (rule 10), and
// lets go of what was closed: the peer abandons it as well.
func (m *Machine) abandon(l *link, why string) {
	for _, s := range l.sorted() {
		switch s.State {
		case kms.StateOpen:
			m.void(s, why)
		case kms.StateClosed:
			m.finish(s)
		}
	}
}

// spoiled gives up a segment whose bytes cannot be read.
func (m *Machine) spoiled(id kms.SegmentID) {
	l := m.links[id.Link]
	if l == nil {
		return
	}
	if s := l.find(id); s != nil && s.State.May(kms.StateVoid) {
		m.event(Event{Alarm: true, Text: "segment cannot be read", Link: l.ID, Segment: id})
		m.void(s, "its bytes cannot be read")
		m.refuse(l.remote, kOffer, id, 0, differs)
	}
}

func (m *Machine) finish(s *segment) {
	m.change(kms.Change{Op: kms.OpFinish, Segment: s.ID})
	s.State = kms.StateFinished
	m.forget(s)
}
