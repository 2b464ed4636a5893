//go:build linux

package node

import (
	"fmt"
	"path/filepath"
	"testing"
	"time"

	"github.com/quietline/quietline/kms/powercut"
)

// TestPowerCuts takes the power away from one KME's disk, or from both, at
// random moments under load: of what no flush has covered a random part is on
// the disk, some of it torn between sectors. The KME then finds what a computer
// finds. No acknowledged key is lost, none comes twice, and keys flow again.
// QUIETLINE_LONG=1 cuts 500 times.
func TestPowerCuts(t *testing.T) {
	cuts := long(10, 500)
	disks := map[*process]*powercut.Disk{}
	c := newCrew(t, 3, func(a, b *process) {
		for _, p := range []*process{a, b} {
			disks[p] = powercut.New(t, 256<<20, time.Millisecond)
			p.cfg.Dir = filepath.Join(disks[p].Dir(), "state")
			p.cfg.Turn = 300 * time.Millisecond // cuts meet some under way
		}
	})
	fractions := []float64{0, 0.25, 0.5, 0.75, 1}
	var total powercut.Loss
	for i := range cuts {
		c.flow(t, 10, fmt.Sprintf("after %d cuts", i))
		time.Sleep(time.Duration(c.rng.IntN(100_000)) * time.Microsecond)
		victims := [][]*process{{c.a}, {c.b}, {c.a}, {c.b}, {c.a, c.b}}[c.rng.IntN(5)]
		for _, p := range victims {
			loss, err := disks[p].Cut(fractions[c.rng.IntN(len(fractions))], c.rng.Uint64())
			if err != nil {
				t.Fatalf("seed %d, cut %d: %v", c.seed, i, err)
			}
			p.kill(t)
			total.Unflushed += loss.Unflushed
			total.Written += loss.Written
			total.Torn += loss.Torn
		}
		for _, p := range victims {
			p.start(t)
		}
	}
	c.flow(t, 10, "after the last cut")
	c.end(t)
	t.Logf("%d cuts; blocks in the caches %+v", cuts, total)
	if total.Unflushed == 0 {
		t.Errorf("seed %d: no cut met an unflushed block: the test cannot fail", c.seed)
	}
	for _, p := range []*process{c.a, c.b} {
		c.compare(t, p)
	}
}
