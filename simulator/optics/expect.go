package optics

import "math"

// Expectation is what a link yields on average, for one set of fraction and
// link. Gains are per live gate: dead time lowers the rate, not the gain.
type Expectation struct {
	Gain    []float64 // detections a gate for each intensity, after-pulses included
	QBER    []float64 // of sifted detections for each intensity, ratio
	Total   float64   // detections a gate over all intensities
	Error   float64   // QBER over all intensities: the link's set error, ratio
	Doubles float64   // share of sifted detections that are double clicks
	// RateHz is detections per second after dead time (non-paralysable),
	// SiftedHz those in which both ends chose the key basis.
	RateHz, SiftedHz float64
}

// Expect computes the averages of the channel and detector model: for mean m
// at the receiver the detectors see m·(1-e_d) and m·e_d, click independently,
// and a double click has a random bit. Eve on a fraction x replaces the error
// e of light and noise by (1-x)·e + x·(e/2 + 1/4). An after-pulse comes with
// probability p a click unless the detectors are dead again, itself leaves
// one, and has a random bit, so with p' = p·(live share) clicks grow by
// p'/(1-p'). That some fall onto another click is left out: a share of p'
// times the gain.
func (l Link) Expect(eve float64) Expectation {
	d, eta := l.Detectors, l.Transmittance()
	var e Expectation
	var errors, doubles, mean float64
	for _, in := range l.Intensities {
		m := eta * in.Mu
		right := 1 - (1-d.DarkCount)*math.Exp(-m*(1-d.Misalignment))
		wrong := 1 - (1-d.DarkCount)*math.Exp(-m*d.Misalignment)
		click := right + wrong - right*wrong
		bad := wrong*(1-right) + right*wrong/2
		bad = (1-eve)*bad + eve*(bad/2+click/4)
		mean += in.Prob * click
		doubles += in.Prob * right * wrong
		e.Gain = append(e.Gain, click)
		e.QBER = append(e.QBER, bad)
	}
	again := d.AfterPulse / (1 + l.ClockHz*mean*d.DeadTime.Seconds())
	ghosts := again / (1 - again)
	for i, in := range l.Intensities {
		bad := e.QBER[i] + ghosts*mean/2
		e.Gain[i] += ghosts * mean
		e.QBER[i] = 0
		if e.Gain[i] > 0 {
			e.QBER[i] = bad / e.Gain[i]
		}
		e.Total += in.Prob * e.Gain[i]
		errors += in.Prob * bad
	}
	if e.Total > 0 {
		e.Error, e.Doubles = errors/e.Total, doubles/e.Total
	}
	e.RateHz = l.ClockHz * e.Total
	e.RateHz /= 1 + e.RateHz*d.DeadTime.Seconds()
	e.SiftedHz = e.RateHz * l.KeyBasis * l.KeyBasis
	return e
}
