package twosites

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/quietline/quietline/cmd/internal/control"
	"github.com/quietline/quietline/cmd/internal/pki"
)

// long says that a test runs for a minute.
func long(t *testing.T) {
	t.Helper()
	if os.Getenv("CI") == "" && os.Getenv("QUIETLINE_LONG") == "" {
		t.Skip("takes a minute; set QUIETLINE_LONG=1 to run it (CI does)")
	}
}

// shorten gives a site's line and door certificates that live for seconds.
func (s *site) shorten(life time.Duration) {
	s.t.Helper()
	a, err := pki.Open(filepath.Join(s.dir, s.name, "pki"))
	if err != nil {
		s.t.Fatal(err)
	}
	for name, req := range map[string]pki.Request{
		"line": {CommonName: "line-" + s.name, SAE: "line-" + s.name, Client: true},
		"kme-door": {CommonName: "kme-door", Server: true, DNS: []string{"localhost"},
			IPs: []netip.Addr{netip.MustParseAddr("127.0.0.1")}},
	} {
		req.Life = life
		if err := os.Remove(a.PairFile(name)); err != nil {
			s.t.Fatal(err)
		}
		if _, err := a.Make(pki.SAERoot, name, req); err != nil {
			s.t.Fatal(err)
		}
	}
}

func (s *site) path(name string) string { return filepath.Join(s.dir, s.name, name) }

// lineStatus asks the line's daemon.
func (s *site) lineStatus() (*control.Line, error) {
	st, err := control.Dial(s.path("state/line-tokyo-kochi.sock")).Status(s.t.Context())
	return st.Line, err
}

// echo answers bytes at a through the tunnel.
func echo(ctx context.Context, ln net.Listener) {
	defer context.AfterFunc(ctx, func() { _ = ln.Close() })()
	for {
		conn, err := ln.Accept()
		if err != nil {
			return
		}
		go func() { defer conn.Close(); _, _ = io.Copy(conn, conn) }()
	}
}

// TestRenewalUnderTraffic runs two sites whose certificates live for half a
// minute, rekeys all the time, and sends bytes through the line and back:
// every request to the key manager is answered, and no byte is lost.
func TestRenewalUnderTraffic(t *testing.T) {
	long(t)
	a, b := machines(t)
	atA, atB := enrol(t, a, b)
	a.shorten(30 * time.Second)
	before, err := pki.LoadPair(a.path("pki/line.pem"))
	if err != nil {
		t.Fatal(err)
	}
	a.daemons(atA)
	b.daemons(atB)
	inner := addresses(t, a, b)
	if got := talk(t, a, b, inner); got == "" {
		t.Fatal("nothing comes through")
	}
	ctx, stop := context.WithTimeout(t.Context(), 70*time.Second)
	defer stop()
	ln, err := a.ns.Listen("tcp", netip.AddrPortFrom(inner[0], 9).String())
	if err != nil {
		t.Fatal(err)
	}
	go echo(ctx, ln)
	conn, err := b.ns.Dial(ctx, "tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	first, err := a.lineStatus()
	if err != nil {
		t.Fatal(err)
	}
	sent, slowest := 0, time.Duration(0)
	socket := control.Dial(a.path("state/line-tokyo-kochi.sock"))
	rekeyed := time.Now()
	for ctx.Err() == nil {
		if time.Since(rekeyed) > 2*time.Second {
			rekeyed = time.Now()
			if err := socket.Rekey(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		text, at := fmt.Appendf(nil, "%08d", sent), time.Now()
		_ = conn.SetDeadline(at.Add(10 * time.Second))
		if _, err := conn.Write(text); err != nil {
			t.Fatalf("after %d: %v", sent, err)
		}
		if _, err := io.ReadFull(conn, text); err != nil {
			t.Fatalf("after %d: %v", sent, err)
		}
		slowest = max(slowest, time.Since(at))
		sent++
		select {
		case <-ctx.Done():
		case <-time.After(5 * time.Millisecond):
		}
	}
	last, err := a.lineStatus()
	if err != nil {
		t.Fatal(err)
	}
	after, err := pki.LoadPair(a.path("pki/line.pem"))
	if err != nil {
		t.Fatal(err)
	}
	renewed := strings.Count(a.logs(), `"msg":"certificate renewed"`)
	t.Logf("%d round trips, the slowest %v; %d renewals; %d rekeys, %d failed, key failures %v, drops %v",
		sent, slowest, renewed, last.Rekeys-first.Rekeys, last.RekeyFailures-first.RekeyFailures,
		last.KeyFailures, last.Drops)
	if after.Chain[0].Equal(before.Chain[0]) || renewed < 4 {
		t.Errorf("%d renewals of two certificates in 70 s, want 4 at least", renewed)
	}
	for reason, n := range last.KeyFailures {
		if n != first.KeyFailures[reason] && reason != "empty" { // a simulated link is slow
			t.Errorf("%d requests to the key manager failed: %s", n-first.KeyFailures[reason], reason)
		}
	}
	if last.Rekeys-first.Rekeys < 5 { // the simulated link makes the pace
		t.Errorf("%d rekeys", last.Rekeys-first.Rekeys)
	}
}

// talking are two sites that were enrolled with printed commands, with their
// daemons running and a line that carries packets between the inner addresses.
func talking(t *testing.T) (a, b *site, inner []netip.Addr) {
	t.Helper()
	a, b = machines(t)
	atA, atB := enrol(t, a, b)
	a.daemons(atA)
	b.daemons(atB)
	inner = addresses(t, a, b)
	if talk(t, a, b, inner) == "" {
		t.Fatal("nothing comes through")
	}
	return a, b, inner
}

// TestPeerCertificateRenewed renews what the key manager shows to its peer: it
// begins anew by itself, the session stands again, and the line carries on.
func TestPeerCertificateRenewed(t *testing.T) {
	long(t)
	a, b, inner := talking(t)
	ctx, cancel := context.WithTimeout(t.Context(), mostTime)
	defer cancel()
	kme := control.Dial(a.path("state/kme.sock"))
	first, err := kme.Status(ctx)
	if err != nil {
		t.Fatal(err)
	}
	begun := time.Now()
	a.finish("quietline pki renew --dir tokyo/pki kme-peer", "")
	retry(t, ctx, func() error {
		st, err := kme.Status(ctx)
		switch {
		case err != nil:
			return err
		case st.Started.Equal(first.Started):
			return errors.New("it has not begun anew")
		case len(st.KME.Peers) != 1 || !st.KME.Peers[0].Up || !st.KME.Serving:
			return fmt.Errorf("no session: %s", st.KME.Reason)
		}
		return nil
	})
	t.Logf("%v after the renewal the session stands again", time.Since(begun).Round(time.Millisecond))
	if got := talk(t, a, b, inner); got == "" {
		t.Error("nothing comes through")
	}
	line := control.Dial(a.path("state/line-tokyo-kochi.sock"))
	before, err := a.lineStatus()
	if err != nil {
		t.Fatal(err)
	}
	if err := line.Rekey(ctx); err != nil {
		t.Fatal(err)
	}
	retry(t, ctx, func() error {
		now, err := a.lineStatus()
		if err == nil && now.Epoch == before.Epoch {
			err = fmt.Errorf("no new epoch: %s %s", now.Handshake, now.Failure)
		}
		return err
	})
}

// logs is what all processes of a site printed.
func (s *site) logs() string {
	var out strings.Builder
	for _, p := range s.running {
		out.WriteString(p.said())
	}
	return out.String()
}

// TestRevokeSite cuts kochi off at tokyo and holds the clock: line and session
// end within seconds, and the stock is void.
func TestRevokeSite(t *testing.T) {
	long(t)
	a, b, inner := talking(t)
	ctx, cancel := context.WithTimeout(t.Context(), mostTime)
	defer cancel()
	kme := control.Dial(a.path("state/kme.sock"))
	retry(t, ctx, func() error { // some stock to destroy
		st, err := kme.Status(ctx)
		if err == nil && (len(st.KME.Links) == 0 || st.KME.Links[0].Stored == 0) {
			err = errors.New("no stock yet")
		}
		return err
	})
	begun := time.Now()
	a.finish("quietline pki revoke --config tokyo/site.yaml --site kochi", "")
	retry(t, ctx, func() error {
		if _, err := a.lineStatus(); err == nil {
			return errors.New("the line runs still")
		}
		if _, err := control.Dial(a.path("state/sim-tokyo-kochi.sock")).Status(ctx); err == nil {
			return errors.New("the simulator runs still")
		}
		st, err := kme.Status(ctx)
		if err == nil && (len(st.KME.Peers) > 0 || len(st.KME.Links) > 0) {
			text, _ := json.Marshal(st.KME)
			err = fmt.Errorf("the key manager knows kochi still: %s", text)
		}
		return err
	})
	if took := time.Since(begun); took > 15*time.Second {
		t.Errorf("it took %v", took)
	} else {
		t.Logf("line and key manager cut off in %v", took.Round(time.Millisecond))
	}
	if !strings.Contains(a.logs(), "stock of a link that is no longer configured is void") {
		t.Error("the stock was not made void")
	}
	if _, err := os.Stat(a.path("lines/kochi")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the line's secrets are left: %v", err)
	}
	short, stop := context.WithTimeout(t.Context(), 2*time.Second)
	defer stop()
	if _, err := b.ns.Dial(short, "tcp", netip.AddrPortFrom(inner[0], 7).String()); err == nil {
		t.Error("kochi still reaches tokyo through the line")
	}
}
