package simulator

import (
	"math"
	"os"
	"syscall"
	"testing"
	"time"
)

// cpu is the processor time this process has used.
func cpu(t testing.TB) time.Duration {
	t.Helper()
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		t.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// TestMetroLive runs the demo's link as the demo does, at the pace of its
// clock, and holds it to what the preset promises.
func TestMetroLive(t *testing.T) {
	if os.Getenv("QUIETLINE_LONG") == "" {
		t.Skip("takes half a minute of real time: set QUIETLINE_LONG=1")
	}
	p, err := PresetByName("metro")
	if err != nil {
		t.Fatal(err)
	}
	f := p.Forecast()
	began, used := time.Now(), cpu(t)
	a, b := startPair(t, p)
	pairOf(t, a, b)
	first, firstCPU := time.Since(began), cpu(t)-used
	if first > 10*time.Second {
		t.Errorf("the first key came after %v, want 10 s at most", first)
	}
	const blocks = 15
	began, used = time.Now(), cpu(t)
	var bits, qber float64
	for range blocks {
		x := pairOf(t, a, b)
		bits += float64(8 * x.Bits.Len())
		qber += x.QBER / blocks
	}
	took, work := time.Since(began).Seconds(), (cpu(t) - used).Seconds()
	t.Logf("first key after %.2f s (%.2f s of processor time)", first.Seconds(), firstCPU.Seconds())
	t.Logf("%.0f secret bits a second (forecast %.0f), %.0f a processor second of both ends",
		bits/took, f.SecretBPS, bits/work)
	t.Logf("QBER %.5f, set error %.5f; %+v", qber, f.QBER, b.Stats().Clicks)
	if bits/took < 50e3 {
		t.Errorf("%.0f secret bits a second, want 50,000 at least", bits/took)
	}
	n := float64(blocks * p.BlockBits)
	// After-pulses that fall into the dead time are not in the model: 1 % of
	// the 0.1 % they add.
	if sigma := math.Sqrt(f.QBER * (1 - f.QBER) / n); math.Abs(qber-f.QBER) > 5*sigma+1e-5 {
		t.Errorf("QBER is off by %.1f sigma", (qber-f.QBER)/sigma)
	}
}
