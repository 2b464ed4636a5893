// Package finite computes how many secret bits a block of decoy-state BB84
// holds.
//
// The main function is [Wiesemann], the default. [Rusca] and [Asymptotic] are
// there to be compared with: the first reproduces published figures, the
// second is a limit that no finite length may pass.
//
// A caller must keep in mind: all counts are observed counts of one block, in
// which no event was left out after its outcome was known; the intensities
// are ordered signal first; a length of 0 means no key, whatever the reason.
package finite

import "math"

// Source is what alice's source does: two intensities, signal first.
type Source struct {
	Mu [2]float64 // mean photon numbers, Mu[0] > Mu[1] > 0
	P  [2]float64 // probabilities, sum 1
}

// Counts are sifted events of one basis by intensity.
type Counts struct {
	N [2]float64 // n_{B,k}: events
	M [2]float64 // m_{B,k}: errors among them
}

func (c Counts) n() float64 { return c.N[0] + c.N[1] }
func (c Counts) m() float64 { return c.M[0] + c.M[1] }

// Block is all a length is computed from.
type Block struct {
	Source
	Key, Test Counts
	// Leak is what reconciliation told about the key, in bits: λ_EC.
	Leak float64
	// Verify is the length of the verification hash, in bits; what stands as
	// log2(2/ε_cor) in the papers, and at least that.
	Verify float64
	EpsSec float64 // secrecy parameter of the block
}

// Result is a length with the bounds behind it.
type Result struct {
	Bits   int     // secret bits, 0 if there is no key
	Single float64 // lower bound on the single-photon events of the key basis, s_{K,1}
	Phase  float64 // upper bound on their phase error ratio, 0 to 0.5
}

// Entropy is the binary entropy h(x) in bits.
func Entropy(x float64) float64 {
	if x <= 0 || x >= 1 {
		return 0
	}
	return -x*math.Log2(x) - (1-x)*math.Log2(1-x)
}

// Tau is the probability that alice sends n photons, τ_n (Lim et al., PRA 89,
// 022307 (2014)).
func (s Source) Tau(n int) float64 {
	sum := 0.0
	for k := range s.Mu {
		sum += s.P[k] * math.Exp(-s.Mu[k]) * math.Pow(s.Mu[k], float64(n))
	}
	return sum / math.Gamma(float64(n)+1)
}

// hoeffding is the deviation δ(n, ε) = sqrt(n ln(1/ε)/2) of a sum of n
// independent indicator variables.
func hoeffding(n, eps float64) float64 { return math.Sqrt(n * math.Log(1/eps) / 2) }

// bounds of the one-decoy method: Rusca et al., APL 112, 171104 (2018), whose
// names they keep.
type bounds struct {
	Source
	eps float64 // of each single estimate
}

// scaled is e^{μ_k}/p_k (x ± δ): n^±_{B,k} and m^±_{B,k}.
func (b bounds) scaled(k int, x, delta float64) float64 {
	return math.Exp(b.Mu[k]) / b.P[k] * (x + delta)
}

// vacuumUpper is s^u_{B,0} = 2(τ_0 m^+_{B,k} + δ(n_B)) for the better k: half
// of what vacuum gives is errors.
func (b bounds) vacuumUpper(c Counts) float64 {
	least := c.n()
	for k := range c.M {
		m := b.scaled(k, c.M[k], hoeffding(c.m(), b.eps))
		least = min(least, 2*(b.Tau(0)*m+hoeffding(c.n(), b.eps)))
	}
	return least
}

// vacuumLower is s^l_{B,0}, clipped to 0 … n_B.
func (b bounds) vacuumLower(c Counts) float64 {
	d := hoeffding(c.n(), b.eps)
	mu := b.Mu
	s := b.Tau(0) / (mu[0] - mu[1]) *
		(mu[0]*b.scaled(1, c.N[1], -d) - mu[1]*b.scaled(0, c.N[0], d))
	return clip(s, c.n())
}

// singleLower is s^l_{B,1}, clipped to 0 … n_B.
func (b bounds) singleLower(c Counts) float64 {
	d := hoeffding(c.n(), b.eps)
	m1, m2 := b.Mu[0], b.Mu[1]
	ratio := m2 * m2 / (m1 * m1)
	s := b.Tau(1) * m1 / (m2 * (m1 - m2)) * (b.scaled(1, c.N[1], -d) -
		ratio*b.scaled(0, c.N[0], d) - (1-ratio)*b.vacuumUpper(c)/b.Tau(0))
	return clip(s, c.n())
}

// errorsUpper is v^u_{B,1}, clipped to 0 … m_B.
func (b bounds) errorsUpper(c Counts) float64 {
	d := hoeffding(c.m(), b.eps)
	v := b.Tau(1) / (b.Mu[0] - b.Mu[1]) *
		(b.scaled(0, c.M[0], d) - b.scaled(1, c.M[1], -d))
	return clip(v, c.n())
}

func clip(x, n float64) float64 { return max(0, min(x, n)) }

// phase is v/s + sampling deviation; 1/2 where the bound says nothing.
func phase(errs, test, key float64, deviation func(ratio, test, key float64) float64) float64 {
	if test <= 0 || key <= 0 {
		return 0.5
	}
	ratio := min(errs/test, 0.5)
	return min(0.5, ratio+deviation(ratio, test, key))
}

// Rusca is the one-decoy length of Rusca et al., APL 112, 171104 (2018):
//
//	l = s_0 + s_1(1-h(φ)) - λ_EC - 6 log2(19/ε_sec) - log2(2/ε_cor)
//
// It reproduces the published table; distillation does not use it.
func Rusca(b Block) Result {
	e := bounds{b.Source, b.EpsSec / 19}
	single := e.singleLower(b.Key)
	ph := phase(e.errorsUpper(b.Test), e.singleLower(b.Test), single,
		func(ratio, test, key float64) float64 { return gamma(b.EpsSec, ratio, key, test) })
	l := e.vacuumLower(b.Key) + single*(1-Entropy(ph)) -
		b.Leak - 6*math.Log2(19/b.EpsSec) - b.Verify
	return result(l, single, ph)
}

// gamma is the sampling deviation of Fung, Ma, Chau, PRA 81, 012318 (2010), as
// printed in Lim et al., PRA 89, 022307 (2014) with 21²; Rusca 2018 has 19².
func gamma(eps, ratio, key, test float64) float64 {
	ratio = max(ratio, 1/(key+test)) // the printed form is not defined at 0
	v := (1 - ratio) * ratio
	n := (key + test) / (key * test)
	return math.Sqrt(n * v / math.Ln2 * math.Log2(n/v*19*19/(eps*eps)))
}

// Wiesemann is the one-decoy length of Wiesemann, Krause, Tupkary,
// Lütkenhaus, Rusca and Walenta, arXiv:2405.16578v3 (2026):
//
//	l = s_1(1-h(Λ)) - λ_EC - log2(2/ε_cor) - 4 log2(15/(ε_sec 2^{1/4}))
//
// with ε_sec/15 for each estimate, Hoeffding's inequality for the counts and
// Serfling's for the sampling; vacuum events are not counted.
//
// λ_EC counts alice's parities, as is usual. What bob's questions tell about
// the error pattern is taken to be public and not charged; Tupkary and
// Lütkenhaus, PR Applied 20, 064040 (2023), discuss when that is free.
func Wiesemann(b Block) Result {
	eps := b.EpsSec / 15
	e := bounds{b.Source, eps}
	single := e.singleLower(b.Key)
	ph := phase(e.errorsUpper(b.Test), e.singleLower(b.Test), single,
		func(_, test, key float64) float64 { return serfling(test, key, eps) })
	l := single*(1-Entropy(ph)) - b.Leak - b.Verify -
		4*math.Log2(15/(b.EpsSec*math.Pow(2, 0.25)))
	return result(l, single, ph)
}

// serfling is sqrt((c+d)/(cd) (d+1)/d ln(1/ε)): how far the error ratio of c
// unseen events may lie above that of d sampled ones (Serfling, Ann. Stat. 2,
// 39 (1974); form of Tomamichel et al., Nature Commun. 3, 634 (2012)).
func serfling(d, c, eps float64) float64 {
	return math.Sqrt((c + d) / (c * d) * (d + 1) / d * math.Log(1/eps))
}

func result(l, single, ph float64) Result {
	r := Result{Single: single, Phase: ph}
	if ph < 0.5 && l >= 1 && !math.IsNaN(l) {
		r.Bits = int(math.Floor(l))
	}
	return r
}
