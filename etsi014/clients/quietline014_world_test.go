package clients

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"sync/atomic"
	"testing"
	"time"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/etsi014/etsitest"
	"github.com/quietline/quietline/etsi014/identity"
)

// language is one client.
type language struct {
	name, interpreter, file string
	driver                  string // a program that uses the client as a module
}

var languages = []language{
	{"python", "python3", "python/quietline014.py", "testdata/driver.py"},
	{"javascript", "node", "javascript/quietline014.mjs", "testdata/driver.mjs"},
}

// each runs a test for both clients. A developer's machine may lack an
// interpreter; CI may not.
func each(t *testing.T, test func(t *testing.T, l language)) {
	for _, l := range languages {
		t.Run(l.name, func(t *testing.T) {
			t.Parallel()
			if _, err := exec.LookPath(l.interpreter); err != nil {
				if os.Getenv("CI") != "" {
					t.Fatalf("%v; the CI image must have it", err)
				}
				t.Skipf("%v; install it to run this test (CI does)", err)
			}
			test(t, l)
		})
	}
}

// The SAEs of a world; one ID needs percent-encoding in the path.
const (
	tokyo = "tokyo"
	kochi = "kochi/線 7"
	osaka = "osaka"
)

// world is one KME behind its door, and the files of its SAEs.
type world struct {
	kme    *etsitest.KME
	ca     *etsitest.CA
	dir    string
	url    string
	server *http.Server
	conns  atomic.Int64 // connections that the door has taken
	flags  map[string][]string
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{
		kme: &etsitest.KME{Stock: 100, Retry: 7 * time.Second}, ca: etsitest.NewCA(t, "test CA"),
		dir: t.TempDir(), flags: map[string][]string{},
	}
	cert, key := etsitest.WriteFiles(t, w.dir, "kme", w.door(t))
	etsitest.WriteFile(t, w.dir+"/ca.crt", w.ca.PEM())
	cfg := identity.Config{Pairs: []identity.Pair{{Cert: cert, Key: key}}, CA: w.dir + "/ca.crt"}
	for file, sae := range map[string]etsi014.SAEID{"a": tokyo, "b": kochi, "c": osaka} {
		c := w.ca.Issue(t, etsitest.Leaf{CN: file, URIs: []string{identity.DefaultURI(sae)}})
		cert, key := etsitest.WriteFiles(t, w.dir, file, c)
		w.flags[string(sae)] = []string{"--cert", cert, "--key", key, "--ca", w.dir + "/ca.crt"}
		cfg.Rules = append(cfg.Rules, identity.Rule{SAE: sae})
	}
	live, err := identity.Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	h, err := etsi014.NewHandler(etsi014.HandlerConfig{KME: w.kme, Identify: live.Identify})
	if err != nil {
		t.Fatal(err)
	}
	w.server = etsi014.NewServer(h, live.Server(), nil)
	w.server.ConnState = func(_ net.Conn, s http.ConnState) {
		if s == http.StateNew {
			w.conns.Add(1)
		}
	}
	l := listen(t)
	w.url = "https://" + l.Addr().String()
	done := make(chan error, 1)
	go func() { done <- etsi014.Serve(w.server, l, etsi014.Bounds{}) }()
	t.Cleanup(func() {
		_ = w.server.Close()
		if err := <-done; !errors.Is(err, http.ErrServerClosed) {
			t.Errorf("serve: %v", err)
		}
	})
	return w
}

// door is a certificate for a server on a loopback address.
func (w *world) door(t *testing.T) tls.Certificate {
	return w.ca.Issue(t, etsitest.Leaf{CN: "kme", Server: true, IPs: []net.IP{net.IPv4(127, 0, 0, 1)}})
}

func listen(t *testing.T) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// serve answers each connection by handle until the test ends, and counts the
// connections. A nil certificate serves without TLS.
func serve(t *testing.T, cert *tls.Certificate, handle func(net.Conn)) (
	url string, n *atomic.Int64,
) {
	t.Helper()
	l, n := listen(t), new(atomic.Int64)
	url = "https://" + l.Addr().String()
	if cert != nil {
		l = tls.NewListener(l, &tls.Config{Certificates: []tls.Certificate{*cert}})
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			n.Add(1)
			handle(conn)
			_ = conn.Close()
		}
	}()
	t.Cleanup(func() { _ = l.Close(); <-ended })
	return url, n
}

// script is a KME that reads one request whole and writes these bytes.
func (w *world) script(t *testing.T, answer string) (url string, requests *atomic.Int64) {
	t.Helper()
	cert, requests := w.door(t), new(atomic.Int64)
	url, _ = serve(t, &cert, func(c net.Conn) {
		req, err := http.ReadRequest(bufio.NewReader(c))
		if err != nil {
			return
		}
		_, _ = io.Copy(io.Discard, req.Body)
		requests.Add(1)
		_, _ = io.WriteString(c, answer)
	})
	return url, requests
}

// result is what a command printed and how it ended.
type result struct {
	code        int
	out, stderr string
}

// run starts a client as a command of one SAE.
func (w *world) run(t *testing.T, l language, sae, verb string, args ...string) result {
	t.Helper()
	return start(t, l, append(append([]string{l.file, verb}, w.flags[sae]...), args...))
}

func start(t *testing.T, l language, args []string) result {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, l.interpreter, args...)
	cmd.Env = append(os.Environ(), "PYTHONDONTWRITEBYTECODE=1")
	var out, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &stderr
	err := cmd.Run()
	if exit := new(exec.ExitError); err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return result{cmd.ProcessState.ExitCode(), out.String(), stderr.String()}
}

// collect takes one key by the Go client.
func (w *world) collect(t *testing.T, sae string, by etsi014.SAEID, keyID string) []byte {
	t.Helper()
	f := w.flags[sae]
	live, err := identity.Open(identity.Config{
		Pairs: []identity.Pair{{Cert: f[1], Key: f[3]}}, CA: f[5],
	})
	if err != nil {
		t.Fatal(err)
	}
	c, err := etsi014.NewClient(etsi014.ClientConfig{URLs: []string{w.url}, TLS: live.Client})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	id, err := etsi014.ParseKeyID(keyID)
	if err != nil {
		t.Fatal(err)
	}
	got, err := c.KeysByID(t.Context(), etsi014.IDRequest{Initiator: by, IDs: []etsi014.KeyID{id}})
	if err != nil {
		t.Fatal(err)
	}
	return got.Keys[0].Bits.Expose()
}
