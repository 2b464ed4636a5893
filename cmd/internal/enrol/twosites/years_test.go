package twosites

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/quietline/quietline/cmd/internal/control"
	"github.com/quietline/quietline/cmd/internal/pki"
	"github.com/quietline/quietline/etsi014/identity"
)

// long says that a test runs for a minute.
func long(t *testing.T) {
	t.Helper()
	if os.Getenv("CI") == "" && os.Getenv("QUIETLINE_LONG") == "" {
		t.Skip("takes a minute; set QUIETLINE_LONG=1 to run it (CI does)")
	}
}

// shorten gives a site certificates of every kind that live for seconds.
func (s *site) shorten(life time.Duration) {
	s.t.Helper()
	a, err := pki.Open(filepath.Join(s.dir, s.name, "pki"))
	if err != nil {
		s.t.Fatal(err)
	}
	kme := "kme-" + s.name
	for name, c := range map[string]struct {
		root pki.Root
		req  pki.Request
	}{
		"line":     {pki.SAERoot, pki.Request{CommonName: "line-" + s.name, SAE: "line-" + s.name, Client: true}},
		"kme-peer": {pki.PeerRoot, pki.Request{CommonName: kme, KME: kme, Server: true, Client: true}},
		"kme-door": {pki.SAERoot, pki.Request{CommonName: "kme-door", Server: true, DNS: []string{"localhost"},
			IPs: []netip.Addr{netip.MustParseAddr("127.0.0.1")}}},
	} {
		c.req.Life = life
		if err := os.Remove(a.PairFile(name)); err != nil {
			s.t.Fatal(err)
		}
		if _, err := a.Make(c.root, name, c.req); err != nil {
			s.t.Fatal(err)
		}
	}
}

func (s *site) path(name string) string { return filepath.Join(s.dir, s.name, name) }

// lineStatus asks the line's daemon.
func (s *site) lineStatus() (*control.Line, error) {
	st, err := control.Dial(s.path("state/line-kochi-tokyo.sock")).Status(s.t.Context())
	return st.Line, err
}

// stream sends numbered datagrams through the line, which hides no loss as TCP
// would, and counts those that come.
type stream struct{ sent, came atomic.Uint64 }

func (s *stream) run(ctx context.Context, t *testing.T, from, to *site, at netip.AddrPort) (stop func()) {
	t.Helper()
	in, err := to.ns.ListenPacket("udp", at.String())
	if err != nil {
		t.Fatal(err)
	}
	out, err := from.ns.Dial(ctx, "udp", at.String())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(ctx)
	var sending, reading sync.WaitGroup
	reading.Go(func() {
		seen := map[uint64]bool{}
		for b := make([]byte, 64); ; {
			n, _, err := in.ReadFrom(b)
			if err != nil {
				return
			}
			if number, _ := binary.Uvarint(b[:n]); !seen[number] {
				seen[number] = true
				s.came.Add(1)
			}
		}
	})
	sending.Go(func() {
		tick := time.NewTicker(5 * time.Millisecond)
		defer tick.Stop()
		for ctx.Err() == nil {
			if _, err := out.Write(binary.AppendUvarint(nil, s.sent.Load())); err != nil {
				t.Errorf("datagram %d: %v", s.sent.Load(), err)
				return
			}
			s.sent.Add(1)
			select {
			case <-ctx.Done():
			case <-tick.C:
			}
		}
	})
	return func() {
		cancel()
		sending.Wait()
		for limit := time.Now().Add(5 * time.Second); s.came.Load() < s.sent.Load() && time.Now().Before(limit); {
			time.Sleep(10 * time.Millisecond) // the last ones are under way
		}
		_ = in.Close()
		_ = out.Close()
		reading.Wait()
	}
}

// callers ask a site's door without a pause, over connections that are kept and
// over new ones, and count the answers.
type callers struct{ asked, answered, shaken atomic.Uint64 }

func (c *callers) run(ctx context.Context, t *testing.T, s *site, peer string) (stop func()) {
	t.Helper()
	pair := s.path("pki/line.pem")
	live, err := identity.Open(identity.Config{Pairs: []identity.Pair{{Cert: pair, Key: pair}},
		CA: s.path("pki/sae-ca.crt")})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	wg.Go(func() { live.Follow(ctx, time.Second, nil) })
	for range 3 {
		wg.Go(func() { c.one(ctx, t, s, peer, live) })
	}
	return func() { cancel(); wg.Wait() }
}

func (c *callers) one(ctx context.Context, t *testing.T, s *site, peer string, live *identity.Live) {
	var client *http.Client
	fresh := func() {
		if client != nil {
			client.CloseIdleConnections()
		}
		client = &http.Client{Transport: &http.Transport{TLSClientConfig: live.Client(),
			DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
				c.shaken.Add(1)
				return s.ns.Dial(ctx, network, addr)
			}}}
	}
	for n := 0; ctx.Err() == nil; n++ {
		if n%100 == 0 { // a second or two: long enough to be kept across a renewal
			fresh()
		}
		c.asked.Add(1)
		resp, err := client.Get("https://127.0.0.1:8443/api/v1/keys/" + peer + "/status")
		if err != nil {
			t.Errorf("request %d: %v", c.asked.Load(), err)
			return
		}
		_, err = io.Copy(io.Discard, resp.Body)
		_ = resp.Body.Close()
		if err != nil || resp.StatusCode != http.StatusOK {
			t.Errorf("request %d: %s, %v", c.asked.Load(), resp.Status, err)
			return
		}
		c.answered.Add(1)
		select {
		case <-ctx.Done():
		case <-time.After(10 * time.Millisecond):
		}
	}
	client.CloseIdleConnections()
}

// shown is the certificate that a site's key manager shows to peers.
func (s *site) shown(ctx context.Context, addr string) (*x509.Certificate, error) {
	conn, err := s.ns.Dial(ctx, "tcp", addr)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	var leaf *x509.Certificate
	_ = tls.Client(conn, &tls.Config{InsecureSkipVerify: true, // it is only looked at
		CurvePreferences: []tls.CurveID{tls.X25519MLKEM768},
		VerifyConnection: func(cs tls.ConnectionState) error {
			leaf = cs.PeerCertificates[0]
			return errors.New("seen enough")
		}}).HandshakeContext(ctx)
	if leaf == nil {
		return nil, errors.New("no certificate was shown")
	}
	return leaf, nil
}

// TestRenewalUnderTraffic runs two sites whose certificates, those of the line,
// the door and the channel between key managers, live for half a minute. Three
// callers ask each door without a pause, datagrams pass both ways through the
// line, which rekeys all the time: no request and no packet is lost, and no
// daemon begins anew.
func TestRenewalUnderTraffic(t *testing.T) {
	long(t)
	a, b := machines(t)
	atA, atB := enrol(t, a, b)
	both := []*site{a, b}
	for _, s := range both {
		s.shorten(30 * time.Second)
	}
	a.daemons(atA)
	b.daemons(atB)
	inner := addresses(t, a, b)
	if got := talk(t, a, b, inner); got == "" {
		t.Fatal("nothing comes through")
	}
	ctx, stop := context.WithTimeout(t.Context(), 50*time.Second)
	defer stop()
	first := map[string]control.Status{}
	for _, s := range both {
		for _, d := range []string{"kme", "line-kochi-tokyo"} {
			first[s.name+d] = s.status(d)
		}
	}
	var there, back stream
	var atTokyo, atKochi callers
	stops := []func(){there.run(t.Context(), t, a, b, netip.AddrPortFrom(inner[1], 9)),
		back.run(t.Context(), t, b, a, netip.AddrPortFrom(inner[0], 9)),
		atTokyo.run(t.Context(), t, a, "line-kochi"), atKochi.run(t.Context(), t, b, "line-tokyo")}
	socket, tick := control.Dial(a.path("state/line-kochi-tokyo.sock")), time.NewTicker(2*time.Second)
	defer tick.Stop()
	for running := true; running; {
		select {
		case <-ctx.Done():
			running = false
		case <-tick.C:
			if err := socket.Rekey(t.Context()); err != nil {
				t.Error(err)
			}
			for _, s := range both {
				if k := s.status("kme").KME; !k.Serving || len(k.Peers) != 1 || !k.Peers[0].Up {
					t.Errorf("%s: the session is gone: %+v", s.name, k)
				}
			}
		}
	}
	for _, stop := range stops {
		stop()
	}
	for name, n := range map[string][2]uint64{
		"packets tokyo to kochi": {there.sent.Load(), there.came.Load()},
		"packets kochi to tokyo": {back.sent.Load(), back.came.Load()},
		"requests at tokyo":      {atTokyo.asked.Load(), atTokyo.answered.Load()},
		"requests at kochi":      {atKochi.asked.Load(), atKochi.answered.Load()},
	} {
		t.Logf("%s: %d, lost %d", name, n[0], n[0]-n[1])
		if n[0] != n[1] || n[0] < 500 {
			t.Errorf("%s: %d sent, %d came", name, n[0], n[1])
		}
	}
	t.Logf("%d and %d connections to the doors", atTokyo.shaken.Load(), atKochi.shaken.Load())
	for _, s := range both {
		s.renewedAll(first)
	}
}

// renewedAll holds a site's state after the renewals against that before.
func (s *site) renewedAll(first map[string]control.Status) {
	t := s.t
	t.Helper()
	renewed := strings.Count(s.logs(), `"msg":"certificate renewed"`)
	t.Logf("%s: %d renewals", s.name, renewed)
	if renewed < 6 {
		t.Errorf("%s: %d renewals of three certificates in 50 s, want two of each", s.name, renewed)
	}
	for _, d := range []string{"kme", "line-kochi-tokyo"} {
		now, then := s.status(d), first[s.name+d]
		if !now.Started.Equal(then.Started) || now.PID != then.PID {
			t.Errorf("%s: %s began anew", s.name, d)
		}
		if l := now.Line; l != nil {
			for reason, n := range l.KeyFailures {
				if n != then.Line.KeyFailures[reason] && reason != "empty" { // a simulated link is slow
					t.Errorf("%s: %d requests to the key manager failed: %s", s.name,
						n-then.Line.KeyFailures[reason], reason)
				}
			}
			t.Logf("%s: %d rekeys", s.name, l.Rekeys-then.Line.Rekeys)
			if l.Rekeys-then.Line.Rekeys < 5 { // the simulated link makes the pace
				t.Errorf("%s: %d rekeys", s.name, l.Rekeys-then.Line.Rekeys)
			}
		}
	}
	pair, err := pki.LoadPair(s.path("pki/kme-peer.pem"))
	if err != nil {
		t.Fatal(err)
	}
	address := map[string]string{"tokyo": "192.0.2.1:8444", "kochi": "192.0.2.2:8444"}[s.name]
	ctx, cancel := context.WithTimeout(t.Context(), mostTime)
	defer cancel()
	retry(t, ctx, func() error { // it may have been renewed a second ago
		leaf, err := s.shown(ctx, address)
		if err == nil && !leaf.Equal(pair.Chain[0]) {
			err = fmt.Errorf("%s shows %s, the file has %s", s.name, pki.Describe(leaf), pki.Describe(pair.Chain[0]))
			if p, perr := pki.LoadPair(s.path("pki/kme-peer.pem")); perr == nil {
				pair = p
			}
		}
		return err
	})
}

// status asks a daemon of the site.
func (s *site) status(daemon string) control.Status {
	s.t.Helper()
	st, err := control.Dial(s.path("state/" + daemon + ".sock")).Status(s.t.Context())
	if err != nil {
		s.t.Fatalf("%s: %s: %v", s.name, daemon, err)
	}
	return st
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

// TestEnrolledOnceMore enrols a site again while everything runs: line and
// simulator take the new secrets over by themselves, at both ends.
func TestEnrolledOnceMore(t *testing.T) {
	long(t)
	a, b, inner := talking(t)
	before, err := os.ReadFile(a.path("lines/kochi/link.secret"))
	if err != nil {
		t.Fatal(err)
	}
	running := append(append([]*process{}, a.running...), b.running...)
	join(t, a, b, "quietline pki invite --config tokyo/site.yaml --again kochi")
	after, err := os.ReadFile(a.path("lines/kochi/link.secret"))
	if err != nil || bytes.Equal(before, after) {
		t.Errorf("the secret is the old one, %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), mostTime)
	defer cancel()
	for _, s := range []*site{a, b} {
		retry(t, ctx, func() error {
			for _, what := range []string{"line", "link"} {
				if !strings.Contains(s.logs(), what+" begins anew with the changed site file") {
					return fmt.Errorf("%s: the %s goes on with the old secrets", s.name, what)
				}
			}
			return nil
		})
	}
	if got := talk(t, a, b, inner); got == "" {
		t.Error("nothing comes through")
	}
	for _, p := range running {
		select {
		case <-p.ended:
			if strings.Contains(p.cmd.String(), " kme ") || strings.Contains(p.cmd.String(), " line ") ||
				strings.Contains(p.cmd.String(), " sim ") {
				t.Errorf("%v has ended: %s", p.cmd.Args, p.said())
			}
		default:
		}
	}
}

// logs is what all processes of a site printed.
func (s *site) logs() string {
	var out strings.Builder
	for _, p := range s.running {
		out.WriteString(p.said())
	}
	return out.String()
}

// cutWithin is what "within seconds" promises: two looks of two seconds each at
// the site file, and the graceful end of a key manager's calls.
const cutWithin = 10 * time.Second

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
		if _, err := control.Dial(a.path("state/sim-kochi-tokyo.sock")).Status(ctx); err == nil {
			return errors.New("the simulator runs still")
		}
		st, err := kme.Status(ctx)
		if err == nil && (len(st.KME.Peers) > 0 || len(st.KME.Links) > 0) {
			text, _ := json.Marshal(st.KME)
			err = fmt.Errorf("the key manager knows kochi still: %s", text)
		}
		return err
	})
	if took := time.Since(begun); took > cutWithin {
		t.Errorf("it took %v, at most %v is promised", took, cutWithin)
	} else {
		t.Logf("line and key manager cut off in %v", took.Round(time.Millisecond))
	}
	// Kochi knocks still, is refused by name, and hears why.
	retry(t, ctx, func() error {
		st, err := control.Dial(b.path("state/kme.sock")).Status(ctx)
		if err == nil && (len(st.KME.Peers) != 1 || st.KME.Peers[0].Up ||
			!strings.Contains(st.KME.Peers[0].Reason, "certificate")) {
			err = fmt.Errorf("kochi believes in tokyo still: %+v", st.KME.Peers)
		} else if err == nil {
			t.Logf("kochi says: %s", st.KME.Peers[0].Reason)
		}
		return err
	})
	for _, w := range []string{"peer is turned away", "kme-kochi", "is no peer of ours, ours are none", "enrol that site"} {
		if !strings.Contains(a.logs(), w) {
			t.Errorf("tokyo does not say %q of the site that still knocks", w)
		}
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
