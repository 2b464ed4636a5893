package probe_test

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"net"
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/etsi014/etsitest"
	"github.com/quietline/quietline/etsi014/identity"
	"github.com/quietline/quietline/etsi014/probe"
)

// mutant is one fault that is put into our own server. The zero value is none.
type mutant struct {
	config func(*etsi014.HandlerConfig)
	tls    func(testing.TB, *tls.Config)
	wrap   func(http.Handler) http.Handler
}

// bench makes certificates once for all mutants.
type bench struct {
	ca   *etsitest.CA
	door tls.Certificate
	live *identity.Live
	saes map[string]tls.Certificate
}

func newBench(t testing.TB) *bench {
	t.Helper()
	b := &bench{ca: etsitest.NewCA(t, "test CA"), saes: map[string]tls.Certificate{}}
	b.door = b.ca.Issue(t, etsitest.Leaf{Server: true, IPs: []net.IP{net.IPv4(127, 0, 0, 1)}})
	dir := t.TempDir()
	cert, key := etsitest.WriteFiles(t, dir, "kme", b.door)
	etsitest.WriteFile(t, dir+"/ca.crt", b.ca.PEM())
	cfg := identity.Config{Pairs: []identity.Pair{{Cert: cert, Key: key}}, CA: dir + "/ca.crt"}
	for _, name := range []string{"tokyo", "kochi", "osaka"} {
		cfg.Rules = append(cfg.Rules, identity.Rule{SAE: etsi014.SAEID(name)})
		b.saes[name] = b.ca.Issue(t, etsitest.Leaf{
			URIs: []string{identity.DefaultURI(etsi014.SAEID(name))},
		})
	}
	var err error
	if b.live, err = identity.Open(cfg); err != nil {
		t.Fatal(err)
	}
	return b
}

// serve runs our server with a fault until the test ends and returns how to
// probe it.
func (b *bench) serve(t testing.TB, m mutant) probe.Config {
	t.Helper()
	cfg := etsi014.HandlerConfig{
		KME: &etsitest.KME{Stock: 1000}, Identify: b.live.Identify,
		Limits: etsi014.Limits{MaxKeys: 128},
	}
	if m.config != nil {
		m.config(&cfg)
	}
	var h http.Handler
	h, err := etsi014.NewHandler(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if m.wrap != nil {
		h = m.wrap(h)
	}
	tlsConfig := &tls.Config{
		Certificates: []tls.Certificate{b.door}, MinVersion: tls.VersionTLS12,
		ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: b.ca.Pool(),
	}
	if m.tls != nil {
		m.tls(t, tlsConfig)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := etsi014.NewServer(h, tlsConfig, nil)
	done := make(chan error, 1)
	go func() { done <- etsi014.Serve(server, l, etsi014.Bounds{}) }()
	t.Cleanup(func() {
		if err := server.Shutdown(context.WithoutCancel(t.Context())); err != nil {
			t.Error(err)
		}
		<-done
	})
	party := func(name string) probe.Party {
		return probe.Party{
			SAE: etsi014.SAEID(name), URL: "https://" + l.Addr().String(), TLS: &tls.Config{
				RootCAs: b.ca.Pool(), Certificates: []tls.Certificate{b.saes[name]},
			},
		}
	}
	third := party("osaka")
	return probe.Config{Master: party("tokyo"), Slave: party("kochi"), Third: &third}
}

// ask runs one case.
func ask(t testing.TB, cfg probe.Config, name string) probe.Result {
	t.Helper()
	cfg.Only = func(s string) bool { return s == name }
	var got []probe.Result
	_, err := probe.Run(t.Context(), cfg, func(r probe.Result) { got = append(got, r) })
	if err != nil {
		t.Fatal(err)
	}
	if len(got) != 1 {
		t.Fatalf("%s: %d results", name, len(got))
	}
	return got[0]
}

// reply lets a fault change an answer that our server gave. A next that is
// called again asks our server once more.
func reply(change func(r *http.Request, a *httptest.ResponseRecorder)) mutant {
	return mutant{wrap: func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			rec := httptest.NewRecorder()
			next.ServeHTTP(rec, r)
			change(r, rec)
			for name, values := range rec.Header() {
				if name != "Content-Length" {
					w.Header()[name] = values
				}
			}
			w.WriteHeader(rec.Code)
			_, _ = w.Write(rec.Body.Bytes())
		})
	}}
}

// edit changes the JSON object of every answer with a code.
func edit(code int, change func(m map[string]any)) mutant {
	return reply(func(_ *http.Request, a *httptest.ResponseRecorder) {
		var m map[string]any
		if a.Code != code || json.Unmarshal(a.Body.Bytes(), &m) != nil {
			return
		}
		change(m)
		b, err := json.Marshal(m)
		if err != nil {
			panic(err)
		}
		a.Body.Reset()
		_, _ = a.Body.Write(b)
	})
}

// eachKey changes the keys of every container.
func eachKey(change func(i int, k map[string]any)) mutant {
	return edit(200, func(m map[string]any) {
		list, _ := m["keys"].([]any)
		for i, k := range list {
			change(i, k.(map[string]any))
		}
	})
}

// member sets a member of every 200, or removes it with nil.
func member(name string, value any) mutant {
	return edit(200, func(m map[string]any) {
		if m[name] = value; value == nil {
			delete(m, name)
		}
	})
}

// message sets the text of every Error.
func message(code int, text any) mutant {
	return edit(code, func(m map[string]any) { m["message"] = text })
}

// recode answers to where our server answers from.
func recode(from, to int) mutant {
	return reply(func(_ *http.Request, a *httptest.ResponseRecorder) {
		if a.Code == from {
			a.Code = to
		}
	})
}

// header sets a header of every answer with a code.
func header(code int, name, value string) mutant {
	return reply(func(_ *http.Request, a *httptest.ResponseRecorder) {
		if a.Code == code {
			a.Header().Set(name, value)
		}
	})
}
