package finite

import (
	"fmt"
	"math"
	"testing"
)

func near(t *testing.T, what string, got, want, relative float64) {
	t.Helper()
	if math.Abs(got-want) > relative*math.Abs(want) {
		t.Errorf("%s is %.5g, want %.5g within %g", what, got, want, relative)
	}
}

// gys is the parameter set of Gobby, Yuan and Shields 2004 as Ma 2005 uses it.
func gys(km float64) Channel {
	return Channel{Eta: math.Pow(10, -0.021*km) * 0.045, Y0: 1.7e-6, E: 0.033}
}

func TestAsymptoticReproducesMa2005(t *testing.T) {
	for _, c := range []struct{ km, infinite, weak float64 }{
		{0, 2.555e-3, 2.414e-3},
		{50, 2.226e-4, 2.096e-4},
		{100, 1.718e-5, 1.602e-5},
		{120, 4.815e-6, 4.369e-6},
	} {
		near(t, fmt.Sprintf("R(%g km)", c.km),
			Asymptotic(gys(c.km), .48, 1.22, .5), c.infinite, .005)
		near(t, fmt.Sprintf("weak R(%g km)", c.km),
			AsymptoticWeak(gys(c.km), .48, .05, 1.22, .5), c.weak, .005)
	}
	for _, c := range []struct{ km, qber float64 }{
		{0, .0330}, {50, .0334}, {100, .0376}, {140, .0630},
	} {
		near(t, fmt.Sprintf("E(%g km)", c.km), gys(c.km).QBER(.48), c.qber, .005)
	}
	last := func(rate func(float64) float64) float64 {
		km := 0.0
		for rate(km) > 0 {
			km += 0.01
		}
		return km
	}
	near(t, "last km", last(func(km float64) float64 {
		return Asymptotic(gys(km), .48, 1.22, .5)
	}), 142.05, .2/142)
	near(t, "last km with a weak decoy", last(func(km float64) float64 {
		return AsymptoticWeak(gys(km), .48, .05, 1.22, .5)
	}), 140.55, .2/140)
}

func TestEntropyCrossing(t *testing.T) {
	// 1-2h(Q) crosses zero at 11.003 % (Shor, Preskill 2000).
	if 1-2*Entropy(.11002) <= 0 || 1-2*Entropy(.11004) >= 0 {
		t.Error("1-2h(Q) does not cross zero at 11.003 %")
	}
}

// expected makes the mean counts of n key-basis events; pz is the key-basis
// probability of both ends, dead Rusca's after-click correction left out.
func expected(s Source, c Channel, pz, n float64) (b Block, pulses float64) {
	click := 0.0
	for k := range s.Mu {
		click += s.P[k] * c.Gain(s.Mu[k])
	}
	pulses = n / (pz * pz * click)
	for k := range s.Mu {
		sent := pulses * s.P[k] * c.Gain(s.Mu[k])
		e := c.QBER(s.Mu[k])
		b.Key.N[k], b.Key.M[k] = sent*pz*pz, sent*pz*pz*e
		b.Test.N[k], b.Test.M[k] = sent*(1-pz)*(1-pz), sent*(1-pz)*(1-pz)*e
	}
	b.Source = s
	b.Leak = 1.16 * n * Entropy(b.Key.m()/n)
	b.EpsSec, b.Verify = 1e-9, math.Log2(2/1e-15)
	return b, pulses
}

// optimum searches the four free parameters from a start by coordinate steps.
func optimum(c Channel, n float64, length func(Block) Result) float64 {
	x := [4]float64{.88, .70, .51, .154} // p_Z, p_1, μ_1, μ_2
	rate := func(x [4]float64) float64 {
		for i, v := range x {
			if v <= 0 || (i < 2 && v >= 1) {
				return 0
			}
		}
		if x[3] >= x[2] {
			return 0
		}
		s := Source{Mu: [2]float64{x[2], x[3]}, P: [2]float64{x[1], 1 - x[1]}}
		b, pulses := expected(s, c, x[0], n)
		return float64(length(b).Bits) / pulses
	}
	best := rate(x)
	for step := .08; step > .0005; {
		moved := false
		for i := range x {
			for _, d := range []float64{step, -step} {
				y := x
				y[i] += d
				if r := rate(y); r > best {
					best, x, moved = r, y, true
				}
			}
		}
		if !moved {
			step /= 2
		}
	}
	return best
}

func TestRuscaReproducesTable(t *testing.T) {
	// Rusca 2018 Fig. 2 set: p_dc 1e-8, e_d 1 %, f 1.16, 1 GHz, no dead time.
	for _, c := range []struct{ n, lossDB, bps float64 }{
		{1e6, 20, 680e3}, {1e6, 30, 67.8e3}, {1e6, 40, 6.74e3}, {1e6, 50, 639},
		{1e7, 20, 1.029e6}, {1e7, 30, 102.5e3}, {1e7, 40, 10.21e3}, {1e7, 50, 981},
		{1e8, 20, 1.323e6}, {1e8, 30, 132e3}, {1e8, 40, 13.15e3},
		{1e9, 20, 1.558e6}, {1e9, 30, 155.5e3},
		// Table I, n_Z = 1e7; the published 243 kb/s includes a dead time.
		{1e7, 26, 258e3},
	} {
		ch := Channel{Eta: math.Pow(10, -c.lossDB/10), Y0: 1e-8, E: .01}
		near(t, fmt.Sprintf("n=%g at %g dB", c.n, c.lossDB), optimum(ch, c.n, Rusca)*1e9, c.bps, .03)
	}
}

var structural = Source{Mu: [2]float64{.5, .15}, P: [2]float64{.7, .3}}

func TestLengthsAreOrdered(t *testing.T) {
	for _, f := range []struct {
		name   string
		length func(Block) Result
	}{{"wiesemann", Wiesemann}, {"rusca", Rusca}} {
		t.Run(f.name, func(t *testing.T) {
			for _, db := range []float64{0, 5, 10, 20, 30} {
				ch := Channel{Eta: math.Pow(10, -db/10) * .2, Y0: 2e-6, E: .015}
				last := 0.0
				for n := 1e4; n < 1e11; n *= 1.7 {
					b, pulses := expected(structural, ch, .9, n)
					rate := float64(f.length(b).Bits) / pulses
					if rate < last*(1-1/n) {
						t.Errorf("%g dB: a block of %g gives %g per pulse, a smaller one %g", db, n, rate, last)
					}
					// The weak decoy is unknown to an infinite-decoy limit at
					// the signal's mean photon number only for the signal;
					// compare with the mixture of both.
					limit := 0.0
					for k := range structural.Mu {
						limit += structural.P[k] * max(0, Asymptotic(ch, structural.Mu[k], 1, .81)+
							.81*ch.Y0*math.Exp(-structural.Mu[k]))
					}
					if rate > limit || rate > PLOB(ch.Eta) {
						t.Errorf("%g dB, n=%g: rate %g is above a limit (%g, %g)",
							db, n, rate, limit, PLOB(ch.Eta))
					}
					last = rate
				}
				if last == 0 {
					t.Errorf("%g dB: no key at any length", db)
				}
			}
		})
	}
}

func TestInterceptResendLeavesNothing(t *testing.T) {
	ch := Channel{Eta: .02, Y0: 2e-6, E: .015}
	last := math.MaxInt
	for _, x := range []float64{0, .1, .2, .3, .4, 1} {
		eve := ch
		eve.E = (1-x)*ch.E + x*(ch.E/2+.25)
		b, _ := expected(structural, eve, .9, 1e7)
		got := Wiesemann(b).Bits
		if got > last {
			t.Errorf("Eve on %g gives %d bits, more than less of her", x, got)
		}
		last = got
		near(t, "QBER", b.Test.m()/b.Test.n(), eve.E, .02)
	}
	if last != 0 {
		t.Errorf("full intercept-resend leaves %d bits", last)
	}
}

// Eve blocks single photons, keeps one photon of each longer pulse and makes
// up for the loss, so that the signal's gain and the error ratio stay.
func TestPhotonNumberSplittingLeavesNothing(t *testing.T) {
	ch := Channel{Eta: .01, Y0: 2e-6, E: .01}
	b, pulses := expected(structural, ch, .9, 1e7)
	if Wiesemann(b).Bits == 0 {
		t.Fatal("no key without Eve")
	}
	multi := func(mu float64) float64 { return 1 - math.Exp(-mu)*(1+mu) }
	pass := ch.Gain(structural.Mu[0]) / multi(structural.Mu[0])
	for k, mu := range structural.Mu {
		n := pulses * structural.P[k] * multi(mu) * pass
		b.Key.N[k], b.Key.M[k] = n*.81, n*.81*ch.QBER(mu)
		b.Test.N[k], b.Test.M[k] = n*.01, n*.01*ch.QBER(mu)
	}
	if got := Wiesemann(b).Bits; got != 0 {
		t.Errorf("photon-number splitting leaves %d bits", got)
	}
}

func TestNoCountsNoKey(t *testing.T) {
	for _, b := range []Block{
		{Source: structural, EpsSec: 1e-9},
		{Source: structural, EpsSec: 1e-9, Key: Counts{N: [2]float64{1e6, 1e5}}},
		{Source: structural, EpsSec: 1e-9, Test: Counts{N: [2]float64{1e6, 1e5}}},
	} {
		if r, w := Rusca(b), Wiesemann(b); r.Bits != 0 || w.Bits != 0 || w.Phase != 0.5 {
			t.Errorf("%+v gives %+v and %+v", b, r, w)
		}
	}
}

func TestLeakIsPaidBitForBit(t *testing.T) {
	b, _ := expected(structural, Channel{Eta: .02, Y0: 2e-6, E: .01}, .9, 1e7)
	before := Wiesemann(b).Bits
	b.Leak += 1000
	b.Verify += 24
	if got := before - Wiesemann(b).Bits; got != 1024 {
		t.Errorf("1024 more bits told cost %d", got)
	}
}
