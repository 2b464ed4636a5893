package enrol

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"os"
	"time"

	"github.com/quietline/quietline/cmd/internal/config"
	"github.com/quietline/quietline/cmd/internal/pki"
	"github.com/quietline/quietline/secret"
	"github.com/quietline/quietline/tunnel/bundle"
	"github.com/quietline/quietline/tunnel/rekey"
)

// Finding is one thing that Inspect looked at.
type Finding struct {
	What  string `json:"what"`            // e.g. "line tokyo-kochi: certificate"
	Fault string `json:"fault,omitempty"` // empty: it is good
	Note  string `json:"note,omitempty"`  // what a person may compare
}

// inspection collects findings about one site.
type inspection struct {
	site *config.Site
	now  time.Time
	list []Finding
}

// Inspect looks at every certificate, key, list, bundle and secret that a site
// file names, as the daemons and their peers will, and changes nothing. Each
// fault says what was compared with what and what to do. links are the check
// values of lines as another site's Inspect noted them, by line; see
// [LinkCheck].
func Inspect(site *config.Site, links map[string]string, now time.Time) []Finding {
	i := &inspection{site: site, now: now}
	if k := site.KME; k != nil {
		i.door(k)
		i.peer(k)
		i.rootKey(k.RootKey)
	}
	for n := range site.Lines {
		l := &site.Lines[n]
		i.line(l, links[l.ID])
		if l.Keys != nil {
			i.keys("line "+l.ID+": ", l.Keys)
		}
	}
	return i.list
}

func (i *inspection) note(what string, err error) {
	f := Finding{What: what}
	if err != nil {
		f.Fault = err.Error()
	}
	i.list = append(i.list, f)
}

// pair loads a certificate and its key from one file or two.
func pair(cert, key string) (*pki.Pair, error) {
	if cert == key {
		return pki.LoadPair(cert)
	}
	chain, err := pki.ReadCertificates(cert)
	if err != nil {
		return nil, err
	}
	return pki.JoinPair(chain, key)
}

// certificate holds a pair against roots and use.
func (i *inspection) certificate(cert, key, ca string, use pki.Use) (*pki.Pair, error) {
	p, err := pair(cert, key)
	if err != nil {
		return nil, explain(err)
	}
	roots, err := pki.ReadCertificates(ca)
	if err != nil {
		return nil, explain(err)
	}
	return p, pki.CheckChain(p.Chain, roots, p.Key.Public(), use, i.now)
}

// explain adds what to do about faults of files.
func explain(err error) error {
	switch {
	case errors.Is(err, pki.ErrKeyPair):
		return fmt.Errorf("%w; name the pair that was made together, or renew it: quietline pki renew", err)
	case errors.Is(err, os.ErrNotExist):
		return fmt.Errorf("%w; correct the path in the site file, or make it: quietline pki issue", err)
	}
	return err
}

func (i *inspection) door(k *config.KME) {
	p, err := pair(k.Certificate, k.Key)
	if err != nil {
		i.note("door: certificate", explain(err))
		return
	}
	// The door's own root is known to its clients only: here the path is not
	// checked, names and dates are.
	err = pki.CheckChain(p.Chain, p.Chain[len(p.Chain)-1:], p.Key.Public(), pki.Use{Server: true}, i.now)
	i.note("door: certificate", err)
	_, err = pki.ReadCertificates(k.ClientCA)
	i.note("door: roots of applications", explain2(err))
}

func explain2(err error) error {
	if err == nil {
		return nil
	}
	return explain(err)
}

func (i *inspection) peer(k *config.KME) {
	_, err := i.certificate(k.PeerCertificate, k.PeerKey, k.PeerCA,
		pki.Use{URI: pki.KMEURI(k.ID), Server: true, Client: true})
	i.note("key manager: certificate towards peers", err)
}

func (i *inspection) rootKey(path string) {
	b, err := secret.ReadFile(path, 32)
	if err == nil && b.Len() != 32 {
		err = fmt.Errorf("read %s: %d bytes, expected 32; restore it from its copy", path, b.Len())
	}
	b.Clear()
	i.note("key manager: root key", explain2(err))
}

// keys holds a line's certificate against the door where it draws keys.
func (i *inspection) keys(of string, k *config.Keys) {
	ca, use := k.CA, pki.Use{Client: true}
	if kme := i.site.KME; kme != nil {
		ca = kme.ClientCA
	}
	for _, a := range i.site.SAEs {
		if a.ID == k.SAE {
			use.URI = a.Identity.URI
		}
	}
	p, err := i.certificate(k.Certificate, k.Key, ca, use)
	i.note(of+"certificate of SAE "+k.SAE, err)
	if p != nil && i.site.KME != nil && i.site.KME.ClientCRL != "" {
		i.note(of+"revocation", revoked(p.Chain[0], i.site.KME.ClientCRL))
	}
	if i.site.KME != nil {
		i.note(of+"door as its client sees it", i.reach(k))
	}
}

// reach holds the door's certificate against the CA and the address that a
// client of this site has.
func (i *inspection) reach(k *config.Keys) error {
	door, err := i.certificate(i.site.KME.Certificate, i.site.KME.Key, k.CA, pki.Use{Server: true})
	if err != nil {
		return err
	}
	u, err := url.Parse(k.KMEs[0])
	if err != nil {
		return err
	}
	if err := door.Chain[0].VerifyHostname(u.Hostname()); err != nil {
		form := "--dns"
		if _, err := netip.ParseAddr(u.Hostname()); err == nil {
			form = "--ip"
		}
		return fmt.Errorf("the SAN for %s is missing: %w; quietline pki issue door NAME %s %s",
			u.Hostname(), err, form, u.Hostname())
	}
	return nil
}

// revoked looks a certificate up in a list.
func revoked(c *x509.Certificate, path string) error {
	text, err := os.ReadFile(path)
	if err != nil {
		return explain(err)
	}
	if block, _ := pem.Decode(text); block != nil {
		text = block.Bytes
	}
	list, err := x509.ParseRevocationList(text)
	if err != nil {
		return fmt.Errorf("read %s: %w", path, err)
	}
	for _, e := range list.RevokedCertificateEntries {
		if bytes.Equal(list.RawIssuer, c.RawIssuer) && e.SerialNumber.Cmp(c.SerialNumber) == 0 {
			return fmt.Errorf("%w since %s: %s, on %s; issue a new one under a new name: quietline pki issue",
				pki.ErrRevoked, stamp(e.RevocationTime), pki.Describe(c), path)
		}
	}
	return nil
}

// line looks at the secrets and the bundle of a line.
func (i *inspection) line(l *config.Line, other string) {
	of := "line " + l.ID + ": "
	seed, err := bundle.ReadSecret(l.StaticKey)
	i.note(of+"static key", explain2(err))
	seed.Clear()
	i.note(of+"bundle of the other end", checkBundle(l))
	link, err := bundle.ReadSecret(l.LinkSecret)
	if err != nil {
		i.note(of+"link secret", explain(err))
		return
	}
	defer link.Clear()
	f := Finding{What: of + "link secret", Note: LinkCheck(link)}
	if other != "" && clean(other) != clean(f.Note) {
		f.Fault = fmt.Sprintf("wrong link secret: its check value is %s here and %s at the other end; "+
			"enrol the line again: quietline pki invite --again", f.Note, other)
	}
	i.list = append(i.list, f)
}

func checkBundle(l *config.Line) error {
	text, err := os.ReadFile(l.PeerBundle)
	if err != nil {
		return explain(err)
	}
	b, err := bundle.Unmarshal(text)
	switch {
	case err != nil:
		return fmt.Errorf("read %s: %w; enrol the line again: quietline pki invite", l.PeerBundle, err)
	case l.PeerFingerprint != "" && b.Fingerprint() != l.PeerFingerprint:
		return fmt.Errorf("%w: %s is signed by %s, peer_fingerprint says %s; ask the other site which is "+
			"right, and enrol the line again", ErrFingerprint, l.PeerBundle, b.Fingerprint(), l.PeerFingerprint)
	case l.Keys != nil && b.EpochSAE != l.Keys.PeerSAE:
		return fmt.Errorf("%w: the bundle names the SAE %q, keys.peer_sae is %q; correct the site file",
			ErrName, b.EpochSAE, l.Keys.PeerSAE)
	}
	return ownEnd(l, b)
}

// ownEnd refuses the own bundle in place of the other end's.
func ownEnd(l *config.Line, b *bundle.Bundle) error {
	seed, err := bundle.ReadSecret(l.StaticKey)
	if err != nil {
		return nil // told before
	}
	defer seed.Clear()
	public, err := rekey.Public(b.Suite, seed)
	if err == nil && bytes.Equal(public, b.Static) {
		err = fmt.Errorf("%w: %s is this end's own bundle; take the other end's", ErrName, l.PeerBundle)
	}
	return err
}

// LinkCheck is a value that two people may compare over the telephone to see
// whether their link secrets are the same: 64 bits of HMAC-SHA-256 under the
// secret, from which nobody gets back.
func LinkCheck(link secret.Bytes) string {
	m := hmac.New(sha256.New, link.Expose())
	m.Write([]byte("quietline link check"))
	text := hex.EncodeToString(m.Sum(nil)[:8])
	return text[:4] + " " + text[4:8] + " " + text[8:12] + " " + text[12:]
}
