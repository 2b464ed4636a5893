package doctor_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/etsi014/doctor"
	"github.com/quietline/quietline/etsi014/etsitest"
	"github.com/quietline/quietline/etsi014/identity"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var loopback = []net.IP{net.IPv4(127, 0, 0, 1)}

// ward is a KME and an SAE, healthy until a test spoils something.
type ward struct {
	dir       string
	ca, other *etsitest.CA
	door, sae tls.Certificate
	server    *tls.Config
	handler   http.Handler
	cfg       doctor.Config
	bare      bool // neither a certificate of its own nor a CA file
}

func newWard(t *testing.T) *ward {
	t.Helper()
	w := &ward{dir: t.TempDir(), ca: etsitest.NewCA(t, "hospital CA")}
	w.other = etsitest.NewCA(t, "vendor CA")
	w.door = w.ca.Issue(t, etsitest.Leaf{CN: "kme", Server: true, IPs: loopback, To: late()})
	w.sae = w.ca.Issue(t, etsitest.Leaf{
		CN: "box 7", URIs: []string{"urn:quietline:sae:tokyo"}, To: late(),
	})
	w.server = &tls.Config{ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: w.ca.Pool()}
	cert, key := etsitest.WriteFiles(t, w.dir, "kme", w.door)
	etsitest.WriteFile(t, w.dir+"/ca.crt", w.ca.PEM())
	live, err := identity.Open(identity.Config{
		Pairs: []identity.Pair{{Cert: cert, Key: key}}, CA: w.dir + "/ca.crt",
		Rules: []identity.Rule{{SAE: "tokyo"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	w.handler, err = etsi014.NewHandler(etsi014.HandlerConfig{
		KME: &etsitest.KME{}, Identify: live.Identify,
	})
	if err != nil {
		t.Fatal(err)
	}
	return w
}

func late() time.Time { return time.Now().Add(60 * 24 * time.Hour) }

// examine starts the KME and lets the SAE look at it.
func (w *ward) examine(t *testing.T) []doctor.Check {
	t.Helper()
	cert, key := etsitest.WriteFiles(t, w.dir, "sae", w.sae)
	if w.cfg.CA == "" {
		w.cfg.CA = w.dir + "/ca.crt"
	}
	w.cfg.Cert, w.cfg.Key = cert, key
	if w.bare {
		w.cfg.Cert, w.cfg.Key, w.cfg.CA = "", "", ""
	}
	w.server.Certificates = []tls.Certificate{w.door}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := etsi014.NewServer(w.handler, w.server, nil)
	done := make(chan error, 1)
	go func() { done <- server.ServeTLS(l, "", "") }()
	defer func() {
		_ = server.Shutdown(context.WithoutCancel(t.Context()))
		<-done
	}()
	if w.cfg.Addr == "" {
		w.cfg.Addr = l.Addr().String()
	}
	return doctor.Examine(t.Context(), w.cfg)
}

func TestHealthy(t *testing.T) {
	var names []string
	for _, c := range newWard(t).examine(t) {
		if c.Verdict != doctor.OK || c.Hint != "" || c.Found == "" {
			t.Errorf("%+v", c)
		}
		names = append(names, c.Name)
		if _, err := json.Marshal(c); err != nil {
			t.Error(err)
		}
	}
	want := "files, own certificate, connect, handshake, KME certificate, client authorities, " +
		"our certificate at the KME, clock"
	if got := strings.Join(names, ", "); got != want {
		t.Errorf("got %s", got)
	}
}

// Each fault is found, by the right check, with the side that refused and a
// hint that leads on.
func TestFaults(t *testing.T) {
	uri := []string{"urn:quietline:sae:tokyo"}
	hour := time.Hour
	for _, tc := range []struct {
		name    string
		spoil   func(t *testing.T, w *ward)
		check   string
		verdict doctor.Verdict
		found   string
		hint    string
	}{
		{"no CA file", func(_ *testing.T, w *ward) { w.cfg.CA = w.dir + "/no.crt" },
			"files", doctor.Fail, "no.crt", "correct the file"},
		{"own expired", func(t *testing.T, w *ward) {
			w.sae = w.ca.Issue(t, etsitest.Leaf{URIs: uri, To: time.Now().Add(-hour / 2)})
		}, "own certificate", doctor.Fail, "expired on", "renew it"},
		{"own of tomorrow", func(t *testing.T, w *ward) {
			w.sae = w.ca.Issue(t, etsitest.Leaf{URIs: uri, From: time.Now().Add(hour), To: late()})
		}, "own certificate", doctor.Fail, "not valid before", "this machine's clock"},
		{"own for servers", func(t *testing.T, w *ward) {
			w.sae = w.ca.Issue(t, etsitest.Leaf{URIs: uri, Server: true})
		}, "own certificate", doctor.Fail, "urn:quietline:sae:tokyo", "clientAuth"},
		{"own ends soon", func(t *testing.T, w *ward) {
			w.sae = w.ca.Issue(t, etsitest.Leaf{URIs: uri, From: time.Now().Add(-80 * hour)})
		}, "own certificate", doctor.Warn, "ends in", "renew"},
		{"no port", func(_ *testing.T, w *ward) { w.cfg.Addr = "kme" },
			"connect", doctor.Fail, "missing port", "host:port"},
		{"nobody there", func(_ *testing.T, w *ward) { w.cfg.Addr = "127.0.0.1:1" },
			"connect", doctor.Fail, "refused", "firewall"},
		{"old TLS", func(_ *testing.T, w *ward) {
			w.server.MinVersion, w.server.MaxVersion = tls.VersionTLS10, tls.VersionTLS11
		}, "handshake", doctor.Fail, "the KME refused: tls: protocol version", "another version"},
		{"TLS 1.2 only", func(_ *testing.T, w *ward) { w.server.MaxVersion = tls.VersionTLS12 },
			"handshake", doctor.Warn, "TLS 1.2", "X25519MLKEM768"},
		{"KME expired", func(t *testing.T, w *ward) {
			w.door = w.ca.Issue(t, etsitest.Leaf{Server: true, IPs: loopback,
				From: time.Now().Add(-2 * hour), To: time.Now().Add(-hour)})
		}, "KME certificate", doctor.Fail, "we refuse it: it ended on", "renew"},
		{"KME from the future", func(t *testing.T, w *ward) {
			w.door = w.ca.Issue(t, etsitest.Leaf{Server: true, IPs: loopback,
				From: time.Now().Add(hour)})
		}, "KME certificate", doctor.Fail, "we refuse it: it begins on", "clock"},
		{"KME of another name", func(_ *testing.T, w *ward) { w.cfg.ServerName = "kme.example" },
			"KME certificate", doctor.Fail, "does not carry the name kme.example", "issue it"},
		{"KME certificate for clients", func(t *testing.T, w *ward) {
			w.door = w.ca.Issue(t, etsitest.Leaf{IPs: loopback})
		}, "KME certificate", doctor.Fail, "not for servers", "serverAuth"},
		{"KME of another authority", func(t *testing.T, w *ward) {
			w.door = w.other.Issue(t, etsitest.Leaf{Server: true, IPs: loopback})
		}, "KME certificate", doctor.Fail, `issuer "CN=vendor CA"`, "CA file, or let the KME"},
		{"KME without its intermediate", func(t *testing.T, w *ward) {
			w.door = w.ca.Sub(t, "KME CA").Issue(t, etsitest.Leaf{Server: true, IPs: loopback})
			w.door.Certificate = w.door.Certificate[:1]
		}, "KME certificate", doctor.Fail, "unknown authority", "intermediate"},
		{"KME asks for nothing", func(_ *testing.T, w *ward) {
			w.server.ClientAuth = tls.NoClientCert
		}, "client authorities", doctor.Fail, "no client certificate", "open to everybody"},
		{"KME takes another authority", func(_ *testing.T, w *ward) {
			w.server.ClientCAs = w.other.Pool()
		}, "client authorities", doctor.Fail, "takes certificates of CN=vendor CA; ours is of " +
			"CN=hospital CA", "give the KME our CA"},
		{"KME takes another authority, TLS 1.2", func(_ *testing.T, w *ward) {
			w.server.ClientCAs, w.server.MaxVersion = w.other.Pool(), tls.VersionTLS12
		}, "handshake", doctor.Fail, "the KME refused", "CA that signed our certificate"},
		{"KME refuses silently", func(_ *testing.T, w *ward) {
			w.server.ClientAuth = tls.RequireAnyClientCert
			w.server.VerifyPeerCertificate = func([][]byte, [][]*x509.Certificate) error {
				return io.EOF
			}
		}, "our certificate at the KME", doctor.Fail, "the KME refused", "deny list"},
		{"KME does not know the SAE", func(t *testing.T, w *ward) {
			w.sae = w.ca.Issue(t, etsitest.Leaf{CN: "box 8", To: late()})
		}, "our certificate at the KME", doctor.Fail, "knows no SAE by it", "enrol"},
		{"KME's clock", func(_ *testing.T, w *ward) {
			w.handler = http.HandlerFunc(func(rw http.ResponseWriter, _ *http.Request) {
				rw.Header().Set("Date", time.Now().Add(-hour).UTC().Format(http.TimeFormat))
			})
		}, "clock", doctor.Warn, "1h0m", "NTP"},
		{"KME without a date", func(_ *testing.T, w *ward) {
			w.handler = http.HandlerFunc(func(rw http.ResponseWriter, _ *http.Request) {
				rw.Header()["Date"] = nil
			})
		}, "clock", doctor.Warn, "no date", "by hand"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := newWard(t)
			tc.spoil(t, w)
			checks := w.examine(t)
			for _, c := range checks {
				if c.Name == tc.check && c.Verdict == tc.verdict {
					if !strings.Contains(c.Found, tc.found) || !strings.Contains(c.Hint, tc.hint) {
						t.Errorf("found %q, hint %q", c.Found, c.Hint)
					}
					return
				}
			}
			t.Errorf("no such check: %+v", checks)
		})
	}
}

// TestAllFaults: a certificate with several faults has them told at once, for
// whoever mends it makes it anew once.
func TestAllFaults(t *testing.T) {
	w := newWard(t)
	w.door = w.other.Issue(t, etsitest.Leaf{CN: "kme", From: time.Now().Add(-2 * time.Hour),
		To: time.Now().Add(-time.Hour)})
	var all []string
	for _, c := range w.examine(t) {
		if c.Name == "KME certificate" {
			if c.Verdict != doctor.Fail || c.Hint == "" {
				t.Errorf("%+v", c)
			}
			all = append(all, c.Found)
		}
	}
	text := strings.Join(all, "\n")
	for _, want := range []string{"ended on", "does not carry the name", "not for servers", "vendor CA"} {
		if !strings.Contains(text, want) {
			t.Errorf("lacks %q:\n%s", want, text)
		}
	}
	if len(all) != 4 {
		t.Errorf("%d faults:\n%s", len(all), text)
	}
}

// TestBare: without files of our own the doctor looks at the rest, sends
// nothing, and says what it did not look at.
func TestBare(t *testing.T) {
	for name, seed := range map[string]func(*ward){
		"well": func(*ward) {},
		"expired": func(w *ward) {
			w.door = w.ca.Issue(t, etsitest.Leaf{Server: true, IPs: loopback, From: time.Unix(1e9, 0), To: time.Unix(1.1e9, 0)})
		},
		"TLS 1.2": func(w *ward) { w.server.MaxVersion = tls.VersionTLS12 },
	} {
		w := newWard(t)
		w.bare = true
		seed(w)
		verdicts, said := map[string]doctor.Verdict{}, ""
		for _, c := range w.examine(t) {
			verdicts[c.Name] = c.Verdict
			said += c.Found + "\n"
		}
		for _, check := range []string{"own certificate", "KME authority"} {
			if verdicts[check] != doctor.Warn {
				t.Errorf("%s: %s is %q", name, check, verdicts[check])
			}
		}
		want := map[string]doctor.Verdict{"expired": doctor.Fail}[name]
		if want == "" {
			want = doctor.Warn // good as far as can be seen
		}
		if verdicts["KME certificate"] != want || verdicts["our certificate at the KME"] != "" ||
			!strings.Contains(said, "not checked") || !strings.Contains(said, "CN=hospital CA") {
			t.Errorf("%s: %v\n%s", name, verdicts, said)
		}
	}
}

// Ports that are no door: plain HTTP, and one that hangs up.
func TestOtherPorts(t *testing.T) {
	for want, answer := range map[string]string{
		"speaks no TLS":                 "HTTP/1.1 400 Bad Request\r\n\r\n",
		"closed the connection without": "",
	} {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan struct{})
		go func() {
			defer close(done)
			c, err := l.Accept()
			if err != nil {
				return
			}
			defer c.Close()
			buf := make([]byte, 4096)
			_, _ = c.Read(buf)
			_, _ = io.WriteString(c, answer)
		}()
		w := newWard(t)
		w.cfg.Addr = l.Addr().String()
		checks := w.examine(t)
		last := checks[len(checks)-1]
		if last.Name != "handshake" || !strings.Contains(last.Found, want) {
			t.Errorf("want %q: %+v", want, last)
		}
		_ = l.Close()
		<-done
	}
}

// A KME that says nothing is given up in time.
func TestSilence(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	w := newWard(t)
	w.cfg.Addr, w.cfg.Timeout = l.Addr().String(), 50*time.Millisecond
	checks := w.examine(t)
	if last := checks[len(checks)-1]; last.Name != "handshake" || last.Verdict != doctor.Fail {
		t.Errorf("%+v", last)
	}
}
