package seal

import (
	"errors"
	"math"
	"testing"

	"pgregory.net/rapid"
)

func TestWindow(t *testing.T) {
	type step struct {
		counter uint64
		err     error
	}
	const w = WindowLen
	tests := []struct {
		name  string
		steps []step
	}{
		{"first is zero", []step{{0, nil}, {0, ErrReplayed}}},
		{"first is high", []step{{1 << 40, nil}, {1 << 40, ErrReplayed}, {0, ErrTooOld}}},
		{"first is late by one", []step{{1, nil}, {0, nil}, {0, ErrReplayed}, {1, ErrReplayed}}},
		{"edge of the window", []step{{w - 1, nil}, {0, nil}, {w, nil}, {0, ErrTooOld}, {1, nil}}},
		{"edge with an unaligned top", []step{{w + 36, nil}, {36, ErrTooOld}, {37, nil}}},
		{"jump of one word", []step{{5, nil}, {69, nil}, {5, ErrReplayed}, {6, nil}}},
		{"jump over the whole ring", []step{{7, nil}, {7 + 3*w, nil}, {7 + 3*w - 1, nil},
			{7 + 2*w, ErrTooOld}, {7 + 2*w + 1, nil}}},
		{"jump by one ring", []step{{3, nil}, {3 + ringWords*wordBits, nil},
			{3 + ringWords*wordBits - w + 1, nil}}},
		{"end of the counter", []step{{math.MaxUint64 - 1, nil}, {math.MaxUint64 - w, nil},
			{math.MaxUint64, ErrTooOld}}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var win window
			for i, s := range tt.steps {
				err := win.check(s.counter)
				if !errors.Is(err, s.err) {
					t.Fatalf("step %d, counter %d: %v, want %v", i, s.counter, err, s.err)
				}
				if err == nil {
					win.mark(s.counter)
				}
			}
		})
	}
}

// The window must agree with a set that remembers everything.
func TestWindowAgainstModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var win window
		seen := map[uint64]bool{}
		var top uint64
		start := rapid.Uint64Range(0, 1<<50).Draw(t, "start")
		for range rapid.IntRange(1, 200).Draw(t, "steps") {
			base := max(top, start)
			var c uint64
			switch rapid.IntRange(0, 3).Draw(t, "move") {
			case 0:
				c = base + rapid.Uint64Range(0, 3).Draw(t, "ahead")
			case 1:
				c = base + rapid.Uint64Range(0, 3*WindowLen).Draw(t, "jump")
			case 2:
				c = base - min(base, rapid.Uint64Range(0, 130).Draw(t, "late"))
			default:
				c = base - min(base, rapid.Uint64Range(0, WindowLen+130).Draw(t, "very late"))
			}
			var want error
			switch {
			case len(seen) > 0 && c+WindowLen <= top:
				want = ErrTooOld
			case seen[c]:
				want = ErrReplayed
			}
			if got := win.check(c); !errors.Is(got, want) {
				t.Fatalf("counter %d with top %d: %v, want %v", c, top, got, want)
			}
			if want == nil {
				win.mark(c)
				seen[c] = true
				top = max(top, c)
			}
		}
	})
}

func BenchmarkWindow(b *testing.B) {
	var win window
	var c uint64
	for b.Loop() {
		if win.check(c) != nil {
			b.Fatal("in order, and refused")
		}
		win.mark(c)
		c++
	}
}
