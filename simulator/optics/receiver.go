package optics

import (
	"math"
	"math/rand/v2"

	"github.com/quietline/quietline/hw/distill"
)

// Receiver is bob's end: a random basis a slot, two detectors, their noise
// and their dead time. One goroutine owns it.
type Receiver struct {
	det   Detectors
	key   keyed // basis of a slot and the bit of a double click
	basis uint64
	rng   *rand.Rand

	darkRate  float64 // of the pair: 1-exp(-darkRate) a gate
	darkBoth  float64 // P(both | at least one) in a dark gate
	deadSlots uint64
	lifeSlots float64

	from  uint64 // slots below are over
	live  uint64 // first slot in which the detectors can click again
	dark  uint64 // next dark gate
	ghost []ghost
	stats Clicks
}

// ghost is a trapped carrier that will click a detector in a slot.
type ghost struct {
	slot     uint64
	detector uint8
}

// Clicks counts what a receiver saw. All but Light count detections.
type Clicks struct {
	Light       uint64 // pulses that arrived, those in the dead time too
	Detections  uint64
	Doubles     uint64 // both detectors clicked: the bit was drawn
	Dark        uint64 // without light and without after-pulse
	AfterPulses uint64 // with an after-pulse
	Dead        uint64 // pulses lost to the dead time
}

// NewReceiver returns the receiver of one generation, from slot 0. Bob's seed
// chooses bases and the bits of double clicks, the physics seed all else.
func NewReceiver(l Link, bob, physics Seed, generation uint64) *Receiver {
	d := l.Detectors
	r := &Receiver{
		det:       d,
		key:       newKeyed(bob.derive("receiver", generation)),
		basis:     threshold(l.KeyBasis),
		rng:       rand.New(rand.NewChaCha8(physics.derive("receiver", generation))),
		darkRate:  -2 * math.Log1p(-d.DarkCount),
		deadSlots: l.slots(d.DeadTime),
		lifeSlots: d.AfterPulseLife.Seconds() * l.ClockHz,
	}
	if d.DarkCount > 0 {
		r.darkBoth = d.DarkCount * d.DarkCount / -math.Expm1(-r.darkRate)
	}
	r.dark = gap(r.rng, r.darkRate)
	return r
}

// Clicks returns the counts so far.
func (r *Receiver) Clicks() Clicks { return r.stats }

// Detect appends to dst the detections in the slots of a window. Windows come
// in rising order; slots between two windows saw no detector.
func (r *Receiver) Detect(dst []distill.Detection, w Window) []distill.Detection {
	if w.From > r.from {
		r.skip(w.From)
	}
	pulses := w.Pulses
	for {
		slot := r.dark
		if len(pulses) > 0 {
			slot = min(slot, pulses[0].Slot)
		}
		for _, g := range r.ghost {
			slot = min(slot, g.slot)
		}
		if slot >= w.To {
			break
		}
		var p Pulse
		if len(pulses) > 0 && pulses[0].Slot == slot {
			p, pulses = pulses[0], pulses[1:]
			r.stats.Light++
		}
		if d, ok := r.gate(slot, p); ok {
			dst = append(dst, d)
		}
	}
	r.from = max(r.from, w.To)
	return dst
}

// skip moves on to a slot without looking.
func (r *Receiver) skip(to uint64) {
	r.from = to
	if r.dark < to {
		r.dark = after(to, gap(r.rng, r.darkRate))
	}
	r.take(to - 1)
}

// gate opens the detectors in one slot; p has no photon if no light came.
func (r *Receiver) gate(slot uint64, p Pulse) (distill.Detection, bool) {
	ghosts := r.take(slot)
	noise := r.darkClicks(slot)
	if slot < r.live {
		if p.Photons > 0 {
			r.stats.Dead++
		}
		return distill.Detection{}, false
	}
	a, b := r.key.at(slot)
	d := distill.Detection{Slot: slot, Basis: distill.Test}
	if a>>1 < r.basis {
		d.Basis = distill.Key
	}
	clicks := noise | ghosts | r.lightClicks(p, d.Basis)
	switch clicks {
	case 0:
		return distill.Detection{}, false
	case 2:
		d.Bit = 1
	case 3:
		d.Bit = uint8(b & 1)
		r.stats.Doubles++
	}
	r.stats.Detections++
	if ghosts != 0 {
		r.stats.AfterPulses++
	} else if p.Photons == 0 {
		r.stats.Dark++
	}
	r.live = slot + 1 + r.deadSlots
	r.trap(clicks)
	return d, true
}

// lightClicks returns a bit per detector that p's photons make click.
func (r *Receiver) lightClicks(p Pulse, basis distill.Basis) (clicks uint8) {
	wrong := r.det.Misalignment
	if basis != p.Basis {
		wrong = 0.5
	}
	for range p.Photons {
		port := p.Bit
		if r.rng.Float64() < wrong {
			port ^= 1
		}
		clicks |= 1 << port
	}
	return clicks
}

// darkClicks returns a bit per detector with a dark count in slot.
func (r *Receiver) darkClicks(slot uint64) uint8 {
	if r.dark != slot {
		return 0
	}
	r.dark = after(slot+1, gap(r.rng, r.darkRate))
	switch u := r.rng.Float64(); {
	case u < r.darkBoth:
		return 3
	case u < (1+r.darkBoth)/2:
		return 1
	default:
		return 2
	}
}

// trap draws the after-pulses that clicks leave behind.
func (r *Receiver) trap(clicks uint8) {
	if r.det.AfterPulse == 0 {
		return
	}
	for det := range uint8(2) {
		if clicks>>det&1 == 0 || r.rng.Float64() >= r.det.AfterPulse {
			continue
		}
		delay := uint64(r.rng.ExpFloat64() * r.lifeSlots)
		r.ghost = append(r.ghost, ghost{after(r.live, delay), det})
	}
}

// take removes the carriers due up to and including slot and returns a bit
// per detector of those due in it.
func (r *Receiver) take(slot uint64) (clicks uint8) {
	left := r.ghost[:0]
	for _, g := range r.ghost {
		switch {
		case g.slot > slot:
			left = append(left, g)
		case g.slot == slot:
			clicks |= 1 << g.detector
		}
	}
	r.ghost = left
	return clicks
}
