package identity_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/quietline/quietline/etsi014/etsitest"
	"github.com/quietline/quietline/etsi014/identity"
)

func pinOf(c tls.Certificate) string { return fmt.Sprintf("%x", sha256.Sum256(c.Leaf.Raw)) }

func soon() time.Time { return time.Now().Add(time.Hour) }

// What is taken away: at the handshake, and at the next request of a
// connection that was there before. What stays is untouched.
func TestRevocation(t *testing.T) {
	s := newSite(t)
	uri := []string{"urn:quietline:sae:tokyo"}
	sub := s.ca.Sub(t, "SAE CA")
	viaSub := sub.Issue(t, etsitest.Leaf{URIs: uri})
	crl := func(name string, data []byte) string {
		etsitest.WriteFile(t, s.dir+"/"+name, data)
		return s.dir + "/" + name
	}
	block, _ := pem.Decode(s.ca.Revoke(t, soon(), s.sae.Leaf))
	for _, tc := range []struct {
		name   string
		change func(*identity.Config)
		cert   tls.Certificate
		gone   bool
	}{
		{"nothing", func(*identity.Config) {}, s.sae, false},
		{"empty list", func(c *identity.Config) {
			c.CRLs = []string{crl("empty.crl", s.ca.Revoke(t, soon()))}
		}, s.sae, false},
		{"other certificate", func(c *identity.Config) {
			c.CRLs = []string{crl("other.crl", s.ca.Revoke(t, soon(), viaSub.Leaf))}
		}, s.sae, false},
		{"listed", func(c *identity.Config) {
			c.CRLs = []string{crl("listed.crl", s.ca.Revoke(t, soon(), s.sae.Leaf))}
		}, s.sae, true},
		{"listed in DER", func(c *identity.Config) {
			c.CRLs = []string{crl("der.crl", block.Bytes)}
		}, s.sae, true},
		{"second list of a file", func(c *identity.Config) {
			c.CRLs = []string{crl("two.crl", append(s.ca.Revoke(t, soon()),
				s.ca.Revoke(t, soon(), s.sae.Leaf)...))}
		}, s.sae, true},
		{"intermediate authority listed", func(c *identity.Config) {
			c.CRLs = []string{crl("sub.crl", s.ca.Revoke(t, soon(), sub.Cert))}
		}, viaSub, true},
		{"denied", func(c *identity.Config) { c.Deny = []string{pinOf(s.sae)} }, s.sae, true},
		{"denied in capitals", func(c *identity.Config) {
			c.Deny = []string{strings.ToUpper(pinOf(s.sae))}
		}, s.sae, true},
		{"other denied", func(c *identity.Config) { c.Deny = []string{pinOf(viaSub)} }, s.sae, false},
		{"denied by a file", func(c *identity.Config) {
			c.DenyFiles = []string{crl("denied", []byte("# stolen\n\n "+pinOf(s.sae)+"\r\n"))}
		}, s.sae, true},
		{"denied by a file's last line", func(c *identity.Config) {
			c.DenyFiles = []string{crl("last", []byte(pinOf(viaSub)+"\n"+pinOf(s.sae)))}
		}, s.sae, true},
		{"remark", func(c *identity.Config) {
			c.DenyFiles = []string{crl("remark", []byte("#"+pinOf(s.sae)+"\n"))}
		}, s.sae, false},
	} {
		live := open(t, s.cfg)
		door, _, err, saeErr := shake(t, live.Server(), s.client(tc.cert))
		if err != nil || saeErr != nil {
			t.Fatal(tc.name, err, saeErr)
		}
		if _, err := live.Identify(&door); err != nil {
			t.Errorf("%s: before the change: %v", tc.name, err)
		}
		next := s.cfg
		tc.change(&next)
		if err := live.Reload(next); err != nil {
			t.Fatal(tc.name, err)
		}
		if _, err := live.Identify(&door); errors.Is(err, identity.ErrRevoked) != tc.gone {
			t.Errorf("%s: live connection: %v", tc.name, err)
		}
		for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
			cfg := s.client(tc.cert)
			cfg.MaxVersion = version
			_, _, err, saeErr := shake(t, live.Server(), cfg)
			if errors.Is(err, identity.ErrRevoked) != tc.gone || (saeErr != nil) != tc.gone {
				t.Errorf("%s: handshake %x: %v, %v", tc.name, version, err, saeErr)
			}
		}
	}
}

// An SAE refuses a KME whose certificate is revoked.
func TestClientSeesRevokedServer(t *testing.T) {
	s := newSite(t)
	live := open(t, s.cfg)
	_, view, err, saeErr := shake(t, live.Server(), s.client(s.sae))
	if err != nil || saeErr != nil {
		t.Fatal(err, saeErr)
	}
	path := s.dir + "/kme.crl"
	etsitest.WriteFile(t, path, s.ca.Revoke(t, soon(), view.PeerCertificates[0]))
	sae := open(t, identity.Config{
		Pairs: []identity.Pair{s.pair(t, "sae", etsitest.Leaf{})}, CA: s.cfg.CA,
		CRLs: []string{path},
	})
	cfg := sae.Client()
	cfg.ServerName = "kme.example"
	if _, _, _, err := shake(t, live.Server(), cfg); !errors.Is(err, identity.ErrRevoked) {
		t.Errorf("got %v", err)
	}
}

// A list that cannot be trusted is not loaded, and the old state stays.
func TestRevocationFaults(t *testing.T) {
	s := newSite(t)
	foreign := etsitest.NewCA(t, "test CA") // the same name, another key
	good := s.ca.Revoke(t, soon(), s.sae.Leaf)
	for _, tc := range []struct {
		name, want string
		data       []byte
	}{
		{"forged", "no authority", foreign.Revoke(t, soon(), s.sae.Leaf)},
		{"run out", "fetch a new one", s.ca.Revoke(t, time.Now().Add(-time.Minute))},
		{"a certificate", "revocation lists", s.ca.PEM()},
		{"garbage", "load CRL", []byte("x")},
		{"damaged", "damaged after list 1", append(good, good[:80]...)},
		{"partial scope", "critical extension", criticalCRL(t)},
	} {
		live := open(t, s.cfg)
		next := s.cfg
		next.CRLs = []string{s.dir + "/" + tc.name}
		etsitest.WriteFile(t, next.CRLs[0], tc.data)
		if tc.name == "partial scope" {
			next.CA = s.dir + "/critical.crt"
			etsitest.WriteFile(t, next.CA, criticalCA(t))
		}
		err := live.Reload(next)
		if err == nil || !strings.Contains(err.Error(), tc.want) ||
			!strings.Contains(err.Error(), tc.name) {
			t.Errorf("%s: got %v", tc.name, err)
		}
		if live.Stats().Revoked != 0 {
			t.Errorf("%s: half of it was loaded", tc.name)
		}
	}
	next := s.cfg
	next.CRLs, next.Deny = []string{s.dir + "/none"}, []string{"abc"}
	next.DenyFiles = []string{s.dir + "/gone", s.dir + "/denied"}
	etsitest.WriteFile(t, next.DenyFiles[1], []byte("# one\n"+pinOf(s.sae)+"\nabc\n"))
	err := open(t, s.cfg).Reload(next)
	if !errors.Is(err, os.ErrNotExist) {
		t.Errorf("got %v", err)
	}
	for _, want := range []string{"deny list, entry 1: ", "load CRL " + next.CRLs[0],
		"load deny list " + next.DenyFiles[0], "load deny list " + next.DenyFiles[1] + ": line 3: "} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%v lacks %q", err, want)
		}
	}
}

// criticalKey signs the one list that etsitest cannot make.
var criticalKey, _ = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)

func criticalTemplate() *x509.Certificate {
	return &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "critical CA"}, IsCA: true,
		BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCRLSign | x509.KeyUsageCertSign,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: soon(), SubjectKeyId: []byte{1},
	}
}

func criticalCA(t testing.TB) []byte {
	c := criticalTemplate()
	der, err := x509.CreateCertificate(rand.Reader, c, c, criticalKey.Public(), criticalKey)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

func criticalCRL(t testing.TB) []byte {
	der, err := x509.CreateRevocationList(rand.Reader, &x509.RevocationList{
		Number: big.NewInt(1), ThisUpdate: time.Now(), NextUpdate: soon(),
		ExtraExtensions: []pkix.Extension{{ // issuingDistributionPoint
			Id: asn1.ObjectIdentifier{2, 5, 29, 28}, Critical: true, Value: []byte{0x30, 0},
		}},
	}, criticalTemplate(), criticalKey)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func TestStats(t *testing.T) {
	s := newSite(t)
	s.cfg.CRLs = []string{s.dir + "/a.crl", s.dir + "/b.crl"}
	next := soon().Truncate(time.Second)
	etsitest.WriteFile(t, s.cfg.CRLs[0], s.ca.Revoke(t, next.Add(time.Hour), s.sae.Leaf))
	etsitest.WriteFile(t, s.cfg.CRLs[1], s.ca.Revoke(t, next))
	s.cfg.Deny = []string{pinOf(s.sae)}
	got := open(t, s.cfg).Stats()
	if !got.CRLExpires.Equal(next) || got.Revoked != 1 || got.Denied != 1 || got.Rules != 1 ||
		got.Expires.Before(time.Now()) {
		t.Errorf("got %+v", got)
	}
}

// No revocation list makes the loader panic.
func FuzzCRL(f *testing.F) {
	ca := etsitest.NewCA(f, "test CA")
	list := ca.Revoke(f, soon())
	f.Add(list)
	block, _ := pem.Decode(list)
	f.Add(block.Bytes)
	f.Add([]byte("-----BEGIN X509 CRL-----\n"))
	s := newSite(f)
	f.Fuzz(func(t *testing.T, data []byte) {
		cfg := s.cfg
		cfg.CRLs = []string{t.TempDir() + "/x.crl"}
		etsitest.WriteFile(t, cfg.CRLs[0], data)
		if l, err := identity.Open(cfg); err == nil && l.Stats().Revoked > 0 {
			t.Error("a list of another authority was taken")
		}
	})
}
