package peer

import (
	"math"
	"slices"

	"github.com/quietline/quietline/kms"
)

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
// over, never the last, and nothing that SAEs of ours have reserved.
func (m *Machine) wanted(l *link, n uint64) {
	n = min(n, uint64(len(l.mine)/2))
	if m.cfg.Reserve == 0 {
		m.giveAway(l, int(n))
		return
	}
	per := kms.KeySlots(m.cfg.KeySizeBits, SlotBytes)
	open, closed := l.remote.room(per, math.MaxInt)
	for free := open + closed; n > 0 && len(l.mine) > 0; n-- {
		free -= l.mine[len(l.mine)-1].Slots / per
		// What may be granted ahead must not come out of the reserve either;
		// see kms.Allowance.
		if free-(free+3)/4 < m.cfg.Reserve {
			return
		}
		m.giveAway(l, 1)
	}
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
