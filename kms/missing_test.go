package kms

import (
	"errors"
	"testing"
	"testing/synctest"

	"github.com/quietline/quietline/etsi014"
)

// TestMissingBits: a refusal for want of keys says exactly how many bits more
// the request would have needed, and never more than it asked.
func TestMissingBits(t *testing.T) {
	for _, tt := range []struct {
		name         string
		allow        map[etsi014.SAEID]Allowance
		stock        int
		before       int // keys drawn first
		number, size int
		cause        error
		missing      int
	}{
		{"rate, all of it", map[etsi014.SAEID]Allowance{"hungry": {Keys: 5}}, 1000, 20, 3, 512,
			ErrRate, 3 * 512},
		{"rate, some of it", map[etsi014.SAEID]Allowance{"hungry": {Keys: 5}}, 1000, 2, 5, 256,
			ErrRate, 2 * 256},
		{"share", map[etsi014.SAEID]Allowance{"hungry": {Share: 0.5}}, 100, 40, 5, 256,
			ErrQuota, 3 * 256}, // of 85 half are 42
		{"share, large keys", map[etsi014.SAEID]Allowance{"hungry": {Share: 0.5}}, 100, 40, 1, 1280,
			ErrQuota, 3 * 256},
		{"reserve", map[etsi014.SAEID]Allowance{"line": {Reserve: 10}}, 40, 0, 25, 256,
			ErrReserve, 5 * 256}, // a quarter is granted ahead, 10 are kept
		{"reserve, all of it", map[etsi014.SAEID]Allowance{"line": {Reserve: 40}}, 40, 0, 2, 256,
			ErrReserve, 2 * 256},
	} {
		synctest.Test(t, func(t *testing.T) {
			k := withAllowances(t, newTank(tt.stock), tt.allow)
			if tt.before > 0 {
				if err := drawKeys(t.Context(), k, "hungry", tt.before, 256); err != nil {
					t.Fatal(tt.name, err)
				}
			}
			err := drawKeys(t.Context(), k, "hungry", tt.number, tt.size)
			e := new(etsi014.Error)
			if !errors.As(err, &e) || !errors.Is(err, tt.cause) || e.MissingBits != tt.missing ||
				e.RetryAfter <= 0 {
				t.Errorf("%s: %v (%+v), want %d bits missing", tt.name, err, e, tt.missing)
			}
		})
	}
}
