package cascade

import (
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

// noisy makes alice's bits and bob's with the given error ratio.
func noisy(rng *rand.Rand, n int, qber float64) (alice, bob []uint64, errs []int) {
	alice = make([]uint64, (n+63)/64)
	for i := range alice {
		alice[i] = rng.Uint64()
	}
	bob = append([]uint64(nil), alice...)
	for i := range n {
		if rng.Float64() < qber {
			bob[i/64] ^= 1 << (i % 64)
			errs = append(errs, i)
		}
	}
	return alice, bob, errs
}

type fataler interface {
	Helper()
	Fatal(args ...any)
}

// reconcile runs both ends and counts the bits alice sends.
func reconcile(t fataler, plan *Plan, alice, bob []uint64) (a, b *Party, sent int) {
	t.Helper()
	a, b = NewAlice(plan, alice), NewBob(plan, bob)
	for !a.Done() {
		if b.Done() {
			t.Fatal("bob is done before alice")
		}
		pa, pb := a.Parities(), b.Parities()
		sent += a.asks()
		for i := range pa {
			pa[i] ^= pb[i]
		}
		if err := errors.Join(a.Compare(pa), b.Compare(pa)); err != nil {
			t.Fatal(err)
		}
	}
	if !b.Done() {
		t.Fatal("alice is done before bob")
	}
	return a, b, sent
}

// Whatever bob holds, after reconciliation every known block is even, so that
// only patterns that are even everywhere survive; with few errors none does.
func TestReconcileAnyBits(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		seed := rapid.Uint64().Draw(t, "seed")
		n := rapid.IntRange(MinBits, 9000).Draw(t, "n")
		qber := rapid.Float64Range(0, .12).Draw(t, "qber")
		guess := rapid.Float64Range(0, .5).Draw(t, "guess")
		rng := rand.New(rand.NewPCG(seed, 1))
		plan := NewPlan(n, guess, seed)
		alice, bob, errs := noisy(rng, plan.Bits(), qber)
		a, b, sent := reconcile(t, plan, alice[:plan.Bits()/64], bob[:plan.Bits()/64])
		if a.Leak() != sent || b.Leak() != sent {
			t.Fatalf("leak is %d and %d, %d bits were sent", a.Leak(), b.Leak(), sent)
		}
		if diff := cmp.Diff(a.Errors(), b.Errors()); diff != "" {
			t.Fatal(diff)
		}
		if diff := cmp.Diff(alice[:plan.Bits()/64], a.Bits()); diff != "" {
			t.Fatalf("alice's bits have changed: %s", diff)
		}
		left := 0
		got := b.Bits()
		for i := range got {
			if got[i] != alice[i] {
				left++
			}
		}
		if left == 0 && len(a.Errors()) != len(errs) {
			t.Fatalf("%d errors found, %d made", len(a.Errors()), len(errs))
		}
		// A pair of errors that stays together through 13 shuffles is possible
		// in short frames only when blocks are the whole frame.
		if left > 0 && n > 4096 {
			t.Fatalf("%d words differ after reconciliation of %d bits", left, n)
		}
	})
}

func TestNoErrorsCostOnlyTops(t *testing.T) {
	plan := NewPlan(1<<14, .03, 1)
	alice, _, _ := noisy(rand.New(rand.NewPCG(1, 1)), plan.Bits(), 0)
	a, _, _ := reconcile(t, plan, alice, alice)
	want := 0
	for p, log := range plan.log {
		want += plan.FrameBits >> log
		if p > 0 {
			want--
		}
	}
	if a.Leak() != want || a.Rounds() != len(stages) {
		t.Errorf("%d bits in %d rounds, want %d in %d", a.Leak(), a.Rounds(), want, len(stages))
	}
}

func TestPlanCutsWholeWords(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n := rapid.IntRange(MinBits, 1<<18).Draw(t, "n")
		plan := NewPlan(n, .02, 0)
		lost := n - plan.Bits()
		if lost < 0 || lost >= 64*plan.Frames+plan.Frames || plan.FrameBits%64 != 0 {
			t.Fatalf("%d bits: %d frames of %d", n, plan.Frames, plan.FrameBits)
		}
	})
}

func TestWrongLengthChangesNothing(t *testing.T) {
	plan := NewPlan(1000, .05, 1)
	a := NewAlice(plan, make([]uint64, plan.Bits()/64))
	good := a.Parities()
	for _, bad := range [][]byte{nil, good[1:], append(good[:len(good):len(good)], 0)} {
		if err := a.Compare(bad); !errors.Is(err, ErrLength) {
			t.Errorf("%d bytes: %v", len(bad), err)
		}
	}
	if err := a.Compare(good); err != nil || a.Leak() == 0 {
		t.Errorf("the good ones: %v, leak %d", err, a.Leak())
	}
}

func FuzzCompare(f *testing.F) {
	f.Add([]byte{1, 2, 3}, uint16(1000))
	f.Add([]byte{0xff}, uint16(64))
	f.Fuzz(func(t *testing.T, diff []byte, n uint16) {
		plan := NewPlan(max(MinBits, int(n)%4096), .05, 1)
		a := NewAlice(plan, make([]uint64, plan.Bits()/64))
		// Differences a hostile peer makes up must end, not loop or panic:
		// every round splits a block or opens a stage.
		for i := 0; !a.Done(); i++ {
			d := make([]byte, len(a.Parities()))
			copy(d, diff[min(i, len(diff)):])
			if n := a.asks() % 8; n > 0 {
				d[len(d)-1] &= 1<<n - 1
			}
			if err := a.Compare(d); err != nil {
				t.Fatal(err)
			}
		}
	})
}

func entropy(q float64) float64 { return -q*math.Log2(q) - (1-q)*math.Log2(1-q) }

// measure returns the mean efficiency f over runs of n bits, and how many
// frames kept an error.
func measure(t fataler, n, runs int, qber float64) (f float64, failed int) {
	for run := range runs {
		rng := rand.New(rand.NewPCG(uint64(run), uint64(n)))
		plan := NewPlan(n, qber, uint64(run))
		alice, bob, errs := noisy(rng, plan.Bits(), qber)
		a, b, _ := reconcile(t, plan, alice, bob)
		q := float64(len(errs)) / float64(plan.Bits())
		f += float64(a.Leak()) / (float64(plan.Bits()) * entropy(q)) / float64(runs)
		if cmp.Diff(alice, b.Bits()) != "" {
			failed++
		}
	}
	return f, failed
}

func TestEfficiency(t *testing.T) {
	// The limits are those every later change must keep.
	for _, c := range []struct{ qber, limit float64 }{
		{.01, 1.04}, {.02, 1.04}, {.03, 1.04}, {.05, 1.05}, {.08, 1.06}, {.11, 1.07},
	} {
		f, failed := measure(t, 1<<18, 2, c.qber)
		t.Logf("qber %.2f: f %.4f", c.qber, f)
		if f > c.limit || failed > 0 {
			t.Errorf("qber %.2f: f %.4f, limit %.2f; %d runs failed", c.qber, f, c.limit, failed)
		}
	}
}

// The length of a frame must not matter: just above a power of two the last
// block of a pass is shortest.
func TestFramesOfAnyLengthEndEqual(t *testing.T) {
	for _, n := range []int{4096 + 64, 8192 - 64, 1<<15 + 64, 1<<16 + 64, 3 << 14} {
		if _, failed := measure(t, n, 30, .01); failed > 0 {
			t.Errorf("%d bits: %d runs of 30 failed", n, failed)
		}
	}
}

func BenchmarkReconcile(b *testing.B) {
	for _, qber := range []float64{.01, .02, .03, .05, .08, .11} {
		b.Run(fmt.Sprintf("qber=%.2f", qber), func(b *testing.B) {
			rng := rand.New(rand.NewPCG(1, 2))
			const n = 1 << 19
			alice, bob, errs := noisy(rng, n, qber)
			plan := NewPlan(n, qber, 1)
			var a *Party
			for b.Loop() {
				a, _, _ = reconcile(b, plan, alice, bob)
			}
			b.ReportMetric(float64(a.Leak())/(n*entropy(float64(len(errs))/n)), "f")
			b.ReportMetric(float64(a.Rounds()), "rounds")
			b.ReportMetric(n*float64(b.N)/b.Elapsed().Seconds()/1e6, "Mbit/s")
		})
	}
}
