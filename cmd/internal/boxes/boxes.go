// Package boxes writes what other makers' boxes and programs need to draw keys
// from a key manager over ETSI GS QKD 014: their configuration text, and their
// certificates in the forms they take.
//
// [Write] is all there is; a [Setup] says who asks which KME about whom, and
// [List] names the boxes.
//
// A caller must keep in mind that no text has met a real box yet: each says
// above its lines where they come from and which are unverified.
package boxes

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"embed"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"text/template"
	"unicode"

	"software.sslmate.com/src/go-pkcs12"

	"github.com/quietline/quietline/cmd/internal/pki"
	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/etsi014/identity"
	"github.com/quietline/quietline/secret"
)

// Errors of this package.
var (
	// ErrBox: there is no text for a box of this name.
	ErrBox = errors.New("no such box")
	// ErrSetup: a value cannot stand in the box's configuration.
	ErrSetup = errors.New("value does not fit the box")
)

// Box is a maker's box, or a program.
type Box struct {
	Name  string `json:"name"`
	About string `json:"about"`
	File  string `json:"file"` // of the configuration text
	// maxSAE and maxHost bound the SAE ID and the KME's host, characters;
	// 0 = no bound is known.
	maxSAE, maxHost int
}

// List names the boxes in the order of the alphabet.
func List() []Box {
	return []Box{
		{Name: "arnika", About: "arnika: WireGuard's preshared key from a KME", File: "arnika.env"},
		// The bounds stand in FortiOS's CLI reference, "config vpn qkd".
		{Name: "fortigate", About: "FortiGate, FortiOS 7.4.2 and later: IKE keys from a KME",
			File: "fortigate.conf", maxSAE: 291, maxHost: 63},
		{Name: "junos", About: "Junos SRX and vSRX: IKE PPK (RFC 8784) from a KME",
			File: "junos.set"},
		{Name: "strongswan", About: "strongSwan: IKE PPK (RFC 8784) loaded by a script",
			File: "strongswan.conf"},
	}
}

//go:embed text
var texts embed.FS

// Setup says who asks which KME about whom.
type Setup struct {
	URL   string        // base URL of the KME
	SAE   etsi014.SAEID // who asks; "" = as the certificate's URI says
	Peer  etsi014.SAEID // about whom
	Files identity.Config
}

// facts are what the texts are filled with.
type facts struct {
	URL, Host, Port string
	SAE, Peer       string
	PeerPath        string // Peer as it stands in a URL
	Dir             string
	DNSFault        string // what Junos automation dislikes in the SAE's certificate
}

// Write makes the folder dir and fills it for one box. It returns the names of
// the files. Nothing is asked of the KME. The folder must not exist, because
// an old one may be in use by a box.
func Write(dir, name string, s Setup) ([]string, error) {
	fail := func(err error) ([]string, error) {
		return nil, fmt.Errorf("write %s for %s: %w", dir, name, err)
	}
	box, err := find(name)
	if err != nil {
		return nil, err
	}
	live, err := identity.Open(s.Files)
	if err != nil {
		return fail(err)
	}
	own := live.Client().Certificates[0]
	pair := &pki.Pair{Key: own.PrivateKey.(crypto.Signer)}
	for _, der := range own.Certificate {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return fail(err)
		}
		pair.Chain = append(pair.Chain, c)
	}
	f, err := s.facts(box, pair.Chain[0])
	if err != nil {
		return fail(err)
	}
	roots, err := pki.ReadCertificates(s.Files.CA)
	if err != nil {
		return fail(err)
	}
	if f.Dir, err = filepath.Abs(dir); err != nil {
		return fail(err)
	}
	if strings.ContainsFunc(f.Dir, special) {
		return fail(fmt.Errorf("%w: the folder's name has a character with a meaning there", ErrSetup))
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		return fail(err)
	}
	if err := fill(dir, box, f); err != nil {
		return fail(err)
	}
	if err := bundle(dir, pair, roots); err != nil {
		return fail(err)
	}
	return list(dir)
}

func find(name string) (Box, error) {
	var names []string
	for _, b := range List() {
		if b.Name == name {
			return b, nil
		}
		names = append(names, b.Name)
	}
	return Box{}, fmt.Errorf("%w: %q; there are %s", ErrBox, name, strings.Join(names, ", "))
}

// facts checks the values. They land between quotes in foreign configuration
// languages and in a shell script, so that characters with a meaning there are
// refused, not escaped.
func (s Setup) facts(box Box, leaf *x509.Certificate) (facts, error) {
	u, err := url.Parse(s.URL)
	if err != nil || u.Scheme != "https" || u.Hostname() == "" || u.RawQuery != "" ||
		u.User != nil || u.Fragment != "" {
		return facts{}, fmt.Errorf("%w: %q is no base URL like https://host:port", ErrSetup, s.URL)
	}
	if s.SAE == "" {
		if s.SAE, err = named(leaf); err != nil {
			return facts{}, err
		}
	}
	f := facts{
		URL: strings.TrimRight(s.URL, "/"), Host: u.Hostname(), Port: u.Port(), SAE: string(s.SAE),
		Peer: string(s.Peer), PeerPath: url.PathEscape(string(s.Peer)),
	}
	if f.Port == "" {
		f.Port = "443"
	}
	for _, c := range []struct{ what, value string }{
		{"SAE ID", f.SAE}, {"SAE ID", f.Peer}, {"URL", f.URL},
	} {
		if c.value == "" || strings.ContainsFunc(c.value, special) ||
			c.what == "URL" && strings.Contains(c.value, " ") {
			return facts{}, fmt.Errorf("%w: %s %q is empty or has a character with a meaning there",
				ErrSetup, c.what, c.value)
		}
	}
	if n := len([]rune(f.SAE)); box.maxSAE > 0 && n > box.maxSAE {
		return facts{}, fmt.Errorf("%w: SAE ID of %d characters, it takes %d", ErrSetup, n, box.maxSAE)
	}
	if box.maxHost > 0 && len(f.Host) > box.maxHost {
		return facts{}, fmt.Errorf("%w: host of %d characters, it takes %d", ErrSetup, len(f.Host),
			box.maxHost)
	}
	f.DNSFault = dnsFault(leaf)
	return f, nil
}

// special says that a character could mean more than itself between the quotes
// of a configuration file or of a shell.
func special(r rune) bool {
	return !unicode.IsPrint(r) || strings.ContainsRune("\"'`\\${}", r)
}

// named is the SAE that a certificate names in our way.
func named(leaf *x509.Certificate) (etsi014.SAEID, error) {
	for _, u := range leaf.URIs {
		if id, ok := strings.CutPrefix(u.String(), identity.DefaultURI("")); ok {
			plain, err := url.PathUnescape(id)
			if err != nil {
				break
			}
			return etsi014.ParseSAEID(plain)
		}
	}
	return "", fmt.Errorf("%w: the certificate names no SAE; give the SAE ID", ErrSetup)
}

// dnsFault says what Juniper's MACsec automation would refuse.
func dnsFault(leaf *x509.Certificate) string {
	switch {
	case len(leaf.DNSNames) == 0:
		return "the certificate carries no DNS name"
	case strings.Contains(strings.Join(leaf.DNSNames, ""), "_"):
		return "a DNS name of the certificate has an underscore"
	}
	return ""
}

// fill writes the box's texts.
func fill(dir string, box Box, f facts) error {
	all, err := template.New("").Option("missingkey=error").ParseFS(texts, "text/"+box.Name+"*")
	if err != nil {
		return err
	}
	for _, t := range all.Templates() {
		if t.Name() == "" {
			continue
		}
		var b bytes.Buffer
		if err := t.Execute(&b, f); err != nil {
			return err
		}
		name, mode := t.Name(), os.FileMode(0o644)
		if strings.HasSuffix(name, ".sh") {
			name, mode = strings.TrimPrefix(name, box.Name+"-"), 0o755
		}
		if err := secret.WriteFileMode(filepath.Join(dir, name), b.Bytes(), mode); err != nil {
			return err
		}
	}
	return nil
}

// bundle writes the certificates: PEM, PKCS#12 as OpenSSL 1.1.1 and later read
// it, and PKCS#12 of the old kind for boxes that cannot.
func bundle(dir string, pair *pki.Pair, roots []*x509.Certificate) error {
	at := func(name string) string { return filepath.Join(dir, name) }
	if err := pki.WritePEM(at("sae.crt"), at("sae.key"), pair); err != nil {
		return err
	}
	ca := pki.EncodeCertificates(roots)
	if err := secret.WriteFileMode(at("kme-ca.crt"), ca, 0o644); err != nil {
		return err
	}
	// 130 bits, so that nobody guesses it off-line, whatever the format does.
	password := secret.Own([]byte(rand.Text()))
	defer password.Clear()
	if err := secret.WriteFile(at("p12-password"), password.Expose()); err != nil {
		return err
	}
	if err := pki.WritePKCS12(at("sae.p12"), pair, roots, password); err != nil {
		return err
	}
	with := append(append([]*x509.Certificate{}, pair.Chain[1:]...), roots...)
	old, err := pkcs12.LegacyDES.Encode(pair.Key, pair.Chain[0], with, string(password.Expose()))
	if err != nil {
		return fmt.Errorf("encode %s: %w", at("sae-legacy.p12"), err)
	}
	defer secret.Wipe(old)
	return secret.WriteFile(at("sae-legacy.p12"), old)
}

func list(dir string) (names []string, err error) {
	entries, err := os.ReadDir(dir)
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names, err
}

// Unverified counts the lines of a box's texts that are marked as unverified.
func Unverified(dir, name string) (int, error) {
	box, err := find(name)
	if err != nil {
		return 0, err
	}
	b, err := os.ReadFile(filepath.Join(dir, box.File))
	if err != nil {
		return 0, err
	}
	n := 0
	for _, line := range strings.Split(string(b), "\n") {
		if strings.Contains(line, "UNVERIFIED") {
			n++
		}
	}
	return n, nil
}
