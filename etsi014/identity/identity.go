// Package identity says who a certificate is: it ties the verified leaf of a
// TLS connection to one SAE ID, and keeps certificates, authorities and rules
// so that all of them can be changed while connections live.
//
// [Table] is the list of rules; [Live] holds it together with the files and
// makes the TLS configurations of both ends of ETSI GS QKD 014.
//
// A caller must keep in mind that the standard leaves open which field of a
// certificate carries the SAE ID (clause 5.1), so each SAE has a rule of its
// own, and that a certificate which fits two SAEs is nobody's.
package identity

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"net/url"
	"strings"

	"github.com/quietline/quietline/etsi014"
)

// Errors of a look-up. The texts that wrap them name subject, issuer and
// alternative names: they are for the log and not for the client.
var (
	// ErrNoCertificate: the connection has no verified client certificate.
	ErrNoCertificate = errors.New("no verified certificate")
	// ErrNoMatch: no rule fits the certificate.
	ErrNoMatch = errors.New("certificate belongs to no SAE")
	// ErrAmbiguous: rules of more than one SAE fit.
	ErrAmbiguous = errors.New("certificate belongs to more than one SAE")
)

// Match says which part of a certificate a rule compares.
type Match string

// The parts of a certificate. All compare exactly; DNS names compare without
// regard to case, and a wildcard is not expanded.
const (
	ByURI Match = "uri" // a subject alternative name of type URI
	ByDNS Match = "dns" // a subject alternative name of type DNS
	ByCN  Match = "cn"  // the subject's common name
	ByPin Match = "pin" // SHA-256 of the whole certificate, hexadecimal, colons allowed
)

// Rule ties one part of a certificate to an SAE. An SAE may have several
// rules, for the time in which its certificate changes.
type Rule struct {
	SAE etsi014.SAEID
	By  Match // empty = ByURI
	// Value is what the part must be. Empty is allowed with ByURI and means
	// DefaultURI of the SAE.
	Value string
}

// DefaultURI is the URI that names an SAE in a certificate unless its rule
// says otherwise: urn:quietline:sae: and the SAE ID, percent-encoded.
func DefaultURI(id etsi014.SAEID) string {
	return "urn:quietline:sae:" + url.PathEscape(string(id))
}

type part struct {
	by    Match
	value string
}

// Table finds the SAE of a certificate. It does not change and is safe for
// concurrent use.
type Table struct {
	rules map[part]etsi014.SAEID
}

// New checks the rules and reports all faults at once. No rules make a table
// that refuses everybody.
func New(rules []Rule) (*Table, error) {
	t := &Table{rules: make(map[part]etsi014.SAEID, len(rules))}
	var faults []error
	for i, r := range rules {
		p, err := r.part()
		if err == nil {
			if other, taken := t.rules[p]; taken {
				err = fmt.Errorf("%s %q is already the mark of SAE %s", p.by, p.value, other)
			}
		}
		if err != nil {
			faults = append(faults, fmt.Errorf("rule %d, SAE %q: %w", i+1, r.SAE, err))
			continue
		}
		t.rules[p] = r.SAE
	}
	if len(faults) > 0 {
		return nil, errors.Join(faults...)
	}
	return t, nil
}

// part checks a rule and brings its value into the form that is compared.
func (r Rule) part() (part, error) {
	if _, err := etsi014.ParseSAEID(string(r.SAE)); err != nil {
		return part{}, err
	}
	p := part{by: r.By, value: r.Value}
	if p.by == "" {
		p.by = ByURI
	}
	if p.by == ByURI && p.value == "" {
		p.value = DefaultURI(r.SAE)
	}
	if p.value == "" {
		return part{}, fmt.Errorf("%s needs a value", p.by)
	}
	switch p.by {
	case ByURI, ByCN:
	case ByDNS:
		p.value = strings.ToLower(p.value)
	case ByPin:
		pin, err := parsePin(p.value)
		if err != nil {
			return part{}, err
		}
		p.value = hex.EncodeToString(pin[:])
	default:
		return part{}, fmt.Errorf("unknown match %q: use uri, dns, cn or pin", p.by)
	}
	return p, nil
}

// Lookup finds the one SAE whose rules fit a leaf that was verified before.
// The error wraps ErrNoMatch or ErrAmbiguous.
func (t *Table) Lookup(leaf *x509.Certificate) (etsi014.SAEID, error) {
	var found etsi014.SAEID
	for _, p := range parts(leaf) {
		sae, ok := t.rules[p]
		if !ok || sae == found {
			continue
		}
		if found != "" {
			return "", fmt.Errorf("%w: %s and %s, %s", ErrAmbiguous, found, sae, describe(leaf))
		}
		found = sae
	}
	if found == "" {
		return "", fmt.Errorf("%w: %s", ErrNoMatch, describe(leaf))
	}
	return found, nil
}

// parts lists all of a certificate that a rule can name, in a fixed order.
func parts(leaf *x509.Certificate) []part {
	var list []part
	for _, u := range leaf.URIs {
		list = append(list, part{ByURI, u.String()})
	}
	for _, d := range leaf.DNSNames {
		list = append(list, part{ByDNS, strings.ToLower(d)})
	}
	if cn := leaf.Subject.CommonName; cn != "" {
		list = append(list, part{ByCN, cn})
	}
	pin := sha256.Sum256(leaf.Raw)
	return append(list, part{ByPin, hex.EncodeToString(pin[:])})
}

// describe names a certificate for the log.
func describe(c *x509.Certificate) string {
	var uris []string
	for _, u := range c.URIs {
		uris = append(uris, u.String())
	}
	return fmt.Sprintf("subject %q, issuer %q, URIs %q, DNS names %q, serial %x, SHA-256 %x",
		c.Subject, c.Issuer, uris, c.DNSNames, c.SerialNumber, sha256.Sum256(c.Raw))
}
