package peer

import (
	"github.com/quietline/quietline/kms"
)

func (m *Machine) refuse(r *remote, k kind, id kms.SegmentID, first int, why reason) {
	m.send(r, message{kind: kRefuse, refused: k, id: id, first: first, reason: why})
}

// received acts on one message.
func (m *Machine) received(in Received) {
	r := m.peers[in.Peer]
	if r == nil {
		return
	}
	msg := &m.msg
	if err := msg.decode(in.Data); err != nil {
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
	case differs:
		if s.State.May(kms.StateVoid) {
			m.event(Event{Alarm: true, Text: "blocks differ", Link: l.ID, Segment: s.ID,
				Reason: "the peer says so, or cannot read its own"})
		}
		m.dead(s, 0)
	case notOwner, conflict:
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
