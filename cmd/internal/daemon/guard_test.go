package daemon

import (
	"context"
	"encoding/json"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/vishvananda/netlink"

	"github.com/quietline/quietline/cmd/internal/config"
	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/etsi014/etsitest"
	"github.com/quietline/quietline/secret"
	"github.com/quietline/quietline/tunnel/bundle"
	"github.com/quietline/quietline/tunnel/guard"
	"github.com/quietline/quietline/tunnel/lab"
)

func TestGuardOf(t *testing.T) {
	prefixes := func(text ...string) (ps []netip.Prefix) {
		for _, s := range text {
			ps = append(ps, netip.MustParsePrefix(s))
		}
		return ps
	}
	remote := netip.MustParseAddrPort("192.0.2.2:4500")
	got := GuardOf(&config.Line{ID: "a", Endpoints: []config.Endpoint{{Remote: remote}},
		TUN: config.TUN{Name: "ql0", Addresses: prefixes("10.9.0.1/30", "10.8.0.1/32"),
			Routes: prefixes("10.2.0.0/16", "10.3.0.1/32", "2001:db8::/48")}})
	want := guard.Config{Line: "a", Interface: "ql0", Outer: remote,
		Networks: prefixes("10.2.0.0/16", "2001:db8::/48", "10.9.0.0/30", "10.3.0.1/32")}
	if diff := cmp.Diff(want, got, cmpopts.EquateComparable(netip.Prefix{}, netip.AddrPort{})); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// runLine is a line daemon in a process of its own, to be killed.
func runLine(path string) int {
	text, err := os.ReadFile(path)
	var l config.Line
	if err == nil {
		err = json.Unmarshal(text, &l)
	}
	if err == nil {
		err = Line(context.Background(), Env{Site: &config.Site{Site: "x", State: filepath.Dir(l.Control)},
			Log: Logger(os.Stderr, 0)}, &l)
	}
	if err != nil {
		_, _ = os.Stderr.WriteString(err.Error())
		return 1
	}
	return 0
}

// hospital sends plaintext from tokyo's host to a host behind kochi, all the
// time, while tokyo's default route leads onto the outer network.
type hospital struct {
	*cable
	mark []byte
	came atomic.Int64 // at the host behind kochi
}

func newHospital(t *testing.T, change func(i int, l *config.Line)) *hospital {
	t.Helper()
	h := &hospital{mark: []byte("plaintext of a patient: " + t.Name())}
	h.cable = newCable(t, func(i int, l *config.Line) {
		if i == 0 {
			l.TUN.Routes = []netip.Prefix{netip.MustParsePrefix("10.2.0.0/16")}
		}
		l.EpochLife, l.HoldMax = time.Second, 3*time.Second
		if change != nil {
			change(i, l)
		}
	})
	do := func(i int, f func() error) {
		t.Helper()
		if err := h.ends[i].Namespace.Do(f); err != nil {
			t.Fatal(err)
		}
	}
	do(0, func() error {
		return netlink.RouteAdd(&netlink.Route{Gw: net.IPv4(192, 0, 2, 2)})
	})
	do(1, func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		addr, err := netlink.ParseAddr("10.2.0.1/32")
		if err != nil {
			return err
		}
		return netlink.AddrAdd(lo, addr)
	})
	sink, err := h.ends[1].Namespace.ListenPacket("udp", "10.2.0.1:9000")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = sink.Close() })
	go func() {
		buf := make([]byte, 2000)
		for {
			if _, _, err := sink.ReadFrom(buf); err != nil {
				return
			}
			h.came.Add(1)
		}
	}()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	t.Cleanup(func() { cancel(); <-done })
	go func() {
		defer close(done)
		for ctx.Err() == nil {
			if c, err := h.ends[0].Namespace.Dial(ctx, "udp", "10.2.0.1:9000"); err == nil {
				for range 10 {
					_, _ = c.Write(h.mark)
					time.Sleep(2 * time.Millisecond)
				}
				_ = c.Close()
			}
			time.Sleep(2 * time.Millisecond)
		}
	}()
	return h
}

// watch records the outer interfaces of both ends; what it returns tells
// whether plaintext was on one.
func (h *hospital) watch(t *testing.T) func() bool {
	t.Helper()
	var recorders [2]*lab.Recorder
	var paths [2]string
	for i, e := range h.ends {
		paths[i] = filepath.Join(t.TempDir(), "wire")
		r, err := lab.Capture(e.Namespace, e.Name, paths[i])
		if err != nil {
			t.Fatal(err)
		}
		recorders[i] = r
	}
	return func() bool {
		t.Helper()
		leak := false
		for i, r := range recorders {
			if err := r.Stop(); err != nil {
				t.Fatal(err)
			}
			f, err := lab.Search(paths[i], [][]byte{h.mark})
			if err != nil {
				t.Fatal(err)
			}
			leak = leak || f.Any()
		}
		return leak
	}
}

// flows waits until plaintext comes through the line.
func (h *hospital) flows(t *testing.T) {
	t.Helper()
	n := h.came.Load()
	await(t, "plaintext comes through the line", func() bool { return h.came.Load() > n+20 })
}

// TestFailClosed: no plaintext on any outer interface at the start, beside a
// running line, at its stop, crash, reload, upgrade, with a wrong peer and
// without keys. The same search finds it without the guard.
func TestFailClosed(t *testing.T) {
	lab.Need(t)
	if _, err := exec.LookPath("nft"); err != nil {
		t.Skip("nft is not installed")
	}
	h := newHospital(t, nil)
	control := h.watch(t)
	time.Sleep(200 * time.Millisecond)
	if !control() {
		t.Fatal("without a guard nothing leaks: the test shows nothing")
	}
	// As at boot, before the line.
	if err := h.ends[0].Namespace.Do(func() error { return guard.Install(GuardOf(&h.lines[0])) }); err != nil {
		t.Fatal(err)
	}
	phase := func(name string, f func()) {
		t.Helper()
		leaks := h.watch(t)
		f()
		time.Sleep(100 * time.Millisecond)
		if leaks() {
			t.Errorf("%s: plaintext on an outer interface", name)
		}
	}
	phase("before the start", func() { time.Sleep(200 * time.Millisecond) })
	defer h.run(t, 1)()
	var stop func()
	phase("start, rekeys, stop", func() {
		stop = h.run(t, 0)
		h.flows(t)
		time.Sleep(1500 * time.Millisecond) // a rekey and more
		stop()
		time.Sleep(300 * time.Millisecond)
	})
	phase("crash", func() {
		kill := h.process(t)
		h.flows(t)
		kill()
		time.Sleep(500 * time.Millisecond)
	})
	phase("upgrade: another process follows", func() {
		kill := h.process(t)
		h.flows(t)
		kill()
		stop = h.run(t, 0)
		h.flows(t)
	})
	phase("reload: the line begins anew at once", func() {
		stop()
		h.lines[0].EpochLife = 2 * time.Second
		stop = h.run(t, 0)
		h.flows(t)
		stop()
	})
	phase("wrong peer", func() {
		right := h.lines[0].LinkSecret
		wrong := filepath.Join(t.TempDir(), "wrong")
		s, _, err := bundle.Generate(1, secret.Bytes{})
		if err != nil {
			t.Fatal(err)
		}
		if err := os.Mkdir(wrong, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := bundle.WriteSecrets(wrong, s); err != nil {
			t.Fatal(err)
		}
		h.lines[0].LinkSecret = filepath.Join(wrong, bundle.LinkFile)
		stop = h.run(t, 0)
		time.Sleep(2 * time.Second)
		if l := h.line(t, 0); l == nil || l.Level != "BLOCKED" {
			t.Errorf("with a wrong peer: %+v", l)
		}
		stop()
		h.lines[0].LinkSecret = right
	})
	phase("a line that cannot start", func() {
		right := h.lines[0].StaticKey
		h.lines[0].StaticKey += ".missing"
		env := Env{Site: &config.Site{Site: "x", State: filepath.Dir(h.lines[0].Control)}, Log: testLog(t)}
		err := h.ends[0].Namespace.Do(func() error { return Line(t.Context(), env, &h.lines[0]) })
		if err == nil {
			t.Error("a line without its key starts")
		}
		h.lines[0].StaticKey = right
	})
}

// process runs tokyo's line in a process of its own; what it returns kills it.
func (h *hospital) process(t *testing.T) (kill func()) {
	t.Helper()
	text, err := json.Marshal(h.lines[0])
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "line.json")
	if err := os.WriteFile(path, text, 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe", "-test.run", "^$")
	cmd.Env = append(os.Environ(), "QUIETLINE_TEST_LINE="+path)
	cmd.Stderr = t.Output()
	if err := h.ends[0].Namespace.Start(cmd); err != nil {
		t.Fatal(err)
	}
	return func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }
}

// TestFailClosedWithoutKeys: a strict line whose key manager is away holds, then
// blocks, and nothing leaves on another way.
func TestFailClosedWithoutKeys(t *testing.T) {
	lab.Need(t)
	var away atomic.Bool
	kme := &etsitest.KME{Stock: 10_000, Fail: func() error {
		if away.Load() {
			return etsi014.ErrDown
		}
		return nil
	}}
	keys := doorFor(t, kme, "line-tokyo", "line-kochi")
	names := [2]string{"tokyo", "kochi"}
	h := newHospital(t, func(i int, l *config.Line) {
		l.Policy, l.Keys = "qkd-strict", keys("line-"+names[i], "line-"+names[1-i])
	})
	// What waits for the neighbour's address has passed the guard's hooks.
	control := h.watch(t)
	await(t, "plaintext gets out without a guard", func() bool { return h.came.Load() > 20 })
	if !control() {
		t.Fatal("without a guard nothing leaks: the test shows nothing")
	}
	if err := h.ends[0].Namespace.Do(func() error {
		return guardLine(&h.lines[0], testLog(t))
	}); err != nil {
		t.Fatal(err)
	}
	leaks := h.watch(t)
	defer h.run(t, 0)()
	defer h.run(t, 1)()
	h.flows(t)
	away.Store(true)
	h.level(t, "BLOCKED")
	time.Sleep(300 * time.Millisecond)
	away.Store(false)
	h.flows(t)
	if leaks() {
		t.Error("plaintext on an outer interface")
	}
}
