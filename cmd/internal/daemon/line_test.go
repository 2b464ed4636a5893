package daemon

import (
	"context"
	"errors"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/quietline/quietline/cmd/internal/config"
	"github.com/quietline/quietline/cmd/internal/control"
	"github.com/quietline/quietline/etsi014/etsitest"
	"github.com/quietline/quietline/secret"
	"github.com/quietline/quietline/tunnel/bundle"
	"github.com/quietline/quietline/tunnel/lab"
	"github.com/quietline/quietline/tunnel/rekey"
	"github.com/quietline/quietline/tunnel/tunneltest"
)

// TestLineStatusAndRekey shows a real line, over a network in memory, through
// its control socket, and rekeys it there.
func TestLineStatusAndRekey(t *testing.T) {
	pair := tunneltest.New(t, tunneltest.Options{Policy: rekey.QKDStrict, Keys: 20})
	pair.Up(20 * time.Second)
	e := lineEnd{line: pair.Tokyo.Line}
	cfg := &config.Line{ID: "a", Policy: "qkd-strict"}
	env := Env{Site: &config.Site{Site: "tokyo"}, Version: "v1"}
	socket := filepath.Join(t.TempDir(), "line.sock")
	parts, _, err := env.doors("a", socket, "", control.Door{
		Status: func() control.Status { return e.status(cfg) },
		Rekey:  func() error { e.line.Rekey(); return nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- together(ctx, parts...) }()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("run: %v", err)
		}
	}()
	c := control.Dial(socket)
	before, err := c.Status(ctx)
	if err != nil {
		t.Fatal(err)
	}
	l := before.Line
	if before.Daemon != "line" || before.ID != "a" || before.Site != "tokyo" ||
		before.Version != "v1" || before.PID == 0 || before.Started.IsZero() {
		t.Errorf("status begins with %+v", before)
	}
	if l.Level != "QKD" || l.Epoch == 0 || l.Age == nil || l.LastKey == nil || l.Keys != 1 ||
		l.Policy != "qkd-strict" || l.PeerPolicy != "qkd-strict" || l.Device.Backend != "memory" {
		t.Errorf("line %+v", l)
	}
	if l.Stock != nil {
		t.Errorf("stock %d, though nobody asked", *l.Stock)
	}
	if err := c.Rekey(ctx); err != nil {
		t.Fatal(err)
	}
	if !pair.Wait(20*time.Second, func() bool {
		s, err := c.Status(ctx)
		return err == nil && s.Line.Epoch > l.Epoch && s.Line.Rekeys > l.Rekeys
	}) {
		t.Error("no new epoch")
	}
}

// TestWatchStock follows a key manager that runs dry and goes away.
func TestWatchStock(t *testing.T) {
	kme := &etsitest.KME{Stock: 5}
	ka, _ := door(t, kme)
	s := source(t, ka)
	e := lineEnd{keys: &s}
	look := func() {
		t.Helper()
		ctx, cancel := context.WithCancel(t.Context())
		cancel() // one look, then the end
		if err := e.watchStock(ctx); err != nil {
			t.Fatal(err)
		}
	}
	e.look(t.Context())
	if got := e.stock.Load(); got == nil || got.Keys != 5 {
		t.Fatalf("stock %+v, want 5 keys", got)
	}
	look() // its call is cut short: not known
	if got := e.stock.Load(); got != nil {
		t.Errorf("stock %+v of a key manager that did not answer", got)
	}
}

// enrol makes what two ends of a line know of each other, as files, and the
// lines of the two site files.
func enrol(t *testing.T) (lines [2]config.Line) {
	t.Helper()
	dir, id := t.TempDir(), bundle.NewLinkID()
	var link secret.Bytes
	var publics [2][]byte
	names := [2]string{"tokyo", "kochi"}
	for i, name := range names {
		s, public, err := bundle.Generate(rekey.XWing, link)
		if err != nil {
			t.Fatal(err)
		}
		link, publics[i] = s.Link, public
		home := filepath.Join(dir, name)
		if err := errors.Join(os.Mkdir(home, 0o700), bundle.WriteSecrets(home, s)); err != nil {
			t.Fatal(err)
		}
		lines[i] = config.Line{ID: "line", Policy: "pqc-only",
			StaticKey:  filepath.Join(home, bundle.SeedFile),
			LinkSecret: filepath.Join(home, bundle.LinkFile),
			PeerBundle: filepath.Join(home, "peer.bundle"),
			EpochLife:  time.Minute, HoldMax: time.Hour,
			Control: filepath.Join(home, "line.sock")}
	}
	seed := bundle.NewSignerSeed()
	signer, err := bundle.NewSigner(seed)
	if err != nil {
		t.Fatal(err)
	}
	for i := range names {
		other := bundle.Bundle{Version: bundle.Version, LinkID: id, Site: names[1-i], Suite: rekey.XWing,
			Static: publics[1-i], EpochSAE: "line-" + names[1-i],
			PadSAE: "pad-" + names[1-i]}
		if err := other.Sign(signer); err != nil {
			t.Fatal(err)
		}
		text, err := other.Marshal()
		if err == nil {
			err = secret.WriteFile(lines[i].PeerBundle, text)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return lines
}

func TestOpenMachineRefuses(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(*config.Line)
		want   error
	}{
		{"as enrolled", func(*config.Line) {}, nil},
		{"right SAE", func(l *config.Line) { l.Keys = &config.Keys{PeerSAE: "line-kochi"} }, nil},
		{"other signer", func(l *config.Line) { l.PeerFingerprint = "0000 0000 0000 0000 0000 0000 0000 0000" }, ErrBundle},
		{"other SAE", func(l *config.Line) { l.Keys = &config.Keys{PeerSAE: "x"} }, ErrBundle},
		{"no bundle", func(l *config.Line) { l.PeerBundle += "x" }, fs.ErrNotExist},
		{"no key", func(l *config.Line) { l.StaticKey += "x" }, fs.ErrNotExist},
		{"no secret", func(l *config.Line) { l.LinkSecret += "x" }, fs.ErrNotExist},
		{"not a bundle", func(l *config.Line) { l.PeerBundle = l.StaticKey }, bundle.ErrFormat},
		{"policy", func(l *config.Line) { l.Policy = "fast" }, rekey.ErrPolicy},
	} {
		t.Run(tt.name, func(t *testing.T) {
			l := enrol(t)[0]
			tt.change(&l)
			m, err := openMachine(&l)
			if !errors.Is(err, tt.want) {
				t.Fatalf("err = %v, want %v", err, tt.want)
			}
			if tt.want == ErrBundle { // whose, by whom, against what, and what to do
				for _, w := range []string{l.PeerBundle, "of site kochi", "signed by", "enrol the line again"} {
					if !strings.Contains(err.Error(), w) {
						t.Errorf("%v\nlacks %q", err, w)
					}
				}
			}
			if err == nil {
				m.Clear()
			}
		})
	}
}

// TestLineDaemons runs the daemon at both ends of a cable, as the line verb
// does, and carries a datagram through.
func TestLineDaemons(t *testing.T) {
	lab.Need(t)
	lines := enrol(t)
	outer := [2]string{"192.0.2.1", "192.0.2.2"}
	inner := [2]string{"10.9.0.1", "10.9.0.2"}
	var ends [2]lab.End
	for i := range lines {
		ns, err := lab.NewNamespace([]string{"tokyo", "kochi"}[i])
		if err != nil {
			t.Fatal(err)
		}
		defer ns.Close()
		ends[i] = lab.End{Namespace: ns, Name: "wan0",
			Addresses: []netip.Prefix{netip.MustParsePrefix(outer[i] + "/24")}}
	}
	if err := lab.Veth(ends[0], ends[1]); err != nil {
		t.Fatal(err)
	}
	for i := range lines {
		l := &lines[i]
		l.Endpoints = []config.Endpoint{{Local: netip.MustParseAddrPort(outer[i] + ":4500"),
			Remote: netip.MustParseAddrPort(outer[1-i] + ":4500")}}
		l.TUN = config.TUN{Name: "ql0",
			Addresses: []netip.Prefix{netip.MustParsePrefix(inner[i] + "/30")}}
		env := Env{Site: &config.Site{Site: "x", State: filepath.Dir(l.Control)}, Log: testLog(t)}
		defer start(t, func(ctx context.Context) error {
			return ends[i].Namespace.Do(func() error { return Line(ctx, env, l) })
		})()
	}
	a, b := control.Dial(lines[0].Control), control.Dial(lines[1].Control)
	await(t, "both ends carry traffic", func() bool {
		s, err := a.Status(t.Context())
		u, uerr := b.Status(t.Context())
		return err == nil && uerr == nil && s.Line.Level == "PQC" && u.Line.Level == "PQC"
	})
	to, err := ends[1].Namespace.ListenPacket("udp", inner[1]+":9000")
	if err != nil {
		t.Fatal(err)
	}
	defer to.Close()
	from, err := ends[0].Namespace.Dial(t.Context(), "udp", inner[1]+":9000")
	if err != nil {
		t.Fatal(err)
	}
	defer from.Close()
	await(t, "a datagram comes through", func() bool {
		if _, err := from.Write([]byte("through the line")); err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, 100)
		_ = to.SetReadDeadline(time.Now().Add(time.Second))
		n, _, err := to.ReadFrom(buf)
		return err == nil && string(buf[:n]) == "through the line"
	})
	await(t, "tokyo counts it", func() bool {
		s, err := a.Status(t.Context())
		return err == nil && s.Line.Sent.Packets > 0
	})
	s, err := a.Status(t.Context())
	if err != nil || s.Line.Device.Name != "ql0" || s.Line.Device.MTU != 1424 || s.Simulated {
		t.Errorf("status %+v, %v", s.Line, err)
	}
}
