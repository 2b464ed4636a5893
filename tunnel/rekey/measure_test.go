package rekey

import (
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/quietline/quietline/tunnel/dudect"
)

// TestLatency: two ends that know nothing of each other send after two and two
// and a half round trips, and the answer of each key manager; a rekey takes as
// long, beside traffic. CPU is BenchmarkHandshake's.
func TestLatency(t *testing.T) {
	for _, rtt := range []time.Duration{0, 10 * time.Millisecond, 100 * time.Millisecond} {
		w := newWorld(1)
		w.net.delay = rtt / 2
		w.start(QKDStrict, nil)
		i, r := w.named("I"), w.named("R")
		sends := func(e *end) func() bool { return func() bool { return e.send != nil } }
		if !w.until(time.Second, sends(i)) {
			t.Fatalf("round trip %v: not up", rtt)
		}
		first := w.now.Sub(epochZero)
		if !w.until(time.Second, sends(r)) {
			t.Fatalf("round trip %v: not up", rtt)
		}
		second := w.now.Sub(epochZero)
		t.Logf("round trip %v: initiator sends after %v, responder after %v", rtt, first, second)
		if first > 2*rtt+2*keyTime || second > 5*rtt/2+2*keyTime {
			t.Errorf("round trip %v: %v and %v", rtt, first, second)
		}
		w.ok(t)
	}
}

// keyTime bounds what the test's key manager takes.
const keyTime = 10 * time.Millisecond

// TestJunkFlood: a million datagrams of strangers, of every form that passes
// some check, and replays of a true M1: no call to a key manager, no KEM work
// beyond what the pending handshakes allow, no answer that is larger, and the
// memory of before.
func TestJunkFlood(t *testing.T) {
	n := 1_000_000
	if testing.Short() {
		n = 10_000
	}
	w := newWorld(1)
	w.start(QKDStrict, nil)
	w.run(time.Second)
	r := w.named("R")
	m1s := recordings(w, 1)
	w.run(time.Second)
	rng := rand.New(rand.NewPCG(1, 1))
	d := make([]byte, maxDatagram)
	before, memory := r.m.Stats(), heapNow()
	now, requests, answers := w.now, 0, 0
	began := time.Now()
	for i := range n {
		b := d[:rng.IntN(len(d))]
		for j := range min(len(b), 32) {
			b[j] = byte(rng.Uint32())
		}
		switch {
		case i%3 == 0 && len(b) > 4: // all but mac1
			copy(b, []byte{kindM1 + byte(i)%5, wireVersion, byte(XWing), byte(i) & 0x11})
		case i%1000 == 1: // true once, and replayed since
			parts := m1s[0]
			b = parts[i/1000%len(parts)]
		}
		now = now.Add(time.Microsecond)
		out := r.m.Step(now, Input{Datagram: b, From: addrOf(9), Load: i%64 > 32})
		if out.Request != nil {
			requests++
		}
		answers += len(out.Datagrams)
	}
	spent, after := time.Since(began), r.m.Stats()
	t.Logf("%d datagrams, %v each; %d KEM operations, %d answers, heap %+d bytes", n,
		spent/time.Duration(n), after.KEMs-before.KEMs, answers, int64(heapNow())-int64(memory))
	if requests != 0 || after.KeysDrawn != before.KeysDrawn {
		t.Errorf("%d calls to the key manager", requests)
	}
	if grown := int64(heapNow()) - int64(memory); grown > 256<<10 {
		t.Errorf("heap has grown by %d bytes", grown)
	}
	if after.KEMs-before.KEMs > 3*uint64(n)/2000 {
		t.Errorf("%d KEM operations", after.KEMs-before.KEMs)
	}
}

func heapNow() uint64 {
	runtime.GC()
	runtime.GC()
	var s runtime.MemStats
	runtime.ReadMemStats(&s)
	return s.HeapAlloc
}

// TestTimingOfMAC1: how much of a mac1 is right does not show in time.
func TestTimingOfMAC1(t *testing.T) {
	w := newWorld(1)
	w.start(PQCOnly, nil)
	w.run(time.Second)
	e := &w.named("R").m.env
	d := make([]byte, headerSize+2*macSize)
	copy(d, []byte{kindM3, wireVersion, byte(XWing), 0})
	body := d[:headerSize]
	good := mac1(e.in, body)
	var kinds [2][]byte
	for k, wrong := range []int{0, macSize - 1} { // the first byte or the last
		kinds[k] = slices.Clone(d)
		copy(kinds[k][headerSize:], good)
		kinds[k][headerSize+wrong] ^= 0x80
	}
	if x := dudect.Steady(4000, func(k int) { _, _ = e.unwrap(w.now, kinds[k], addrOf(0), false) }); math.Abs(x) >= dudect.Limit {
		t.Errorf("t = %.1f between a mac1 wrong at its first and at its last byte", x)
	}
}

// TestFIPSMode runs the handshake of both suites in Go's FIPS 140-3 mode, in a
// process of its own. Under "only" the seal with a counter as its nonce is
// refused, which docs/handshake.md says: should that change, so must the page.
func TestFIPSMode(t *testing.T) {
	for mode, want := range map[string]string{"on": "", "only": "GCM with arbitrary IVs"} {
		cmd := exec.Command("/proc/self/exe", "-test.run", "^(TestLineComesUpAndRekeys|TestLatency|TestStrictSuite)$")
		cmd.Env = append(os.Environ(), "GODEBUG=fips140="+mode)
		out, err := cmd.CombinedOutput()
		switch {
		case want == "" && err != nil:
			t.Errorf("fips140=%s: %v\n%.3000s", mode, err, out)
		case want != "" && (err == nil || !strings.Contains(string(out), want)):
			t.Errorf("fips140=%s: %v, without %q\n%.3000s", mode, err, want, out)
		}
	}
}

// BenchmarkLoneEnd is the CPU of one end of a handshake, and so how many a core
// does in a second.
func BenchmarkLoneEnd(b *testing.B) {
	for name, tweak := range map[string]func(int, *Config){"X-Wing": nil, "MLKEM1024-P384": suite2(b)} {
		for _, role := range []string{"I", "R"} {
			b.Run(fmt.Sprintf("%s/%s", name, role), func(b *testing.B) {
				w := newWorld(1)
				w.net.delay = 0
				w.start(QKDStrict, tweak)
				w.run(20 * time.Second)
				i := w.scheduled()
				spent := time.Duration(0)
				e := w.named(role)
				e.clock = &spent
				before := i.m.Stats().Completed
				for b.Loop() {
					i.step(Input{Rekey: true})
					w.run(12 * time.Second) // the old epoch goes
				}
				n := float64(i.m.Stats().Completed - before)
				b.ReportMetric(float64(spent.Microseconds())/n, "us/handshake")
				b.ReportMetric(n/spent.Seconds(), "handshakes/s/core")
			})
		}
	}
}
