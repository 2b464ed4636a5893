package peer

import (
	"slices"

	"github.com/quietline/quietline/kms"
)

// openNext opens our oldest confirmed segment: rule 5.
func (m *Machine) openNext(l *link) {
	s := l.mine[0]
	l.mine = slices.Delete(l.mine, 0, 1)
	l.mineSlots -= s.Slots
	s.Session = l.remote.session
	s.State, s.acked, s.drawAt = kms.StateOpen, false, m.now
	s.idBlock = l.names.segment(s.ID)
	l.open = append(l.open, s)
	m.change(kms.Change{Op: kms.OpOpen, Segment: s.ID, Session: s.Session})
	m.repeat(s, true)
}

func (m *Machine) openReceived(l *link, id kms.SegmentID) {
	s := l.find(id)
	r := l.remote
	switch {
	case s == nil:
		m.refuse(r, kOpen, id, 0, dead)
	case s.State == kms.StateNew:
		m.refuse(r, kOpen, id, 0, notYet)
	case m.owns(s):
		m.event(Event{Alarm: true, Text: "peer opens what is ours", Link: l.ID, Segment: id})
		m.refuse(r, kOpen, id, 0, notOwner)
	case s.State == kms.StateConfirmed && !l.idAgreed:
		m.refuse(r, kOpen, id, 0, notYet)
	case s.State == kms.StateConfirmed:
		s.State, s.Session, s.giving = kms.StateOpen, r.session, false
		s.idBlock = l.names.segment(id)
		l.served = append(l.served, s)
		m.change(kms.Change{Op: kms.OpOpen, Segment: id, Session: r.session})
		m.repeat(s, true)
		m.send(r, message{kind: kOpenAck, id: id})
	case s.State == kms.StateOpen && s.Session == r.session:
		m.send(r, message{kind: kOpenAck, id: id})
	default:
		m.refuse(r, kOpen, id, 0, dead)
	}
}

func (m *Machine) openAcked(l *link, id kms.SegmentID) {
	s := l.find(id)
	if s == nil || s.State != kms.StateOpen || !m.owns(s) || s.Session != l.remote.session {
		return
	}
	if !s.acked {
		s.acked = true
		m.repeat(s, true)
		l.remote.stirred = true
	}
}

// turn lists what the next epoch keeps: segments of which something was
// claimed are sealed anew without it, all other keys are only wrapped anew.
func (m *Machine) turn(epoch uint64) {
	m.out.Gone = map[kms.SegmentID]kms.Bitmap{}
	m.out.IDKeys = map[kms.LinkID][]byte{}
	for _, r := range m.ordered {
		for _, l := range r.links {
			if l.idKey != nil {
				m.out.IDKeys[l.ID] = l.idKey
				m.change(kms.Change{Op: kms.OpLink, Segment: kms.SegmentID{Link: l.ID}})
			}
			for _, s := range l.sorted() {
				switch {
				case s.State > kms.StateOpen:
				case s.touched:
					s.touched = false
					m.out.Gone[s.ID] = slices.Clone(s.buried)
					m.change(kms.Change{Op: kms.OpReseal, Segment: s.ID})
				default:
					m.change(kms.Change{Op: kms.OpRewrap, Segment: s.ID})
				}
			}
		}
	}
	m.change(kms.Change{Op: kms.OpTurn, Epoch: epoch})
}
