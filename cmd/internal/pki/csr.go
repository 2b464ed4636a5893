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
	"net/url"
	"slices"
	"strings"
	"time"
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
	return write(csrPath, text, 0o644)
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

// PublicKey is that of the key file of a request.
func PublicKey(keyPath string) (crypto.PublicKey, error) {
	key, err := readKey(keyPath)
	if err != nil {
		return nil, err
	}
	return key.Public(), nil
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
	if err := remove(keyPath); err != nil {
		return nil, fmt.Errorf("import chain: %w", err)
	}
	return p, nil
}

// CheckChain tells the first of [ChainFaults].
func CheckChain(chain, roots []*x509.Certificate, key crypto.PublicKey, use Use, now time.Time,
) error {
	if faults := ChainFaults(chain, roots, key, use, now); len(faults) > 0 {
		return faults[0]
	}
	return nil
}

// ChainFaults tells every reason why a chain, leaf first, would be refused:
// what was compared with what, and what to do. Each is a [Fault] and wraps
// [ErrChain]. A nil key is not compared; without roots the path is not.
func ChainFaults(chain, roots []*x509.Certificate, key crypto.PublicKey, use Use, now time.Time,
) (faults []error) {
	leaf := chain[0]
	bad := func(next, format string, args ...any) {
		faults = append(faults, Advise(fmt.Errorf("%w: %s: %s", ErrChain, fmt.Sprintf(format, args...),
			Describe(leaf)), next))
	}
	if leaf.IsCA {
		bad("put the leaf first in the file", "the first certificate is a CA's")
		return faults
	}
	if key != nil && !SamePublic(key, leaf.PublicKey) {
		bad("have the CA sign the latest request", "it is for the key %.16s…, the request has %.16s…",
			KeyPrint(leaf.PublicKey), KeyPrint(key))
	}
	switch {
	case now.After(leaf.NotAfter):
		bad("renew it, or set the clock", "it expired before %s", now.UTC().Format(clock))
	case now.Before(leaf.NotBefore):
		bad("check this machine's clock; if that is right, the certificate was made under a wrong "+
			"one: quietline pki renew", "it is not yet valid at %s", now.UTC().Format(clock))
	}
	if use.URI != "" && !slices.ContainsFunc(leaf.URIs, func(u *url.URL) bool {
		return u.String() == use.URI
	}) {
		bad("have the CA copy the names of the request", "the SAN URI %s is missing", use.URI)
	}
	for _, u := range []struct {
		want  bool
		usage x509.ExtKeyUsage
		name  string
	}{{use.Server, x509.ExtKeyUsageServerAuth, "serverAuth"},
		{use.Client, x509.ExtKeyUsageClientAuth, "clientAuth"}} {
		if u.want && !slices.Contains(leaf.ExtKeyUsage, u.usage) &&
			!slices.Contains(leaf.ExtKeyUsage, x509.ExtKeyUsageAny) {
			bad("have the CA set it", "the extended key usage %s is missing", u.name)
		}
	}
	if roots != nil {
		checkPath(chain, roots, now, bad)
	}
	return faults
}

// checkPath builds the path to a root and tells where it breaks. It does so for
// the time nearest to now at which the leaf is valid: its own dates are
// another fault.
func checkPath(chain, roots []*x509.Certificate, now time.Time,
	bad func(next, format string, args ...any),
) {
	if leaf := chain[0]; now.After(leaf.NotAfter) {
		now = leaf.NotAfter
	} else if now.Before(leaf.NotBefore) {
		now = leaf.NotBefore
	}
	opts := x509.VerifyOptions{Roots: x509.NewCertPool(), Intermediates: x509.NewCertPool(),
		CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}
	var subjects []string
	for _, c := range roots {
		opts.Roots.AddCert(c)
		subjects = append(subjects, c.Subject.String())
	}
	for _, c := range chain[1:] {
		opts.Intermediates.AddCert(c)
	}
	_, err := chain[0].Verify(opts)
	if err == nil {
		return
	}
	top := chain[0]
	for _, c := range append([]*x509.Certificate{top}, chain[1:]...) {
		if c != top && top.CheckSignatureFrom(c) == nil {
			top = c
		}
		if i := slices.IndexFunc(roots, func(r *x509.Certificate) bool {
			return top.CheckSignatureFrom(r) == nil
		}); i >= 0 {
			next := "ask who runs the CA what it may sign"
			if strings.Contains(err.Error(), "URI with empty host") {
				// RFC 5280 section 4.2.1.10: a constraint of URIs is one of hosts.
				next = "our names are URNs, which have no host: take a CA without name constraints"
			}
			bad(next, "the path to the root %q is not valid: %v", roots[i].Subject, err)
			return
		}
	}
	for _, c := range append(append([]*x509.Certificate{}, roots...), chain[1:]...) {
		if bytes.Equal(c.RawSubject, top.RawIssuer) {
			bad("name the CA that signed it", "no path to a root: %v; one of the right name %q is there "+
				"and has another key", err, c.Subject)
			return
		}
	}
	at := ""
	if len(top.IssuingCertificateURL) > 0 {
		at = ", which its issuer keeps at " + strings.Join(top.IssuingCertificateURL, " and ")
	}
	bad("append the intermediate of that name to the chain"+at+", or name the right CA",
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
