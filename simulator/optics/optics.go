// Package optics is the photonic half of a simulated BB84 link: a weak
// coherent source with decoy intensities, a fibre, an eavesdropper and a
// receiver with two threshold detectors.
//
// The main types are [Source], what alice prepares; [Light], what of it would
// reach a detector behind eve and the fibre; and [Receiver], which turns that
// light into bob's detections. [Link] describes all of them, [Link.Expect]
// says what they must yield on average.
//
// # Cost
//
// Almost every pulse ends in no click, so no pulse is drawn that does not
// matter. The number of photons of a pulse of mean mu that survive a
// transmittance eta is Poisson of mean eta·mu. Light draws the gaps between
// slots that would hold such a photon if every pulse had the brightest
// intensity (geometric), prepares the pulse there again from a seekable keyed
// generator and keeps it with the probability that its real intensity asks
// for. That is exact, and it costs per detection.
//
// The detectors' efficiency is folded into the transmittance on alice's side:
// a photon that no detector would register is not carried at all. Loss and
// efficiency commute, so nothing observable changes.
//
// # Who knows what
//
// Alice's process runs Source and Light, bob's the Receiver. What travels
// between them ([Window]) is what the photons carry, including basis and bit:
// it belongs on a connection of its own and its contents stop at the Receiver.
// Detections carry only what bob sees. Light never learns what clicked.
//
// # What a caller must keep in mind
//
// Everything is deterministic: equal seeds and equal calls give equal
// photons and clicks, however the slots are cut into windows. Seeds of
// physics, alice and bob are separate. No type here is safe for concurrent
// use: two goroutines that need one generation's preparations make two equal
// Sources.
//
// # Limits of the model
//
// No timing jitter, no drift of polarisation or phase, no Raman noise, and no
// photon-number splitting: eve is intercept-resend.
package optics

import (
	"errors"
	"fmt"
	"math"
	"time"
)

// Intensity is one brightness of the source.
type Intensity struct {
	Mu   float64 // mean photon number of a pulse leaving alice, 0 to MaxMu
	Prob float64 // probability that a pulse has it, (0, 1]
}

// MaxMu bounds the mean photon number. Published decoy sources are below 1;
// the bound keeps the photon number of a pulse in the byte the wire has
// (P(n > 255) < 1e-200 at mean 10).
const MaxMu = 10

// MaxIntensities bounds their number: three is the most a published decoy
// protocol with finite-key proof uses, the fourth is head room.
const MaxIntensities = 4

// Fibre is the quantum channel's glass.
type Fibre struct {
	LengthKM    float64 // km, >= 0
	LossDBPerKM float64 // dB/km, >= 0; 0.2 is standard fibre at 1550 nm
	ExtraLossDB float64 // dB, connectors, splices and switches; >= 0
}

// LossDB is the fibre's total loss in dB.
func (f Fibre) LossDB() float64 { return f.LengthKM*f.LossDBPerKM + f.ExtraLossDB }

// Transmittance is the probability that a photon passes the fibre.
func (f Fibre) Transmittance() float64 { return math.Pow(10, -f.LossDB()/10) }

// Detectors describes bob's receiver: an active basis choice in front of two
// alike threshold detectors, one a bit value.
type Detectors struct {
	// Efficiency is the probability, (0, 1], that a photon at the receiver's
	// input makes a click: optics and detector together.
	Efficiency float64
	// DarkCount is the probability of a click without light, per gate and
	// detector, [0, 1).
	DarkCount float64
	// Misalignment is the probability e_d that a photon takes the wrong
	// port, [0, 0.5]: finite visibility V gives (1-V)/2.
	Misalignment float64
	// DeadTime blanks both detectors after a click of either. Blanking only
	// the one that clicked would leave a known efficiency mismatch.
	DeadTime time.Duration
	// AfterPulse is the probability, [0, 1), that a click leaves a carrier
	// that clicks the same detector again later.
	AfterPulse float64
	// AfterPulseLife is the mean time between the end of the dead time and
	// that second click.
	AfterPulseLife time.Duration
}

// Link is everything physical about one simulated link. Ends must agree on it.
type Link struct {
	// ClockHz is the pulse repetition rate; one pulse is one slot.
	ClockHz float64
	// Intensities, signal first.
	Intensities []Intensity
	// KeyBasis is the probability, (0, 1), with which each end chooses the
	// key basis.
	KeyBasis  float64
	Fibre     Fibre
	Detectors Detectors
}

// ErrLink says that a link's description cannot be simulated.
var ErrLink = errors.New("link description is out of range")

// Validate returns every fault of the description, each wrapping ErrLink.
func (l Link) Validate() error {
	var faults []error
	check := func(ok bool, what string, v any) {
		if !ok {
			faults = append(faults, fmt.Errorf("%w: %s is %v", ErrLink, what, v))
		}
	}
	check(l.ClockHz >= 1 && l.ClockHz <= 1e11, "clock in Hz", l.ClockHz)
	check(l.KeyBasis > 0 && l.KeyBasis < 1, "key basis probability", l.KeyBasis)
	n := len(l.Intensities)
	check(n >= 1 && n <= MaxIntensities, "number of intensities", n)
	var sum float64
	for _, in := range l.Intensities {
		check(in.Mu >= 0 && in.Mu <= MaxMu, "mean photon number", in.Mu)
		check(in.Prob > 0 && in.Prob <= 1, "intensity probability", in.Prob)
		sum += in.Prob
	}
	check(math.Abs(sum-1) < 1e-9, "sum of intensity probabilities", sum)
	f, d := l.Fibre, l.Detectors
	check(f.LengthKM >= 0 && f.LossDBPerKM >= 0 && f.ExtraLossDB >= 0 && f.LossDB() <= 200,
		"fibre loss in dB", f.LossDB())
	check(d.Efficiency > 0 && d.Efficiency <= 1, "detector efficiency", d.Efficiency)
	check(d.DarkCount >= 0 && d.DarkCount < 1, "dark count probability", d.DarkCount)
	check(d.Misalignment >= 0 && d.Misalignment <= 0.5, "misalignment", d.Misalignment)
	check(d.DeadTime >= 0 && d.DeadTime <= time.Second, "dead time", d.DeadTime)
	check(d.AfterPulse >= 0 && d.AfterPulse < 1, "after-pulse probability", d.AfterPulse)
	check(d.AfterPulseLife >= 0 && d.AfterPulseLife <= time.Second, "after-pulse life",
		d.AfterPulseLife)
	return errors.Join(faults...)
}

// Transmittance is that of fibre and receiver together, eta = eta_ch·eta_B.
func (l Link) Transmittance() float64 { return l.Fibre.Transmittance() * l.Detectors.Efficiency }

// slots turns a time into whole slots of the link's clock.
func (l Link) slots(d time.Duration) uint64 { return uint64(math.Round(d.Seconds() * l.ClockHz)) }
