// Package etsitest is for tests of what speaks ETSI GS QKD 014: a certificate
// authority made on the spot ([CA]) and a key manager in memory ([KME]).
//
// A caller must keep in mind that nothing here is fit for service: keys of the
// authority live as long as the test, and the key manager makes its keys from
// the system's random numbers, not from photons.
package etsitest

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// CA signs certificates for one test.
type CA struct {
	Cert  *x509.Certificate
	key   crypto.Signer
	chain [][]byte // what goes with every leaf: intermediates up to below the root
}

// Leaf describes a certificate. The zero value is a client's, valid now.
type Leaf struct {
	CN       string
	URIs     []string
	DNS      []string
	IPs      []net.IP
	Server   bool // for serverAuth instead of clientAuth
	From, To time.Time
	Key      crypto.Signer // nil = a fresh ECDSA P-256 key
}

// NewCA makes an authority.
func NewCA(tb testing.TB, name string) *CA {
	tb.Helper()
	key, t := NewKey(tb), authority(tb, name)
	der, err := x509.CreateCertificate(rand.Reader, t, t, key.Public(), key)
	return &CA{Cert: parse(tb, der, err), key: key}
}

// Sub makes an intermediate authority under this one.
func (ca *CA) Sub(tb testing.TB, name string) *CA {
	tb.Helper()
	key, t := NewKey(tb), authority(tb, name)
	der, err := x509.CreateCertificate(rand.Reader, t, ca.Cert, key.Public(), ca.key)
	sub := parse(tb, der, err)
	return &CA{Cert: sub, key: key, chain: append([][]byte{sub.Raw}, ca.chain...)}
}

func authority(tb testing.TB, name string) *x509.Certificate {
	tb.Helper()
	return &x509.Certificate{
		SerialNumber: serial(tb), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
}

// NewKey makes an ECDSA P-256 key.
func NewKey(tb testing.TB) crypto.Signer {
	tb.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		tb.Fatal(err)
	}
	return key
}

func parse(tb testing.TB, der []byte, err error) *x509.Certificate {
	tb.Helper()
	if err != nil {
		tb.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		tb.Fatal(err)
	}
	return c
}

func serial(tb testing.TB) *big.Int {
	tb.Helper()
	n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		tb.Fatal(err)
	}
	return n
}

// Issue signs a leaf.
func (ca *CA) Issue(tb testing.TB, l Leaf) tls.Certificate {
	tb.Helper()
	if l.Key == nil {
		l.Key = NewKey(tb)
	}
	if l.From.IsZero() {
		l.From = time.Now().Add(-time.Hour)
	}
	if l.To.IsZero() {
		l.To = time.Now().Add(12 * time.Hour)
	}
	t := &x509.Certificate{
		SerialNumber: serial(tb), Subject: pkix.Name{CommonName: l.CN},
		NotBefore: l.From, NotAfter: l.To, DNSNames: l.DNS, IPAddresses: l.IPs,
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	if l.Server {
		t.ExtKeyUsage[0] = x509.ExtKeyUsageServerAuth
	}
	for _, s := range l.URIs {
		u, err := url.Parse(s)
		if err != nil {
			tb.Fatal(err)
		}
		t.URIs = append(t.URIs, u)
	}
	der, err := x509.CreateCertificate(rand.Reader, t, ca.Cert, l.Key.Public(), ca.key)
	leaf := parse(tb, der, err)
	chain := append([][]byte{der}, ca.chain...)
	return tls.Certificate{Certificate: chain, PrivateKey: l.Key, Leaf: leaf}
}

// Pool holds the authority's certificate.
func (ca *CA) Pool() *x509.CertPool {
	p := x509.NewCertPool()
	p.AddCert(ca.Cert)
	return p
}

// PEM is the authority's certificate.
func (ca *CA) PEM() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.Cert.Raw})
}

// Revoke signs a revocation list in PEM, valid until next.
func (ca *CA) Revoke(tb testing.TB, next time.Time, gone ...*x509.Certificate) []byte {
	tb.Helper()
	t := &x509.RevocationList{
		Number: serial(tb), ThisUpdate: time.Now().Add(-2 * time.Hour), NextUpdate: next,
	}
	for _, c := range gone {
		t.RevokedCertificateEntries = append(t.RevokedCertificateEntries,
			x509.RevocationListEntry{
				SerialNumber: c.SerialNumber, RevocationTime: time.Now().Add(-time.Minute),
			})
	}
	der, err := x509.CreateRevocationList(rand.Reader, t, ca.Cert, ca.key)
	if err != nil {
		tb.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: der})
}

// WriteFiles writes name.crt and name.key (mode 0600) into dir.
func WriteFiles(tb testing.TB, dir, name string, c tls.Certificate) (cert, key string) {
	tb.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(c.PrivateKey)
	if err != nil {
		tb.Fatal(err)
	}
	cert, key = filepath.Join(dir, name+".crt"), filepath.Join(dir, name+".key")
	var chain []byte
	for _, b := range c.Certificate {
		chain = append(chain, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: b})...)
	}
	WriteFile(tb, cert, chain)
	WriteFile(tb, key, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
	return cert, key
}

// WriteFile writes a file of mode 0600 by rename, so that a reader never sees
// half of it.
func WriteFile(tb testing.TB, path string, data []byte) {
	tb.Helper()
	next := path + ".next"
	if err := os.WriteFile(next, data, 0o600); err != nil {
		tb.Fatal(err)
	}
	if err := os.Rename(next, path); err != nil {
		tb.Fatal(err)
	}
}
