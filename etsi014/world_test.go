package etsi014_test

import (
	"bufio"
	"crypto/tls"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"

	"go.uber.org/goleak"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/etsi014/etsitest"
	"github.com/quietline/quietline/etsi014/identity"
)

// After a refused request net/http lingers half a second by itself, so that the
// client can read the answer; that is no leak.
func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m, goleak.IgnoreAnyFunction("net/http.(*conn).closeWriteAndWait"))
}

// world is one KME behind its door on a loopback address, with SAEs "tokyo",
// "kochi" and "osaka" enrolled and "nobody" holding a certificate of the right
// authority that no rule names.
type world struct {
	kme    *etsitest.KME
	ca     *etsitest.CA
	addr   string
	live   *identity.Live
	config identity.Config
	saes   map[string]tls.Certificate

	server *http.Server

	mu   sync.Mutex
	seen []etsi014.Observation
}

var enrolled = []string{"tokyo", "kochi", "osaka"}

func newWorld(t testing.TB, change func(*etsi014.HandlerConfig)) *world {
	t.Helper()
	w := &world{
		kme: &etsitest.KME{Stock: 1000}, ca: etsitest.NewCA(t, "test CA"),
		saes: map[string]tls.Certificate{},
	}
	dir := t.TempDir()
	door := w.ca.Issue(t, etsitest.Leaf{
		CN: "kme", Server: true, IPs: []net.IP{net.IPv4(127, 0, 0, 1)},
	})
	cert, key := etsitest.WriteFiles(t, dir, "kme", door)
	etsitest.WriteFile(t, dir+"/ca.crt", w.ca.PEM())
	w.config = identity.Config{Pairs: []identity.Pair{{Cert: cert, Key: key}}, CA: dir + "/ca.crt"}
	for _, name := range append([]string{"nobody"}, enrolled...) {
		sae := etsi014.SAEID(name)
		w.saes[name] = w.ca.Issue(t, etsitest.Leaf{
			CN: name, URIs: []string{identity.DefaultURI(sae)},
		})
		if name != "nobody" {
			w.config.Rules = append(w.config.Rules, identity.Rule{SAE: sae})
		}
	}
	live, err := identity.Open(w.config)
	if err != nil {
		t.Fatal(err)
	}
	w.live = live
	cfg := etsi014.HandlerConfig{
		KME: w.kme, Identify: live.Identify,
		Observe: func(o etsi014.Observation) {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.seen = append(w.seen, o)
		},
	}
	if change != nil {
		change(&cfg)
	}
	h, err := etsi014.NewHandler(cfg)
	if err != nil {
		t.Fatal(err)
	}
	w.server = etsi014.NewServer(h, live.Server(), nil)
	w.addr = serve(t, w.server)
	return w
}

// serve runs a server on a free loopback port until the test ends.
func serve(t testing.TB, s *http.Server) string { return serveIn(t, s, etsi014.Bounds{}) }

// serveIn is serve within bounds.
func serveIn(t testing.TB, s *http.Server, bounds etsi014.Bounds) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- etsi014.Serve(s, l, bounds) }()
	t.Cleanup(func() {
		_ = s.Close()
		if err := <-done; err != http.ErrServerClosed {
			t.Errorf("serve: %v", err)
		}
	})
	return l.Addr().String()
}

// tls returns a client configuration for an SAE.
func (w *world) tls(sae string) *tls.Config {
	cfg := &tls.Config{RootCAs: w.ca.Pool(), ServerName: "127.0.0.1"}
	if c, ok := w.saes[sae]; ok {
		cfg.Certificates = []tls.Certificate{c}
	}
	return cfg
}

func (w *world) client(t testing.TB, sae string) *etsi014.Client {
	t.Helper()
	return newClient(t, etsi014.ClientConfig{
		URLs: []string{"https://" + w.addr}, TLS: func() *tls.Config { return w.tls(sae) },
	})
}

func newClient(t testing.TB, cfg etsi014.ClientConfig) *etsi014.Client {
	t.Helper()
	c, err := etsi014.NewClient(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// observations stops the door, so that every answer was reported, and returns
// what it told.
func (w *world) observations(t testing.TB) []etsi014.Observation {
	t.Helper()
	if err := w.server.Shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	return append([]etsi014.Observation(nil), w.seen...)
}

// reply is what came back, as text.
type reply struct {
	code   int
	header http.Header
	body   string
}

// send writes one request as it is on a fresh connection. The target goes on
// the wire untouched; head may hold more header lines.
func (w *world) send(t testing.TB, sae, method, target, body string, head ...string) reply {
	t.Helper()
	conn, err := tls.Dial("tcp", w.addr, w.tls(sae))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if body != "" && method != "" {
		head = append(head, fmt.Sprintf("Content-Length: %d", len(body)))
	}
	var lines strings.Builder
	for _, h := range head {
		lines.WriteString(h + "\r\n")
	}
	_, err = fmt.Fprintf(conn, "%s %s HTTP/1.1\r\nHost: kme\r\nConnection: close\r\n%s\r\n%s",
		method, target, lines.String(), body)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := http.ReadResponse(bufio.NewReader(conn), &http.Request{Method: method})
	if err != nil {
		t.Fatalf("%s %s: %v", method, target, err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatalf("%s %s: %v", method, target, err)
	}
	return reply{resp.StatusCode, resp.Header, string(b)}
}

// logTo gives a handler a logger that keeps every line of every level.
func logTo(w io.Writer) *slog.Logger {
	return slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{Level: slog.LevelDebug}))
}
