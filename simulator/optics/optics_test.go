package optics

import (
	"errors"
	"fmt"
	"math"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/quietline/quietline/hw/distill"
)

// bright is a link with everything switched on and many clicks a pulse, so
// that tests see second-order effects without many slots.
func bright() Link {
	return Link{
		ClockHz:     1e8,
		Intensities: []Intensity{{Mu: 0.5, Prob: 0.6}, {Mu: 0.15, Prob: 0.4}},
		KeyBasis:    0.8,
		Fibre:       Fibre{LengthKM: 25, LossDBPerKM: 0.2, ExtraLossDB: 1},
		Detectors:   Detectors{Efficiency: 0.4, DarkCount: 2e-4, Misalignment: 0.02},
	}
}

func seed(b byte) (s Seed) {
	for i := range s {
		s[i] = b
	}
	return s
}

// run sends slots pulses and returns what was prepared and seen.
func run(l Link, eve float64, slots uint64, windows int) ([]distill.Detection, *Source, Clicks) {
	source := NewSource(l, seed(1), 1)
	light := NewLight(l, source, seed(2), 1)
	light.SetEve(eve)
	receiver := NewReceiver(l, seed(3), seed(4), 1)
	var dets []distill.Detection
	var from uint64
	for i := range windows {
		to := slots * uint64(i+1) / uint64(windows)
		w := Window{Generation: 1, From: from, To: to, Pulses: light.Until(nil, to)}
		dets = receiver.Detect(dets, w)
		from = to
	}
	return dets, source, receiver.Clicks()
}

// tally sorts detections by intensity: all of them, those with equal bases,
// and the errors among these.
type tally struct{ clicks, sifted, errors []float64 }

func count(l Link, dets []distill.Detection, source *Source, basis ...distill.Basis) tally {
	n := len(l.Intensities)
	t := tally{make([]float64, n), make([]float64, n), make([]float64, n)}
	for _, d := range dets {
		p := source.At(d.Slot)
		t.clicks[p.Intensity]++
		if p.Basis != d.Basis || (len(basis) > 0 && p.Basis != basis[0]) {
			continue
		}
		t.sifted[p.Intensity]++
		if p.Bit != d.Bit {
			t.errors[p.Intensity]++
		}
	}
	return t
}

// near fails unless got lies within sigmas standard deviations of want. The
// seeds are fixed, so a pass stays a pass; 4 sigma is what a right model
// exceeds once in 16,000.
func near(t *testing.T, what string, got, want, sigma float64) {
	t.Helper()
	if math.Abs(got-want) > 4*sigma {
		t.Errorf("%s = %.6g, want %.6g, off by %.1f sigma (seeds 1,2,3,4)",
			what, got, want, (got-want)/sigma)
	}
}

func binomial(n, p float64) float64 { return math.Sqrt(n * p * (1 - p)) }

func TestGainAndErrorMatchTheModel(t *testing.T) {
	noisy := bright()
	noisy.Detectors.DarkCount = 0.02
	three := bright()
	three.Intensities = []Intensity{{0.5, 0.5}, {0.1, 0.3}, {0, 0.2}}
	strong := bright()
	strong.Intensities = []Intensity{{4, 0.5}, {1, 0.5}}
	strong.Fibre, strong.Detectors.Misalignment = Fibre{}, 0.1
	ghosts := bright()
	ghosts.Detectors.AfterPulse = 0.05
	ghosts.Detectors.AfterPulseLife = 20 * time.Microsecond
	links := map[string]Link{"plain": bright(), "dark counts": noisy, "vacuum": three,
		"double clicks": strong, "after-pulses": ghosts}
	for name, l := range links {
		for _, eve := range []float64{0, 0.3, 1} {
			t.Run(fmt.Sprintf("%s, eve %g", name, eve), func(t *testing.T) {
				const slots = 2_000_000
				dets, source, clicks := run(l, eve, slots, 7)
				want, got := l.Expect(eve), count(l, dets, source)
				match := l.KeyBasis*l.KeyBasis + (1-l.KeyBasis)*(1-l.KeyBasis)
				for i, in := range l.Intensities {
					n := slots * in.Prob
					// A ghost that meets another click is lost: allow for it.
					slack := n * l.Detectors.AfterPulse * want.Total * want.Total
					near(t, fmt.Sprintf("clicks at mu %g", in.Mu), got.clicks[i],
						n*want.Gain[i], binomial(n, want.Gain[i])+slack)
					near(t, fmt.Sprintf("sifted at mu %g", in.Mu), got.sifted[i],
						got.clicks[i]*match, binomial(got.clicks[i], match))
					near(t, fmt.Sprintf("errors at mu %g", in.Mu), got.errors[i],
						got.sifted[i]*want.QBER[i], binomial(got.sifted[i], want.QBER[i]))
				}
				if clicks.Detections != uint64(len(dets)) {
					t.Errorf("Clicks().Detections = %d, want %d", clicks.Detections, len(dets))
				}
			})
		}
	}
}

func TestBothBasesSeeTheSameError(t *testing.T) {
	l := bright()
	dets, source, _ := run(l, 0.5, 4_000_000, 1)
	want := l.Expect(0.5)
	for _, basis := range []distill.Basis{distill.Key, distill.Test} {
		got := count(l, dets, source, basis)
		near(t, fmt.Sprintf("errors in basis %d", basis), got.errors[0],
			got.sifted[0]*want.QBER[0], binomial(got.sifted[0], want.QBER[0]))
	}
}

func TestEveRaisesTheErrorByAQuarterOfHerShare(t *testing.T) {
	l := bright()
	l.Detectors.DarkCount, l.Detectors.Misalignment = 0, 0.01
	for _, x := range []float64{0, 0.1, 0.25, 0.5, 1} {
		dets, source, _ := run(l, x, 3_000_000, 1)
		got := count(l, dets, source)
		n, bad := got.sifted[0]+got.sifted[1], got.errors[0]+got.errors[1]
		want := (1-x)*0.01 + x*(0.005+0.25) // bb84 intercept-resend law
		near(t, fmt.Sprintf("QBER at x = %g", x), bad/n, want, math.Sqrt(want*(1-want)/n)+1e-4)
	}
}

func TestEveChangesNoGain(t *testing.T) {
	l := bright()
	without, _, _ := run(l, 0, 1_000_000, 1)
	with, _, _ := run(l, 1, 1_000_000, 1)
	// The photons that arrive are the same ones; only dark gates can differ.
	if len(with) != len(without) {
		t.Errorf("%d detections with eve, %d without", len(with), len(without))
	}
}

func TestWithoutLightOnlyDarkCounts(t *testing.T) {
	l := bright()
	source := NewSource(l, seed(1), 1)
	light := NewLight(l, source, seed(2), 1)
	light.SetTransmittance(0)
	receiver := NewReceiver(l, seed(3), seed(4), 1)
	const slots = 3_000_000
	if p := light.Until(nil, slots); len(p) != 0 {
		t.Fatalf("%d pulses through a cut fibre", len(p))
	}
	dets := receiver.Detect(nil, Window{To: slots})
	p := 1 - (1-2e-4)*(1-2e-4)
	near(t, "dark clicks", float64(len(dets)), slots*p, binomial(slots, p))
	got := count(l, dets, source)
	bad, n := got.errors[0]+got.errors[1], got.sifted[0]+got.sifted[1]
	near(t, "errors of dark clicks", bad, n/2, binomial(n, 0.5))

	light.SetTransmittance(l.Transmittance())
	if p := light.Until(nil, 2*slots); len(p) == 0 || p[0].Slot < slots {
		t.Errorf("light did not come back, or in the past")
	}
}

func TestDeadTimeLowersTheRate(t *testing.T) {
	l := bright()
	l.Detectors.DeadTime = 100 * time.Nanosecond // 10 slots
	const slots = 3_000_000
	dets, source, clicks := run(l, 0, slots, 3)
	for i := 1; i < len(dets); i++ {
		if gap := dets[i].Slot - dets[i-1].Slot; gap <= 10 {
			t.Fatalf("clicks %d and %d are %d slots apart", i-1, i, gap)
		}
	}
	q := l.Expect(0).Total
	// In slots: one click every 1/q + 10 on average, with the deviation of
	// the geometric gap.
	mean := slots / (1/q + 10)
	near(t, "detections", float64(len(dets)), mean, math.Sqrt(mean*(1-q))/(1+10*q))
	near(t, "rate", float64(len(dets))/slots*l.ClockHz, l.Expect(0).RateHz,
		l.ClockHz*math.Sqrt(mean)/slots)
	if clicks.Dead == 0 {
		t.Error("no pulse fell into the dead time")
	}
	got, want := count(l, dets, source), l.Expect(0)
	near(t, "errors", got.errors[0], got.sifted[0]*want.QBER[0],
		binomial(got.sifted[0], want.QBER[0]))
}

func TestAfterPulsesAndDeadTime(t *testing.T) {
	l := bright()
	l.Detectors.AfterPulse, l.Detectors.AfterPulseLife = 0.1, 20*time.Microsecond
	l.Detectors.DeadTime = 150 * time.Nanosecond // two clicks in ten fall into it
	const slots = 5_000_000
	dets, source, clicks := run(l, 0, slots, 3)
	got, want := count(l, dets, source), l.Expect(0)
	n, bad := got.sifted[0]+got.sifted[1], got.errors[0]+got.errors[1]
	near(t, "errors", bad, n*want.Error, binomial(n, want.Error))
	mean := want.RateHz * slots / l.ClockHz
	near(t, "detections", float64(len(dets)), mean, math.Sqrt(mean))
	if clicks.AfterPulses == 0 || clicks.Dead == 0 {
		t.Errorf("the run exercised too little: %+v", clicks)
	}
}

func TestDoubleClicks(t *testing.T) {
	l := bright()
	l.Fibre, l.Detectors.Misalignment, l.KeyBasis = Fibre{}, 0.2, 0.999999
	l.Intensities = []Intensity{{2, 1}}
	_, _, clicks := run(l, 0, 500_000, 1)
	n := float64(clicks.Detections)
	want := l.Expect(0).Doubles
	near(t, "double clicks", float64(clicks.Doubles), n*want, binomial(n, want))
}

func TestWindowsDoNotMatter(t *testing.T) {
	l := bright()
	l.Detectors.DeadTime = 200 * time.Nanosecond
	l.Detectors.AfterPulse, l.Detectors.AfterPulseLife = 0.1, time.Microsecond
	one, _, clicks := run(l, 0.2, 300_000, 1)
	many, _, _ := run(l, 0.2, 300_000, 4999)
	if diff := cmp.Diff(one, many); diff != "" {
		t.Errorf("windows change the clicks:\n%s", diff)
	}
	if clicks.AfterPulses == 0 || clicks.Dark == 0 || len(one) == 0 {
		t.Errorf("the run exercised too little: %+v", clicks)
	}
}

func TestSkippedSlots(t *testing.T) {
	l := bright()
	l.Detectors.DarkCount = 0.01
	r := NewReceiver(l, seed(3), seed(4), 1)
	r.Detect(nil, Window{From: 0, To: 1000})
	for _, d := range r.Detect(nil, Window{From: 5000, To: 6000}) {
		if d.Slot < 5000 || d.Slot >= 6000 {
			t.Errorf("click in slot %d, outside the window", d.Slot)
		}
	}
}

func TestGenerationsAndSeedsAreIndependent(t *testing.T) {
	l := bright()
	sources := []*Source{NewSource(l, seed(1), 1), NewSource(l, seed(1), 2),
		NewSource(l, seed(9), 1)}
	const n = 100_000
	for i, a := range sources {
		for _, b := range sources[:i] {
			var equal float64
			for slot := range uint64(n) {
				if a.At(slot).Bit == b.At(slot).Bit {
					equal++
				}
			}
			near(t, "equal bits", equal, n/2, binomial(n, 0.5))
		}
	}
	if sources[0].At(77) != NewSource(l, seed(1), 1).At(77) {
		t.Error("a source does not repeat itself")
	}
}

func TestPreparationsFollowTheProbabilities(t *testing.T) {
	l := bright()
	l.Intensities = []Intensity{{0.5, 0.5}, {0.1, 0.3}, {0, 0.2}}
	s := NewSource(l, seed(1), 1)
	const n = 200_000
	var key, one float64
	bright := make([]float64, 3)
	for slot := range uint64(n) {
		p := s.At(slot)
		bright[p.Intensity]++
		one += float64(p.Bit)
		if p.Basis == distill.Key {
			key++
		}
	}
	near(t, "key basis", key, n*0.8, binomial(n, 0.8))
	near(t, "ones", one, n/2, binomial(n, 0.5))
	for i, in := range l.Intensities {
		near(t, "intensity", bright[i], n*in.Prob, binomial(n, in.Prob))
	}
}

func TestPhotonNumbersArePoisson(t *testing.T) {
	l := bright()
	l.Intensities = []Intensity{{10, 0.1}, {3, 0.2}, {0.5, 0.3}, {0.01, 0.4}}
	lt := NewLight(l, NewSource(l, seed(1), 1), seed(2), 1)
	lt.SetTransmittance(1)
	const n = 200_000
	for i, mean := range []float64{10, 3, 0.5, 0.01} {
		var sum float64
		for range n {
			sum += float64(lt.levels[i].photons(lt.rng.Float64()))
		}
		want := mean / -math.Expm1(-mean)
		variance := want*(1+mean) - want*want
		near(t, fmt.Sprintf("photons at mean %g", mean), sum/n, want, math.Sqrt(variance/n))
	}
}

func TestValidate(t *testing.T) {
	if err := bright().Validate(); err != nil {
		t.Fatalf("a good link: %v", err)
	}
	tests := map[string]func(*Link){
		"clock":       func(l *Link) { l.ClockHz = 0 },
		"clock NaN":   func(l *Link) { l.ClockHz = math.NaN() },
		"basis":       func(l *Link) { l.KeyBasis = 1 },
		"no light":    func(l *Link) { l.Intensities = nil },
		"mu":          func(l *Link) { l.Intensities[0].Mu = 11 },
		"probability": func(l *Link) { l.Intensities[0].Prob = 0.7 },
		"loss":        func(l *Link) { l.Fibre.ExtraLossDB = -1 },
		"efficiency":  func(l *Link) { l.Detectors.Efficiency = 1.1 },
		"dark":        func(l *Link) { l.Detectors.DarkCount = 1 },
		"visibility":  func(l *Link) { l.Detectors.Misalignment = 0.6 },
		"dead time":   func(l *Link) { l.Detectors.DeadTime = -1 },
		"after-pulse": func(l *Link) { l.Detectors.AfterPulse = 1 },
		"carrier":     func(l *Link) { l.Detectors.AfterPulseLife = -1 },
	}
	for name, spoil := range tests {
		t.Run(name, func(t *testing.T) {
			l := bright()
			spoil(&l)
			if err := l.Validate(); !errors.Is(err, ErrLink) {
				t.Errorf("Validate() = %v, want ErrLink", err)
			}
		})
	}
}

// BenchmarkPhotons is the whole photonic cost of one detection, both ends.
func BenchmarkPhotons(b *testing.B) {
	l := bright()
	l.Fibre = Fibre{ExtraLossDB: 20}
	l.Detectors.DarkCount = 1e-6
	source := NewSource(l, seed(1), 1)
	light := NewLight(l, source, seed(2), 1)
	receiver := NewReceiver(l, seed(3), seed(4), 1)
	var pulses []Pulse
	var dets []distill.Detection
	var wire []byte
	var slot, n uint64
	for b.Loop() {
		w := Window{From: slot, To: slot + 100_000}
		w.Pulses = light.Until(pulses[:0], w.To)
		pulses = w.Pulses
		wire = AppendWindow(wire[:0], w)
		w, err := ParseWindow(wire, pulses)
		if err != nil {
			b.Fatal(err)
		}
		dets = receiver.Detect(dets[:0], w)
		n += uint64(len(dets))
		slot = w.To
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(n), "ns/detection")
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(slot), "ns/slot")
}
