package clients_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/etsi014/clients"
	"github.com/quietline/quietline/etsi014/etsitest"
	"github.com/quietline/quietline/etsi014/identity"
)

// world is a KME's door with the files that a client of another language reads.
type world struct {
	dir     string
	kme     *etsitest.KME
	live    *identity.Live
	url     string
	asked   atomic.Int32 // requests that arrived
	lose    atomic.Bool  // break the connection instead of answering
	program []string
}

// each runs a test with every language that is installed here.
func each(t *testing.T, run func(t *testing.T, w *world)) {
	for _, lang := range []struct{ program, file, text string }{
		{"python3", "qkd014.py", clients.Python()},
		{"node", "qkd014.mjs", clients.JavaScript()},
	} {
		t.Run(lang.program, func(t *testing.T) {
			if _, err := exec.LookPath(lang.program); err != nil {
				t.Skipf("%s is not installed: %v", lang.program, err)
			}
			w := newWorld(t)
			etsitest.WriteFile(t, filepath.Join(w.dir, lang.file), []byte(lang.text))
			w.program = []string{lang.program, lang.file}
			run(t, w)
		})
	}
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{dir: t.TempDir(), kme: &etsitest.KME{Stock: 100, Retry: 7 * time.Second}}
	ca := etsitest.NewCA(t, "test CA")
	etsitest.WriteFile(t, w.dir+"/ca.crt", ca.PEM())
	cert, key := etsitest.WriteFiles(t, w.dir, "kme", ca.Issue(t, etsitest.Leaf{
		Server: true, IPs: []net.IP{net.IPv4(127, 0, 0, 1)},
	}))
	cfg := identity.Config{Pairs: []identity.Pair{{Cert: cert, Key: key}}, CA: w.dir + "/ca.crt"}
	for _, name := range []string{"tokyo", "a/b 東"} {
		sae := etsi014.SAEID(name)
		cfg.Rules = append(cfg.Rules, identity.Rule{SAE: sae})
		file := strings.Split(name, "/")[0]
		etsitest.WriteFiles(t, w.dir, file, ca.Issue(t, etsitest.Leaf{
			URIs: []string{identity.DefaultURI(sae)},
		}))
	}
	var err error
	if w.live, err = identity.Open(cfg); err != nil {
		t.Fatal(err)
	}
	h, err := etsi014.NewHandler(etsi014.HandlerConfig{KME: w.kme, Identify: w.live.Identify})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	w.url = "https://" + l.Addr().String()
	server := etsi014.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		w.asked.Add(1)
		if w.lose.Load() {
			_, _ = io.Copy(io.Discard, r.Body)
			panic(http.ErrAbortHandler)
		}
		h.ServeHTTP(rw, r)
	}), w.live.Server(), nil)
	done := make(chan error, 1)
	go func() { done <- server.ServeTLS(l, "", "") }()
	t.Cleanup(func() {
		if err := server.Shutdown(context.WithoutCancel(t.Context())); err != nil {
			t.Error(err)
		}
		<-done
	})
	return w
}

// run starts the client as an SAE, whose files are named by the first part of
// its ID, and returns its output and, if it failed, its complaint.
func (w *world) run(t *testing.T, urls []string, sae string, args ...string) (out, fault string) {
	t.Helper()
	line := append([]string{}, w.program[1:]...)
	for _, u := range urls {
		line = append(line, "--url", u)
	}
	line = append(line, "--cert", sae+".crt", "--key", sae+".key", "--ca", "ca.crt")
	cmd := exec.CommandContext(t.Context(), w.program[0], append(line, args...)...)
	cmd.Dir = w.dir
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		if stderr.Len() == 0 {
			t.Fatalf("%v: %v without a word", cmd.Args, err)
		}
		return "", stderr.String()
	}
	return stdout.String(), ""
}

func TestClients(t *testing.T) {
	each(t, func(t *testing.T, w *world) {
		own := []string{w.url}
		out, fault := w.run(t, own, "tokyo", "status", "a/b 東")
		var status map[string]any
		if err := json.Unmarshal([]byte(out), &status); err != nil ||
			status["slave_SAE_ID"] != "a/b 東" || status["key_size"] != 256.0 {
			t.Errorf("status: %s %s, %v", out, fault, err)
		}
		drawn, fault := w.run(t, own, "tokyo", "enc", "a/b 東", "--number", "3", "--size", "512")
		lines := strings.Split(strings.TrimSpace(drawn), "\n")
		if len(lines) != 3 || len(strings.Fields(lines[0])[1]) != 88 {
			t.Fatalf("enc: %s %s", drawn, fault)
		}
		var ids []string // asked in reverse order and in capitals
		for i := range lines {
			ids = append(ids, strings.ToUpper(strings.Fields(lines[2-i])[0]))
		}
		got, fault := w.run(t, own, "a", append([]string{"dec", "tokyo"}, ids...)...)
		want := lines[2] + "\n" + lines[1] + "\n" + lines[0] + "\n"
		if got != want {
			t.Errorf("dec: got %s %s, want %s", got, fault, want)
		}
		for _, tc := range []struct {
			want string
			args []string
		}{
			{"400: one or more keys", append([]string{"dec", "tokyo"}, ids...)},
			{"400: size shall be a multiple of 8", []string{"enc", "tokyo", "--size", "257"}},
			{"503: not enough key", []string{"enc", "tokyo", "--number", "101"}},
		} {
			if _, fault := w.run(t, own, "a", tc.args...); !strings.Contains(fault, tc.want) {
				t.Errorf("%v: got %s", tc.args, fault)
			}
		}
		if w.kme.Left() != 97 {
			t.Errorf("%d keys are left", w.kme.Left())
		}
	})
}

// A lost answer is told and not asked again; an address where nobody listens
// is passed over, and one that is not trusted gets no request.
func TestClientsBurnNoKey(t *testing.T) {
	each(t, func(t *testing.T, w *world) {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		closed := "https://" + l.Addr().String()
		_ = l.Close()
		out, fault := w.run(t, []string{closed, w.url}, "tokyo", "enc", "a/b 東")
		if len(strings.Fields(out)) != 2 || w.kme.Left() != 99 {
			t.Errorf("second address: %s %s, %d keys left", out, fault, w.kme.Left())
		}
		foreign := newWorld(t)
		out, fault = w.run(t, []string{foreign.url, w.url}, "tokyo", "enc", "a/b 東")
		if len(strings.Fields(out)) != 2 || foreign.asked.Load() != 0 {
			t.Errorf("foreign KME: %s %s, %d requests", out, fault, foreign.asked.Load())
		}
		w.lose.Store(true)
		before := w.asked.Load()
		_, fault = w.run(t, []string{w.url, w.url}, "tokyo", "enc", "a/b 東")
		if !strings.Contains(fault, "answer was lost") || w.asked.Load() != before+1 {
			t.Errorf("lost answer: %s, %d requests", fault, w.asked.Load()-before)
		}
		if _, fault = w.run(t, []string{closed}, "tokyo", "enc", "x"); !strings.Contains(fault,
			"reach KME") {
			t.Errorf("nobody: %s", fault)
		}
	})
}

// As a library: the structure of errors, and no key in what is printed.
func TestClientsAsLibraries(t *testing.T) {
	scripts := map[string]string{
		"python3": `
from qkd014 import Client, QKDError
kme = Client(["%s"], "tokyo.crt", "tokyo.key", "ca.crt")
for _ in range(3):
    keys = kme.enc_keys("a/b", 2)
    print(repr(keys), len(keys[0].bits))
    keys[0].clear()
    assert not any(keys[0].bits)
try:
    kme.enc_keys("a/b", 1000)
except QKDError as e:
    print(e.status, e.retry_after, e.details)
try:
    kme.enc_keys("a/b", 1, optional=[{"x_y": 1}], mandatory=[{"x_y": 1}])
except QKDError as e:
    print(e.message)
`,
		"node": `
import { inspect } from 'node:util';
import { Client } from './qkd014.mjs';
const kme = new Client(['%s'], { cert: 'tokyo.crt', key: 'tokyo.key', ca: 'ca.crt' });
for (let i = 0; i < 3; i++) {
  const keys = await kme.encKeys('a/b', { number: 2 });
  console.log(inspect(keys), JSON.stringify(keys), keys[0].bits.length);
  keys[0].clear();
  if (keys[0].bits.some((b) => b !== 0)) throw new Error('not wiped');
}
await kme.encKeys('a/b', { number: 1000 }).catch((e) =>
  console.log(e.status, e.retryAfter, JSON.stringify(e.details)));
await kme.encKeys('a/b', { optional: [{ x_y: 1 }], mandatory: [{ x_y: 1 }] }).catch((e) =>
  console.log(e.message));
`,
	}
	each(t, func(t *testing.T, w *world) {
		name := map[string]string{"python3": "use.py", "node": "use.mjs"}[w.program[0]]
		script := fmt.Sprintf(scripts[w.program[0]], w.url)
		if err := os.WriteFile(filepath.Join(w.dir, name), []byte(script), 0o600); err != nil {
			t.Fatal(err)
		}
		cmd := exec.CommandContext(t.Context(), w.program[0], name)
		cmd.Dir = w.dir
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		for _, want := range []string{
			" 32\n", "503 7 ", "missing_bits", "not all extension_mandatory parameters are supported",
		} {
			if !strings.Contains(string(out), want) {
				t.Errorf("%s lacks %q", out, want)
			}
		}
		for _, key := range []string{"\\x", "Buffer", "bytearray", "bits:", `"bits"`} {
			if strings.Contains(string(out), key) {
				t.Errorf("%s shows a key", out)
			}
		}
	})
}
