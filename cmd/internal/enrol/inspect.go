package enrol

import (
	"bytes"
	"cmp"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"time"

	"github.com/quietline/quietline/cmd/internal/config"
	"github.com/quietline/quietline/cmd/internal/pki"
	"github.com/quietline/quietline/etsi014/doctor"
	"github.com/quietline/quietline/kms"
	"github.com/quietline/quietline/kms/keyring"
	"github.com/quietline/quietline/secret"
	"github.com/quietline/quietline/tunnel/bundle"
	"github.com/quietline/quietline/tunnel/rekey"
)

// inspection collects what was found at one site.
type inspection struct {
	dir  string // of the site file
	site *config.Site
	now  time.Time
	list []doctor.Check
}

// Inspect looks at every certificate, key, list, bundle and secret that a site
// file names, as the daemons and their peers will, at the enrolments in its
// folder, and at the clock. It changes nothing and opens no connection. Each
// fault says what was compared with what and what to do. links are the check
// values of lines as the other site's Inspect told them, by line; see
// [LinkCheck].
func Inspect(file string, site *config.Site, links map[string]string, now time.Time) []doctor.Check {
	i := &inspection{dir: filepath.Dir(file), site: site, now: now}
	i.clock(file)
	if k := site.KME; k != nil {
		i.door(k)
		i.peer(k)
		if k.RootKey != "" { // a credential is shown to its service alone
			i.rootKey(k.RootKey)
		}
	}
	for n := range site.Lines {
		l := &site.Lines[n]
		i.line(l, links[l.ID])
		if l.Keys != nil {
			i.keys("line "+l.ID+": ", l.Keys)
		}
	}
	i.enrolments()
	return i.list
}

// note keeps a check: good with what was found, or each of its faults.
func (i *inspection) note(name, good string, faults ...error) {
	clean := true
	for _, err := range faults {
		if err == nil {
			continue
		}
		clean = false
		found, hint := pki.Split(explain(err))
		i.list = append(i.list, doctor.Check{Name: name, Verdict: doctor.Fail, Found: found, Hint: hint})
	}
	if clean {
		i.list = append(i.list, doctor.Check{Name: name, Verdict: doctor.OK, Found: good})
	}
}

// explain adds what to do about faults of files, where nothing else does.
func explain(err error) error {
	if f := new(pki.Fault); errors.As(err, &f) {
		return err
	}
	switch {
	case errors.Is(err, pki.ErrKeyPair):
		return pki.Advise(err, "name the pair that was made together, or renew it: quietline pki renew")
	case errors.Is(err, os.ErrNotExist):
		return pki.Advise(err, "correct the path in the site file, or make it: quietline pki issue")
	case errors.Is(err, secret.ErrExposed):
		return pki.Advise(err, "a secret must be readable by its owner only: chmod 600; if others "+
			"could log in here, make it anew")
	case errors.Is(err, os.ErrPermission):
		return pki.Advise(err, "run it as the daemons' user")
	}
	return pki.Advise(err, "take the file from its source again")
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

// certificate holds a pair against roots and use; without a file of roots the
// path is not looked at.
func (i *inspection) certificate(cert, key, ca string, use pki.Use) (*pki.Pair, []error) {
	p, err := pair(cert, key)
	if err != nil {
		return nil, []error{err}
	}
	var roots []*x509.Certificate
	if ca != "" {
		if roots, err = pki.ReadCertificates(ca); err != nil {
			return p, []error{err}
		}
	}
	return p, pki.ChainFaults(p.Chain, roots, p.Key.Public(), use, i.now)
}

// describe names a pair's certificate, if there is one.
func describe(p *pki.Pair) string {
	if p == nil {
		return ""
	}
	return pki.Describe(p.Chain[0])
}

func (i *inspection) door(k *config.KME) {
	// The door's own root is known to its clients only: here the path is not
	// checked, names and dates are.
	p, faults := i.certificate(k.Certificate, k.Key, "", pki.Use{Server: true})
	i.note("door: certificate", describe(p), faults...)
	_, err := pki.ReadCertificates(k.ClientCA)
	i.note("door: roots of applications", k.ClientCA, err)
}

func (i *inspection) peer(k *config.KME) {
	// Peers hold it against the root that they were given at the enrolment:
	// this site's own, which stands in peer_ca too.
	p, faults := i.certificate(k.PeerCertificate, k.PeerKey, k.PeerCA,
		pki.Use{URI: pki.KMEURI(k.ID), Server: true, Client: true})
	i.note("key manager: certificate towards peers", describe(p), faults...)
}

func (i *inspection) rootKey(path string) {
	b, err := keyring.ReadRootKey(path)
	b.Clear()
	good := path
	if errors.Is(err, kms.ErrSealed) {
		good += ", under a passphrase"
		_, err = keyring.ReadSealedRoot(path)
	}
	if err != nil && !errors.Is(err, fs.ErrPermission) && !errors.Is(err, secret.ErrExposed) {
		err = pki.Advise(err, "restore it from its copy")
	}
	i.note("key manager: root key", good, err)
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
	p, faults := i.certificate(k.Certificate, k.Key, ca, use)
	i.note(of+"certificate of SAE "+k.SAE, describe(p), faults...)
	if kme := i.site.KME; kme != nil {
		if p != nil && kme.ClientCRL != "" {
			i.note(of+"revocation", "not on "+kme.ClientCRL, revoked(p.Chain[0], kme.ClientCRL))
		}
		if p != nil && kme.ClientDeny != "" {
			i.note(of+"deny list", "not on "+kme.ClientDeny, denied(p.Chain[0], kme.ClientDeny))
		}
		i.reach(of, k)
	}
}

// reach holds the door's certificate against the CA and the address that a
// client of this site has.
func (i *inspection) reach(of string, k *config.Keys) {
	door, faults := i.certificate(i.site.KME.Certificate, i.site.KME.Key, k.CA, pki.Use{Server: true})
	u, err := url.Parse(k.KMEs[0])
	if err == nil && door != nil {
		err = named(door.Chain[0], u.Hostname())
	}
	i.note(of+"door as its client sees it", k.KMEs[0], append(faults, err)...)
}

// named looks for a host among a certificate's names.
func named(c *x509.Certificate, host string) error {
	err := c.VerifyHostname(host)
	if err == nil {
		return nil
	}
	form := "--dns"
	if _, err := netip.ParseAddr(host); err == nil {
		form = "--ip"
	}
	return pki.Advise(fmt.Errorf("the SAN for %s is missing: %w: %s", host, err, pki.Describe(c)),
		fmt.Sprintf("quietline pki issue door NAME %s %s", form, host))
}

// revoked looks a certificate up in a list.
func revoked(c *x509.Certificate, path string) error {
	text, err := os.ReadFile(path)
	if err != nil {
		return err
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
			return pki.Advise(fmt.Errorf("%w since %s: %s, on %s", pki.ErrRevoked,
				stamp(e.RevocationTime), pki.Describe(c), path),
				"issue a new one under a new name: quietline pki issue")
		}
	}
	return nil
}

// denied looks a certificate up in a deny list.
func denied(c *x509.Certificate, path string) error {
	text, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	pin := sha256.Sum256(c.Raw)
	digits := bytes.ReplaceAll(bytes.ToLower(text), []byte(":"), nil)
	if !bytes.Contains(digits, []byte(hex.EncodeToString(pin[:]))) {
		return nil
	}
	return pki.Advise(fmt.Errorf("%w: %s, SHA-256 %x, on %s", pki.ErrRevoked, pki.Describe(c), pin, path),
		"issue a new one")
}

// line looks at the secrets and the bundle of a line.
func (i *inspection) line(l *config.Line, other string) {
	of := "line " + l.ID + ": "
	seed, err := bundle.ReadSecret(l.StaticKey)
	i.note(of+"static key", l.StaticKey, err)
	seed.Clear()
	i.note(of+"bundle of the other end", cmp.Or(l.PeerFingerprint, l.PeerBundle), checkBundle(l))
	link, err := bundle.ReadSecret(l.LinkSecret)
	if err != nil {
		i.note(of+"link secret", "", err)
		return
	}
	defer link.Clear()
	check := LinkCheck(link)
	if other != "" && clean(other) != clean(check) {
		err = pki.Advise(fmt.Errorf("wrong link secret: its check value is %s here and %s at the other end",
			check, other), "enrol the line again: quietline pki invite --again")
	}
	i.note(of+"link secret", "check value "+check+", which the other end must have too", err)
}

// checkBundle holds a bundle against the site file.
func checkBundle(l *config.Line) error {
	text, err := os.ReadFile(l.PeerBundle)
	if err != nil {
		return err
	}
	b, err := bundle.Unmarshal(text)
	switch {
	case err != nil:
		return pki.Advise(fmt.Errorf("read %s: %w", l.PeerBundle, err),
			"enrol the line again: quietline pki invite --again")
	case l.PeerFingerprint != "" && b.Fingerprint() != l.PeerFingerprint:
		return pki.Advise(fmt.Errorf("%w: %s is signed by %s, peer_fingerprint says %s", ErrFingerprint,
			l.PeerBundle, b.Fingerprint(), l.PeerFingerprint),
			"ask the other site which is right, and enrol the line again: quietline pki invite --again")
	case l.Keys != nil && b.EpochSAE != l.Keys.PeerSAE:
		return pki.Advise(fmt.Errorf("%w: the bundle names the SAE %q, keys.peer_sae is %q", ErrName,
			b.EpochSAE, l.Keys.PeerSAE), "correct the site file")
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
		err = pki.Advise(fmt.Errorf("%w: %s is this end's own bundle", ErrName, l.PeerBundle),
			"take the other end's")
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
