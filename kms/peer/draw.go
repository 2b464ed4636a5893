package peer

import (
	"slices"
	"time"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/kms"
)

// shape is one kind of request: who draws for whom, and what size. Grants are
// made for a shape.
type shape struct {
	initiator etsi014.SAEID
	targets   []etsi014.SAEID
	sizeBits  int
	per       int // slots a key
	ahead     bool

	grants []*grant
	free   int // keys granted, acknowledged, not drawn
	coming int // keys granted, not yet acknowledged
	wanted int // keys that waiting draws lack

	rate   float64 // keys a second
	calls  float64 // a second
	drawAt time.Duration
	asked  time.Duration // last GRANT

	asking  bool // among remote.asking
	blocked int  // the pass of serve that found too few keys
}

// draw is a request that waits for its grant.
type draw struct {
	Draw
	shape *shape
	r     *remote
}

// draw serves a request for new keys: at once from acknowledged grants, or
// after a round trip.
func (m *Machine) draw(in Draw) {
	r, err := m.route(&in)
	if err != nil {
		m.answer(Answer{Ticket: in.Ticket, Err: err})
		return
	}
	sh := r.shape(&in, m.cfg.KeySizeBits)
	sh.demand(m.now, in.Number)
	d := &draw{Draw: in, shape: sh, r: r}
	m.waiting[in.Ticket] = d
	r.queue = append(r.queue, d)
	sh.wanted += in.Number
	r.stirred = true
	if !sh.asking {
		sh.asking = true
		r.asking = append(r.asking, sh)
	}
}

// settle serves what the inputs of a step have stirred, once for all of them.
func (m *Machine) settle() {
	for _, r := range m.ordered {
		if r.stirred {
			r.stirred = false
			m.pump(r)
		}
		for _, sh := range r.asking {
			sh.asking = false
			m.grantAhead(r, sh)
		}
		r.asking = r.asking[:0]
	}
}

// route finds the peer that serves the targets we do not; the loopback pool if
// there are none.
func (m *Machine) route(in *Draw) (*remote, error) {
	var r *remote
	for _, t := range in.Targets {
		at, ok := m.cfg.SAEs[t]
		switch {
		case !ok:
			return nil, &etsi014.Error{Kind: etsi014.ErrRequest, Message: "unknown slave SAE"}
		case at == m.cfg.KME:
		case m.peers[at] == nil:
			return nil, &etsi014.Error{Kind: etsi014.ErrRequest,
				Message: "no link leads to the slave SAE's KME"}
		case r != nil && r != m.peers[at]:
			return nil, &etsi014.Error{Kind: etsi014.ErrRequest,
				Message: "slave SAEs at two other KMEs: a key comes from the link with one of " +
					"them, and the other KME has no copy of it; ask for each KME by itself"}
		default:
			r = m.peers[at]
		}
	}
	if r == nil {
		r = m.loop.remote
	}
	return r, nil
}

// shapeID names a shape. SAE IDs hold no zero byte, which parts the targets.
type shapeID struct {
	initiator etsi014.SAEID
	targets   string
	sizeBits  int
}

func shapeKey(in *Draw) shapeID {
	id := shapeID{initiator: in.Initiator, sizeBits: in.SizeBits}
	for i, s := range in.Targets {
		if i == 0 {
			id.targets = string(s)
		} else {
			id.targets += "\x00" + string(s)
		}
	}
	return id
}

func (r *remote) shape(in *Draw, readySize int) *shape {
	key := shapeKey(in)
	sh := r.shapes[key]
	if sh == nil {
		sh = &shape{initiator: in.Initiator, targets: slices.Clone(in.Targets),
			sizeBits: in.SizeBits, per: kms.KeySlots(in.SizeBits, SlotBytes),
			ahead: in.SizeBits == readySize && len(in.Targets) == 1 && !r.local}
		r.shapes[key] = sh
	}
	return sh
}

// room is how many keys of per slots the open segments of a peer can still
// grant; closed is how many its confirmed ones would. It may stop counting at
// enough: a draw must not walk the whole stock.
func (r *remote) room(per, enough int) (open, closed int) {
	for _, l := range r.links {
		for _, s := range l.open {
			if s.acked {
				open += s.room(per)
			} else {
				closed += s.room(per)
			}
		}
		if r.local {
			closed += l.asked/per + l.spareSlots()/per
		}
		if per == 1 && l.idAgreed {
			closed += l.mineSlots
			continue
		}
		for i := 0; l.idAgreed && i < len(l.mine) && open+closed < enough; i++ {
			closed += l.mine[i].Slots / per
		}
	}
	return open, closed
}

// pump serves waiting draws from what is granted, and grants and opens what
// they lack. It is run after everything that may have changed that.
func (m *Machine) pump(r *remote) {
	if r.local {
		m.pumpLoop(m.loop)
		return
	}
	m.serve(r)
	m.failShort(r) // first, so that nothing is granted for a draw that cannot be
	if r.up() {
		m.grantWanted(r)
		m.failShort(r)
		m.openAhead(r)
	}
}

// serve answers every waiting draw that acknowledged grants cover, in order of
// arrival for each shape.
func (m *Machine) serve(r *remote) {
	r.pass++
	waiting := r.queue[:0]
	for _, d := range r.queue {
		if d.shape.free < d.Number || d.shape.blocked == r.pass {
			d.shape.blocked = r.pass
			waiting = append(waiting, d)
			continue
		}
		delete(m.waiting, d.Ticket)
		d.shape.wanted -= d.Number
		m.answer(Answer{Ticket: d.Ticket, Keys: m.claim(d)})
	}
	clear(r.queue[len(waiting):])
	r.queue = waiting
}

// claim draws a request's keys from its shape's grants, oldest first.
func (m *Machine) claim(d *draw) []KeyRef {
	keys := make([]KeyRef, 0, d.Number)
	sh := d.shape
	for i := 0; i < len(sh.grants) && len(keys) < d.Number; i++ {
		g := sh.grants[i]
		n := min(d.Number-len(keys), g.keys-g.drawn)
		if !g.acked || n <= 0 {
			continue
		}
		s := g.seg
		m.claimSlots(g, kms.RoleInitiator, g.Initiator, g.drawn, n)
		for k := g.drawn; k < g.drawn+n; k++ {
			keys = append(keys, g.ref(m.id(g, k), k))
			m.consume(g, true)
			if len(g.roles) == 0 {
				m.bury(g.seg, g.slot(k), g.per)
			}
		}
		m.list(g, g.drawn, g.drawn+n)
		g.drawn += n
		sh.free -= n
		if g.ready {
			s.link.remote.ready -= n * g.per
		}
		s.drawAt = m.now
		m.retain(g, n)
		if g.drawn == g.keys {
			sh.grants = slices.Delete(sh.grants, i, i+1)
			i--
			s.undrawn--
			m.closeIfDone(s)
		}
	}
	return keys
}

// grantWanted grants what waiting draws lack, and opens segments for what does
// not fit the open ones.
func (m *Machine) grantWanted(r *remote) {
	for _, d := range r.queue {
		sh := d.shape
		if lack := sh.wanted - sh.free - sh.coming; lack > 0 {
			lack -= m.grantKeys(r, sh, lack, false)
			if lack > 0 {
				m.openFor(r, sh.per, lack)
			}
		}
	}
}

// grantKeys grants up to n keys from open segments, oldest first, and returns
// how many.
func (m *Machine) grantKeys(r *remote, sh *shape, n int, ready bool) int {
	done := 0
	for _, l := range r.links {
		for _, s := range l.open {
			if k := min(n-done, s.room(sh.per)); s.acked && k > 0 {
				m.makeGrant(sh, s, k, ready)
				done += k
			}
		}
	}
	return done
}

// openFor opens as many segments as lack keys need, counting those on their
// way; one at a time per link when one is enough.
func (m *Machine) openFor(r *remote, per, lack int) {
	for _, l := range r.links {
		for _, s := range l.open {
			if !s.acked {
				lack -= s.Slots / per
			}
		}
	}
	for _, l := range r.links {
		for lack > 0 && l.idAgreed && len(l.mine) > 0 {
			lack -= l.mine[0].Slots / per
			m.openNext(l)
		}
	}
}

// failShort answers draws that the stock cannot cover, newest first, so that
// those that came before are not starved by what came after.
func (m *Machine) failShort(r *remote) {
	up, per, room := r.up(), 0, 0
	for i := len(r.queue) - 1; i >= 0; i-- {
		d := r.queue[i]
		sh := d.shape
		have := sh.free
		if up {
			have += sh.coming
		}
		lack := sh.wanted - have
		if lack > 0 && up {
			if sh.per != per || room < lack {
				open, closed := r.room(sh.per, lack)
				per, room = sh.per, open+closed
			}
			have += room
		}
		if sh.wanted <= have {
			continue
		}
		missing := min(sh.wanted-have, d.Number) * sh.sizeBits
		if r.local {
			m.failDraw(d, fullLoop(missing))
			continue
		}
		m.failDraw(d, shortage(missing, r))
		m.want(r)
	}
}

// shortage is the answer when there is not enough key: how much is missing,
// and when to ask again.
func shortage(missingBits int, r *remote) error {
	e := &etsi014.Error{Kind: etsi014.ErrEmpty, RetryAfter: time.Second, MissingBits: missingBits}
	if !r.up() {
		e.Details = []map[string]string{{"peer_kme": "not there: " + r.reason}}
		e.RetryAfter = 5 * time.Second
	}
	return e
}

// want asks the peer for segments of its own, for we have none to draw.
func (m *Machine) want(r *remote) {
	if !r.up() || m.now < r.wantAt {
		return
	}
	r.wantAt = m.now + wantEvery
	for _, l := range r.links {
		if len(l.mine) == 0 {
			m.send(r, message{kind: kWant, id: kms.SegmentID{Link: l.ID}, count: wantCount})
		}
	}
}

// wantEvery is the least time between two WANTs.
const wantEvery = time.Second

// wantCount is how many segments one WANT asks for: with the giver's rule of
// half of its own, a few calls even out any imbalance.
const wantCount = 16

// failDraw answers a waiting draw with an error.
func (m *Machine) failDraw(d *draw, err error) {
	delete(m.waiting, d.Ticket)
	d.r.queue = slices.DeleteFunc(d.r.queue, func(o *draw) bool { return o == d })
	d.shape.wanted -= d.Number
	m.answer(Answer{Ticket: d.Ticket, Err: err})
}

// failWaiting answers every draw that waits for a peer who went away.
func (m *Machine) failWaiting(r *remote) {
	for _, d := range slices.Clone(r.queue) {
		m.failDraw(d, &etsi014.Error{Kind: etsi014.ErrDown, RetryAfter: time.Second,
			Message: "the peer KME went away"})
	}
}

// fetch hands keys to a target: rule 8, all or nothing.
func (m *Machine) fetch(in Fetch) {
	type part struct {
		keyAt
		role *role
	}
	var few [4]part // most calls are for one key
	parts := few[:0]
	var err error
	for _, id := range in.IDs {
		at, ok := m.index[id]
		if !ok {
			err = etsi014.ErrUnknownKey
			continue
		}
		ro := at.grant.roleOf(in.Target)
		if ro == nil || at.grant.Initiator != in.Initiator {
			m.answer(Answer{Ticket: in.Ticket, Err: etsi014.ErrDenied})
			return
		}
		if ro.done.Get(at.key) {
			err = etsi014.ErrUnknownKey
		}
		parts = append(parts, part{at, ro})
	}
	for i := range parts { // an ID named twice is fetched already the second time
		for j := range i {
			if parts[i].keyAt == parts[j].keyAt {
				err = etsi014.ErrUnknownKey
			}
		}
	}
	if err != nil {
		m.answer(Answer{Ticket: in.Ticket, Err: err})
		return
	}
	keys := make([]KeyRef, 0, len(parts))
	for i, p := range parts {
		g := p.grant
		keys = append(keys, g.ref(in.IDs[i], p.key))
		if p.key >= g.drawn { // it was drawn, and with it all before: a watermark
			n := p.key + 1 - g.drawn
			g.drawn += n
			m.retain(g, n)
		}
		m.claimSlots(g, p.role.place, in.Target, p.key, 1)
		m.take(g, p.role, p.key, true)
	}
	m.answer(Answer{Ticket: in.Ticket, Keys: keys})
	for _, p := range parts {
		m.closeIfDone(p.grant.seg)
	}
}

// claimSlots claims n keys of a grant from one on; neighbours share a change.
func (m *Machine) claimSlots(g *grant, role int, sae etsi014.SAEID, from, n int) {
	s := g.seg
	if len(m.out.Changes) > 0 {
		c := &m.out.Changes[len(m.out.Changes)-1]
		if c.Op == kms.OpClaim && c.Segment == s.ID && c.Role == role && c.SAE == sae &&
			c.First+c.Slots == g.slot(from) && c.First >= g.First {
			c.Slots += n * g.per
			return
		}
	}
	m.change(kms.Change{Op: kms.OpClaim, Segment: s.ID, Session: s.Session,
		First: g.slot(from), Slots: n * g.per, Role: role, SAE: sae})
}

// roleOf is the target's role in the grant, nil if it is not served here as one.
func (g *grant) roleOf(sae etsi014.SAEID) *role {
	for i := range g.roles {
		if g.Targets[g.roles[i].place] == sae {
			return &g.roles[i]
		}
	}
	return nil
}
