package identity

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"strings"
	"time"
)

// ErrRevoked: the certificate, or an authority on its way to the root, is
// revoked by a CRL or stands on the deny list.
var ErrRevoked = errors.New("certificate is revoked")

// mark names a certificate as a CRL does: RFC 5280 section 5.
type mark struct{ issuer, serial string }

func markOf(c *x509.Certificate) mark {
	return mark{string(c.RawIssuer), string(c.SerialNumber.Bytes())}
}

// revocations is all that takes trust away again. It does not change.
type revocations struct {
	marks   map[mark]bool
	denied  map[[sha256.Size]byte]bool
	expires time.Time // the earliest NextUpdate of the CRLs; zero without one
}

// clean returns the first of the verified chains without a revoked member.
func (r *revocations) clean(chains [][]*x509.Certificate) ([]*x509.Certificate, error) {
	if len(chains) == 0 {
		return nil, ErrNoCertificate
	}
	leaf := chains[0][0]
	if r.denied[sha256.Sum256(leaf.Raw)] {
		return nil, fmt.Errorf("%w: it stands on the deny list: %s", ErrRevoked, describe(leaf))
	}
	var found *x509.Certificate
	for _, chain := range chains {
		found = nil
		for _, c := range chain {
			if r.marks[markOf(c)] {
				found = c
				break
			}
		}
		if found == nil {
			return chain, nil
		}
	}
	return nil, fmt.Errorf("%w: a CRL names it: %s", ErrRevoked, describe(found))
}

// loadRevocations reads CRL files and the deny lists. A CRL counts if an
// authority of the CA file signed it and its time has not run out: an old list
// may miss the very certificate that was stolen.
func loadRevocations(
	cfg Config, authorities []*x509.Certificate, now time.Time,
) (*revocations, error) {
	r := &revocations{
		marks: make(map[mark]bool), denied: make(map[[sha256.Size]byte]bool),
	}
	var faults []error
	for _, path := range cfg.CRLs {
		if err := r.loadFile(path, authorities, now); err != nil {
			faults = append(faults, fmt.Errorf("load CRL %s: %w", path, err))
		}
	}
	for i, s := range cfg.Deny {
		pin, err := parsePin(s)
		if err != nil {
			faults = append(faults, fmt.Errorf("deny list, entry %d: %w", i+1, err))
			continue
		}
		r.denied[pin] = true
	}
	for _, path := range cfg.DenyFiles {
		if err := r.denyFile(path); err != nil {
			faults = append(faults, fmt.Errorf("load deny list %s: %w", path, err))
		}
	}
	return r, errors.Join(faults...)
}

// denyFile reads a text file of pins.
func (r *revocations) denyFile(path string) error {
	data, err := readPublic(path)
	if err != nil {
		return err
	}
	n := 0
	for line := range strings.Lines(string(data)) {
		n++
		if line = strings.TrimSpace(line); line == "" || line[0] == '#' {
			continue
		}
		pin, err := parsePin(line)
		if err != nil {
			return fmt.Errorf("line %d: %w", n, err)
		}
		r.denied[pin] = true
	}
	return nil
}

// loadFile reads one file of CRLs, PEM or a single one in DER.
func (r *revocations) loadFile(path string, authorities []*x509.Certificate, now time.Time) error {
	data, err := readPublic(path)
	if err != nil {
		return err
	}
	if !bytes.Contains(data, []byte("-----BEGIN")) {
		return r.add(data, authorities, now)
	}
	for n := 0; ; n++ {
		var block *pem.Block
		if block, data = pem.Decode(data); block == nil {
			if n == 0 || bytes.Contains(data, []byte("-----BEGIN")) {
				return fmt.Errorf("damaged after list %d; copy it again", n)
			}
			return nil
		}
		if block.Type != "X509 CRL" {
			return fmt.Errorf("it holds a %s; name a file of revocation lists", block.Type)
		}
		if err := r.add(block.Bytes, authorities, now); err != nil {
			return err
		}
	}
}

func (r *revocations) add(der []byte, authorities []*x509.Certificate, now time.Time) error {
	list, err := x509.ParseRevocationList(der)
	if err != nil {
		return err
	}
	var signed bool
	for _, c := range authorities {
		signed = signed || bytes.Equal(c.RawSubject, list.RawIssuer) &&
			list.CheckSignatureFrom(c) == nil
	}
	if !signed {
		return fmt.Errorf("no authority of the CA file signed it (issuer %q)", list.Issuer)
	}
	for _, e := range list.Extensions {
		if e.Critical { // RFC 5280 section 5.2: delta and indirect lists, partial scopes
			return fmt.Errorf("its critical extension %v is not supported; use a full list", e.Id)
		}
	}
	switch next := list.NextUpdate; {
	case next.IsZero():
	case now.After(next):
		return fmt.Errorf("it ran out on %s; fetch a new one", next.Format("2006-01-02 15:04 MST"))
	case r.expires.IsZero() || next.Before(r.expires):
		r.expires = next
	}
	for _, e := range list.RevokedCertificateEntries {
		r.marks[mark{string(list.RawIssuer), string(e.SerialNumber.Bytes())}] = true
	}
	return nil
}

// parsePin reads a SHA-256 of a certificate, with or without colons.
func parsePin(s string) (pin [sha256.Size]byte, err error) {
	raw, err := hex.DecodeString(strings.ReplaceAll(s, ":", ""))
	if err != nil || len(raw) != len(pin) {
		return pin, errors.New("pin needs 64 hexadecimal digits (SHA-256 of the certificate)")
	}
	return [sha256.Size]byte(raw), nil
}
