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
	"sync/atomic"
	"testing"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"

	"github.com/quietline/quietline/kms/powercut"
)

func TestMain(m *testing.M) {
	powercut.Main()
	os.Exit(m.Run())
}

// group is the committer in front of a contender: it takes all callers that
// wait into one commit, as the goroutine of kms/node does that owns the store.
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

// loads are the callers of each load, and the keys that one asks for.
var loads = []struct {
	name       string
	callers, n int
}{{"1 caller", 1, 1}, {"8 callers", 8, 1}, {"64 callers", 64, 1}, {"8 callers of 100", 8, 100}}

// figures are the rows of the table, in the order of what measure returns.
var figures = func() []string {
	f := []string{"ingest, keys/s", "bytes on disk per key", "open, ms"}
	for _, l := range loads {
		f = append(f, "keys/s, "+l.name, "p50, us, "+l.name, "p99, us, "+l.name)
	}
	return f
}()

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
	for at := 0; at < keys; at += batch { // a fast contender would run out
		if err := c.Ingest(sealed(keys+at, batch)); err != nil {
			t.Fatalf("%s: ingest: %v", o.name, err)
		}
	}
	g := newGroup(c)
	for _, l := range loads {
		out = append(out, rate(t, g, l.callers, l.n)...)
	}
	g.end()
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	return out
}

// loadKeys bounds what a load takes, so that the stock is enough for all.
const loadKeys = 400_000

// rate is keys a second over half a second of claims, and how long a claim took
// in the median and the 99th percentile, in microseconds.
func rate(t *testing.T, g *group, callers, n int) []float64 {
	const long = 500 * time.Millisecond
	took := make([][]float64, callers)
	var taken atomic.Int64
	start := time.Now()
	var wg sync.WaitGroup
	for i := range callers {
		wg.Go(func() {
			for began := start; began.Sub(start) < long && taken.Add(int64(n)) <= loadKeys; {
				if _, err := g.claim(n); err != nil {
					t.Errorf("claim: %v", err)
					return
				}
				now := time.Now()
				took[i] = append(took[i], float64(now.Sub(began).Nanoseconds())/1000)
				began = now
			}
		})
	}
	wg.Wait()
	elapsed := time.Since(start).Seconds()
	all := slices.Concat(took...)
	if len(all) == 0 {
		return []float64{math.NaN(), math.NaN(), math.NaN()}
	}
	slices.Sort(all)
	return []float64{float64(len(all)*n) / elapsed, all[len(all)/2], all[len(all)*99/100]}
}

func median(v []float64) float64 {
	if len(v) == 0 {
		return math.NaN()
	}
	slices.Sort(v)
	return v[len(v)/2]
}

// mountHere mounts the modelled disk, whose folder leads through a link into
// another process's view, at dir too: SQLite resolves links itself and would
// end up elsewhere.
func mountHere(t *testing.T, disk, dir string) {
	t.Helper()
	process, _, _ := strings.Cut(disk, "/root/")
	mounts, err := os.ReadFile(filepath.Join(process, "mounts"))
	if err != nil {
		t.Fatal(err)
	}
	_, loop, found := strings.Cut(string(mounts), "/dev/loop")
	loop, _, _ = strings.Cut(loop, " ")
	if !found {
		t.Fatalf("no loop device in\n%s", mounts)
	}
	if err := unix.Mount("/dev/loop"+loop, dir, "ext4", unix.MS_NOATIME, ""); err != nil {
		t.Fatalf("mount /dev/loop%s: %v", loop, err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("unmount: %v", err)
		}
	})
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
				if modelled {
					mountHere(t, powercut.New(t, 1<<30, flush).Dir(), dir)
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
