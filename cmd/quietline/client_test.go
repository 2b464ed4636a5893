package main

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/etsi014/etsitest"
	"github.com/quietline/quietline/etsi014/identity"
)

// hall is a KME's door on loopback with the files of two applications.
type hall struct {
	dir, url, addr string
	kme            *etsitest.KME
	ca             *etsitest.CA
	kmeFlags       []string // --url, for client
}

func newHall(t *testing.T) *hall {
	t.Helper()
	h := &hall{dir: t.TempDir(), kme: &etsitest.KME{Stock: 10, Retry: 7 * time.Second},
		ca: etsitest.NewCA(t, "site CA")}
	cert, key := etsitest.WriteFiles(t, h.dir, "kme", h.ca.Issue(t, etsitest.Leaf{
		CN: "kme", Server: true, IPs: []net.IP{net.IPv4(127, 0, 0, 1)}, To: later(),
	}))
	etsitest.WriteFile(t, h.path("ca.crt"), h.ca.PEM())
	cfg := identity.Config{Pairs: []identity.Pair{{Cert: cert, Key: key}}, CA: h.path("ca.crt")}
	for _, sae := range []string{"tokyo", "kochi", "osaka"} {
		etsitest.WriteFiles(t, h.dir, sae, h.ca.Issue(t, etsitest.Leaf{
			CN: sae, URIs: []string{identity.DefaultURI(etsi014.SAEID(sae))}, To: later(),
		}))
		cfg.Rules = append(cfg.Rules, identity.Rule{SAE: etsi014.SAEID(sae)})
	}
	h.addr = serveDoor(t, cfg, h.kme)
	h.url = "https://" + h.addr
	h.kmeFlags = []string{"--url", h.url}
	return h
}

// serveDoor runs a KME's door until the test ends and returns its address.
func serveDoor(t *testing.T, cfg identity.Config, kme etsi014.KME) (addr string) {
	t.Helper()
	live, err := identity.Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	handler, err := etsi014.NewHandler(etsi014.HandlerConfig{KME: kme, Identify: live.Identify})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := etsi014.NewServer(handler, live.Server(), nil)
	done := make(chan error, 1)
	go func() { done <- server.ServeTLS(l, "", "") }()
	t.Cleanup(func() {
		_ = server.Close()
		if err := <-done; !errors.Is(err, http.ErrServerClosed) {
			t.Error(err)
		}
	})
	return l.Addr().String()
}

// later is beyond the two weeks in which doctor warns.
func later() time.Time { return time.Now().Add(60 * 24 * time.Hour) }

func (h *hall) path(name string) string { return filepath.Join(h.dir, name) }

// files are the flags that name an application's certificate.
func (h *hall) files(sae string) []string {
	return []string{"--cert", h.path(sae + ".crt"), "--key", h.path(sae + ".key"),
		"--ca", h.path("ca.crt")}
}

// client runs quietline client as an application.
func (h *hall) client(sae, verb string, args ...string) (code int, out, stderr string) {
	line := slices.Concat([]string{"client", verb}, h.files(sae), h.kmeFlags, args)
	var o, e bytes.Buffer
	code = run(line, &o, &e)
	return code, o.String(), e.String()
}

// must is client where it must be well.
func (h *hall) must(t *testing.T, sae, verb string, args ...string) string {
	t.Helper()
	code, out, stderr := h.client(sae, verb, args...)
	if code != exitOK || stderr != "" {
		t.Fatalf("%s: exit %d: %s", verb, code, stderr)
	}
	return out
}

func TestClientDrawsAndCollects(t *testing.T) {
	h := newHall(t)
	if got, want := h.must(t, "tokyo", "status", "--peer", "kochi"),
		"tokyo at kme-tokyo and kochi at kme-kochi: 10 keys of 256 bits to draw\n"; !strings.HasPrefix(
		got, want) {
		t.Errorf("status %q, want %q", got, want)
	}
	var status map[string]any
	if err := json.Unmarshal([]byte(h.must(t, "tokyo", "status", "--peer", "kochi", "--json")),
		&status); err != nil || len(status) != 11 || status["stored_key_count"] != 10.0 {
		t.Errorf("status %v, %v", status, err)
	}
	drawn := h.must(t, "tokyo", "enc", "--peer", "kochi", "--number", "2", "--size", "128",
		"--also", "osaka")
	lines := strings.Split(strings.TrimSuffix(drawn, "\n"), "\n")
	if len(lines) != 2 {
		t.Fatalf("%d lines", len(lines))
	}
	var ids []string
	for _, line := range lines {
		id, text, _ := strings.Cut(line, " ")
		b, err := base64.StdEncoding.DecodeString(text)
		if err != nil || len(b) != 16 {
			t.Errorf("key of %d bytes, %v", len(b), err)
		}
		ids = append(ids, "--id", id)
	}
	collect := append([]string{"--peer", "tokyo"}, ids...)
	if got := h.must(t, "kochi", "dec", collect...); got != drawn {
		t.Error("kochi collected other keys")
	}
	out := h.path("keys.json")
	if got := h.must(t, "osaka", "dec", append(collect, "--json", "--out", out)...); got != "" {
		t.Error("--out prints")
	}
	info, err := os.Stat(out)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info, err)
	}
	b, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	var c struct {
		Keys []struct {
			ID  string `json:"key_ID"`
			Key string `json:"key"`
		} `json:"keys"`
	}
	if err := json.Unmarshal(b, &c); err != nil || len(c.Keys) != 2 {
		t.Fatalf("%d keys, %v", len(c.Keys), err)
	}
	for i, k := range c.Keys {
		if k.ID+" "+k.Key != lines[i] {
			t.Errorf("key %d differs", i)
		}
	}
}

func TestClientFailsOver(t *testing.T) {
	h := newHall(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed := "https://" + l.Addr().String()
	_ = l.Close()
	h.kmeFlags = []string{"--url", closed, "--url", h.url}
	h.must(t, "tokyo", "enc", "--peer", "kochi")
	if h.kme.Left() != 9 {
		t.Errorf("%d keys left", h.kme.Left())
	}
	h.kmeFlags = []string{"--url", closed}
	code, _, stderr := h.client("tokyo", "enc", "--peer", "kochi")
	if code != exitFailure || !strings.Contains(stderr, "connection refused") ||
		!strings.Contains(stderr, "hint: quietline doctor tls "+strings.TrimPrefix(closed, "https://")) {
		t.Errorf("exit %d, %q", code, stderr)
	}
}

func TestClientRefusals(t *testing.T) {
	h := newHall(t)
	id, _, _ := strings.Cut(h.must(t, "tokyo", "enc", "--peer", "kochi"), " ")
	unknown := "00000000-0000-4000-8000-000000000000"
	old := h.path("old")
	if err := os.WriteFile(old, []byte("a key"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name, sae, verb string
		args            []string
		code            int
		want            string
	}{
		{"unknown", "kochi", "dec", []string{"--peer", "tokyo", "--id", id, "--id", unknown}, 1,
			"one or more keys specified are not found on KME"},
		{"unknown", "kochi", "dec", []string{"--peer", "tokyo", "--id", unknown}, 1,
			"hint: each application collects a key once"},
		{"another's", "osaka", "dec", []string{"--peer", "tokyo", "--id", id}, 1,
			"caller is not entitled"},
		{"too many", "tokyo", "enc", []string{"--peer", "kochi", "--number", "11"}, 1,
			"hint: come again in 7s; 512 bits are missing"},
		{"size", "tokyo", "enc", []string{"--peer", "kochi", "--size", "127"}, 1,
			"hint: --size counts bits"},
		{"old file", "tokyo", "enc", []string{"--peer", "kochi", "--out", old}, 1,
			"hint: name a new file; no key was asked"},
		{"no folder", "tokyo", "enc", []string{"--peer", "kochi", "--out", h.path("no/key")}, 1,
			"no such file or directory"},
		{"another KME", "tokyo", "enc", []string{"--peer", "kochi", "--kme", "kme-osaka"}, 1,
			"certificate does not name KME kme-osaka"},
		{"no key file", "nobody", "enc", []string{"--peer", "kochi"}, 1, "nobody.crt"},
		{"no peer", "tokyo", "enc", nil, 2, "--peer is missing"},
		{"long peer", "tokyo", "enc", []string{"--peer", strings.Repeat("x", 292)}, 2, "--peer: "},
		{"also", "tokyo", "enc", []string{"--peer", "kochi", "--also", ""}, 2, "--also: "},
		{"number", "tokyo", "enc", []string{"--peer", "kochi", "--number", "0"}, 2, "at least one key"},
		{"size", "tokyo", "enc", []string{"--peer", "kochi", "--size", "-8"}, 2, "no negative size"},
		{"no ID", "kochi", "dec", []string{"--peer", "tokyo"}, 2, "--id is missing"},
		{"no UUID", "kochi", "dec", []string{"--peer", "tokyo", "--id", "7"}, 2, "is not a UUID"},
		{"timeout", "tokyo", "enc", []string{"--peer", "kochi", "--timeout", "0s"}, 2, "above 0"},
		{"http", "tokyo", "enc", []string{"--peer", "kochi", "--url", "http://x"}, 2, "no base URL"},
		{"extra", "tokyo", "status", []string{"--peer", "kochi", "now"}, 2, "takes no argument"},
		{"flag", "tokyo", "status", []string{"--peers", "kochi"}, 2, "unknown flag"},
	} {
		t.Run(c.name, func(t *testing.T) {
			code, out, stderr := h.client(c.sae, c.verb, c.args...)
			if code != c.code || out != "" || !strings.Contains(stderr, c.want) {
				t.Errorf("exit %d, want %d: %q lacks %q", code, c.code, stderr, c.want)
			}
			if c.code == exitUsage && !strings.Contains(stderr, "\nhint: ") {
				t.Errorf("%q has no hint", stderr)
			}
		})
	}
	if h.kme.Left() != 9 {
		t.Errorf("%d keys left, want 9", h.kme.Left())
	}
	h.must(t, "kochi", "dec", "--peer", "tokyo", "--id", id)
	if b, err := os.ReadFile(old); err != nil || string(b) != "a key" {
		t.Error("an old file was replaced")
	}
}

func TestClientWithoutVerb(t *testing.T) {
	for _, args := range [][]string{{"client"}, {"client", "draw"}, {"doctor", "ssh"}} {
		var out, stderr bytes.Buffer
		code := run(args, &out, &stderr)
		if code != exitUsage || !strings.Contains(stderr.String(), "hint: ") {
			t.Errorf("%v: exit %d, %q", args, code, stderr.String())
		}
	}
}

// TestAppendKeysMeasures: a buffer that grew would leave a key behind.
func TestAppendKeysMeasures(t *testing.T) {
	for _, asJSON := range []bool{false, true} {
		for n := range 5 {
			var c etsi014.Container
			for range n {
				c.Keys = append(c.Keys, etsi014.Key{Bits: fixed(512)})
			}
			first := appendKeys(nil, c, asJSON)
			room := 16 + n*(64+base64.StdEncoding.EncodedLen(512))
			if len(first) > room {
				t.Errorf("%d keys take %d bytes, measured %d", n, len(first), room)
			}
			if asJSON && !json.Valid(first) {
				t.Errorf("not JSON: %s", fmt.Sprint(n))
			}
		}
	}
}
