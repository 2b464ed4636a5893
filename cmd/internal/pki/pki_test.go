package pki_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/quietline/quietline/cmd/internal/pki"
	"github.com/quietline/quietline/secret"
)

const day = 24 * time.Hour

func newCA(t *testing.T, name string) *pki.CA {
	t.Helper()
	ca, err := pki.NewCA(name, 30*day)
	if err != nil {
		t.Fatal(err)
	}
	return ca
}

// pair issues a certificate, writes it and loads it as TLS does.
func pair(t *testing.T, ca *pki.CA, req pki.Request) tls.Certificate {
	t.Helper()
	issued, err := ca.Issue(req)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	cert, key := filepath.Join(dir, "a.crt"), filepath.Join(dir, "a.key")
	if err := issued.Save(cert, key); err != nil {
		t.Fatal(err)
	}
	p, err := tls.LoadX509KeyPair(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func pool(ca *pki.CA) *x509.CertPool {
	p := x509.NewCertPool()
	p.AddCert(ca.Certificate())
	return p
}

// handshake runs mutual TLS over loopback and returns the name the server saw.
func handshake(t *testing.T, server, client *tls.Config) (string, error) {
	t.Helper()
	ln, err := tls.Listen("tcp", "127.0.0.1:0", server)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	type seen struct {
		uri string
		err error
	}
	result := make(chan seen, 1)
	go func() {
		conn, err := ln.Accept()
		if err != nil {
			result <- seen{err: err}
			return
		}
		defer conn.Close()
		tc := conn.(*tls.Conn)
		if err := tc.Handshake(); err != nil {
			result <- seen{err: err}
			return
		}
		cert := tc.ConnectionState().PeerCertificates[0]
		result <- seen{uri: fmt.Sprint(cert.URIs)}
	}()
	dialer := tls.Dialer{Config: client}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	conn, err := dialer.DialContext(ctx, "tcp", ln.Addr().String())
	if err == nil {
		_, _ = io.Copy(io.Discard, conn)
		_ = conn.Close()
	}
	got := <-result
	return got.uri, errors.Join(err, got.err)
}

func TestMutualTLS(t *testing.T) {
	saes, kmes := newCA(t, "SAEs of tokyo"), newCA(t, "KMEs")
	door := pair(t, saes, pki.Request{CommonName: "kme-tokyo", DNS: []string{"localhost"},
		IPs: []netip.Addr{netip.MustParseAddr("127.0.0.1")}, Server: true, Life: day})
	sae := pair(t, saes, pki.Request{CommonName: "a", SAE: "a", Client: true, Life: day})
	kme := pair(t, kmes, pki.Request{CommonName: "k", KME: "k", Server: true, Client: true, Life: day})
	tests := []struct {
		name      string
		client    tls.Certificate
		clientCAs *pki.CA
		roots     *pki.CA
		host      string
		want      string // "" = must fail
	}{
		{"sae by address", sae, saes, saes, "127.0.0.1", "[urn:quietline:sae:a]"},
		{"sae by name", sae, saes, saes, "localhost", "[urn:quietline:sae:a]"},
		{"other name", sae, saes, saes, "example.org", ""},
		{"kme as sae", kme, saes, saes, "localhost", ""},
		{"sae as kme", sae, kmes, saes, "localhost", ""},
		{"kme", kme, kmes, saes, "localhost", "[urn:quietline:kme:k]"},
		{"server as client", door, saes, saes, "localhost", ""},
		{"wrong root", sae, saes, kmes, "localhost", ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := handshake(t,
				&tls.Config{Certificates: []tls.Certificate{door}, ClientCAs: pool(tt.clientCAs),
					ClientAuth: tls.RequireAndVerifyClientCert},
				&tls.Config{Certificates: []tls.Certificate{tt.client}, RootCAs: pool(tt.roots),
					ServerName: tt.host})
			if tt.want == "" && err == nil {
				t.Fatalf("accepted as %s", got)
			}
			if tt.want != "" && (err != nil || got != tt.want) {
				t.Fatalf("got %s, %v, want %s", got, err, tt.want)
			}
		})
	}
}

func TestSaveAndLoad(t *testing.T) {
	ca, dir := newCA(t, "root"), t.TempDir()
	cert, key := filepath.Join(dir, "ca.crt"), filepath.Join(dir, "ca.key")
	if err := ca.Save(cert, key); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]os.FileMode{cert: 0o644, key: 0o600} {
		info, err := os.Stat(path)
		if err != nil || info.Mode().Perm() != want {
			t.Errorf("%s: mode %v, %v, want %v", path, info.Mode(), err, want)
		}
	}
	again, err := pki.LoadCA(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := again.Issue(pki.Request{CommonName: "a", SAE: "a", Client: true, Life: day})
	if err != nil {
		t.Fatal(err)
	}
	_, err = leaf.Certificate().Verify(x509.VerifyOptions{Roots: pool(ca),
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
	if err != nil {
		t.Errorf("verify what the loaded CA issued: %v", err)
	}
	if err := os.Chmod(key, 0o640); err != nil {
		t.Fatal(err)
	}
	if _, err := pki.LoadCA(cert, key); !errors.Is(err, secret.ErrExposed) {
		t.Errorf("key readable by the group: err = %v, want %v", err, secret.ErrExposed)
	}
}

func TestLoadRefuses(t *testing.T) {
	a, b, dir := newCA(t, "a"), newCA(t, "b"), t.TempDir()
	file := func(name string) string { return filepath.Join(dir, name) }
	leaf, err := a.Issue(pki.Request{CommonName: "a", SAE: "a", Client: true, Life: day})
	if err != nil {
		t.Fatal(err)
	}
	err = errors.Join(a.Save(file("a.crt"), file("a.key")), b.Save(file("b.crt"), file("b.key")),
		leaf.Save(file("leaf.crt"), file("leaf.key")), secret.WriteFile(file("junk"), []byte("junk")))
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		cert, key string
		want      error // nil = any
	}{
		{"a.crt", "b.key", pki.ErrKeyPair},
		{"leaf.crt", "leaf.key", pki.ErrNotCA},
		{"none", "a.key", os.ErrNotExist},
		{"a.crt", "none", os.ErrNotExist},
		{"junk", "a.key", nil},
		{"a.crt", "junk", nil},
		{"a.key", "a.key", nil},
	} {
		_, err := pki.LoadCA(file(tt.cert), file(tt.key))
		if err == nil || (tt.want != nil && !errors.Is(err, tt.want)) {
			t.Errorf("load %s, %s: err = %v, want %v", tt.cert, tt.key, err, tt.want)
		}
	}
}

func TestIssueRefuses(t *testing.T) {
	ca := newCA(t, "root")
	for _, req := range []pki.Request{
		{SAE: "a", Client: true, Life: day},
		{CommonName: "a", SAE: "a", Client: true},
		{CommonName: "a", SAE: "a", Life: day},
		{CommonName: "a", SAE: "a", KME: "a", Client: true, Life: day},
		{CommonName: "a", Server: true, Life: day},
	} {
		if _, err := ca.Issue(req); !errors.Is(err, pki.ErrRequest) {
			t.Errorf("%+v: err = %v, want %v", req, err, pki.ErrRequest)
		}
	}
	if _, err := pki.NewCA("", day); !errors.Is(err, pki.ErrRequest) {
		t.Errorf("CA without a name: err = %v", err)
	}
}

// TestLife: a leaf never outlives its root.
func TestLife(t *testing.T) {
	ca := newCA(t, "root")
	leaf, err := ca.Issue(pki.Request{CommonName: "a", SAE: "a", Client: true, Life: 365 * day})
	if err != nil {
		t.Fatal(err)
	}
	if got, max := leaf.Certificate().NotAfter, ca.Certificate().NotAfter; got.After(max) {
		t.Errorf("leaf ends %v, root %v", got, max)
	}
}

// TestOddID: an ID with reserved characters comes back as it was.
func TestOddID(t *testing.T) {
	ca := newCA(t, "root")
	leaf, err := ca.Issue(pki.Request{CommonName: "a", SAE: "a#b?c%d", Client: true, Life: day})
	if err != nil {
		t.Fatal(err)
	}
	if got, want := leaf.Certificate().URIs[0].String(), pki.SAEURI("a#b?c%d"); got != want {
		t.Errorf("URI %s, want %s", got, want)
	}
	if !strings.HasPrefix(pki.KMEURI("k"), "urn:quietline:kme:") {
		t.Errorf("KMEURI = %s", pki.KMEURI("k"))
	}
}
