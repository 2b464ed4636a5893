package peer

import (
	"math"
	"os"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// effort is how many histories a test plays: most of them, or fewer when the
// time is over; no time = all.
type effort struct {
	most int
	time time.Duration
}

// effortOf shares the simulator's time among kinds of histories:
// QUIETLINE_SEEDS=n plays n histories of each; QUIETLINE_LONG=1 plays for half
// of the time that the test may take, in CI 10,000 in all, and at a desk 5 s
// must do.
func effortOf(t *testing.T, kinds int) effort {
	if v, err := strconv.Atoi(os.Getenv("QUIETLINE_SEEDS")); err == nil {
		return effort{most: v}
	}
	share := time.Duration(kinds)
	switch {
	case os.Getenv("QUIETLINE_LONG") != "":
		end, ok := t.Deadline()
		if !ok {
			end = time.Now().Add(10 * time.Minute)
		}
		return effort{math.MaxInt, time.Until(end) / 2 / share}
	case os.Getenv("CI") != "":
		return effort{most: (10_000 + kinds - 1) / kinds}
	case testing.Short():
		return effort{math.MaxInt, time.Second / share}
	}
	return effort{math.MaxInt, 5 * time.Second / share}
}

// TestSimulated plays seeded histories. A failure names the seed; set
// QUIETLINE_SEED to it to see that one history event by event.
func TestSimulated(t *testing.T) {
	kinds := map[string]histories{
		"crashes":        {steps: 500},
		"one disk old":   {steps: 500, restores: true},
		"both disks old": {steps: 500, restores: true, bothOld: true},
	}
	much := effortOf(t, len(kinds))
	for name, h := range kinds {
		t.Run(strings.ReplaceAll(name, " ", "-"), func(t *testing.T) {
			if v, err := strconv.ParseUint(os.Getenv("QUIETLINE_SEED"), 10, 64); err == nil {
				h.traceOnly = true
				w := newWorld(v, h)
				err := w.run()
				t.Logf("seed %d: %v\n%s", v, err, strings.Join(w.trace, "\n"))
				return
			}
			play(t, h, much)
		})
	}
}

// play runs seeds from 1 on, on all cores.
func play(t *testing.T, h histories, much effort) {
	t.Helper()
	// Histories are short and leave much behind: collect it less often.
	defer debug.SetGCPercent(debug.SetGCPercent(400))
	var next, played, delivered, taken atomic.Uint64
	var bad atomic.Int64
	began := time.Now()
	enough := int64(3)
	if os.Getenv("QUIETLINE_PLANT") != "" {
		enough = 1
	}
	more := func(seed uint64) bool {
		return seed == 1 || seed <= uint64(much.most) && bad.Load() < enough &&
			(much.time == 0 || time.Since(began) < much.time)
	}
	var wg sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			for seed := next.Add(1); more(seed); seed = next.Add(1) {
				w := newWorld(seed, h)
				if err := w.run(); err != nil {
					bad.Add(1)
					t.Errorf("seed %d: %v\nto see it: QUIETLINE_SEED=%d go test ./kms/peer -v -run '%s'", seed,
						err, seed, t.Name())
				}
				played.Add(1)
				delivered.Add(uint64(w.delivered))
				taken.Add(uint64(w.taken))
			}
		})
	}
	wg.Wait()
	n := played.Load()
	t.Logf("%d seeds, %.0f a second, %d keys drawn, %d fetched", n,
		float64(n)/time.Since(began).Seconds(), delivered.Load(), taken.Load())
	if n >= 20 && (delivered.Load() < n || taken.Load() < n/2) {
		t.Errorf("only %d keys drawn and %d fetched: the histories test little", delivered.Load(),
			taken.Load())
	}
}
