package simulator

import (
	"fmt"
	"time"

	"github.com/quietline/quietline/hw/distill"
	"github.com/quietline/quietline/hw/distill/finite"
	"github.com/quietline/quietline/simulator/optics"
)

// Preset is a whole link: its physics and how it is distilled. Both ends must
// have the same.
type Preset struct {
	Name        string
	Description string // one line for people
	Sources     string // where the numbers come from
	Link        optics.Link
	BlockBits   int // sifted key-basis bits of a block; distill.Config.BlockBits
}

// Presets returns all presets. The device classes are datasheet-like starting
// points, no vendor's promise.
func Presets() []Preset {
	return []Preset{metro(), bench(), tokyo(), geneva()}
}

// PresetByName returns a preset, or ErrPreset.
func PresetByName(name string) (Preset, error) {
	for _, p := range Presets() {
		if p.Name == name {
			return p, nil
		}
	}
	return Preset{}, fmt.Errorf("%w: %q", ErrPreset, name)
}

// metro is the demo's link. It must give keys within ten seconds on two cores
// that also run both key managers and both lines. So its clock is chosen for
// about 0.5 M detections a second, whose photons cost both ends together a
// tenth of a core, and its block for the detections of two seconds: 2^20 bits
// would give a fifth more key a second but the first one after twice the time,
// and 2^17 would give little more than half (Forecast).
//
// The length is Wiesemann's for one decoy, as hw/distill computes it;
// intensities and bias are that formula's optimum for this block on a coarse
// grid. The QBER of 1.5 % is mostly misalignment, as on a real city link.
func metro() Preset {
	return Preset{
		Name:        "metro",
		Description: "20 km of city fibre, 7 dB, 100 MHz, one decoy: the demo's link",
		Sources: "class of 40-625 MHz polarisation systems of metropolitan networks: mu 0.5 " +
			"and 0.1-0.2, efficiency 0.1-0.2, dark counts 1e-6, misalignment 1-2 %, 5-10 dB; " +
			"intensities and bias at the optimum of Wiesemann et al., arXiv:2405.16578, for " +
			"this block",
		Link: optics.Link{
			ClockHz:     100e6,
			Intensities: []optics.Intensity{{Mu: 0.4, Prob: 0.5}, {Mu: 0.15, Prob: 0.5}},
			KeyBasis:    0.75,
			Fibre:       optics.Fibre{LengthKM: 20, LossDBPerKM: 0.2, ExtraLossDB: 3},
			Detectors: optics.Detectors{
				Efficiency: 0.1, DarkCount: 1e-6, Misalignment: 0.014,
				DeadTime:   50 * time.Nanosecond,
				AfterPulse: 0.002, AfterPulseLife: time.Microsecond,
			},
		},
		BlockBits: 1 << 19,
	}
}

// bench is for tests: the most clicks for the least pulses, and the smallest
// block that gives key.
func bench() Preset {
	return Preset{
		Name:        "bench",
		Description: "two ends on one optical table, for tests",
		Sources:     "none: little loss and detectors with little noise, chosen for short tests",
		Link: optics.Link{
			ClockHz:     10e6,
			Intensities: []optics.Intensity{{Mu: 0.4, Prob: 0.4}, {Mu: 0.15, Prob: 0.6}},
			KeyBasis:    0.65,
			Fibre:       optics.Fibre{ExtraLossDB: 1},
			Detectors: optics.Detectors{
				Efficiency: 0.2, DarkCount: 1e-6, Misalignment: 0.01,
			},
		},
		BlockBits: 1 << 16,
	}
}

// tokyo is the class of the longest-running metropolitan link.
func tokyo() Preset {
	return Preset{
		Name:        "tokyo-45km",
		Description: "45 km of installed fibre, 14.5 dB, 1 GHz, gated APD",
		Sources: "Koganei-Otemachi link: length and loss of Sasaki et al., Opt. Express 19, " +
			"10387 (2011); self-differencing APD of that class; one decoy instead of its two, with " +
			"intensities and bias at the optimum for this block",
		Link: optics.Link{
			ClockHz:     1e9,
			Intensities: []optics.Intensity{{Mu: 0.4, Prob: 0.4}, {Mu: 0.12, Prob: 0.6}},
			KeyBasis:    0.75,
			Fibre:       optics.Fibre{LengthKM: 45, LossDBPerKM: 0.3, ExtraLossDB: 1},
			Detectors: optics.Detectors{
				Efficiency: 0.15, DarkCount: 1e-5, Misalignment: 0.02,
				DeadTime:   2 * time.Nanosecond,
				AfterPulse: 0.03, AfterPulseLife: 20 * time.Nanosecond,
			},
		},
		BlockBits: 1 << 21,
	}
}

// geneva is the one-decoy simulation of the method's own paper.
func geneva() Preset {
	return Preset{
		Name:        "rusca-100km",
		Description: "100 km, 26 dB in all, 1 GHz, one decoy, superconducting detectors",
		Sources: "Rusca et al., APL 112, 171104 (2018), table I and simulation set: dark counts " +
			"1e-8, misalignment 1 %, dead time 100 ns; the total loss of 26 dB is 20 dB of " +
			"fibre and a receiver of efficiency 0.25; intensities and bias at the optimum of " +
			"1e6 bits",
		Link: optics.Link{
			ClockHz:     1e9,
			Intensities: []optics.Intensity{{Mu: 0.47, Prob: 0.53}, {Mu: 0.17, Prob: 0.47}},
			KeyBasis:    0.81,
			Fibre:       optics.Fibre{LengthKM: 100, LossDBPerKM: 0.2},
			Detectors: optics.Detectors{
				Efficiency: 0.25, DarkCount: 1e-8, Misalignment: 0.01,
				DeadTime: 100 * time.Nanosecond,
			},
		},
		BlockBits: 1 << 20,
	}
}

// distill is the preset's half of a machine's configuration.
func (p Preset) distill() distill.Config {
	cfg := distill.Config{KeyBasis: p.Link.KeyBasis, BlockBits: p.BlockBits, Simulated: true}
	for _, in := range p.Link.Intensities {
		cfg.Intensities = append(cfg.Intensities,
			distill.Intensity{Mu: in.Mu, Probability: in.Prob})
	}
	return cfg
}

// Forecast is what a link yields on average without an eavesdropper.
type Forecast struct {
	QBER         float64 // the set error, ratio
	SiftedBPS    float64 // key-basis bits per second
	SecretBPS    float64 // secret bits per second, authentication not yet paid
	SecretBits   int     // of one block
	BlockSeconds float64 // time for the photons of one block
}

// Efficiency and epsilons a forecast counts with: those of hw/distill's
// defaults (Rusca et al. 2018), and the reconciliation efficiency of Cascade
// with 2^16-bit frames, rounded up.
const (
	forecastEfficiency = 1.05
	forecastEpsSec     = 1e-9
	forecastVerify     = 128 // bits of the verification hash
)

// Forecast computes it from the analytic model and the finite-key length.
// SecretBits is 0 for presets with other than two intensities.
func (p Preset) Forecast() Forecast {
	e := p.Link.Expect(0)
	f := Forecast{QBER: e.Error, SiftedBPS: e.SiftedHz}
	f.BlockSeconds = float64(p.BlockBits) / e.SiftedHz
	if len(p.Link.Intensities) != 2 {
		return f
	}
	q := p.Link.KeyBasis
	events := float64(p.BlockBits) / (q * q)
	b := finite.Block{EpsSec: forecastEpsSec, Verify: forecastVerify}
	var n, m float64
	for k, in := range p.Link.Intensities {
		share := in.Prob * e.Gain[k] / e.Total
		b.Mu[k], b.P[k] = in.Mu, in.Prob
		b.Key.N[k], b.Test.N[k] = events*q*q*share, events*(1-q)*(1-q)*share
		b.Key.M[k], b.Test.M[k] = b.Key.N[k]*e.QBER[k], b.Test.N[k]*e.QBER[k]
		n, m = n+b.Key.N[k], m+b.Key.M[k]
	}
	b.Leak = forecastEfficiency * n * finite.Entropy(m/n)
	f.SecretBits = finite.Wiesemann(b).Bits
	f.SecretBPS = float64(f.SecretBits) / f.BlockSeconds
	return f
}
