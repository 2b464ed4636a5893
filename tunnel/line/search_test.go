package line

import (
	"math/rand/v2"
	"testing"
	"time"
)

// hole is a path that takes packets up to limit, loses some, and says nothing.
type hole struct {
	limit  int
	loss   float64
	silent bool // the peer answers no probes
	rng    *rand.Rand
}

// walk lets a search go over the path for so long, looking each second, and
// returns how many probes that took.
func (h *hole) walk(s *search, now *time.Time, d time.Duration) (probes int) {
	for end := now.Add(d); now.Before(end); *now = now.Add(time.Second) {
		for {
			size, number, send := s.step(*now)
			if !send {
				break
			}
			probes++
			if h.silent || size > h.limit || h.rng.Float64() < h.loss {
				continue
			}
			if !s.answered(number, *now) {
				panic("an answer in time was not taken")
			}
		}
	}
	return probes
}

func TestSearch(t *testing.T) {
	const top, base = 1424, 1280
	for name, test := range map[string]struct {
		hole
		mtu    int
		narrow bool
		phase  phase
	}{
		"healthy":       {hole{limit: 1500}, top, false, resting},
		"just":          {hole{limit: top}, top, false, resting},
		"swallows some": {hole{limit: 1390}, 1390, false, resting},
		"one less":      {hole{limit: top - 1}, top - 1, false, resting},
		"base alone":    {hole{limit: base}, base, false, resting},
		"below base":    {hole{limit: base - 1}, base, true, resting},
		"very narrow":   {hole{limit: 100}, base, true, resting},
		"dead":          {hole{limit: -1}, top, false, silent},
		"old peer":      {hole{limit: 1500, silent: true}, top, false, silent},
	} {
		t.Run(name, func(t *testing.T) {
			now := time.Unix(1, 0)
			var s search
			s.aim(top, base)
			test.rng = rand.New(rand.NewPCG(1, 1))
			probes := test.walk(&s, &now, 36*time.Second)
			if s.mtu > test.mtu || s.mtu <= test.mtu-searchStep || s.narrow != test.narrow ||
				s.phase != test.phase {
				t.Errorf("mtu %d, narrow %v, phase %d; want %d, %v, %d", s.mtu, s.narrow, s.phase,
					test.mtu, test.narrow, test.phase)
			}
			if probes > 40 {
				t.Errorf("%d probes in 36 s", probes)
			}
		})
	}
}

// A path that changes under way is followed: down when full packets vanish, up
// when the time has come, and a change that the kernel hears of at once.
func TestSearchFollows(t *testing.T) {
	const top, base = 1424, 1280
	now := time.Unix(1, 0)
	h := &hole{limit: 1500, rng: rand.New(rand.NewPCG(1, 1))}
	var s search
	s.aim(top, base)
	look := func(what string, mtu int) {
		t.Helper()
		if s.mtu > mtu || s.mtu <= mtu-searchStep {
			t.Errorf("%s: mtu %d, want %d", what, s.mtu, mtu)
		}
	}
	h.walk(&s, &now, 10*time.Second)
	look("healthy", top)
	h.limit = 1350
	h.walk(&s, &now, confirmEvery+40*time.Second)
	look("swallows now", 1350)
	h.limit = 1500
	h.walk(&s, &now, raiseEvery-60*time.Second)
	look("not yet tried", 1350)
	h.walk(&s, &now, 2*time.Minute)
	look("healthy again", top)
	s.aim(1300, base)
	look("the kernel has heard", 1300)
	s.aim(top, base)
	look("and again", top)
	if s.answered(s.number-100, now) {
		t.Error("an answer from long ago is taken")
	}
	h.silent = true
	h.walk(&s, &now, time.Minute)
	look("peer without an answer", top)
}

// With losses the search may end too low, never too high, and comes up.
func TestSearchWithLoss(t *testing.T) {
	for seed := range uint64(200) {
		now := time.Unix(1, 0)
		rng := rand.New(rand.NewPCG(seed, 0))
		h := &hole{limit: 1280 + rng.IntN(300), loss: 0.1, rng: rng}
		var s search
		s.aim(1424, 1280)
		h.walk(&s, &now, 2*time.Minute)
		for range 10 { // until a search has met with no accident
			h.walk(&s, &now, raiseEvery+time.Minute)
		}
		if want := min(h.limit, 1424); s.narrow || s.mtu > want {
			t.Errorf("seed %d: mtu %d, narrow %v on a path of %d", seed, s.mtu, s.narrow, h.limit)
		}
	}
}
