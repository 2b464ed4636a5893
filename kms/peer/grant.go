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
	i, _ := s.place(g.First)
	s.grants = slices.Insert(s.grants, i, x)
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

// gone tells whether every target served here has had its copy of a key, or
// will not get it any more.
func (g *grant) gone(key int) bool {
	for i := range g.roles {
		if !g.roles[i].done.Get(key) {
			return false
		}
	}
	return true
}

// dropGrant forgets a grant: its keys are unknown from now on.
func (m *Machine) dropGrant(g *grant) {
	if len(g.roles) > 0 {
		for k := range g.keys {
			if g.gone(k) {
				continue // not listed any more
			}
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

// makeGrant gives the next n keys' slots of an open segment to a shape and
// asks the peer to agree: rule 6.
func (m *Machine) makeGrant(sh *shape, s *segment, n int, ready bool) {
	g := m.newGrant(s, kms.Grant{First: s.next, Slots: n * sh.per, SizeBits: sh.sizeBits,
		Initiator: sh.initiator, Targets: sh.targets})
	g.shape, g.ready = sh, ready
	s.next += g.Slots
	s.undrawn++
	sh.grants = append(sh.grants, g)
	m.change(kms.Change{Op: kms.OpGrant, Segment: s.ID, Session: s.Session, Grant: g.Grant})
	if s.link.remote.local {
		g.acked = true
		sh.free += n
		return
	}
	sh.coming += n
	if ready {
		s.link.remote.ready += g.Slots
	}
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
	if have := s.grantAt(g.First); have != nil && sameGrant(have.Grant, g) {
		m.send(r, message{kind: kGrantAck, id: s.ID, first: g.First})
		return
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
	i, same := s.place(g.First)
	return !same && (i == len(s.grants) || s.grants[i].First >= g.First+g.Slots) &&
		(i == 0 || s.grants[i-1].First+s.grants[i-1].Slots <= g.First)
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

// place is where the grant from that slot on stands, or would.
func (s *segment) place(first int) (int, bool) {
	return slices.BinarySearchFunc(s.grants, first, func(g *grant, first int) int {
		return g.First - first
	})
}

func (s *segment) grantAt(first int) *grant {
	if i, ok := s.place(first); ok {
		return s.grants[i]
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
	r.stirred = true
}

// strangerRefused: the peer does not serve those SAEs. The slots stay unused.
func (m *Machine) strangerRefused(s *segment, first int) {
	g := s.grantAt(first)
	if g == nil || g.acked || g.dead || g.shape == nil {
		return
	}
	g.dead = true
	s.undrawn--
	sh := g.shape
	sh.coming -= g.keys
	for _, d := range slices.Clone(s.link.remote.queue) {
		if d.shape == sh {
			m.failDraw(d, &etsi014.Error{Kind: etsi014.ErrDenied,
				Message: "the peer KME does not know these SAEs"})
		}
	}
}
