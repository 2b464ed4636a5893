package finite

import "math"

// Channel is the model of Ma, Qi, Zhao and Lo, PRA 72, 012326 (2005), section
// II: threshold detectors, transmittance Eta from alice to the clicks,
// background yield Y0 and optical error E.
type Channel struct {
	Eta float64 // total transmittance, 0 to 1
	Y0  float64 // background clicks per pulse
	E   float64 // optical error ratio, 0 to 0.5
}

// Gain is Q_μ, clicks per pulse of mean photon number mu.
func (c Channel) Gain(mu float64) float64 { return c.Y0 + 1 - math.Exp(-c.Eta*mu) }

// QBER is E_μ, with background errors of 1/2.
func (c Channel) QBER(mu float64) float64 {
	return (c.Y0/2 + c.E*(1-math.Exp(-c.Eta*mu))) / c.Gain(mu)
}

// Asymptotic is the secret bits per pulse for ever many pulses and decoys (Ma
// 2005; q is the sifted share), f times the Shannon limit spent on
// reconciliation; negative where there is no key.
func Asymptotic(c Channel, mu, f, q float64) float64 {
	y1 := c.Y0 + c.Eta
	e1 := (c.Y0/2 + c.E*c.Eta) / y1
	return c.rate(mu, f, q, y1, e1)
}

// AsymptoticWeak is [Asymptotic] with vacuum and one weak decoy of mean photon
// number nu.
func AsymptoticWeak(c Channel, mu, nu, f, q float64) float64 {
	qn, qm := c.Gain(nu)*math.Exp(nu), c.Gain(mu)*math.Exp(mu)
	r := nu * nu / (mu * mu)
	y1 := mu / (mu*nu - nu*nu) * (qn - qm*r - (1-r)*c.Y0)
	e1 := (c.QBER(nu)*qn - c.Y0/2) / (y1 * nu)
	return c.rate(mu, f, q, y1, e1)
}

func (c Channel) rate(mu, f, q, y1, e1 float64) float64 {
	q1 := y1 * mu * math.Exp(-mu)
	return q * (q1*(1-Entropy(min(e1, 0.5))) - c.Gain(mu)*f*Entropy(c.QBER(mu)))
}

// PLOB is the repeaterless bound, secret bits per pulse at the given
// transmittance: -log2(1-η) (Pirandola et al., Nature Commun. 8, 15043 (2017)).
func PLOB(eta float64) float64 { return -math.Log1p(-eta) / math.Ln2 }
