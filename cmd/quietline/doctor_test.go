package main

import (
	"bytes"
	"crypto/tls"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/etsi014/doctor"
	"github.com/quietline/quietline/etsi014/etsitest"
)

// doctor runs quietline doctor tls as tokyo.
func (h *hall) doctor(addr string, args ...string) (code int, out, stderr string) {
	line := slices.Concat([]string{"doctor", "tls", addr}, h.files("tokyo"), args)
	var o, e bytes.Buffer
	code = run(line, &o, &e)
	return code, o.String(), e.String()
}

func TestDoctorAllIsWell(t *testing.T) {
	h := newHall(t)
	code, out, stderr := h.doctor(h.addr)
	if code != exitOK || stderr != "" || strings.Contains(out, "next: ") {
		t.Errorf("exit %d: %s%s", code, out, stderr)
	}
	for _, want := range []string{"files", "connect", "KME certificate", "clock"} {
		if !strings.Contains(out, "ok   "+want+": ") {
			t.Errorf("%q lacks %q", out, want)
		}
	}
	code, out, _ = h.doctor(h.addr, "--json")
	var answer doctorAnswer
	if err := json.Unmarshal([]byte(out), &answer); err != nil || code != exitOK || !answer.OK ||
		len(answer.Checks) < 6 || answer.Address != h.addr {
		t.Errorf("exit %d, %v: %+v", code, err, answer)
	}
	if h.kme.Left() != 10 {
		t.Error("the doctor drew a key")
	}
}

// server is a TLS door whose faults a test seeds.
func (h *hall) server(t *testing.T, cert tls.Certificate, change func(*tls.Config)) string {
	t.Helper()
	cfg := &tls.Config{Certificates: []tls.Certificate{cert},
		ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: h.ca.Pool()}
	if change != nil {
		change(cfg)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := etsi014.NewServer(http.NotFoundHandler(), cfg, nil)
	done := make(chan struct{})
	go func() { defer close(done); _ = s.ServeTLS(l, "", "") }()
	t.Cleanup(func() { _ = s.Close(); <-done })
	return l.Addr().String()
}

// TestDoctorTLSNamesTheFault seeds one fault at a time, and wants its cause and
// a next step for it, in text and as JSON.
func TestDoctorTLSNamesTheFault(t *testing.T) {
	h := newHall(t)
	other := etsitest.NewCA(t, "vendor CA")
	leaf := etsitest.Leaf{CN: "kme", Server: true, IPs: []net.IP{net.IPv4(127, 0, 0, 1)}, To: later()}
	issue := func(change func(*etsitest.Leaf)) tls.Certificate {
		l := leaf
		change(&l)
		return h.ca.Issue(t, l)
	}
	good := h.ca.Issue(t, leaf)
	for _, c := range []struct {
		name  string
		addr  func(t *testing.T) string
		args  []string
		check string // that fails
		want  string // in what it found
	}{
		{"refused connection", closedPort, nil, "connect", "refused"},
		{"no TLS", plainPort, nil, "handshake", "speaks no TLS"},
		{"another CA", func(t *testing.T) string { return h.server(t, other.Issue(t, leaf), nil) }, nil,
			"KME certificate", "vendor CA"},
		{"missing SAN", func(t *testing.T) string {
			return h.server(t, issue(func(l *etsitest.Leaf) { l.IPs = nil }), nil)
		}, nil, "KME certificate", "127.0.0.1"},
		{"another name", func(t *testing.T) string { return h.server(t, good, nil) },
			[]string{"--name", "kme.example"}, "KME certificate", "kme.example"},
		{"expired", func(t *testing.T) string {
			return h.server(t, issue(func(l *etsitest.Leaf) {
				l.From, l.To = time.Now().Add(-2*time.Hour), time.Now().Add(-time.Hour)
			}), nil)
		}, nil, "KME certificate", "ended on"},
		{"not yet valid", func(t *testing.T) string {
			return h.server(t, issue(func(l *etsitest.Leaf) { l.From = time.Now().Add(time.Hour) }), nil)
		}, nil, "KME certificate", "begins on"},
		{"wrong usage", func(t *testing.T) string {
			return h.server(t, issue(func(l *etsitest.Leaf) { l.Server = false }), nil)
		}, nil, "KME certificate", "not for servers"},
		{"intermediate missing", func(t *testing.T) string {
			cert := h.ca.Sub(t, "branch CA").Issue(t, leaf)
			cert.Certificate = cert.Certificate[:1]
			return h.server(t, cert, nil)
		}, nil, "KME certificate", "branch CA"},
		{"client certificate not accepted, TLS 1.3", func(t *testing.T) string {
			return h.server(t, good, func(cfg *tls.Config) { cfg.ClientCAs = other.Pool() })
		}, nil, "client authorities", "vendor CA"},
		{"client certificate not accepted, TLS 1.2", func(t *testing.T) string {
			return h.server(t, good, func(cfg *tls.Config) {
				cfg.ClientCAs, cfg.MaxVersion = other.Pool(), tls.VersionTLS12
			})
		}, nil, "handshake", "the KME refused"},
		{"no client certificate wanted", func(t *testing.T) string {
			return h.server(t, good, func(cfg *tls.Config) { cfg.ClientAuth = tls.NoClientCert })
		}, nil, "client authorities", "no client certificate"},
		{"TLS 1.1 only", func(t *testing.T) string {
			return h.server(t, good, func(cfg *tls.Config) {
				cfg.MinVersion, cfg.MaxVersion = tls.VersionTLS10, tls.VersionTLS11
			})
		}, nil, "handshake", "protocol version"},
		{"swapped key", func(*testing.T) string { return h.addr },
			[]string{"--key", h.path("kochi.key")}, "files", "tokyo.crt"},
		{"no CA file", func(*testing.T) string { return h.addr },
			[]string{"--ca", h.path("none")}, "files", "none"},
	} {
		t.Run(c.name, func(t *testing.T) {
			addr := c.addr(t)
			code, out, stderr := h.doctor(addr, append(c.args, "--json")...)
			var answer doctorAnswer
			if err := json.Unmarshal([]byte(out), &answer); err != nil {
				t.Fatalf("%v: %s%s", err, out, stderr)
			}
			if code != exitFailure || answer.OK {
				t.Errorf("exit %d, ok %v", code, answer.OK)
			}
			found := slices.ContainsFunc(answer.Checks, func(k doctor.Check) bool {
				return k.Name == c.check && k.Verdict == doctor.Fail && k.Hint != "" &&
					strings.Contains(k.Found, c.want)
			})
			if !found {
				t.Errorf("no check %q failed with %q: %+v", c.check, c.want, answer.Checks)
			}
			code, out, _ = h.doctor(addr, c.args...)
			if code != exitFailure || !strings.Contains(out, "fail "+c.check+": ") ||
				!strings.Contains(out, "\n     next: ") {
				t.Errorf("exit %d: %s", code, out)
			}
		})
	}
}

// closedPort is an address where nobody listens.
func closedPort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_ = l.Close()
	return l.Addr().String()
}

// plainPort is an HTTP server without TLS.
func plainPort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = c.Read(make([]byte, 1))
			_, _ = io.WriteString(c, "HTTP/1.1 400 Bad Request\r\n\r\n")
			_ = c.Close()
		}
	}()
	t.Cleanup(func() { _ = l.Close(); <-done })
	return l.Addr().String()
}

// TestDoctorTLSBare: without files of one's own the rest is looked at, and what
// could not be is said.
func TestDoctorTLSBare(t *testing.T) {
	h := newHall(t)
	var out, stderr bytes.Buffer
	if code := run([]string{"doctor", "tls", h.addr}, &out, &stderr); code != exitFailure {
		t.Errorf("exit %d: %s", code, stderr.String())
	}
	for _, want := range []string{"warn own certificate: none was given: not checked are",
		"warn KME authority: none was given: not checked is", "warn KME certificate: good as far as can be seen",
		"next: give --cert and --key", "next: give --ca"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("lacks %q:\n%s", want, out.String())
		}
	}
}

func TestDoctorWrongUse(t *testing.T) {
	h := newHall(t)
	for _, args := range [][]string{
		{"doctor", "tls"}, {"doctor", "tls", "kme"}, {"doctor", "tls", "kme:"},
		{"doctor", "tls", h.addr, h.addr}, {"doctor", "tls", h.addr, "--cert", os.DevNull},
		{"doctor", "tls", h.addr, "--key", os.DevNull}, {"doctor", "nobody"},
	} {
		var out, stderr bytes.Buffer
		code := run(args, &out, &stderr)
		if code != exitUsage || !strings.Contains(stderr.String(), "hint: ") {
			t.Errorf("%v: exit %d, %q", args, code, stderr.String())
		}
	}
}
