package peer

import (
	"slices"
	"time"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/kms"
)

// The loopback pool serves keys whose initiator and targets are all SAEs of
// this KME (rule 8). Its segments hold random bits of the KME itself: they
// never were on a link and no peer has them, so nothing is compared, owned or
// acknowledged. What is left of the protocol is the same as for a link and the
// same changes in the store: grants, one bitmap for the initiator and one for
// each target, retention, one close, and a ledger that balances.
//
// It needs no peer, which is also why a restart gives all of it up: nobody
// could witness that the disk is not an old copy, on which keys stand that
// were delivered since. For the same reason the key_IDs of each process come
// from an ID key of its own.

// Bounds of the pool, in slots.
const (
	loopSlots = 256     // a segment, unless one key is longer
	loopLong  = 1 << 12 // the longest: one key of kms.Limits' most, 2^20 bits
	loopMost  = 1 << 18 // live at a time, whoever waits for them: 8 MiB of key
)

// addLoop makes the pool. Of what the store holds only the numbers and the
// ledger go on.
func (m *Machine) addLoop(lease kms.Lease) {
	r := newRemote(m.cfg.KME)
	r.local, r.reason = true, ""
	m.loop = newLink(Link{ID: kms.Loopback, Peer: m.cfg.KME}, r, lease)
	m.links[kms.Loopback] = m.loop
	m.ordered = append(m.ordered, r)
}

// renewLoop binds what is opened from now on to a new incarnation.
func (m *Machine) renewLoop() {
	r := m.loop.remote
	r.connected, r.agreed, r.proven = true, true, true
	r.session = sessionOf(m.cfg.KME, m.self, m.cfg.KME, m.self)
	m.voidLoaded(m.loop, "the loopback pool ends with its process")
}

// spareSlots is how many slots the pool may still be filled with.
func (l *link) spareSlots() int { return max(0, loopMost-l.slots-l.asked) }

// pumpLoop is pump for the pool: grants are good at once, and what is missing
// is asked of the caller.
func (m *Machine) pumpLoop(l *link) {
	r := l.remote
	m.failShort(r)
	need, longest := 0, 0
	var seen []*shape
	for _, d := range r.queue {
		sh := d.shape
		if slices.Contains(seen, sh) {
			continue
		}
		seen = append(seen, sh)
		lack := sh.wanted - sh.free
		if lack -= m.grantKeys(r, sh, max(0, lack), false); lack > 0 {
			need += lack * sh.per
			longest = max(longest, sh.per)
		}
	}
	m.serve(r)
	if need > 0 && l.asked == 0 {
		m.fillLoop(l, max(min(need, loopLong), longest, loopSlots))
	}
}

// fillLoop asks for one more segment.
func (m *Machine) fillLoop(l *link, slots int) {
	slots = min(slots, l.spareSlots())
	if slots == 0 {
		return
	}
	l.asked = slots
	m.out.Fill = append(m.out.Fill, kms.Segment{
		ID:    kms.SegmentID{Link: l.ID, Generation: 1, Number: max(l.floor, 1)},
		State: kms.StateNew, BlockBytes: slots * SlotBytes, SlotBytes: SlotBytes, Slots: slots,
		Owner: m.cfg.KME, Simulated: true})
}

// filled takes a segment of the pool over: stored, confirmed and opened in one
// commit, which the draws that waited for it share.
func (m *Machine) filled(l *link, in Ingested) {
	id := in.Segment.ID
	if l.asked != in.Segment.Slots || l.gone(id) {
		return
	}
	if l.idKey == nil {
		m.drawIDKey(l)
	}
	l.idAgreed = true
	s := &segment{Segment: in.Segment, link: l, since: m.now, left: in.Segment.Slots, drawAt: m.now}
	l.asked, l.generation, l.floor = 0, id.Generation, id.Number+1
	l.add(s)
	bits := uint64(8 * s.SlotBytes * s.Slots)
	l.ledger.Ingested += bits
	l.ledger.Stored += bits
	l.counted = true
	s.State, s.Session, s.acked = kms.StateOpen, l.remote.session, true
	s.idBlock = l.names.segment(id)
	l.open = append(l.open, s)
	m.change(kms.Change{Op: kms.OpIngest, Segment: id, Meta: in.Segment, Sealed: in.Sealed})
	m.change(kms.Change{Op: kms.OpConfirm, Segment: id})
	m.change(kms.Change{Op: kms.OpOpen, Segment: id, Session: s.Session})
	l.remote.stirred = true
}

// fullLoop answers who wants more than the pool may hold.
func fullLoop(missingBits int) error {
	return &etsi014.Error{Kind: etsi014.ErrEmpty, RetryAfter: time.Second, MissingBits: missingBits,
		Details: []map[string]string{{"loopback": "full of keys that wait for their slave SAEs"}}}
}
