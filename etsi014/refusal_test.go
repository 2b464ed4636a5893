package etsi014_test

import (
	"bytes"
	"crypto/tls"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/etsi014/etsitest"
)

// heard is a log that several goroutines write.
type heard struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (h *heard) Write(b []byte) (int, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.b.Write(b)
}

func (h *heard) String() string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.b.String()
}

// TestRefusalsTellBothSides: whoever refuses a certificate says whose it was,
// what it was held against and the next step, in the door's log and in the
// client's error, whichever side refuses.
func TestRefusalsTellBothSides(t *testing.T) {
	ca, other := etsitest.NewCA(t, "hospital CA"), etsitest.NewCA(t, "vendor CA")
	door := etsitest.Leaf{CN: "kme", Server: true, IPs: []net.IP{net.IPv4(127, 0, 0, 1)}}
	sae := etsitest.Leaf{CN: "box 7", URIs: []string{"urn:quietline:sae:tokyo"}}
	old := func(l etsitest.Leaf) etsitest.Leaf {
		l.From, l.To = time.Now().Add(-2*time.Hour), time.Now().Add(-time.Hour)
		return l
	}
	unnamed := door
	unnamed.IPs = nil
	for name, tc := range map[string]struct {
		door, sae    tls.Certificate
		atDoor, atUs []string
	}{
		"client of another CA": {ca.Issue(t, door), other.Issue(t, sae),
			[]string{"we refuse the other end's certificate", `subject "CN=box 7"`, `issuer "CN=vendor CA"`,
				"held against the authorities trusted here", "trust the CA of that issuer here"},
			[]string{"the other end refuses our certificate", `subject "CN=box 7"`, `issuer "CN=vendor CA"`,
				"unknown certificate authority", "quietline doctor"}},
		"client expired": {ca.Issue(t, door), ca.Issue(t, old(sae)),
			[]string{`subject "CN=box 7"`, "expired", "renew it there, or set the clock that is wrong"},
			[]string{`subject "CN=box 7"`, "valid ", "expired certificate", "its log says what it was held against"}},
		"client for servers": {ca.Issue(t, door), ca.Issue(t, etsitest.Leaf{CN: "box 8", Server: true, URIs: sae.URIs}),
			[]string{`subject "CN=box 8"`, "clientAuth or serverAuth"}, []string{`subject "CN=box 8"`, "bad certificate"}},
		"door of another CA": {other.Issue(t, door), ca.Issue(t, sae),
			[]string{"the other end refuses our certificate", "bad certificate", "its log says what it was held against"},
			[]string{"we refuse the other end's certificate", `subject "CN=kme"`, `issuer "CN=vendor CA"`,
				"trust the CA of that issuer here"}},
		"door expired": {ca.Issue(t, old(door)), ca.Issue(t, sae), []string{"refuses our certificate"},
			[]string{`subject "CN=kme"`, "expired", "renew it there"}},
		"door of another name": {ca.Issue(t, unnamed), ca.Issue(t, sae), []string{"refuses our certificate"},
			[]string{`subject "CN=kme"`, "127.0.0.1", "call it by a name that it carries"}},
	} {
		t.Run(name, func(t *testing.T) {
			log := new(heard)
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			s := etsi014.NewServer(http.NotFoundHandler(), &tls.Config{Certificates: []tls.Certificate{tc.door},
				ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: ca.Pool()},
				slog.New(slog.NewTextHandler(log, nil)))
			done := make(chan error, 1)
			go func() { done <- etsi014.Serve(s, l, etsi014.Bounds{}) }()
			c, err := etsi014.NewClient(etsi014.ClientConfig{URLs: []string{"https://" + l.Addr().String()},
				TLS: func() *tls.Config {
					return &tls.Config{RootCAs: ca.Pool(), Certificates: []tls.Certificate{tc.sae}}
				}})
			if err != nil {
				t.Fatal(err)
			}
			_, err = c.Status(t.Context(), "kochi")
			for limit := time.Now().Add(10 * time.Second); log.String() == "" && time.Now().Before(limit); {
				time.Sleep(time.Millisecond) // the door hears of it a moment later
			}
			c.Close()
			_ = s.Close()
			<-done
			if err == nil {
				t.Fatal("it was taken")
			}
			for _, w := range tc.atUs {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("the client says %v\nlacks %q", err, w)
				}
			}
			said := strings.ReplaceAll(log.String(), `\"`, `"`)
			for _, w := range tc.atDoor {
				if !strings.Contains(said, w) {
					t.Errorf("the door says %s\nlacks %q", said, w)
				}
			}
		})
	}
}
