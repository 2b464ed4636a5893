package peer

import (
	"math"

	"github.com/quietline/quietline/kms"
)

// Stats are the peers and links as the machine sees them; what only the
// devices know is left out.
func (m *Machine) Stats() kms.Stats {
	st := kms.Stats{KME: m.cfg.KME, Incarnation: m.self.Counter, Position: m.durable}
	for _, r := range m.ordered {
		if !r.local {
			st.Peers = append(st.Peers, kms.PeerStats{ID: r.id, Connected: r.connected, Up: r.up(),
				Reason: r.reason, RTT: r.rtt})
		}
		for _, l := range r.links {
			if r.local && l.ledger.Ingested == 0 {
				continue // never used
			}
			ls := kms.LinkStats{ID: l.ID, Peer: r.id, Ledger: l.ledger, Segments: map[string]int{}}
			for _, s := range l.segments {
				ls.Segments[s.State.String()]++
				ls.Simulated = ls.Simulated || s.Simulated
			}
			ls.DrawableBits = uint64(8*SlotBytes) * uint64(l.drawableSlots())
			if r.local { // no device that could be simulated; its name says what it is
				ls.DeviceUp, ls.Simulated, ls.QBER, ls.SecretBPS = true, false, math.NaN(), math.NaN()
			}
			st.Links = append(st.Links, ls)
		}
	}
	return st
}

// drawableSlots are our own: not yet granted, or granted and not drawn.
func (l *link) drawableSlots() int {
	slots := 0
	for _, s := range l.open {
		slots += s.Slots - s.next
		for _, g := range s.grants {
			if !g.dead {
				slots += (g.keys - g.drawn) * g.per
			}
		}
	}
	if !l.remote.up() {
		return slots
	}
	return slots + l.mineSlots
}

// Stock tells how many keys a shape could draw now: rule 12. While the peer is
// away that is only what is granted.
func (m *Machine) Stock(shape kms.Shape) (kms.Stock, error) {
	in := Draw{Initiator: shape.Initiator, Targets: shape.Targets, SizeBits: shape.SizeBits}
	r, err := m.route(&in)
	if err != nil {
		return kms.Stock{}, err
	}
	var stock kms.Stock
	if sh := r.shapes[shapeKey(&in)]; sh != nil {
		stock.Keys = sh.free
		if r.up() {
			stock.Keys += sh.coming // the shape's already, and here in a moment
		}
	}
	if r.up() {
		open, closed := r.room(kms.KeySlots(shape.SizeBits, SlotBytes), math.MaxInt)
		stock.Keys += open + closed
	}
	stock.Loopback, stock.Simulated = r.local, r.local
	for _, l := range r.links {
		stock.Simulated = stock.Simulated || l.simulated > 0
	}
	return stock, nil
}
