// Package pki is the small certificate authority of a site: it makes roots and
// issues the certificates that SAEs, key managers and their doors show.
//
// The main type is [Authority]: a folder with three roots, each a [CA], and
// with every certificate that they issued. A caller must keep in mind that
// SAEs, peer key managers and administrators hang on separate roots: with one
// root, every SAE could pass for a key manager. A certificate and its key lie
// in one PEM file (see [Pair]), so that a renewal replaces both at once.
// Nothing here talks to a network, and no key leaves in any form but a file of
// mode 0600.
package pki

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"os"
	"slices"
	"time"

	"github.com/quietline/quietline/secret"
)

// lag is how far certificates reach into the past, for clocks that are behind:
// a tenth of their life, an hour at most.
const lag = time.Hour

func lagOf(life time.Duration) time.Duration { return min(lag, life/10) }

// lifeOf is the life that a certificate was issued for.
func lifeOf(c *x509.Certificate) time.Duration {
	whole := c.NotAfter.Sub(c.NotBefore)
	if whole >= 11*lag {
		return whole - lag
	}
	return whole * 10 / 11
}

// maxFile bounds certificate and key files, bytes; ours have less than 2 KiB.
const maxFile = 64 << 10

// CA is one root with its key. It is safe for concurrent use.
type CA struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// NewCA makes a root (ECDSA P-256) that signs leaves only.
func NewCA(name string, life time.Duration) (*CA, error) {
	if name == "" || life <= 0 {
		return nil, fmt.Errorf("make CA %q for %v: %w", name, life, ErrRequest)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make CA key: %w", err)
	}
	now := time.Now()
	template := &x509.Certificate{
		Subject:               pkix.Name{CommonName: name},
		NotBefore:             now.Add(-lag),
		NotAfter:              now.Add(life),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
		MaxPathLenZero:        true,
	}
	cert, err := sign(template, template, &key.PublicKey, key)
	if err != nil {
		return nil, fmt.Errorf("make CA %q: %w", name, err)
	}
	return &CA{cert: cert, key: key}, nil
}

func sign(template, parent *x509.Certificate, pub *ecdsa.PublicKey, key *ecdsa.PrivateKey,
) (*x509.Certificate, error) {
	der, err := x509.CreateCertificate(rand.Reader, template, parent, pub, key)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

// LoadCA reads what [CA.Save] wrote. A key that others can read is refused
// with [secret.ErrExposed].
func LoadCA(certPath, keyPath string) (*CA, error) {
	cert, err := readCertificate(certPath)
	if err != nil {
		return nil, fmt.Errorf("load CA: %w", err)
	}
	key, err := readKey(keyPath)
	if err != nil {
		return nil, fmt.Errorf("load CA: %w", err)
	}
	if !cert.IsCA {
		return nil, fmt.Errorf("load CA %s: %w", certPath, ErrNotCA)
	}
	if !key.PublicKey.Equal(cert.PublicKey) {
		return nil, fmt.Errorf("load CA %s and %s: %w", certPath, keyPath, ErrKeyPair)
	}
	return &CA{cert: cert, key: key}, nil
}

// Certificate is the root itself, which the other side must trust.
func (ca *CA) Certificate() *x509.Certificate { return ca.cert }

// Save writes the root (mode 0644) and its key (mode 0600), each durably.
func (ca *CA) Save(certPath, keyPath string) error {
	return save(ca.cert, ca.key, certPath, keyPath)
}

// SaveCertificate writes the root alone, for those who only trust it.
func (ca *CA) SaveCertificate(path string) error { return writeCertificate(path, ca.cert) }

// Request says what a certificate is for.
type Request struct {
	CommonName string
	// SAE and KME become the URI names urn:quietline:sae:ID and
	// urn:quietline:kme:ID. At most one of them is set.
	SAE, KME string
	// DNS and IPs are the names under which a server is reached.
	DNS []string
	IPs []netip.Addr
	// Server and Client allow the two ends of TLS; at least one is set.
	Server, Client bool
	// Life counts from now; it is cut at the end of the CA's own.
	Life time.Duration

	uris []*url.URL // names of a certificate that is renewed
}

// SAEURI is the name of an SAE in a certificate.
func SAEURI(id string) string { return uri("sae", id).String() }

// KMEURI is the name of a key manager in a certificate.
func KMEURI(id string) string { return uri("kme", id).String() }

func uri(kind, id string) *url.URL {
	return &url.URL{Scheme: "urn", Opaque: "quietline:" + kind + ":" + url.PathEscape(id)}
}

func (r *Request) template(ca *x509.Certificate) (*x509.Certificate, error) {
	switch {
	case r.CommonName == "" || r.Life <= 0:
		return nil, fmt.Errorf("%w: no name or no life", ErrRequest)
	case r.SAE != "" && r.KME != "":
		return nil, fmt.Errorf("%w: SAE and KME at once", ErrRequest)
	case !r.Server && !r.Client:
		return nil, fmt.Errorf("%w: for neither server nor client", ErrRequest)
	case r.Server && len(r.DNS)+len(r.IPs)+len(r.uris) == 0 && r.KME == "":
		return nil, fmt.Errorf("%w: a server without DNS name or address", ErrRequest)
	}
	now := time.Now()
	t := &x509.Certificate{
		Subject:               pkix.Name{CommonName: r.CommonName},
		NotBefore:             now.Add(-lagOf(r.Life)),
		NotAfter:              now.Add(r.Life),
		KeyUsage:              x509.KeyUsageDigitalSignature,
		BasicConstraintsValid: true,
		DNSNames:              r.DNS,
		URIs:                  slices.Clone(r.uris),
	}
	if t.NotAfter.After(ca.NotAfter) {
		t.NotAfter = ca.NotAfter
	}
	for _, ip := range r.IPs {
		t.IPAddresses = append(t.IPAddresses, net.IP(ip.AsSlice()))
	}
	if r.SAE != "" {
		t.URIs = append(t.URIs, uri("sae", r.SAE))
	}
	if r.KME != "" {
		t.URIs = append(t.URIs, uri("kme", r.KME))
	}
	if r.Server {
		t.ExtKeyUsage = append(t.ExtKeyUsage, x509.ExtKeyUsageServerAuth)
	}
	if r.Client {
		t.ExtKeyUsage = append(t.ExtKeyUsage, x509.ExtKeyUsageClientAuth)
	}
	return t, nil
}

// Issued is a certificate with the key that was made for it.
type Issued struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// Issue makes a key (ECDSA P-256) and signs a certificate for it. It refuses
// with [ErrRequest] what no peer would accept.
func (ca *CA) Issue(req Request) (*Issued, error) {
	template, err := req.template(ca.cert)
	if err != nil {
		return nil, fmt.Errorf("issue certificate %q: %w", req.CommonName, err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("issue certificate %q: %w", req.CommonName, err)
	}
	cert, err := sign(template, ca.cert, &key.PublicKey, ca.key)
	if err != nil {
		return nil, fmt.Errorf("issue certificate %q: %w", req.CommonName, err)
	}
	return &Issued{cert: cert, key: key}, nil
}

// Certificate is the certificate that was issued.
func (i *Issued) Certificate() *x509.Certificate { return i.cert }

// Pair is the certificate with its key, as one file.
func (i *Issued) Pair() *Pair { return &Pair{Chain: []*x509.Certificate{i.cert}, Key: i.key} }

// Save writes the certificate (mode 0644) and its key (mode 0600), each
// durably.
func (i *Issued) Save(certPath, keyPath string) error {
	return save(i.cert, i.key, certPath, keyPath)
}

// save writes the key first: a certificate without its key would be found and
// shown, a key without its certificate is only an unused file.
func save(cert *x509.Certificate, key *ecdsa.PrivateKey, certPath, keyPath string) error {
	if err := writeKey(keyPath, key); err != nil {
		return err
	}
	return writeCertificate(certPath, cert)
}

func writeKey(path string, key crypto.Signer) error {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	defer secret.Wipe(der)
	text := secret.Own(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
	defer text.Clear()
	return write(path, text.Expose(), 0o600)
}

func writeCertificate(path string, cert *x509.Certificate) error {
	text := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw})
	return write(path, text, 0o644)
}

func readCertificate(path string) (*x509.Certificate, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(data)
	if block == nil || block.Type != "CERTIFICATE" {
		return nil, fmt.Errorf("read %s: no PEM block CERTIFICATE", path)
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	return cert, nil
}

func readKey(path string) (*ecdsa.PrivateKey, error) {
	text, err := secret.ReadFile(path, maxFile)
	if err != nil {
		return nil, err
	}
	defer text.Clear()
	block, _ := pem.Decode(text.Expose())
	if block == nil || block.Type != "PRIVATE KEY" {
		return nil, fmt.Errorf("read %s: no PEM block PRIVATE KEY", path)
	}
	defer secret.Wipe(block.Bytes)
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	ec, ok := key.(*ecdsa.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("read %s: a key of type %T, expected ECDSA", path, key)
	}
	return ec, nil
}
