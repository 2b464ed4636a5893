package pki

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/quietline/quietline/secret"
)

// maxCSR bounds a signing request, bytes: one with an RSA-4096 key and a dozen
// names has 3 KiB.
const maxCSR = 16 << 10

// WriteCSR makes the request for one certificate as another CA takes it
// (PKCS #10, RFC 2986), and keeps its new key in keyPath. A key that is there
// already is used again, so that the command can be repeated.
func WriteCSR(req Request, keyPath, csrPath string) error {
	// A template under no CA checks the request itself.
	t, err := req.template(&x509.Certificate{NotAfter: time.Now().Add(req.Life)})
	if err != nil {
		return fmt.Errorf("request certificate %q: %w", req.CommonName, err)
	}
	key, err := pendingKey(keyPath)
	if err != nil {
		return fmt.Errorf("request certificate %q: %w", req.CommonName, err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject: t.Subject, DNSNames: t.DNSNames, IPAddresses: t.IPAddresses, URIs: t.URIs}, key)
	if err != nil {
		return fmt.Errorf("request certificate %q: %w", req.CommonName, err)
	}
	text := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})
	return secret.WriteFileMode(csrPath, text, 0o644)
}

// pendingKey loads or makes the key of a request.
func pendingKey(path string) (*ecdsa.PrivateKey, error) {
	key, err := readKey(path)
	if !errors.Is(err, fs.ErrNotExist) {
		return key, err
	}
	if key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		return nil, err
	}
	return key, writeKey(path, key)
}

// ParseCSR reads a PEM or DER request and checks that its sender has the key.
func ParseCSR(text []byte) (*x509.CertificateRequest, error) {
	if len(text) > maxCSR {
		return nil, fmt.Errorf("read request: %w: %d bytes", ErrRequest, len(text))
	}
	der := text
	if bytes.Contains(text, []byte("-----BEGIN")) {
		block, _ := pem.Decode(text)
		if block == nil || !strings.HasSuffix(block.Type, "CERTIFICATE REQUEST") {
			return nil, fmt.Errorf("read request: %w: no PEM block CERTIFICATE REQUEST", ErrRequest)
		}
		der = block.Bytes
	}
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return nil, fmt.Errorf("read request: %w: %w", ErrRequest, err)
	}
	if err := csr.CheckSignature(); err != nil {
		return nil, fmt.Errorf("read request of %q: %w: %w", csr.Subject, ErrRequest, err)
	}
	return csr, nil
}

// Sign issues a certificate for a key that was made elsewhere. The names are
// those of req, whatever the request asks for: an authority says who is who.
func (a *Authority) Sign(root Root, req Request, csr *x509.CertificateRequest,
) (*x509.Certificate, error) {
	cert, err := a.cas[root].signFor(req, csr.PublicKey)
	if err != nil {
		return nil, err
	}
	return cert, a.record(cert)
}

// Resign issues to the holder of a certificate of this authority the next one,
// with the same names under the same root, for the key of csr. The caller has
// seen the holder prove that it has the old key.
func (a *Authority) Resign(old *x509.Certificate, csr *x509.CertificateRequest,
) (*x509.Certificate, error) {
	ca, err := a.issuer(old)
	if err != nil {
		return nil, fmt.Errorf("renew certificate: %w", err)
	}
	if now := time.Now(); now.After(old.NotAfter) || now.Before(old.NotBefore) {
		return nil, fmt.Errorf("renew certificate: %w: not valid at %s: %s; issue a new one",
			ErrRequest, now.UTC().Format(clock), Describe(old))
	}
	cert, err := ca.signFor(requestOf(old), csr.PublicKey)
	if err != nil {
		return nil, err
	}
	return cert, a.record(cert)
}

// Use is what a certificate must be good for.
type Use struct {
	URI            string // that must stand among its names; "" = any
	Server, Client bool
}

// Import takes the chain that another CA made for the request whose key is in
// keyPath, holds it against that CA's roots, and saves both as a pair. The key
// file is removed once the pair stands; a repeated import finds the pair.
func Import(keyPath, pairPath string, chain, roots []*x509.Certificate, use Use) (*Pair, error) {
	key, err := readKey(keyPath)
	if errors.Is(err, fs.ErrNotExist) {
		if p, perr := LoadPair(pairPath); perr == nil && p.Chain[0].Equal(chain[0]) {
			return p, nil // done before
		}
		return nil, fmt.Errorf("import chain: %w; make a request first", err)
	}
	if err != nil {
		return nil, fmt.Errorf("import chain: %w", err)
	}
	if err := CheckChain(chain, roots, key.Public(), use, time.Now()); err != nil {
		return nil, fmt.Errorf("import chain: %w", err)
	}
	p := &Pair{Chain: chain, Key: key}
	if err := p.Save(pairPath); err != nil {
		return nil, err
	}
	if err := os.Remove(keyPath); err != nil {
		return nil, fmt.Errorf("import chain: %w", err)
	}
	return p, secret.SyncDir(filepath.Dir(keyPath))
}

// CheckChain tells the first reason why a chain, leaf first, would be refused:
// what was compared with what, and what to do. It wraps [ErrChain]. A nil key
// is not compared.
func CheckChain(chain, roots []*x509.Certificate, key crypto.PublicKey, use Use, now time.Time,
) error {
	leaf := chain[0]
	bad := func(next, format string, args ...any) error {
		return fmt.Errorf("%w: %s: %s; %s", ErrChain, fmt.Sprintf(format, args...), Describe(leaf), next)
	}
	var uris []string
	for _, u := range leaf.URIs {
		uris = append(uris, u.String())
	}
	switch {
	case leaf.IsCA:
		return bad("put the leaf first in the file", "the first certificate is a CA's")
	case key != nil && !samePublic(key, leaf.PublicKey):
		return bad("have the CA sign the latest request", "it is for the key %.16s…, the request has %.16s…",
			KeyPrint(leaf.PublicKey), KeyPrint(key))
	case now.After(leaf.NotAfter):
		return bad("renew it, or set the clock", "it expired before %s", now.UTC().Format(clock))
	case now.Before(leaf.NotBefore):
		return bad("check this machine's clock", "it is not yet valid at %s", now.UTC().Format(clock))
	case use.URI != "" && !slices.Contains(uris, use.URI):
		return bad("have the CA copy the names of the request", "the SAN URI %s is missing", use.URI)
	}
	for want, usage := range map[x509.ExtKeyUsage]bool{
		x509.ExtKeyUsageServerAuth: use.Server, x509.ExtKeyUsageClientAuth: use.Client} {
		if usage && !slices.Contains(leaf.ExtKeyUsage, want) &&
			!slices.Contains(leaf.ExtKeyUsage, x509.ExtKeyUsageAny) {
			name := map[bool]string{true: "serverAuth", false: "clientAuth"}[want == x509.ExtKeyUsageServerAuth]
			return bad("have the CA set it", "the extended key usage %s is missing", name)
		}
	}
	return checkPath(chain, roots, now, bad)
}

// checkPath builds the path to a root and tells where it breaks.
func checkPath(chain, roots []*x509.Certificate, now time.Time,
	bad func(next, format string, args ...any) error,
) error {
	opts := x509.VerifyOptions{Roots: x509.NewCertPool(), Intermediates: x509.NewCertPool(),
		CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}
	var subjects []string
	for _, c := range roots {
		opts.Roots.AddCert(c)
		subjects = append(subjects, c.Subject.String())
	}
	top := chain[0]
	for _, c := range chain[1:] {
		opts.Intermediates.AddCert(c)
		if top.CheckSignatureFrom(c) == nil {
			top = c
		}
	}
	_, err := chain[0].Verify(opts)
	if err == nil {
		return nil
	}
	for _, c := range roots {
		if bytes.Equal(c.RawSubject, top.RawIssuer) {
			return bad("name the CA that signed it", "no path to a root: %v; a root has the "+
				"right name %q and is another one", err, c.Subject)
		}
	}
	return bad("append the intermediate of that name to the chain, or name the right CA",
		"no path to a root: the issuer %q is neither in the chain nor among the roots %q",
		top.Issuer, subjects)
}

// signFor issues a certificate for a public key.
func (ca *CA) signFor(req Request, public crypto.PublicKey) (*x509.Certificate, error) {
	template, err := req.template(ca.cert)
	if err == nil {
		var der []byte
		if der, err = x509.CreateCertificate(rand.Reader, template, ca.cert, public, ca.key); err == nil {
			return x509.ParseCertificate(der)
		}
	}
	return nil, fmt.Errorf("issue certificate %q: %w", req.CommonName, err)
}
