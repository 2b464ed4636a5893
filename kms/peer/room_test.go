package peer

import (
	"math"
	"testing"

	"github.com/quietline/quietline/kms"
)

// stocked is a peer with confirmed segments that it may open.
func stocked(segments, slots int) *remote {
	l := &link{idAgreed: true}
	for range segments {
		l.mine = append(l.mine, &segment{Segment: kms.Segment{Slots: slots}, link: l})
		l.mineSlots += slots
	}
	return &remote{links: []*link{l}}
}

// TestRoom: the count is whole unless a bound is given, and then at least the
// bound if there is so much.
func TestRoom(t *testing.T) {
	r := stocked(10, 7)
	for _, tc := range []struct{ per, enough, least, most int }{
		{1, math.MaxInt, 70, 70},
		{2, math.MaxInt, 30, 30}, // one slot of each is cut off
		{8, math.MaxInt, 0, 0},
		{2, 4, 4, 30},
		{2, 31, 30, 30},
		{2, 0, 0, 0},
	} {
		if _, got := r.room(tc.per, tc.enough); got < tc.least || got > tc.most {
			t.Errorf("%d slots a key, %d enough: %d, want %d to %d", tc.per, tc.enough, got, tc.least,
				tc.most)
		}
	}
}

// BenchmarkRoom is what a draw pays for a large stock: nothing that grows.
func BenchmarkRoom(b *testing.B) {
	r := stocked(10_000, 2048)
	for b.Loop() {
		r.room(2, 128)
	}
}
