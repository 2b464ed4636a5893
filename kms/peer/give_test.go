package peer

import (
	"testing"
	"time"

	"github.com/quietline/quietline/kms"
)

// TestGiveLeavesTheReserve: a peer that has nothing gets half of what is here,
// but not what SAEs of this KME have reserved.
func TestGiveLeavesTheReserve(t *testing.T) {
	for _, tc := range []struct{ reserve, given int }{
		{0, 4}, // half of eight segments of eight keys
		{24, 4},
		{25, 3}, // 32 left would be 24 without the quarter that may be granted ahead
		{48, 0},
		{1000, 0},
	} {
		c := newCouple(t, 1, 2*time.Millisecond)
		for range 16 { // half of them are b's
			c.ingest(t, 8)
		}
		c.run(time.Second)
		m := c.m[0]
		m.Reserve(tc.reserve)
		l := m.links["l"]
		if len(l.mine) != 8 {
			t.Fatalf("%d segments to give, want 8", len(l.mine))
		}
		out := Output{}
		m.now, m.out = c.now, &out
		m.wanted(l, wantCount)
		m.out = nil
		given := 0
		for _, ch := range out.Changes {
			if ch.Op == kms.OpGive {
				given++
			}
		}
		if given != tc.given {
			t.Errorf("reserve %d: %d segments given, want %d", tc.reserve, given, tc.given)
		}
	}
}
