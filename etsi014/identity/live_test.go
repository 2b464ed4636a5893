package identity_test

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/quietline/quietline/etsi014/etsitest"
	"github.com/quietline/quietline/etsi014/identity"
	"github.com/quietline/quietline/secret"
)

// site is a folder with the files of a KME, and an SAE's certificate.
type site struct {
	dir string
	ca  *etsitest.CA
	cfg identity.Config
	sae tls.Certificate
}

func newSite(t testing.TB) *site {
	t.Helper()
	s := &site{dir: t.TempDir(), ca: etsitest.NewCA(t, "test CA")}
	s.cfg = identity.Config{
		Pairs: []identity.Pair{s.pair(t, "kme", etsitest.Leaf{Server: true})},
		CA:    s.dir + "/ca.crt",
		Rules: []identity.Rule{{SAE: "tokyo"}},
	}
	etsitest.WriteFile(t, s.cfg.CA, s.ca.PEM())
	s.sae = s.ca.Issue(t, etsitest.Leaf{URIs: []string{"urn:quietline:sae:tokyo"}})
	return s
}

func (s *site) pair(t testing.TB, name string, l etsitest.Leaf) identity.Pair {
	l.CN, l.DNS = name, []string{"kme.example"}
	cert, key := etsitest.WriteFiles(t, s.dir, name, s.ca.Issue(t, l))
	return identity.Pair{Cert: cert, Key: key}
}

// shake runs one handshake over loopback and returns both sides' view.
func shake(
	t testing.TB, server, client *tls.Config,
) (door, sae tls.ConnectionState, doorErr, saeErr error) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var wg sync.WaitGroup
	wg.Go(func() {
		c, err := l.Accept()
		if err != nil {
			doorErr = err
			return
		}
		defer c.Close()
		s := tls.Server(c, server)
		if doorErr = s.HandshakeContext(t.Context()); doorErr != nil {
			return
		}
		door = s.ConnectionState()
		_, doorErr = s.Write([]byte("x"))
	})
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	s := tls.Client(c, client)
	if saeErr = s.HandshakeContext(t.Context()); saeErr == nil {
		sae = s.ConnectionState()
		_, saeErr = s.Read(make([]byte, 1)) // in TLS 1.3 a refusal comes here
	}
	wg.Wait()
	return door, sae, doorErr, saeErr
}

func (s *site) client(certs ...tls.Certificate) *tls.Config {
	return &tls.Config{RootCAs: s.ca.Pool(), ServerName: "kme.example", Certificates: certs}
}

func open(t testing.TB, cfg identity.Config) *identity.Live {
	t.Helper()
	l, err := identity.Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func TestHandshake(t *testing.T) {
	s := newSite(t)
	live := open(t, s.cfg)
	door, sae, err, saeErr := shake(t, live.Server(), s.client(s.sae))
	if err != nil || saeErr != nil {
		t.Fatal(err, saeErr)
	}
	who, err := live.Identify(&door)
	if err != nil || who.SAE != "tokyo" || who.Cert != sha256.Sum256(s.sae.Leaf.Raw) {
		t.Errorf("got %v, %v", who, err)
	}
	if sae.Version != tls.VersionTLS13 || sae.CurveID != tls.X25519MLKEM768 {
		t.Errorf("got version %x, group %v", sae.Version, sae.CurveID)
	}
	again, err := live.Identify(&door)
	if err != nil || again != who {
		t.Errorf("second time: got %v, %v", again, err)
	}
}

func TestHandshakeRefusals(t *testing.T) {
	s := newSite(t)
	live := open(t, s.cfg)
	foreign := etsitest.NewCA(t, "another CA")
	uri := []string{"urn:quietline:sae:tokyo"}
	old := s.ca.Issue(t, etsitest.Leaf{URIs: uri, To: time.Now().Add(-time.Minute)})
	for name, cfg := range map[string]*tls.Config{
		"no certificate":     s.client(),
		"foreign authority":  s.client(foreign.Issue(t, etsitest.Leaf{URIs: uri})),
		"expired":            s.client(old),
		"server certificate": s.client(s.ca.Issue(t, etsitest.Leaf{URIs: uri, Server: true})),
		"TLS 1.1": {
			RootCAs: s.ca.Pool(), ServerName: "kme.example", MinVersion: tls.VersionTLS10,
			MaxVersion: tls.VersionTLS11, Certificates: []tls.Certificate{s.sae},
		},
		"no HTTP/1.1": {
			RootCAs: s.ca.Pool(), ServerName: "kme.example", NextProtos: []string{"h2"},
			Certificates: []tls.Certificate{s.sae},
		},
	} {
		if _, _, err, saeErr := shake(t, live.Server(), cfg); err == nil || saeErr == nil {
			t.Errorf("%s: taken: %v, %v", name, err, saeErr)
		}
	}
	old12 := s.client(s.sae)
	old12.MaxVersion = tls.VersionTLS12
	if _, _, err, saeErr := shake(t, live.Server(), old12); err != nil || saeErr != nil {
		t.Errorf("TLS 1.2: %v, %v", err, saeErr)
	}
}

func TestIdentifyWithoutCertificate(t *testing.T) {
	s := newSite(t)
	live := open(t, s.cfg)
	for name, cs := range map[string]*tls.ConnectionState{
		"no TLS": nil, "no certificate": {},
		"not verified": {PeerCertificates: []*x509.Certificate{s.sae.Leaf}},
	} {
		if _, err := live.Identify(cs); !errors.Is(err, identity.ErrNoCertificate) {
			t.Errorf("%s: got %v", name, err)
		}
	}
}

// The verdict on a client is not that of the handshake alone: a chain that is
// good for servers identifies no SAE.
func TestIdentifyJudgesTheChain(t *testing.T) {
	s := newSite(t)
	live := open(t, s.cfg)
	leaf := s.ca.Issue(t, etsitest.Leaf{
		URIs: []string{"urn:quietline:sae:tokyo"}, Server: true,
	}).Leaf
	_, err := live.Identify(&tls.ConnectionState{
		PeerCertificates: []*x509.Certificate{leaf},
		VerifiedChains:   [][]*x509.Certificate{{leaf, s.ca.Cert}},
	})
	if !errors.Is(err, identity.ErrNoCertificate) {
		t.Errorf("got %v", err)
	}
}

// Every connection shows its certificate: none is resumed.
func TestNoResumption(t *testing.T) {
	s := newSite(t)
	server, client := open(t, s.cfg).Server(), s.client(s.sae)
	client.ClientSessionCache = tls.NewLRUClientSessionCache(1)
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		client.MaxVersion = version
		for range 2 {
			_, sae, err, saeErr := shake(t, server, client)
			if err != nil || saeErr != nil || sae.DidResume {
				t.Errorf("resumed %v, %v, %v", sae.DidResume, err, saeErr)
			}
		}
	}
}

// An RSA and an ECDSA certificate side by side: each client gets what it can.
func TestTwoCertificates(t *testing.T) {
	s := newSite(t)
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	s.cfg.Pairs = append(s.cfg.Pairs, s.pair(t, "kme-rsa", etsitest.Leaf{Server: true, Key: key}))
	live := open(t, s.cfg)
	for suite, want := range map[uint16]x509.PublicKeyAlgorithm{
		tls.TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384:   x509.RSA,
		tls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384: x509.ECDSA,
	} {
		cfg := s.client(s.sae)
		cfg.MaxVersion, cfg.CipherSuites = tls.VersionTLS12, []uint16{suite}
		_, sae, err, saeErr := shake(t, live.Server(), cfg)
		if err != nil || saeErr != nil {
			t.Fatal(err, saeErr)
		}
		if got := sae.PeerCertificates[0].PublicKeyAlgorithm; got != want {
			t.Errorf("got %v, want %v", got, want)
		}
	}
}

// A reload reaches the next handshake and the next request of a connection
// that lives; a faulty one changes nothing.
func TestReload(t *testing.T) {
	s := newSite(t)
	live := open(t, s.cfg)
	server := live.Server()
	door, _, err, _ := shake(t, server, s.client(s.sae))
	if err != nil {
		t.Fatal(err)
	}
	serial := func() string {
		_, sae, err, saeErr := shake(t, server, s.client(s.sae))
		if err != nil || saeErr != nil {
			t.Fatal(err, saeErr)
		}
		return sae.PeerCertificates[0].SerialNumber.String()
	}
	first := serial()
	next := s.cfg
	next.Pairs = []identity.Pair{s.pair(t, "kme", etsitest.Leaf{Server: true})}
	if err := live.Reload(next); err != nil {
		t.Fatal(err)
	}
	if serial() == first {
		t.Error("the old certificate is still shown")
	}
	bad := next
	bad.CA = s.dir + "/none"
	bad.Rules = nil
	if err := live.Reload(bad); err == nil {
		t.Error("a missing file was taken")
	}
	if who, err := live.Identify(&door); err != nil || who.SAE != "tokyo" {
		t.Errorf("after a faulty reload: got %v, %v", who, err)
	}
	next.Rules = []identity.Rule{{SAE: "tokyo-2", Value: "urn:quietline:sae:tokyo"}}
	if err := live.Reload(next); err != nil {
		t.Fatal(err)
	}
	if who, err := live.Identify(&door); err != nil || who.SAE != "tokyo-2" {
		t.Errorf("after new rules: got %v, %v", who, err)
	}
	next.Rules = nil
	if err := live.Reload(next); err != nil {
		t.Fatal(err)
	}
	if _, err := live.Identify(&door); !errors.Is(err, identity.ErrNoMatch) {
		t.Errorf("after the SAE left: got %v", err)
	}
	etsitest.WriteFile(t, next.CA, etsitest.NewCA(t, "new CA").PEM())
	next.Rules = s.cfg.Rules
	if err := live.Reload(next); err != nil {
		t.Fatal(err)
	}
	if _, err := live.Identify(&door); !errors.Is(err, identity.ErrNoCertificate) {
		t.Errorf("after the authority left: got %v", err)
	}
}

// A client's chain with an intermediate authority leads to the root, in the
// handshake and when it is judged again.
func TestIntermediate(t *testing.T) {
	s := newSite(t)
	live := open(t, s.cfg)
	sub := s.ca.Sub(t, "SAE CA")
	sae := sub.Issue(t, etsitest.Leaf{URIs: []string{"urn:quietline:sae:tokyo"}})
	door, _, err, saeErr := shake(t, live.Server(), s.client(sae))
	if err != nil || saeErr != nil {
		t.Fatal(err, saeErr)
	}
	if who, err := live.Identify(&door); err != nil || who.SAE != "tokyo" {
		t.Errorf("got %v, %v", who, err)
	}
}

// Both ends from files.
func TestClientConfig(t *testing.T) {
	s := newSite(t)
	saePair := s.pair(t, "sae", etsitest.Leaf{URIs: []string{"urn:quietline:sae:tokyo"}})
	live := open(t, s.cfg)
	sae := open(t, identity.Config{Pairs: []identity.Pair{saePair}, CA: s.cfg.CA})
	cfg := sae.Client()
	cfg.ServerName = "kme.example"
	door, view, err, saeErr := shake(t, live.Server(), cfg)
	if err != nil || saeErr != nil {
		t.Fatal(err, saeErr)
	}
	if who, err := live.Identify(&door); err != nil || who.SAE != "tokyo" {
		t.Errorf("got %v, %v", who, err)
	}
	if view.NegotiatedProtocol != "http/1.1" || view.CurveID != tls.X25519MLKEM768 {
		t.Errorf("got %q, %v", view.NegotiatedProtocol, view.CurveID)
	}
	cfg = sae.Client()
	cfg.ServerName = "other.example"
	if _, _, _, err := shake(t, live.Server(), cfg); err == nil {
		t.Error("a KME of another name was taken")
	}
}

// Every fault of a file names the file and what to do.
func TestFileFaults(t *testing.T) {
	s := newSite(t)
	good := s.cfg.Pairs[0]
	write := func(name, text string) string {
		etsitest.WriteFile(t, s.dir+"/"+name, []byte(text))
		return s.dir + "/" + name
	}
	pem, err := os.ReadFile(good.Cert)
	if err != nil {
		t.Fatal(err)
	}
	exposed := s.pair(t, "exposed", etsitest.Leaf{Server: true})
	if err := os.Chmod(exposed.Key, 0o640); err != nil {
		t.Fatal(err)
	}
	other := s.pair(t, "other", etsitest.Leaf{Server: true})
	for _, tc := range []struct {
		name string
		pair identity.Pair
		ca   string
		want []string
		is   error
	}{
		{"no certificate", identity.Pair{Cert: s.dir + "/no.crt", Key: good.Key}, s.cfg.CA,
			[]string{"/no.crt"}, os.ErrNotExist},
		{"no key", identity.Pair{Cert: good.Cert, Key: s.dir + "/no.key"}, s.cfg.CA,
			[]string{"/kme.crt", "/no.key"}, os.ErrNotExist},
		{"exposed key", exposed, s.cfg.CA, []string{"exposed.key", "chmod 600"}, secret.ErrExposed},
		{"swapped", identity.Pair{Cert: good.Key, Key: good.Key}, s.cfg.CA,
			[]string{"kme.key", "name the .crt file"}, nil},
		{"key is none", identity.Pair{Cert: good.Cert, Key: write("x.key", "x")}, s.cfg.CA,
			[]string{"x.key", "name the .key file"}, nil},
		{"another's key", identity.Pair{Cert: good.Cert, Key: other.Key}, s.cfg.CA,
			[]string{"kme.crt", "other.key", "made together"}, nil},
		{"expired", s.pair(t, "late", etsitest.Leaf{Server: true, To: time.Now().Add(-time.Hour),
			From: time.Now().Add(-2 * time.Hour)}), s.cfg.CA, []string{"late.crt", "renew"}, nil},
		{"not yet", s.pair(t, "early", etsitest.Leaf{Server: true, From: time.Now().Add(time.Hour)}),
			s.cfg.CA, []string{"early.crt", "clock"}, nil},
		{"no CA named", good, "", []string{"CA file"}, nil},
		{"no CA file", good, s.dir + "/no.ca", []string{"/no.ca"}, os.ErrNotExist},
		{"empty CA file", good, write("empty", "\n"), []string{"/empty", "no PEM certificate"}, nil},
		{"leaf as CA", good, good.Cert, []string{"kme.crt", "no authority"}, nil},
		{"key as CA", good, good.Key, []string{"kme.key", "only certificates"}, nil},
		{"damaged CA", good, write("dam", string(s.ca.PEM())+string(pem[:60])),
			[]string{"/dam", "damaged after certificate 1"}, nil},
		{"garbage CA", good, write("gar",
			"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"),
			[]string{"/gar", "certificate 1"}, nil},
		{"huge CA", good, write("huge", strings.Repeat("\n", 1<<20+1)), []string{"/huge", "longer"}, nil},
	} {
		_, err := identity.Open(identity.Config{Pairs: []identity.Pair{tc.pair}, CA: tc.ca})
		if err == nil || tc.is != nil && !errors.Is(err, tc.is) {
			t.Errorf("%s: got %v", tc.name, err)
			continue
		}
		for _, want := range tc.want {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%s: %v lacks %q", tc.name, err, want)
			}
		}
	}
	_, err = identity.Open(identity.Config{Rules: []identity.Rule{{SAE: ""}}})
	for _, want := range []string{"no certificate is named", "CA file", "rule 1"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v lacks %q: faults are told one at a time", err, want)
		}
	}
}
