package storebench

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/quietline/quietline/kms/powercut"
)

func TestMain(m *testing.M) {
	powercut.Main()
	os.Exit(m.Run())
}

// group is the committer in front of a contender: it takes all callers that
// wait into one commit.
type group struct {
	c     contender
	calls chan *call
	done  chan struct{}
}

type call struct {
	n    int
	keys []byte
	err  error
	done chan struct{}
}

func newGroup(c contender) *group {
	g := &group{c: c, calls: make(chan *call, 64), done: make(chan struct{})}
	go g.run()
	return g
}

func (g *group) run() {
	defer close(g.done)
	for first := range g.calls {
		waiting := []*call{first}
		runtime.Gosched() // whoever can run comes along
		for len(g.calls) > 0 {
			waiting = append(waiting, <-g.calls)
		}
		counts := make([]int, len(waiting))
		for i, w := range waiting {
			counts[i] = w.n
		}
		keys, err := g.c.Claim(counts)
		for i, w := range waiting {
			if w.err = err; err == nil {
				w.keys = keys[i]
			}
			close(w.done)
		}
	}
}

func (g *group) claim(n int) ([]byte, error) {
	c := &call{n: n, done: make(chan struct{})}
	g.calls <- c
	<-c.done
	return c.keys, c.err
}

func (g *group) end() {
	close(g.calls)
	<-g.done
}

// sealed makes n distinct sealed keys, numbered from first.
func sealed(first, n int) []byte {
	b := make([]byte, n*sealedBytes)
	for i := range n {
		binary.BigEndian.PutUint64(b[i*sealedBytes:], uint64(first+i)+1)
	}
	return b
}

// TestContendersDeliverOnce: a store that is quick because it is wrong would
// win.
func TestContendersDeliverOnce(t *testing.T) {
	const keys = 4 * segmentSlots
	for _, o := range contenders {
		dir := t.TempDir()
		c, err := o.open(dir)
		if err != nil {
			t.Fatalf("%s: %v", o.name, err)
		}
		if err := c.Ingest(sealed(0, keys)); err != nil {
			t.Fatalf("%s: ingest: %v", o.name, err)
		}
		g := newGroup(c)
		var mu sync.Mutex
		seen := map[uint64]int{}
		var callers sync.WaitGroup
		for caller := range 8 {
			callers.Go(func() {
				for {
					got, err := g.claim(1 + caller%3)
					if errors.Is(err, errEmpty) {
						return
					}
					if err != nil {
						t.Errorf("%s: claim: %v", o.name, err)
						return
					}
					mu.Lock()
					for one := range slices.Chunk(got, sealedBytes) {
						seen[binary.BigEndian.Uint64(one)]++
					}
					mu.Unlock()
				}
			})
		}
		callers.Wait()
		g.end()
		for key, n := range seen {
			if n != 1 || key == 0 || key > keys {
				t.Errorf("%s: key %d was delivered %d times", o.name, key, n)
			}
		}
		if len(seen) < keys-64 { // what the last commit could not serve whole
			t.Errorf("%s: %d of %d keys delivered", o.name, len(seen), keys)
		}
		if err := c.Close(); err != nil {
			t.Errorf("%s: close: %v", o.name, err)
		}
	}
}

// size is what the files in a folder take on disk, in bytes.
func size(t *testing.T, dir string) (total int64) {
	t.Helper()
	err := filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		info, err := d.Info()
		total += info.Size()
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return total
}

// figure is one row of the table: what, and how to measure it in a fresh or
// used contender. Larger is better where rate is set.
var figures = []string{"ingest, keys/s", "bytes on disk per key", "open, ms",
	"claims/s, 1 caller", "claims/s, 8 callers", "claims/s, 64 callers",
	"keys/s, 8 callers of 100"}

// measure runs one contender through the whole workload.
func measure(t *testing.T, o opener, dir string, keys int) []float64 {
	t.Helper()
	c, err := o.open(dir)
	if err != nil {
		t.Fatalf("%s: %v", o.name, err)
	}
	const batch = 16 * segmentSlots
	start := time.Now()
	for at := 0; at < keys; at += batch {
		if err := c.Ingest(sealed(at, batch)); err != nil {
			t.Fatalf("%s: ingest: %v", o.name, err)
		}
	}
	out := []float64{float64(keys) / time.Since(start).Seconds()}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	bytes := size(t, dir)
	if bytes == 0 {
		t.Fatalf("%s: its files are not in %s", o.name, dir)
	}
	out = append(out, float64(bytes)/float64(keys))
	start = time.Now()
	if c, err = o.open(dir); err != nil {
		t.Fatalf("%s: open: %v", o.name, err)
	}
	out = append(out, float64(time.Since(start).Microseconds())/1000)
	g := newGroup(c)
	for _, w := range []struct{ callers, n int }{{1, 1}, {8, 1}, {64, 1}, {8, 100}} {
		out = append(out, rate(t, g, w.callers, w.n))
	}
	g.end()
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	return out
}

// rate is keys a second over half a second of claims.
func rate(t *testing.T, g *group, callers, n int) float64 {
	const long = 500 * time.Millisecond
	counts := make([]int, callers)
	start := time.Now()
	var wg sync.WaitGroup
	for i := range callers {
		wg.Go(func() {
			for time.Since(start) < long {
				if _, err := g.claim(n); err != nil {
					t.Errorf("claim: %v", err)
					return
				}
				counts[i] += n
			}
		})
	}
	wg.Wait()
	total := 0
	for _, c := range counts {
		total += c
	}
	return float64(total) / time.Since(start).Seconds()
}

func median(v []float64) float64 {
	if len(v) == 0 {
		return math.NaN()
	}
	slices.Sort(v)
	return v[len(v)/2]
}

// TestTable measures all contenders in interleaved rounds, so that a busy
// machine hits each alike, and prints medians and ratios.
func TestTable(t *testing.T) {
	if os.Getenv("QUIETLINE_BENCH") == "" {
		t.Skip("set QUIETLINE_BENCH=1")
	}
	const rounds, keys = 5, 62 * 16 * segmentSlots // a little over 10^6
	flush, err := time.ParseDuration(os.Getenv("QUIETLINE_FLUSH"))
	modelled := err == nil
	all := make([][][]float64, len(contenders)) // contender, figure, round
	for i := range all {
		all[i] = make([][]float64, len(figures))
	}
	for round := range rounds {
		for i := range contenders {
			i = (i + round) % len(contenders)
			t.Run(fmt.Sprint(round, i), func(t *testing.T) {
				dir := t.TempDir()
				if modelled && contenders[i].name == "SQLite" {
					t.Skip("SQLite resolves links itself and misses the disk's folder")
				}
				if modelled {
					dir = powercut.New(t, 1<<30, flush).Dir()
				}
				for k, v := range measure(t, contenders[i], dir, keys) {
					all[i][k] = append(all[i][k], v)
				}
			})
		}
	}
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintf(w, "medians of %d rounds, %d keys\t", rounds, keys)
	for _, o := range contenders {
		fmt.Fprintf(w, "%s\t", o.name)
	}
	fmt.Fprintln(w, "ours/rows\tours/SQLite\t")
	for k, name := range figures {
		var m []float64
		for i := range contenders {
			m = append(m, median(all[i][k]))
		}
		fmt.Fprintf(w, "%s\t%.4g\t%.4g\t%.4g\t%.2f\t%.2f\t\n", name, m[0], m[1], m[2], m[0]/m[1], m[0]/m[2])
	}
	if err := w.Flush(); err != nil {
		t.Fatal(err)
	}
}

// BenchmarkClaim is one commit of so many callers' claims, without callers:
// with TMPDIR in memory it tells a contender's processor time and allocations.
func BenchmarkClaim(b *testing.B) {
	for _, callers := range []int{1, 64} {
		for _, o := range contenders {
			b.Run(fmt.Sprintf("%s/%d", strings.ReplaceAll(o.name, " ", "-"), callers),
				func(b *testing.B) { benchmarkClaim(b, o, callers) })
		}
	}
}

func benchmarkClaim(b *testing.B, o opener, callers int) {
	c, err := o.open(b.TempDir())
	if err != nil {
		b.Fatal(err)
	}
	counts := slices.Repeat([]int{1}, callers)
	const batch = 64 * segmentSlots
	stock := 0
	b.ReportAllocs()
	for b.Loop() {
		if stock < callers {
			b.StopTimer()
			if err := c.Ingest(sealed(0, batch)); err != nil {
				b.Fatal(err)
			}
			stock += batch
			b.StartTimer()
		}
		if _, err := c.Claim(counts); err != nil {
			b.Fatal(err)
		}
		stock -= callers
	}
	if err := c.Close(); err != nil {
		b.Fatal(err)
	}
}
