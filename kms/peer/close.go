package peer

import (
	"slices"
	"time"

	"github.com/quietline/quietline/kms"
)

// marks is how far the owner has drawn each grant that the peer must keep.
func (s *segment) marks() []mark {
	var marks []mark
	for _, g := range s.grants {
		if g.drawn > 0 && len(marks) < maxMarks {
			marks = append(marks, mark{g.First, g.drawn * g.per})
		}
	}
	return marks
}

// sendMarks tells how far our grants are drawn: rule 9.
func (m *Machine) sendMarks(r *remote) {
	for _, l := range r.links {
		for _, s := range l.open {
			var news []mark
			for _, g := range s.grants {
				if g.drawn > g.told && len(news) < maxMarks {
					g.told = g.drawn
					news = append(news, mark{g.First, g.drawn * g.per})
				}
			}
			if len(news) > 0 {
				m.send(r, message{kind: kMarks, id: s.ID, marks: news})
			}
		}
	}
}

func (m *Machine) marksReceived(l *link, msg *message) {
	s := l.find(msg.id)
	if s == nil || s.State != kms.StateOpen || m.owns(s) || s.Session != l.remote.session {
		return
	}
	m.mark(s, msg.marks)
}

// mark starts the retention of what is newly known to be drawn.
func (m *Machine) mark(s *segment, marks []mark) {
	for _, k := range marks {
		g := s.grantAt(k.first)
		if g == nil || k.slots > g.Slots || k.slots <= g.drawn*g.per {
			continue
		}
		n := k.slots/g.per - g.drawn
		g.drawn += n
		m.retain(g, n)
	}
}

// retainGrain is how exactly retention is kept: keys of a second expire
// together, never early.
const retainGrain = time.Second

// retain starts the clock for the n keys that are newly known to be drawn.
func (m *Machine) retain(g *grant, n int) {
	if len(g.roles) == 0 {
		return
	}
	g.seg.owed += n * len(g.roles)
	at := (m.now + retainGrain - 1).Truncate(retainGrain)
	if k := len(g.aged); k > 0 && g.aged[k-1].at == at {
		g.aged[k-1].upTo = g.drawn
		return
	}
	g.aged = append(g.aged, aged{g.drawn, at})
}

// expireKeys destroys drawn keys that no target fetched in time, closes what
// is used up, and looks after idle segments.
func (m *Machine) expireKeys(l *link) {
	for _, s := range append(slices.Clone(l.open), l.served...) {
		for _, g := range s.grants {
			for len(g.aged) > 0 && m.now >= g.aged[0].at+m.cfg.Retention {
				for i := range g.roles {
					m.expire(g, &g.roles[i], g.aged[0].upTo)
				}
				g.aged = g.aged[1:]
			}
			if len(g.aged) > 0 {
				m.wake(g.aged[0].at + m.cfg.Retention)
			}
		}
		m.closeIfDone(s)
	}
}

// expire destroys a role's keys below upTo that were not fetched.
func (m *Machine) expire(g *grant, ro *role, upTo int) {
	for k := ro.expired; k < upTo; k++ {
		if ro.done.Get(k) {
			continue
		}
		n := 1
		for k+n < upTo && !ro.done.Get(k+n) {
			n++
		}
		m.change(kms.Change{Op: kms.OpExpire, Segment: g.seg.ID, Session: g.seg.Session,
			First: g.slot(k), Slots: n * g.per, Role: ro.place, SAE: g.Targets[ro.place]})
		for range n {
			m.take(g, ro, k, false)
			k++
		}
		k--
	}
	ro.expired = max(ro.expired, upTo)
}

// take notes that a key is gone for one of our targets, and for good when it
// was the last.
func (m *Machine) take(g *grant, ro *role, key int, delivered bool) {
	ro.done.Set(key)
	g.seg.owed--
	if delivered && len(g.roles) > 1 {
		if g.got == nil {
			g.got = kms.NewBitmap(g.keys)
		}
		g.got.Set(key)
	}
	if !g.gone(key) {
		return
	}
	delete(m.index, m.id(g, key))
	m.bury(g.seg, g.slot(key), g.per)
	if m.owns(g.seg) {
		return // counted when drawn
	}
	m.consume(g, delivered || g.got.Get(key))
}

// consume takes one key's slots out of the stock.
func (m *Machine) consume(g *grant, delivered bool) {
	ledger := &g.seg.link.ledger
	to := &ledger.Expired
	if delivered {
		to = &ledger.Delivered
	}
	m.spend(g.seg, g.per, to)
	slack := uint64(8*g.seg.SlotBytes*g.per - g.SizeBits)
	*to -= slack
	ledger.Burnt += slack
}

// closeIfDone closes a segment of which nothing is left to deliver: rule 9.
func (m *Machine) closeIfDone(s *segment) {
	if s.State != kms.StateOpen || s.owed > 0 { // a target may still fetch
		return
	}
	switch {
	case m.owns(s):
		if !s.acked || !m.usedUp(s) {
			return
		}
		m.spend(s, s.left, &s.link.ledger.Burnt)
		marks := s.marks()
		m.change(kms.Change{Op: kms.OpClose, Segment: s.ID})
		s.State = kms.StateClosed
		m.unlist(s)
		s.final = marks
		m.repeat(s, true)
	case s.closing:
		m.spend(s, s.left, &s.link.ledger.Burnt)
		m.change(kms.Change{Op: kms.OpClose, Segment: s.ID})
		s.State = kms.StateClosed
		m.finish(s)
	}
}

// room is how many keys of per slots the segment can still grant. The number
// of grants is bounded, so that CLOSE can tell of them all.
func (s *segment) room(per int) int {
	if len(s.grants) >= maxMarks {
		return 0
	}
	return (s.Slots - s.next) / per
}

// usedUp tells whether our segment has nothing more to draw: all its slots are
// granted and drawn, or what is left of its grants lay idle for a retention
// time and no key fits the rest.
func (m *Machine) usedUp(s *segment) bool {
	if s.room(kms.KeySlots(m.cfg.KeySizeBits, s.SlotBytes)) > 0 {
		return false
	}
	if s.undrawn == 0 {
		return true
	}
	return m.now >= s.drawAt+aheadIdle && !slices.ContainsFunc(s.grants,
		func(g *grant) bool { return g.drawn < g.keys && !g.dead && !g.acked })
}

func (m *Machine) closeReceived(l *link, msg *message) {
	s := l.find(msg.id)
	r := l.remote
	switch {
	case s == nil:
		m.send(r, message{kind: kCloseAck, id: msg.id})
	case s.State != kms.StateOpen, m.owns(s), s.Session != r.session:
		m.refuse(r, kClose, msg.id, 0, dead)
	default:
		if !s.closing {
			s.closing = true
			m.mark(s, msg.marks)
			m.burnUndrawn(s)
		}
		m.send(r, message{kind: kCloseAck, id: msg.id})
		m.closeIfDone(s)
	}
}

// burnUndrawn forgets the keys of a closed segment that were never drawn.
func (m *Machine) burnUndrawn(s *segment) {
	keep := 0
	for _, g := range s.grants {
		for k := g.drawn; k < g.keys && len(g.roles) > 0; k++ {
			delete(m.index, m.id(g, k))
			m.bury(s, g.slot(k), g.per)
		}
		for k := range g.drawn {
			for i := range g.roles {
				if !g.roles[i].done.Get(k) {
					keep += g.per
					break
				}
			}
		}
	}
	m.spend(s, max(0, s.left-keep), &s.link.ledger.Burnt)
}

func (m *Machine) closeAcked(l *link, id kms.SegmentID) {
	if s := l.find(id); s != nil && s.State == kms.StateClosed && m.owns(s) {
		m.finish(s)
	}
}

// bury marks slots that nobody may read here any more: the next turn of the
// epoch leaves them out.
func (m *Machine) bury(s *segment, first, slots int) {
	if s.buried == nil {
		s.buried = kms.NewBitmap(s.Slots)
	}
	for i := first; i < first+slots; i++ {
		s.buried.Set(i)
	}
	s.touched = true
}
