package renew

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"io/fs"
	"log"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/quietline/quietline/cmd/internal/pki"
	"github.com/quietline/quietline/secret"
)

const day = 24 * time.Hour

func quiet() *log.Logger { return log.New(io.Discard, "", 0) }

func authority(t testing.TB, dir string) *pki.Authority {
	t.Helper()
	a, err := pki.Init(filepath.Join(dir, "pki"), "tokyo")
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		root pki.Root
		req  pki.Request
	}{
		"door": {pki.SAERoot, pki.Request{CommonName: "door", Server: true, DNS: []string{"kme"}}},
		"line": {pki.SAERoot, pki.Request{CommonName: "line-tokyo", SAE: "line-tokyo", Client: true}},
		"peer": {pki.PeerRoot, pki.Request{CommonName: "kme-tokyo", KME: "kme-tokyo", Server: true, Client: true}},
	} {
		c.req.Life = pki.LeafLife
		if _, err := a.Make(c.root, name, c.req); err != nil {
			t.Fatal(err)
		}
	}
	return a
}

// pipes is a listener without sockets, so that a test may own the clock.
type pipes struct {
	conns chan net.Conn
	ended chan struct{}
	away  atomic.Bool
}

func (p *pipes) Accept() (net.Conn, error) {
	select {
	case c := <-p.conns:
		return c, nil
	case <-p.ended:
		return nil, net.ErrClosed
	}
}
func (p *pipes) Close() error   { close(p.ended); return nil }
func (p *pipes) Addr() net.Addr { return &net.UnixAddr{Name: "pipe"} }

func (p *pipes) dial(context.Context, string, string) (net.Conn, error) {
	if p.away.Load() {
		return nil, errors.New("no route to host")
	}
	here, there := net.Pipe()
	p.conns <- there
	return here, nil
}

// overPipes is a [Client] that dials the pipes.
type overPipes struct {
	p *pipes
	a *pki.Authority
}

func (c overPipes) Renew(ctx context.Context, path string, old *pki.Pair) (*pki.Pair, error) {
	roots := x509.NewCertPool()
	roots.AddCert(c.a.Root(pki.SAERoot).Certificate())
	shown, err := tls.LoadX509KeyPair(path, path)
	if err != nil {
		return nil, err
	}
	transport := &http.Transport{DialContext: c.p.dial, DisableKeepAlives: true,
		TLSClientConfig: &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{shown}, ServerName: "kme"}}
	key, text, err := request(old)
	if err != nil {
		return nil, err
	}
	answer, err := post(ctx, &http.Client{Transport: transport}, "https://kme", text)
	if err != nil {
		return nil, err
	}
	chain, err := pki.ParseCertificates(answer)
	return &pki.Pair{Chain: chain, Key: key}, err
}

// door serves renewals over the pipes with the pair that lies there now.
func door(a *pki.Authority, p *pipes) *http.Server {
	roots := x509.NewCertPool()
	roots.AddCert(a.Root(pki.SAERoot).Certificate())
	s := &http.Server{Handler: &Handler{Authority: a, Allow: func(*tls.ConnectionState) error { return nil }},
		ErrorLog: quiet(), TLSConfig: &tls.Config{ClientCAs: roots, ClientAuth: tls.RequireAndVerifyClientCert,
			GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
				c, err := tls.LoadX509KeyPair(a.PairFile("door"), a.PairFile("door"))
				return &c, err
			}}}
	go func() { _ = s.ServeTLS(p, "", "") }()
	return s
}

// TestTwoYears lets a line renew over mutual TLS for two simulated years while
// the key manager is away for three weeks in every twelve, and what the key
// manager shows at its door and to its peers is renewed beside it. On every day
// the certificates of all three roles are valid, under their own roots.
func TestTwoYears(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		a := authority(t, dir)
		p := &pipes{conns: make(chan net.Conn), ended: make(chan struct{})}
		server := door(a, p)
		ctx, stop := context.WithCancel(t.Context())
		line := NewKeeper([]string{a.PairFile("line")}, overPipes{p, a}, nil)
		own := NewKeeper([]string{a.PairFile("door"), a.PairFile("peer")}, Local{a}, nil)
		ended := make(chan struct{}, 2)
		for _, k := range []*Keeper{line, own} {
			go func() { k.Run(ctx); ended <- struct{}{} }()
		}
		begun, seen, faults := time.Now(), map[string]bool{}, 0
		for at := time.Duration(0); at < 2*365*day; at += day {
			p.away.Store(at/(7*day)%12 >= 9)
			time.Sleep(time.Until(begun.Add(at)))
			for name, role := range roles {
				pair, err := pki.LoadPair(a.PairFile(name))
				if err == nil {
					err = pki.CheckChain(pair.Chain, []*x509.Certificate{a.Root(role.root).Certificate()},
						pair.Key.Public(), role.use, time.Now())
				}
				if err != nil {
					t.Fatalf("%s on day %d: %v", name, at/day, err)
				}
				seen[name+pair.Chain[0].SerialNumber.String()] = true
			}
			if line.Certificates()[0].Fault != "" {
				faults++
			}
		}
		stop()
		<-ended
		<-ended
		_ = server.Close()
		if len(seen) < 30 || len(seen) > 39 {
			t.Errorf("%d certificates in two years of 90-day ones, want 10 to 13 of each kind", len(seen))
		}
		if faults == 0 {
			t.Error("no renewal was due while the key manager was away: the test shows nothing")
		}
	})
}

// roles are those of the certificates that daemons show.
var roles = map[string]struct {
	root pki.Root
	use  pki.Use
}{
	"door": {pki.SAERoot, pki.Use{Server: true}},
	"line": {pki.SAERoot, pki.Use{URI: pki.SAEURI("line-tokyo"), Client: true}},
	"peer": {pki.PeerRoot, pki.Use{URI: pki.KMEURI("kme-tokyo"), Server: true, Client: true}},
}

// TestFaultKeepsTheOldPair: whatever goes wrong, the file stays as it was and
// the reason is told.
func TestFaultKeepsTheOldPair(t *testing.T) {
	for name, tc := range map[string]struct {
		issuer Issuer
		says   string
	}{
		"away":        {issuerFunc(func(*pki.Authority) (*pki.Pair, error) { return nil, errors.New("no route") }), "no route"},
		"other names": {issuerFunc(func(a *pki.Authority) (*pki.Pair, error) { return a.Renew("door") }), "asked for subject"},
	} {
		dir := t.TempDir()
		synctest.Test(t, func(t *testing.T) {
			a := authority(t, dir)
			before, err := os.ReadFile(a.PairFile("line"))
			if err != nil {
				t.Fatal(err)
			}
			f := tc.issuer.(*stub)
			f.a = a
			k := NewKeeper([]string{a.PairFile("line"), a.PairFile("line")}, f, nil)
			ctx, stop := context.WithCancel(t.Context())
			go k.Run(ctx)
			time.Sleep(80 * day)
			synctest.Wait()
			stop()
			list := k.Certificates()
			if len(list) != 1 || !strings.Contains(list[0].Fault, tc.says) {
				t.Errorf("%s: %+v", name, list)
			}
			after, err := os.ReadFile(a.PairFile("line"))
			if err != nil || string(after) != string(before) {
				t.Errorf("%s: the pair was changed: %v", name, err)
			}
		})
	}
}

type stub struct {
	a *pki.Authority
	f func(*pki.Authority) (*pki.Pair, error)
}

func issuerFunc(f func(*pki.Authority) (*pki.Pair, error)) *stub { return &stub{f: f} }

func (s *stub) Renew(context.Context, string, *pki.Pair) (*pki.Pair, error) { return s.f(s.a) }

func TestClock(t *testing.T) {
	begun := time.Now()
	c := clock{begun}
	if err := c.check(begun.Add(1000 * day)); err != nil {
		t.Errorf("three years of service: %v", err)
	}
	for _, tc := range []struct {
		wall, passed time.Duration
		wrong        bool
	}{{0, 0, false}, {59 * time.Minute, 0, false}, {3 * time.Hour, 0, true}, {-3 * time.Hour, 0, true},
		{90 * day, 90 * day, false}, {90*day + 2*time.Hour, 90 * day, true}, {-20 * 365 * day, day, true}} {
		err := moved(begun, begun.Add(tc.wall), tc.passed)
		if errors.Is(err, ErrClock) != tc.wrong {
			t.Errorf("wall %v, passed %v: %v", tc.wall, tc.passed, err)
		}
	}
	k := &Keeper{state: map[string]Certificate{}}
	a := authority(t, t.TempDir())
	if got := k.look(a.PairFile("line")); got.Fault != "" || got.NotAfter.IsZero() {
		t.Errorf("%+v", got)
	}
	if got := k.look("none"); !strings.Contains(got.Fault, "no such file") {
		t.Errorf("%+v", got)
	}
}

// TestClockBehind: a certificate of tomorrow is not replaced, the clock is told.
func TestClockBehind(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "x.pem")
	var pair *pki.Pair
	synctest.Test(t, func(t *testing.T) {
		time.Sleep(500 * day)
		a := authority(t, filepath.Join(dir, "later"))
		var err error
		if pair, err = pki.LoadPair(a.PairFile("line")); err == nil {
			err = pair.Save(path)
		}
		if err != nil {
			t.Fatal(err)
		}
	})
	synctest.Test(t, func(t *testing.T) {
		k := NewKeeper([]string{path}, issuerFunc(nil), nil)
		if wait := k.tend(t.Context(), path); wait != lookEvery {
			t.Errorf("looks again in %v", wait)
		}
		if got := k.Certificates()[0].Fault; !strings.Contains(got, "clock is wrong") || !strings.Contains(got, "set the clock") {
			t.Errorf("fault %q", got)
		}
	})
}

// TestDoor holds client and handler over real sockets, and what is refused.
func TestDoor(t *testing.T) {
	a := authority(t, t.TempDir())
	roots := x509.NewCertPool()
	roots.AddCert(a.Root(pki.SAERoot).Certificate())
	allow := error(nil)
	s := httptest.NewUnstartedServer(&Handler{Authority: a, Allow: func(*tls.ConnectionState) error { return allow }})
	pair, err := tls.LoadX509KeyPair(a.PairFile("door"), a.PairFile("door"))
	if err != nil {
		t.Fatal(err)
	}
	s.TLS = &tls.Config{ClientCAs: roots, ClientAuth: tls.RequireAndVerifyClientCert, Certificates: []tls.Certificate{pair}}
	s.Config.ErrorLog = quiet()
	s.StartTLS()
	defer s.Close()
	path := a.PairFile("line")
	c := Client{URL: s.URL, TLS: func() *tls.Config {
		shown, err := tls.LoadX509KeyPair(path, path)
		if err != nil {
			t.Error(err)
		}
		return &tls.Config{RootCAs: roots, ServerName: "kme", Certificates: []tls.Certificate{shown}}
	}}
	old, err := pki.LoadPair(path)
	if err != nil {
		t.Fatal(err)
	}
	next, err := c.Renew(t.Context(), path, old)
	if err != nil {
		t.Fatal(err)
	}
	if err := sameNames(old.Chain[0], next.Chain[0]); err != nil {
		t.Error(err)
	}
	allow = errors.New("gone since this morning")
	if _, err := c.Renew(t.Context(), path, old); !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "gone since") {
		t.Errorf("forbidden: %v", err)
	}
	allow = nil
	if _, err := a.Revoke("line-tokyo"); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Renew(t.Context(), path, old); !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "revoked") {
		t.Errorf("revoked: %v", err)
	}
	for _, body := range []string{"", "nonsense", strings.Repeat("x", maxBody+1)} {
		client := &http.Client{Transport: &http.Transport{TLSClientConfig: c.TLS(), DisableKeepAlives: true}}
		if _, err := post(t.Context(), client, s.URL, []byte(body)); !errors.Is(err, ErrRefused) {
			t.Errorf("body %.10q: %v", body, err)
		}
	}
}

// TestKilled: a temporary file that a kill left does no harm, and an exposed
// pair is not used.
func TestKilled(t *testing.T) {
	a := authority(t, t.TempDir())
	path := a.PairFile("line")
	if err := os.WriteFile(filepath.Join(a.Dir(), ".line.pem.123"), []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}
	k := NewKeeper([]string{path}, Local{a}, nil)
	if err := k.renew(t.Context(), path); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := k.renew(t.Context(), path); !errors.Is(err, secret.ErrExposed) {
		t.Errorf("an exposed pair: %v", err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := k.renew(t.Context(), path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no pair: %v", err)
	}
}

// TestRefusalsOnBothSides: a renewal that is refused says on both sides whose
// certificate, from whom, what was wrong and what to do.
func TestRefusalsOnBothSides(t *testing.T) {
	nonsense := func(c *http.Client, url string) error {
		_, err := post(t.Context(), c, url, []byte("nonsense"))
		return err
	}
	for name, tc := range map[string]struct {
		spoil func(a *pki.Authority) error
		allow error
		ask   func(c *http.Client, url string) error
		says  []string // on both sides
	}{
		"revoked": {spoil: func(a *pki.Authority) error { _, err := a.Revoke("line-tokyo"); return err },
			says: []string{"certificate is revoked", "issue a new one under a new name"}},
		"no SAE": {allow: errors.New("certificate belongs to no SAE"),
			says: []string{"belongs to no SAE", "look for it in the site file's saes"}},
		"no request": {ask: nonsense, says: []string{"certificate request is not valid"}},
	} {
		a := authority(t, t.TempDir())
		var log strings.Builder
		h := &Handler{Authority: a, Allow: func(*tls.ConnectionState) error { return tc.allow },
			Log: slog.New(slog.NewTextHandler(&log, nil))}
		roots := x509.NewCertPool()
		roots.AddCert(a.Root(pki.SAERoot).Certificate())
		pair, err := tls.LoadX509KeyPair(a.PairFile("door"), a.PairFile("door"))
		if err != nil {
			t.Fatal(err)
		}
		s := httptest.NewUnstartedServer(h)
		s.TLS = &tls.Config{ClientCAs: roots, ClientAuth: tls.RequireAndVerifyClientCert, Certificates: []tls.Certificate{pair}}
		s.StartTLS()
		path := a.PairFile("line")
		shown, err := tls.LoadX509KeyPair(path, path)
		if err != nil {
			t.Fatal(err)
		}
		cfg := &tls.Config{RootCAs: roots, ServerName: "kme", Certificates: []tls.Certificate{shown}}
		if tc.spoil != nil {
			if err := tc.spoil(a); err != nil {
				t.Fatal(err)
			}
		}
		if tc.ask != nil {
			err = tc.ask(&http.Client{Transport: &http.Transport{TLSClientConfig: cfg, DisableKeepAlives: true}}, s.URL)
		} else {
			err = NewKeeper([]string{path}, Client{URL: s.URL, TLS: func() *tls.Config { return cfg }}, nil).renew(t.Context(), path)
		}
		s.Close()
		if !errors.Is(err, ErrRefused) {
			t.Errorf("%s: %v", name, err)
			continue
		}
		there := strings.ReplaceAll(log.String(), `\\"`, `"`)
		there = strings.ReplaceAll(there, `\"`, `"`)
		for _, w := range tc.says {
			if !strings.Contains(err.Error(), w) || !strings.Contains(there, w) {
				t.Errorf("%s: here: %v\nthere: %s\nlacks %q", name, err, there, w)
			}
		}
		for _, w := range []string{`subject "CN=line-tokyo"`, `issuer "CN=Quietline sae root of tokyo"`, "valid "} {
			if !strings.Contains(there, w) || tc.ask == nil && !strings.Contains(err.Error(), w) {
				t.Errorf("%s: here: %v\nthere: %s\nlacks %q", name, err, there, w)
			}
		}
	}
}

// TestForeignDoor: a door without an authority says where to go.
func TestForeignDoor(t *testing.T) {
	s := httptest.NewTLSServer(http.NotFoundHandler())
	defer s.Close()
	_, err := post(t.Context(), s.Client(), s.URL, nil)
	if !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "signs no certificates") ||
		!strings.Contains(err.Error(), "pki issue --request") {
		t.Errorf("%v", err)
	}
}
