package peer

import (
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// seedsFor is how many histories of a kind a test plays: QUIETLINE_SEEDS
// overrides it.
func seedsFor(t *testing.T, n int) int {
	if v, err := strconv.Atoi(os.Getenv("QUIETLINE_SEEDS")); err == nil {
		return v
	}
	if testing.Short() {
		return n / 10
	}
	return n
}

// TestSimulated plays seeded histories. A failure names the seed; set
// QUIETLINE_SEED to it to see that one history event by event.
func TestSimulated(t *testing.T) {
	kinds := map[string]histories{
		"crashes":        {steps: 500},
		"one disk old":   {steps: 500, restores: true},
		"both disks old": {steps: 500, restores: true, bothOld: true},
	}
	for name, h := range kinds {
		t.Run(strings.ReplaceAll(name, " ", "-"), func(t *testing.T) {
			if v, err := strconv.ParseUint(os.Getenv("QUIETLINE_SEED"), 10, 64); err == nil {
				h.traceOnly = true
				w := newWorld(v, h)
				err := w.run()
				t.Logf("seed %d: %v\n%s", v, err, strings.Join(w.trace, "\n"))
				return
			}
			play(t, h, seedsFor(t, 200))
		})
	}
}

// play runs n seeds on all cores.
func play(t *testing.T, h histories, n int) {
	t.Helper()
	var next, delivered, taken atomic.Uint64
	var bad atomic.Int64
	began := time.Now()
	enough := int64(3)
	if os.Getenv("QUIETLINE_PLANT") != "" {
		enough = 1
	}
	var wg sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			for seed := next.Add(1); seed <= uint64(n) && bad.Load() < enough; seed = next.Add(1) {
				w := newWorld(seed, h)
				if err := w.run(); err != nil {
					bad.Add(1)
					t.Errorf("seed %d: %v", seed, err)
				}
				delivered.Add(uint64(w.delivered))
				taken.Add(uint64(w.taken))
			}
		})
	}
	wg.Wait()
	t.Logf("%d histories, %.0f a second, %d keys drawn, %d fetched", n,
		float64(n)/time.Since(began).Seconds(), delivered.Load(), taken.Load())
	if delivered.Load() < uint64(n) || taken.Load() < uint64(n)/2 {
		t.Errorf("only %d keys drawn and %d fetched: the histories test little", delivered.Load(),
			taken.Load())
	}
}
