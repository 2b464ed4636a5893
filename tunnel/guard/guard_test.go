package guard

import (
	"errors"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/quietline/quietline/tunnel/lab"
	"github.com/quietline/quietline/tunnel/tun"
)

func TestMain(m *testing.M) { os.Exit(lab.Main(m)) }

var config = Config{Line: "tokyo-kochi.1", Interface: "ql0",
	Networks: []netip.Prefix{netip.MustParsePrefix("10.2.0.0/16"), netip.MustParsePrefix("2001:db8:2::/48")},
	Outer:    netip.MustParseAddrPort("192.0.2.2:4500")}

func TestConfigIsChecked(t *testing.T) {
	for _, bad := range []Config{{}, {Line: "a b", Interface: "x"}, {Line: "a", Interface: `x"; }`},
		{Line: "a\n", Interface: "x"}, {Line: "a", Interface: "x", Networks: make([]netip.Prefix, 1)}} {
		if err := errors.Join(Install(bad)); !errors.Is(err, ErrConfig) {
			t.Errorf("%+v: %v", bad, err)
		}
		if err := Remove(bad); !errors.Is(err, ErrConfig) {
			t.Errorf("%+v: %v", bad, err)
		}
		if err := Check(bad); !errors.Is(err, ErrConfig) {
			t.Errorf("%+v: %v", bad, err)
		}
	}
}

// world is a host whose every packet would go to a router, and what crosses
// the wire between.
type world struct {
	t            *testing.T
	host, router lab.End
	mark         []byte
}

func newWorld(t *testing.T) *world {
	t.Helper()
	lab.Need(t)
	if _, err := exec.LookPath("nft"); err != nil {
		t.Skip("nft is not installed")
	}
	w := &world{t: t, mark: []byte("plaintext of a patient, " + t.Name())}
	for i, e := range []*lab.End{&w.host, &w.router} {
		ns, err := lab.NewNamespace([]string{"host", "router"}[i])
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = ns.Close() })
		*e = lab.End{Namespace: ns, Name: "wan0", Addresses: []netip.Prefix{
			netip.MustParsePrefix([]string{"192.0.2.1/24", "192.0.2.2/24"}[i])}}
	}
	if err := lab.Veth(w.host, w.router); err != nil {
		t.Fatal(err)
	}
	w.do(func() error {
		return netlink.RouteAdd(&netlink.Route{Gw: netip.MustParseAddr("192.0.2.2").AsSlice()})
	})
	return w
}

func (w *world) do(f func() error) {
	w.t.Helper()
	if err := w.host.Namespace.Do(f); err != nil {
		w.t.Fatal(err)
	}
}

// leaks sends to a network behind the line, and tells whether the wire shows it.
func (w *world) leaks(to string) bool {
	w.t.Helper()
	path := w.t.TempDir() + "/wire"
	r, err := lab.Capture(w.host.Namespace, "wan0", path)
	if err != nil {
		w.t.Fatal(err)
	}
	if c, err := w.host.Namespace.Dial(w.t.Context(), "udp", to); err == nil {
		for range 5 {
			_, _ = c.Write(w.mark)
			time.Sleep(5 * time.Millisecond)
		}
		_ = c.Close()
	}
	time.Sleep(100 * time.Millisecond) // the ring hands over after 20 ms
	if err := r.Stop(); err != nil {
		w.t.Fatal(err)
	}
	f, err := lab.Search(path, [][]byte{w.mark})
	if err != nil {
		w.t.Fatal(err)
	}
	return f.Any()
}

// neighbour spares the search for the router's hardware address.
func (w *world) device() *tun.Config {
	return &tun.Config{Name: "ql0", MTU: 1400, Routes: config.Networks[:1],
		Addresses: []netip.Prefix{netip.MustParsePrefix("10.9.0.1/30")}}
}

// TestNothingLeaves: a network behind the line is reached through its device
// or not at all, before, beside and after the device, and whatever other
// routes there are. Without the guard everything leaks: the test can fail.
func TestNothingLeaves(t *testing.T) {
	w := newWorld(t)
	const inside = "10.2.3.4:9000"
	if !w.leaks(inside) {
		t.Fatal("without a guard nothing leaks: the test shows nothing")
	}
	w.do(func() error { return Install(config) })
	w.do(func() error { return Check(config) })
	step := func(name string) {
		t.Helper()
		if w.leaks(inside) {
			t.Errorf("%s: plaintext on the wire", name)
		}
	}
	step("before the device")
	var dev interface{ Close() error }
	w.do(func() (err error) { dev, err = tun.Open(*w.device()); return err })
	step("beside the device")
	w.do(func() error { // somebody's better route
		link, err := netlink.LinkByName("wan0")
		if err != nil {
			return err
		}
		p := route(netip.MustParsePrefix("10.2.3.0/24"))
		return netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: p.Dst,
			Gw: netip.MustParseAddr("192.0.2.2").AsSlice()})
	})
	step("beside a better route")
	if err := dev.Close(); err != nil {
		t.Fatal(err)
	}
	step("after the device, beside a better route")
	w.do(func() error { return Install(config) }) // again: the same
	step("after a second install")
	w.do(func() error { return Remove(config) })
	if !w.leaks(inside) {
		t.Error("the guard stays after its removal")
	}
	w.do(func() error { return Remove(config) }) // again: no error
}

// TestRoutesAlone: where nftables is not to be had the routes still keep what
// follows the default route, and the caller is told.
func TestRoutesAlone(t *testing.T) {
	w := newWorld(t)
	t.Setenv("PATH", t.TempDir())
	w.do(func() error {
		if err := Install(config); !errors.Is(err, ErrRules) {
			t.Errorf("without nft: %v", err)
		}
		if err := Check(config); !errors.Is(err, ErrRules) {
			t.Errorf("without nft: %v", err)
		}
		return nil
	})
	if w.leaks("10.2.3.4:9000") {
		t.Error("plaintext on the wire")
	}
	if !w.leaks("10.3.3.4:9000") {
		t.Error("another network is not reached")
	}
}

// TestForgedOrigin: what claims to come from behind the line and comes from
// elsewhere is dropped; the line's own datagrams come in and go out, though the
// other end lies in a guarded network.
func TestForgedOrigin(t *testing.T) {
	w := newWorld(t)
	c := config
	c.Networks = append(slices.Clone(c.Networks), netip.MustParsePrefix("192.0.0.0/16"))
	w.do(func() error { return Install(c) })
	in, err := w.host.Namespace.ListenPacket("udp", "192.0.2.1:4500")
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	from := func(local string) bool {
		out, err := w.router.Namespace.ListenPacket("udp", local)
		if err != nil {
			t.Fatal(err)
		}
		defer out.Close()
		if _, err := out.WriteTo(w.mark, in.LocalAddr()); err != nil {
			t.Fatal(err)
		}
		_ = in.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
		_, _, err = in.ReadFrom(make([]byte, 100))
		return err == nil
	}
	if !from("192.0.2.2:4500") {
		t.Error("the line's own datagrams do not come in")
	}
	if from("192.0.2.2:4501") {
		t.Error("another datagram of the guarded host comes in")
	}
	if !w.leaks("192.0.2.2:4500") || w.leaks("192.0.2.2:4501") {
		t.Error("of the guarded host not exactly the line's port is reached")
	}
}

func TestRulesAreOneTransaction(t *testing.T) {
	r := config.rules()
	if !strings.HasPrefix(r, "table inet quietline_tokyo_2d_kochi_2e_1 {}\ndelete table") ||
		strings.Count(r, "drop") != 3*len(config.Networks) {
		t.Errorf("%s", r)
	}
}
