package daemon

import (
	"context"
	"net/netip"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/quietline/quietline/cmd/internal/config"
	"github.com/quietline/quietline/cmd/internal/control"
	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/etsi014/etsitest"
	"github.com/quietline/quietline/tunnel/lab"
)

// cable is two line daemons in network namespaces with a cable between, as the
// line verb runs them.
type cable struct {
	ends  [2]lab.End
	lines [2]config.Line
	doors [2]*control.Client
}

// newCable makes them; change may bend a line before it runs.
func newCable(t *testing.T, change func(i int, l *config.Line)) *cable {
	t.Helper()
	lab.Need(t)
	c := &cable{lines: enrol(t)}
	outer := [2]string{"192.0.2.1", "192.0.2.2"}
	for i := range c.lines {
		ns, err := lab.NewNamespace([]string{"tokyo", "kochi"}[i])
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = ns.Close() })
		c.ends[i] = lab.End{Namespace: ns, Name: "wan0",
			Addresses: []netip.Prefix{netip.MustParsePrefix(outer[i] + "/24")}}
	}
	if err := lab.Veth(c.ends[0], c.ends[1]); err != nil {
		t.Fatal(err)
	}
	for i := range c.lines {
		l := &c.lines[i]
		l.Endpoints = []config.Endpoint{{Local: netip.MustParseAddrPort(outer[i] + ":4500"),
			Remote: netip.MustParseAddrPort(outer[1-i] + ":4500")}}
		l.TUN = config.TUN{Name: "ql0",
			Addresses: []netip.Prefix{netip.MustParsePrefix([]string{"10.9.0.1/30", "10.9.0.2/30"}[i])}}
		if change != nil {
			change(i, l)
		}
		c.doors[i] = control.Dial(l.Control)
	}
	return c
}

// run starts the daemon of an end and returns what stops it.
func (c *cable) run(t *testing.T, i int) func() {
	t.Helper()
	l := &c.lines[i]
	env := Env{Site: &config.Site{Site: "x", State: filepath.Dir(l.Control)}, Log: testLog(t)}
	return start(t, func(ctx context.Context) error {
		return c.ends[i].Namespace.Do(func() error { return Line(ctx, env, l) })
	})
}

// line is the status of an end; nil while it does not answer.
func (c *cable) line(t *testing.T, i int) *control.Line {
	s, err := c.doors[i].Status(t.Context())
	if err != nil {
		return nil
	}
	return s.Line
}

// level waits until both ends rest on a level.
func (c *cable) level(t *testing.T, want string) {
	t.Helper()
	await(t, "both ends are at "+want, func() bool {
		a, b := c.line(t, 0), c.line(t, 1)
		return a != nil && b != nil && a.Level == want && b.Level == want
	})
}

// TestLineDaemonsWithoutKME: the key manager behind real doors goes away under
// real daemons and comes back. The default policy goes on, chained, then after
// a restart of an end without a chain, and is at QKD again in the end.
func TestLineDaemonsWithoutKME(t *testing.T) {
	lab.Need(t)
	var away atomic.Bool
	kme := &etsitest.KME{Stock: 10_000, Fail: func() error {
		if away.Load() {
			return etsi014.ErrDown
		}
		return nil
	}}
	keys := doorFor(t, kme, "line-tokyo", "line-kochi") // as the bundles of enrol name them
	a, b := keys("line-tokyo", "line-kochi"), keys("line-kochi", "line-tokyo")
	c := newCable(t, func(i int, l *config.Line) {
		l.Policy, l.Keys = "qkd-preferred", []*config.Keys{a, b}[i]
		l.EpochLife, l.HoldMax = time.Second, 20*time.Second
	})
	defer c.run(t, 0)()
	stop := c.run(t, 1)
	c.level(t, "QKD")
	away.Store(true)
	c.level(t, "CHAINED")
	await(t, "each end tells the other why", func() bool {
		l := c.line(t, 0)
		return l != nil && l.PeerLevel == "CHAINED" && l.PeerReason != "" && len(l.Standing) > 0 &&
			l.Alarms > 0 && l.Chained > 0 && l.BlockAt != nil
	})
	stop()
	defer c.run(t, 1)()
	c.level(t, "PQC")
	away.Store(false)
	c.level(t, "QKD")
	await(t, "no alarm stands", func() bool {
		l := c.line(t, 0)
		return l != nil && len(l.Standing) == 0
	})
}

// TestLineDaemonsWithPad: real daemons draw pad through real doors as an SAE of
// its own, and carry a datagram under it; without the key manager the line goes
// on until its pad is used up, and then refuses.
func TestLineDaemonsWithPad(t *testing.T) {
	lab.Need(t)
	var away atomic.Bool
	kme := &etsitest.KME{Stock: 100_000, Fail: func() error {
		if away.Load() {
			return etsi014.ErrDown
		}
		return nil
	}}
	keys := doorFor(t, kme, "line-tokyo", "line-kochi", "pad-tokyo", "pad-kochi")
	names := [2]string{"tokyo", "kochi"}
	c := newCable(t, func(i int, l *config.Line) {
		own, peer := names[i], names[1-i]
		k, p := keys("line-"+own, "line-"+peer), keys("pad-"+own, "pad-"+peer)
		k.Pad = &config.PadKeys{Certificate: p.Certificate, Key: p.Key, SAE: p.SAE, PeerSAE: p.PeerSAE}
		l.Policy, l.Keys, l.PadHold = "otp-strict", k, 64<<10
		l.EpochLife, l.HoldMax = time.Second, time.Hour
	})
	defer c.run(t, 0)()
	defer c.run(t, 1)()
	c.level(t, "OTP")
	s := c.line(t, 0)
	if s.Pad == nil || s.Pad.InformationTheoretic || len(s.Pad.NotBecause) == 0 || s.Device.MTU != 1390 ||
		s.Pad.Drawn == 0 || s.Pad.Collected == 0 {
		t.Errorf("%+v %+v", s, s.Pad)
	}
	to, err := c.ends[1].Namespace.ListenPacket("udp", "10.9.0.2:9000")
	if err != nil {
		t.Fatal(err)
	}
	defer to.Close()
	from, err := c.ends[0].Namespace.Dial(t.Context(), "udp", "10.9.0.2:9000")
	if err != nil {
		t.Fatal(err)
	}
	defer from.Close()
	await(t, "a datagram comes through", func() bool {
		_, _ = from.Write([]byte("under one-time pad"))
		buf := make([]byte, 100)
		_ = to.SetReadDeadline(time.Now().Add(time.Second))
		n, _, err := to.ReadFrom(buf)
		return err == nil && string(buf[:n]) == "under one-time pad"
	})
	away.Store(true)
	refused := false
	await(t, "pad is used up", func() bool {
		for range 20 {
			_, err := from.Write(make([]byte, 1000))
			refused = refused || err != nil // ICMP from the line
		}
		s := c.line(t, 0)
		return s != nil && s.Level == "BLOCKED" && s.Drops["no_pad"] > 0 && refused
	})
	if s := c.line(t, 0); s.Pad.Classes[0].Plain+s.Pad.Classes[0].Demoted != 0 {
		t.Errorf("packets went without pad: %+v", s.Pad.Classes)
	}
	away.Store(false)
	c.level(t, "OTP")
}
