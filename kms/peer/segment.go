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
	pending           map[*segment]struct{} // with something to repeat
	mine              []*segment            // CONFIRMED by both, ours to open, oldest first
	mineSlots         int                   // in them
	open              []*segment            // OPEN and ours, oldest first
	served            []*segment            // OPEN and the peer's

	idKey    []byte
	names    namer
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

	buried  kms.Bitmap // slots delivered or destroyed to the last role here
	touched bool       // some were since the last turn
	left    int        // slots not yet delivered, burnt, expired or void
	next    int        // first slot not granted; our own segments only
	grants  []*grant
	final   []mark        // of CLOSE; our own segments only
	drawAt  time.Duration // last draw

	due   time.Duration // next repetition
	tries int
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
}

func (l *link) add(s *segment) {
	l.segments[l.key(s.ID)] = s
	l.pending[s] = struct{}{}
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

func (m *Machine) refuse(r *remote, k kind, id kms.SegmentID, first int, why reason) {
	m.send(r, message{kind: kRefuse, refused: k, id: id, first: first, reason: why})
}

// received acts on one message.
func (m *Machine) received(in Received) {
	r := m.peers[in.Peer]
	if r == nil {
		return
	}
	msg, err := decode(in.Data)
	if err != nil {
		m.event(Event{Alarm: true, Text: "peer sent a malformed message", Peer: r.id,
			Reason: err.Error()})
		return
	}
	if msg.kind == kHello {
		m.helloReceived(r, msg.hello)
		return
	}
	if r.session == (kms.Session{}) || msg.session != r.session || !r.proven || !r.connected {
		m.replyStale(r)
		return
	}
	r.heard = m.now
	if !r.agreed {
		m.replyStale(r)
		return
	}
	if msg.kind == kBeat {
		m.beatReceived(r, msg.at)
		return
	}
	l := m.links[msg.id.Link]
	if l == nil || l.remote != r {
		m.event(Event{Alarm: true, Text: "peer speaks of a link that is not ours", Peer: r.id,
			Link: msg.id.Link})
		return
	}
	m.dispatch(l, msg)
}

// replyStale tells a peer that speaks in another session who we are now.
func (m *Machine) replyStale(r *remote) {
	if m.now >= r.saidAt+replyEvery {
		m.sendHello(r)
	}
}

func (m *Machine) dispatch(l *link, msg *message) {
	switch msg.kind {
	case kIDKey:
		m.idKeyReceived(l, msg.key)
	case kIDKeyAck:
		m.idKeyAcked(l)
	case kInventory:
		m.inventoryReceived(l, msg)
	case kOffer:
		m.offerReceived(l, msg)
	case kConfirmed:
		m.confirmedReceived(l, msg.id)
	case kGive:
		m.giveReceived(l, msg.id)
	case kGiveAck:
		m.giveAcked(l, msg.id)
	case kOpen:
		m.openReceived(l, msg.id)
	case kOpenAck:
		m.openAcked(l, msg.id)
	case kGrant:
		m.grantReceived(l, msg)
	case kGrantAck:
		m.grantAcked(l, msg)
	case kMarks:
		m.marksReceived(l, msg)
	case kClose:
		m.closeReceived(l, msg)
	case kCloseAck:
		m.closeAcked(l, msg.id)
	case kRefuse:
		m.refused(l, msg)
	case kWant:
		m.wanted(l, msg.count)
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
	delete(l.segments, l.key(s.ID))
	delete(l.pending, s)
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

// refused acts on the peer's reason.
func (m *Machine) refused(l *link, msg *message) {
	s := l.find(msg.id)
	if s == nil {
		return
	}
	switch msg.reason {
	case notYet:
		if s.State == kms.StateOpen && !s.acked {
			s.peerConfirmed = false // it may lack our OFFER; s.tries slows us down
			m.send(l.remote, message{kind: kOffer, offer: s.Segment, have: true})
		}
	case stranger:
		m.strangerRefused(s, msg.first)
	case dead:
		m.dead(s, msg.refused)
	case notOwner, conflict, differs:
		m.dead(s, 0)
	}
}

// dead destroys what the peer has not, or no longer.
func (m *Machine) dead(s *segment, told kind) {
	switch {
	case s.State == kms.StateClosed:
		m.finish(s)
	case s.closing: // only our targets' unfetched keys are left; they stay
	case s.State == kms.StateNew && told == kOffer && m.now < s.since+m.cfg.ConfirmWithin:
		// It may still come there; we ask again.
	case s.State.May(kms.StateVoid):
		m.event(Event{Text: "segment is void", Link: s.link.ID, Segment: s.ID,
			Reason: "the peer has it no longer"})
		m.void(s, "peer has it not")
	}
}

// sendInventory tells what we hold, so that what only one side holds is found.
func (m *Machine) sendInventory(r *remote) {
	for _, l := range r.links {
		var msg message
		flush := func() {
			if len(msg.runs) > 0 {
				msg.kind, msg.id.Link = kInventory, l.ID
				m.send(r, msg)
			}
			msg.runs = nil
		}
		for _, s := range l.sorted() {
			if s.State > kms.StateOpen || s.closing {
				continue
			}
			if s.ID.Generation != msg.id.Generation || len(msg.runs) == maxRuns {
				flush()
				msg.id.Generation = s.ID.Generation
			}
			mine := m.owns(s)
			if n := len(msg.runs); n > 0 {
				last := &msg.runs[n-1]
				if last.number+last.count == s.ID.Number && last.state == s.State && last.mine == mine {
					last.count++
					continue
				}
			}
			msg.runs = append(msg.runs, run{s.ID.Number, 1, s.State, mine})
		}
		flush()
	}
}

// inventoryReceived answers for what the peer holds and we have not, and
// brings what both hold into step.
func (m *Machine) inventoryReceived(l *link, msg *message) {
	budget := maxRuns // a hostile count must not keep us busy
	for _, run := range msg.runs {
		for n := run.number; n < run.number+run.count && budget > 0; n++ {
			budget--
			id := msg.id
			id.Number = n
			m.compare(l, id, run)
		}
	}
}

func (m *Machine) compare(l *link, id kms.SegmentID, theirs run) {
	s := l.find(id)
	switch {
	case s == nil && (l.gone(id) || theirs.state >= kms.StateConfirmed):
		m.refuse(l.remote, kInventory, id, 0, dead)
	case s == nil:
	case theirs.mine && m.owns(s):
		// Two owners: a GIVE that one disk forgot. Nobody may draw.
		m.event(Event{Alarm: true, Text: "segment has two owners", Link: l.ID, Segment: id})
		m.refuse(l.remote, kInventory, id, 0, notOwner)
		m.dead(s, kInventory)
	case s.State == kms.StateConfirmed && theirs.state == kms.StateConfirmed:
		if !theirs.mine && !m.owns(s) && s.Given {
			m.send(l.remote, message{kind: kGive, id: id})
		}
		m.bothConfirmed(s)
	case s.State >= kms.StateClosed && theirs.state == kms.StateOpen:
		// our CLOSE is on its way
	case s.State == kms.StateNew && theirs.state == kms.StateConfirmed,
		s.State == kms.StateConfirmed && theirs.state == kms.StateNew:
		m.repeat(s, true)
	}
}

// giveAway hands confirmed segments that we own and have not opened to the
// peer, durably before it is told: rule 4. A segment is given once at most.
func (m *Machine) giveAway(l *link, n int) {
	for i := len(l.mine) - 1; i >= 0 && n > 0; i-- {
		s := l.mine[i]
		if s.Given { // a late copy of the first GIVE would undo a second one
			continue
		}
		n--
		l.mine = slices.Delete(l.mine, i, i+1)
		l.mineSlots -= s.Slots
		s.Owner, s.Given, s.giving = l.remote.id, true, true
		m.change(kms.Change{Op: kms.OpGive, Segment: s.ID, Owner: s.Owner})
		m.repeat(s, true)
	}
}

// wanted: the peer has nothing to draw. Half of what we do not need now goes
// over, never the last.
func (m *Machine) wanted(l *link, n uint64) {
	m.giveAway(l, int(min(n, uint64(len(l.mine)/2))))
}

func (m *Machine) giveReceived(l *link, id kms.SegmentID) {
	s := l.find(id)
	switch {
	case s == nil:
		m.refuse(l.remote, kGive, id, 0, dead)
		return
	case s.State == kms.StateNew:
		m.refuse(l.remote, kGive, id, 0, notYet)
		return
	case s.State == kms.StateConfirmed && !m.owns(s) && !s.Given:
		s.Owner, s.Given = m.cfg.KME, true
		m.change(kms.Change{Op: kms.OpGive, Segment: id, Owner: s.Owner})
		s.peerConfirmed = true
		m.repeat(s, true)
		l.enlist(s)
	}
	if m.owns(s) {
		m.send(l.remote, message{kind: kGiveAck, id: id})
	}
}

func (m *Machine) giveAcked(l *link, id kms.SegmentID) {
	if s := l.find(id); s != nil && !m.owns(s) {
		s.giving = false
		m.repeat(s, true)
	}
}

// agreeIDKey settles the link's ID key at the start of a session: the KME
// whose ID sorts first draws it at the link's set-up and sends it; the other
// adopts it. Nothing is open then, so a new key renames nothing.
func (m *Machine) agreeIDKey(l *link) {
	if m.cfg.KME > l.remote.id || l.idAgreed {
		return
	}
	if l.idKey == nil {
		key := make([]byte, IDKeySize)
		if _, err := m.cfg.Rand.Read(key); err != nil {
			panic("read randomness: " + err.Error()) // crypto/rand never fails
		}
		m.setIDKey(l, key)
	}
	m.repeatIDKey(l, true)
}

func (m *Machine) repeatIDKey(l *link, now bool) {
	r := l.remote
	if !r.up() || l.idAgreed || m.cfg.KME > r.id {
		return
	}
	if now {
		l.idTries = 0
	}
	if now || m.now >= l.idDue {
		m.send(r, message{kind: kIDKey, id: kms.SegmentID{Link: l.ID}, key: l.idKey})
		l.idDue = m.now + backoff(l.idTries)
		l.idTries++
	}
	r.due = min(r.due, l.idDue)
}

func (m *Machine) setIDKey(l *link, key []byte) {
	names, err := newNamer(key)
	if err != nil {
		return // the length is checked by the parser
	}
	l.idKey, l.names = key, names
	if m.out.IDKeys == nil {
		m.out.IDKeys = map[kms.LinkID][]byte{}
	}
	m.out.IDKeys[l.ID] = key
	m.change(kms.Change{Op: kms.OpLink, Segment: kms.SegmentID{Link: l.ID}})
}

func (m *Machine) idKeyReceived(l *link, key []byte) {
	if m.cfg.KME < l.remote.id {
		return // ours counts
	}
	if !slices.Equal(key, l.idKey) {
		if l.idAgreed {
			return // not within a session: IDs are out
		}
		m.setIDKey(l, slices.Clone(key))
	}
	l.idAgreed = true
	m.send(l.remote, message{kind: kIDKeyAck, id: kms.SegmentID{Link: l.ID}})
}

func (m *Machine) idKeyAcked(l *link) {
	if m.cfg.KME < l.remote.id {
		l.idAgreed = true
	}
}
