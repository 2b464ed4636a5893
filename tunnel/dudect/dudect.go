// Package dudect asks of code whether its time tells what it works on, for
// tests: [T] compares the times of two kinds of input statistically, as "Dude,
// is my code constant time?" does (Reparaz, Balasch, Verbauwhede, DATE 2017).
//
// A caller must keep in mind that it finds differences and proves none absent,
// and that a test needs a control: code whose time is known to tell.
package dudect

import (
	"math"
	"math/rand/v2"
	"slices"
	"time"
)

// Limit is where |t| shows a difference: section 3 of the paper begins to worry
// at 4.5 and is sure at 10.
const Limit = 10

// batch is how many calls are timed together: the clock is coarser than most.
const batch = 20

// T calls f with kind 0 or 1, as chance decides, in n batches, and returns
// Welch's t of their times. The slowest tenth is left out: it is the machine's.
func T(n int, f func(kind int)) float64 {
	rng := rand.New(rand.NewPCG(3, 3))
	var times [2][]float64
	for range n {
		kind := rng.IntN(2)
		began := time.Now()
		for range batch {
			f(kind)
		}
		times[kind] = append(times[kind], float64(time.Since(began)))
	}
	cut := slices.Sorted(slices.Values(slices.Concat(times[0], times[1])))[9*n/10]
	var mean, variance, count [2]float64
	for k, ts := range times {
		for _, x := range ts {
			if x <= cut {
				count[k]++
				mean[k] += x
				variance[k] += x * x
			}
		}
		mean[k] /= count[k]
		variance[k] = variance[k]/count[k] - mean[k]*mean[k]
	}
	return (mean[0] - mean[1]) / math.Sqrt(variance[0]/count[0]+variance[1]/count[1])
}

// Steady is T, up to five times while it shows a difference: noise of the
// machine does not stay.
func Steady(n int, f func(kind int)) (t float64) {
	for range 5 {
		if t = T(n, f); math.Abs(t) < Limit {
			break
		}
	}
	return t
}
