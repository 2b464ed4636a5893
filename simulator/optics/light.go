package optics

import (
	"math"
	"math/rand/v2"

	"github.com/quietline/quietline/hw/distill"
)

// Source is what alice prepares, slot by slot. It keeps nothing: a slot's
// preparation is computed from the seed whenever it is asked for.
type Source struct {
	key    keyed
	basis  uint64                 // below: key basis
	bright [MaxIntensities]uint64 // cumulative thresholds
	n      int
}

// NewSource returns the source of one generation. Another generation of the
// same seed prepares independent pulses. The link must be valid.
func NewSource(l Link, alice Seed, generation uint64) *Source {
	s := &Source{
		key:   newKeyed(alice.derive("source", generation)),
		basis: threshold(l.KeyBasis),
		n:     len(l.Intensities),
	}
	var sum float64
	for i, in := range l.Intensities {
		sum += in.Prob
		s.bright[i] = threshold(math.Min(sum, 1))
	}
	return s
}

// At is the preparation of a slot.
func (s *Source) At(slot uint64) distill.Preparation {
	a, b := s.key.at(slot)
	p := distill.Preparation{Basis: distill.Test, Bit: uint8(b & 1)}
	if b>>1 < s.basis {
		p.Basis = distill.Key
	}
	for a >>= 1; int(p.Intensity) < s.n-1 && a >= s.bright[p.Intensity]; {
		p.Intensity++
	}
	return p
}

// Pulse is a slot in which at least one photon would be registered by a live
// detector, as it arrives at bob: behind eve, if she touched it.
type Pulse struct {
	Slot    uint64
	Basis   distill.Basis
	Bit     uint8 // 0 or 1
	Photons uint8 // >= 1
}

// Light draws the pulses that arrive. One goroutine owns it.
type Light struct {
	source *Source
	rng    *rand.Rand
	mus    []float64
	eve    float64
	peak   float64               // eta times the brightest mean
	levels [MaxIntensities]level // for each intensity at the present eta
	now    uint64                // slots below are over
	next   uint64                // next candidate
}

// level is what Light needs to know of one intensity.
type level struct {
	mean   float64 // of the photons that arrive
	keep   float64 // P(photon at this intensity) / P(photon at the brightest)
	single float64 // P(one photon | at least one)
}

// NewLight returns the light of one generation of a source, from slot 0.
func NewLight(l Link, source *Source, physics Seed, generation uint64) *Light {
	lt := &Light{
		source: source,
		rng:    rand.New(rand.NewChaCha8(physics.derive("light", generation))),
		mus:    make([]float64, len(l.Intensities)),
	}
	for i, in := range l.Intensities {
		lt.mus[i] = in.Mu
	}
	lt.SetTransmittance(l.Transmittance())
	return lt
}

// SetTransmittance changes the transmittance of fibre and receiver together,
// 0 to 1, for the slots to come. Zero is a cut fibre.
func (lt *Light) SetTransmittance(eta float64) {
	var brightest float64
	for _, mu := range lt.mus {
		brightest = math.Max(brightest, mu)
	}
	lt.peak = eta * brightest
	for i, mu := range lt.mus {
		mean := eta * mu
		lt.levels[i] = level{mean: mean}
		if mean > 0 {
			some := -math.Expm1(-mean)
			lt.levels[i].keep = some / -math.Expm1(-lt.peak)
			lt.levels[i].single = mean * math.Exp(-mean) / some
		}
	}
	// Geometric gaps have no memory: drawing anew changes no statistics.
	lt.next = after(lt.now, gap(lt.rng, lt.peak))
}

// SetEve lets an eavesdropper intercept and resend the given fraction of
// pulses, 0 to 1, for the slots to come. She sits at alice's door, counts the
// photons, measures them in a basis of her choice and sends as many photons
// of what she saw. So no gain changes, and the error rate rises to
// (1-x)·e + x·(e/2 + 1/4).
func (lt *Light) SetEve(fraction float64) { lt.eve = fraction }

// Until appends to dst the pulses that arrive in the slots from the last
// call's up to, not including, slot.
func (lt *Light) Until(dst []Pulse, slot uint64) []Pulse {
	for lt.next < slot {
		p := lt.source.At(lt.next)
		if lt.rng.Float64() < lt.levels[p.Intensity].keep {
			dst = append(dst, lt.arrive(p))
		}
		lt.next = after(lt.next, 1)
		lt.next = after(lt.next, gap(lt.rng, lt.peak))
	}
	lt.now = max(lt.now, slot)
	return dst
}

// arrive draws what becomes of a pulse of which a photon is left.
func (lt *Light) arrive(p distill.Preparation) Pulse {
	out := Pulse{
		Slot: lt.next, Basis: p.Basis, Bit: p.Bit,
		Photons: lt.levels[p.Intensity].photons(lt.rng.Float64()),
	}
	// The same number of draws with and without eve keeps the photons of a
	// run equal, so that runs can be compared.
	caught, w := lt.rng.Float64() < lt.eve, lt.rng.Uint64()
	if !caught {
		return out
	}
	out.Basis = distill.Basis(w & 1)
	if out.Basis != p.Basis {
		out.Bit = uint8(w >> 1 & 1)
	}
	return out
}

// photons is a Poisson number of which one knows that it is not 0: the
// inverse of its distribution at u, uniform in [0, 1).
func (b level) photons(u float64) uint8 {
	n, p := uint8(1), b.single
	for u >= p && n < math.MaxUint8 {
		u -= p
		n++
		p *= b.mean / float64(n)
	}
	return n
}
