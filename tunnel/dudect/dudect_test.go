package dudect

import (
	"crypto/subtle"
	"math"
	"testing"
)

// TestControl: a comparison that stops early is found, one that does not is not.
func TestControl(t *testing.T) {
	kinds := [2][]byte{make([]byte, 4096), make([]byte, 4096)}
	kinds[0][0] = 1
	zero := make([]byte, 4096)
	if x := T(2000, func(k int) {
		for i := range zero {
			if kinds[k][i] != zero[i] {
				return
			}
		}
	}); math.Abs(x) < Limit {
		t.Errorf("t = %.1f of a comparison that stops early", x)
	}
	if x := Steady(2000, func(k int) { subtle.ConstantTimeCompare(kinds[k], zero) }); math.Abs(x) >= Limit {
		t.Errorf("t = %.1f of one that does not", x)
	}
}
