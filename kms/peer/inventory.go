package peer

import (
	"github.com/quietline/quietline/kms"
)

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
