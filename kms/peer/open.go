package peer

import (
	"slices"
	"time"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/kms"
)

// grant is a range of slots for one initiator and its targets.
type grant struct {
	kms.Grant
	seg   *segment
	shape *shape // ours only
	per   int    // slots a key
	keys  int
	acked bool // by the peer; ours only
	dead  bool // refused: its slots die with the segment
	ready bool // made ahead of demand

	drawn int // keys; at the target's side as far as known
	told  int // keys, in MARKS

	roles []role     // the targets served here
	got   kms.Bitmap // keys that one of several roles fetched
	aged  []aged     // keys whose retention runs
}

// role is a target that is served here: its place and what it has taken.
type role struct {
	place   int // in Grant.Targets
	done    kms.Bitmap
	taken   int // keys fetched or expired
	expired int // keys looked at for expiry
}

// aged says that the keys before upTo were known to be drawn at a time.
type aged struct {
	upTo int
	at   time.Duration
}

// keyAt finds a key by its ID.
type keyAt struct {
	grant *grant
	key   int
}

func (m *Machine) newGrant(s *segment, g kms.Grant) *grant {
	per := kms.KeySlots(g.SizeBits, s.SlotBytes)
	x := &grant{Grant: g, seg: s, per: per, keys: g.Slots / per}
	for place, sae := range g.Targets {
		if m.cfg.SAEs[sae] == m.cfg.KME {
			x.roles = append(x.roles, role{place: place, done: kms.NewBitmap(x.keys)})
		}
	}
	s.grants = append(s.grants, x)
	return x
}

func (g *grant) slot(key int) int { return g.First + key*g.per }

// id is the key_ID of a key of the grant.
func (m *Machine) id(g *grant, key int) etsi014.KeyID {
	s := g.seg
	return s.link.names.key(s.idBlock, g.slot(key), g.SizeBits)
}

// ref says where a key of the grant is.
func (g *grant) ref(id etsi014.KeyID, key int) KeyRef {
	return KeyRef{ID: id, Segment: g.seg.ID, First: g.slot(key), Slots: g.per,
		SlotBytes: g.seg.SlotBytes, SizeBits: g.SizeBits}
}

// list makes the keys [from, to) of a grant findable for our targets.
func (m *Machine) list(g *grant, from, to int) {
	if len(g.roles) == 0 {
		return
	}
	for k := from; k < to; k++ {
		m.index[m.id(g, k)] = keyAt{g, k}
	}
}

// dropGrant forgets a grant: its keys are unknown from now on.
func (m *Machine) dropGrant(g *grant) {
	if len(g.roles) > 0 {
		for k := range g.keys {
			id := m.id(g, k)
			if m.index[id].grant == g {
				delete(m.index, id)
			}
		}
	}
	if g.shape != nil {
		left := g.keys - g.drawn
		switch {
		case g.acked:
			g.shape.free -= left
		case !g.dead:
			g.shape.coming -= left
		}
		if g.ready {
			g.seg.link.remote.ready -= left * g.per
		}
		g.shape.grants = slices.DeleteFunc(g.shape.grants, func(o *grant) bool { return o == g })
	}
}

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
		m.pump(l.remote)
	}
}

// makeGrant gives the next n keys' slots of an open segment to a shape and
// asks the peer to agree: rule 6.
func (m *Machine) makeGrant(sh *shape, s *segment, n int, ready bool) {
	g := m.newGrant(s, kms.Grant{First: s.next, Slots: n * sh.per, SizeBits: sh.sizeBits,
		Initiator: sh.initiator, Targets: sh.targets})
	g.shape, g.ready = sh, ready
	s.next += g.Slots
	sh.grants = append(sh.grants, g)
	sh.coming += n
	if ready {
		s.link.remote.ready += g.Slots
	}
	m.change(kms.Change{Op: kms.OpGrant, Segment: s.ID, Session: s.Session, Grant: g.Grant})
	m.send(s.link.remote, message{kind: kGrant, id: s.ID, grant: g.Grant})
	if _, ok := s.link.pending[s]; !ok {
		s.link.pending[s] = struct{}{}
		s.due, s.tries = m.now+retryFirst, 1
	}
	g.shape.asked = m.now
}

// sendGrants repeats the grants of a segment that are not acknowledged.
func (m *Machine) sendGrants(s *segment) bool {
	sent := false
	for _, g := range s.grants {
		if !g.acked && !g.dead {
			m.send(s.link.remote, message{kind: kGrant, id: s.ID, grant: g.Grant})
			sent = true
		}
	}
	return sent
}

func (m *Machine) grantReceived(l *link, msg *message) {
	s := l.find(msg.id)
	r := l.remote
	switch {
	case s == nil, s.State != kms.StateOpen, s.Session != r.session, s.closing:
		if s == nil || s.State != kms.StateConfirmed && s.State != kms.StateNew {
			m.refuse(r, kGrant, msg.id, msg.grant.First, dead)
		} else {
			m.refuse(r, kGrant, msg.id, msg.grant.First, notYet)
		}
		return
	case m.owns(s):
		m.refuse(r, kGrant, msg.id, msg.grant.First, notOwner)
		return
	}
	g := msg.grant
	for _, have := range s.grants {
		if sameGrant(have.Grant, g) {
			m.send(r, message{kind: kGrantAck, id: s.ID, first: g.First})
			return
		}
	}
	if !m.fits(s, g) {
		m.event(Event{Alarm: true, Text: "grant contradicts another", Link: l.ID, Segment: s.ID})
		m.void(s, "conflicting grant")
		m.refuse(r, kGrant, msg.id, g.First, conflict)
		return
	}
	if !m.known(r, g) {
		m.refuse(r, kGrant, s.ID, g.First, stranger)
		return
	}
	x := m.newGrant(s, g)
	m.list(x, 0, x.keys)
	m.change(kms.Change{Op: kms.OpGrant, Segment: s.ID, Session: s.Session, Grant: g})
	m.send(r, message{kind: kGrantAck, id: s.ID, first: g.First})
}

func sameGrant(a, b kms.Grant) bool {
	return a.First == b.First && a.Slots == b.Slots && a.SizeBits == b.SizeBits &&
		a.Initiator == b.Initiator && slices.Equal(a.Targets, b.Targets)
}

// fits tells whether a grant lies inside the segment and overlaps none.
func (m *Machine) fits(s *segment, g kms.Grant) bool {
	per := kms.KeySlots(g.SizeBits, s.SlotBytes)
	if g.Slots%per != 0 || g.First > s.Slots || g.Slots > s.Slots-g.First {
		return false
	}
	for _, have := range s.grants {
		if g.First < have.First+have.Slots && have.First < g.First+g.Slots {
			return false
		}
	}
	return true
}

// known tells whether the SAEs of a peer's grant are where the peer thinks.
func (m *Machine) known(r *remote, g kms.Grant) bool {
	if m.cfg.SAEs[g.Initiator] != r.id {
		return false
	}
	ours := false
	for _, t := range g.Targets {
		at := m.cfg.SAEs[t]
		if at != m.cfg.KME && at != r.id {
			return false
		}
		ours = ours || at == m.cfg.KME
	}
	return ours
}

func (s *segment) grantAt(first int) *grant {
	for _, g := range s.grants {
		if g.First == first {
			return g
		}
	}
	return nil
}

func (m *Machine) grantAcked(l *link, msg *message) {
	s := l.find(msg.id)
	if s == nil || s.State != kms.StateOpen || !m.owns(s) || s.Session != l.remote.session {
		return
	}
	g := s.grantAt(msg.first)
	if g == nil || g.acked || g.dead {
		return
	}
	g.acked = true
	g.shape.coming -= g.keys
	g.shape.free += g.keys
	r := l.remote
	if took := m.now - g.shape.asked; took > 0 {
		r.rtt += (took - r.rtt) / 8 // smoothed as in RFC 6298 section 2
	}
	m.pump(r)
}

// strangerRefused: the peer does not serve those SAEs. The slots stay unused.
func (m *Machine) strangerRefused(s *segment, first int) {
	g := s.grantAt(first)
	if g == nil || g.acked || g.dead || g.shape == nil {
		return
	}
	g.dead = true
	sh := g.shape
	sh.coming -= g.keys
	for _, d := range slices.Clone(s.link.remote.queue) {
		if d.shape == sh {
			m.failDraw(d, &etsi014.Error{Kind: etsi014.ErrDenied,
				Message: "the peer KME does not know these SAEs"})
		}
	}
}

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
		g.drawn = k.slots / g.per
		m.retain(g)
	}
}

// retain starts the clock for the keys drawn up to now.
func (m *Machine) retain(g *grant) {
	if len(g.roles) > 0 {
		g.aged = append(g.aged, aged{g.drawn, m.now})
	}
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
	ro.taken++
	if delivered && len(g.roles) > 1 {
		if g.got == nil {
			g.got = kms.NewBitmap(g.keys)
		}
		g.got.Set(key)
	}
	for i := range g.roles {
		if !g.roles[i].done.Get(key) {
			return
		}
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
	if s.State != kms.StateOpen {
		return
	}
	for _, g := range s.grants {
		for i := range g.roles {
			if g.roles[i].taken < g.drawn {
				return // a target may still fetch
			}
		}
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
	idle := m.now >= s.drawAt+m.cfg.Retention
	for _, g := range s.grants {
		switch {
		case g.drawn == g.keys, g.dead:
		case !idle, !g.acked:
			return false
		}
	}
	return true
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
