package node

import (
	"bytes"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/secret"
)

// TLSFiles are the PEM files of the peer channel.
type TLSFiles struct {
	Cert string // ours; its one URI SAN is urn:quietline:kme:<KME ID>
	Key  string // mode 0600
	// CA holds who signs KMEs, not SAEs. It speaks for each peer that has no
	// file of its own, see Peer.CA; then any of its roots may name any of them.
	CA string
	// CRLs are revocation lists of those authorities, PEM or DER.
	CRLs []string
}

// uriPrefix comes before the KME ID in a certificate's URI SAN.
const uriPrefix = "urn:quietline:kme:"

// Errors of the peer channel.
var (
	// ErrIdentity: a certificate does not say which KME it is, or another one.
	ErrIdentity = errors.New("certificate does not identify the KME")
	// ErrUntrusted: a certificate names a KME, and nobody who may sign for that
	// KME stands behind it now.
	ErrUntrusted = errors.New("certificate is refused")
)

// trust is what the peer channel rests on at one moment. It does not change.
type trust struct {
	self    etsi014.KMEID
	cert    tls.Certificate
	roots   map[etsi014.KMEID]*rootSet // of each peer
	revoked map[mark]string            // file of the list that names it
	sum     [sha256.Size]byte          // of all files, before they were read
	faults  error                      // of files that it does without
}

// rootSet is a file of authorities.
type rootSet struct {
	file  string
	certs []*x509.Certificate
	pool  *x509.CertPool
}

// mark names a certificate as its issuer's list does, but by the issuer's key:
// two sites may well have given their authorities one name.
type mark struct {
	issuer [sha256.Size]byte
	serial string
}

func markOf(cert, issuer *x509.Certificate) mark {
	return mark{sha256.Sum256(issuer.RawSubjectPublicKeyInfo), string(cert.SerialNumber.Bytes())}
}

// loadTrust reads the files of a configuration. A revocation list that cannot
// be used does not keep the others out, for that might be the very removal of
// its authority: it is a fault of the result, which goes by what the list said
// before, if anything. before is what is in force, nil at the start.
func loadTrust(cfg *Config, before *trust) (*trust, error) {
	t := &trust{self: cfg.KME, roots: map[etsi014.KMEID]*rootSet{}, revoked: map[mark]string{},
		sum: cfg.sumTLS()}
	var err error
	if t.cert, err = loadCertificate(cfg.TLS, cfg.KME); err != nil {
		return nil, err
	}
	files := map[string]*rootSet{}
	for _, p := range cfg.Peers {
		file := p.CA
		if file == "" {
			file = cfg.TLS.CA
		}
		if files[file] == nil {
			files[file], err = loadRoots(file)
			if before != nil && p.CA != "" && errors.Is(err, fs.ErrNotExist) {
				// Somebody took this peer's root away: then nobody speaks for it.
				t.faults = errors.Join(t.faults, err)
				files[file], err = &rootSet{file: file, pool: x509.NewCertPool()}, nil
			}
			if err != nil {
				return nil, err
			}
		}
		t.roots[p.ID] = files[file]
	}
	for _, file := range cfg.TLS.CRLs {
		err := t.loadRevoked(file, time.Now())
		if err == nil {
			continue
		}
		t.faults = errors.Join(t.faults, fmt.Errorf("read revocation list %s: %w", file, err))
		if before == nil {
			continue
		}
		for m, from := range before.revoked {
			if from == file {
				t.revoked[m] = from
			}
		}
	}
	return t, nil
}

// loadCertificate reads what we show to peers.
func loadCertificate(f TLSFiles, self etsi014.KMEID) (tls.Certificate, error) {
	fail := func(err error) (tls.Certificate, error) {
		return tls.Certificate{}, fmt.Errorf("read KME certificate %s: %w", f.Cert, err)
	}
	key, err := secret.ReadFile(f.Key, 1<<20)
	if err != nil {
		return fail(err)
	}
	defer key.Clear()
	chain, err := os.ReadFile(f.Cert)
	if err != nil {
		return fail(err)
	}
	cert, err := tls.X509KeyPair(chain, key.Expose())
	if err != nil {
		return fail(err)
	}
	if id, err := kmeOf(cert.Leaf); err != nil {
		return fail(err)
	} else if id != self {
		return fail(fmt.Errorf("%w: it is KME %q's, this is %q", ErrIdentity, id, self))
	}
	return cert, nil
}

// loadRoots reads a file of authorities.
func loadRoots(file string) (*rootSet, error) {
	rest, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("read KME authority: %w", err)
	}
	set := &rootSet{file: file, pool: x509.NewCertPool()}
	for {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			continue
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("read KME authority %s: certificate %d: %w", file,
				len(set.certs)+1, err)
		}
		set.certs = append(set.certs, c)
		set.pool.AddCert(c)
	}
	if len(set.certs) == 0 || bytes.Contains(rest, []byte("-----BEGIN")) {
		return nil, fmt.Errorf("read KME authority %s: no certificate in it after the first %d",
			file, len(set.certs))
	}
	return set, nil
}

// loadRevoked reads a file of revocation lists. A list counts if one of the
// peers' authorities signed it and its time has not run out: an old one may
// miss the very certificate that was stolen.
func (t *trust) loadRevoked(file string, now time.Time) error {
	data, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	if !bytes.Contains(data, []byte("-----BEGIN")) {
		return t.addRevoked(file, data, now)
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
		if err := t.addRevoked(file, block.Bytes, now); err != nil {
			return err
		}
	}
}

func (t *trust) addRevoked(file string, der []byte, now time.Time) error {
	list, err := x509.ParseRevocationList(der)
	if err != nil {
		return err
	}
	var issuer *x509.Certificate
	for _, set := range t.roots {
		for _, c := range set.certs {
			if bytes.Equal(c.RawSubject, list.RawIssuer) && list.CheckSignatureFrom(c) == nil {
				issuer = c
			}
		}
	}
	if issuer == nil {
		return fmt.Errorf("no authority of our peers signed it (issuer %q)", list.Issuer)
	}
	for _, e := range list.Extensions {
		if e.Critical { // RFC 5280 section 5.2: delta and indirect lists, partial scopes
			return fmt.Errorf("its critical extension %v is not supported; use a full list", e.Id)
		}
	}
	if !list.NextUpdate.IsZero() && now.After(list.NextUpdate) {
		return fmt.Errorf("it ran out on %s; fetch a new one", stamp(list.NextUpdate))
	}
	for _, e := range list.RevokedCertificateEntries {
		t.revoked[mark{sha256.Sum256(issuer.RawSubjectPublicKeyInfo),
			string(e.SerialNumber.Bytes())}] = file
	}
	return nil
}

// config is what both ends of the channel share. Peers must offer TLS 1.3 with
// X25519MLKEM768: key agreements between KMEs are recorded today and broken
// later.
func (t *trust) config() *tls.Config {
	return &tls.Config{
		MinVersion:       tls.VersionTLS13,
		CurvePreferences: []tls.CurveID{tls.X25519MLKEM768},
		Certificates:     []tls.Certificate{t.cert},
		ClientAuth:       tls.RequireAnyClientCert,
		// A KME is known by its URI, not by a host name: verify checks chain
		// and name on both sides.
		InsecureSkipVerify:     true,
		SessionTicketsDisabled: true, // a resumed session would skip the check of the chain
	}
}

// kmeOf is the KME that a certificate names: exactly one URI SAN.
func kmeOf(cert *x509.Certificate) (etsi014.KMEID, error) {
	if len(cert.URIs) != 1 {
		return "", fmt.Errorf("%w: %d URI SANs, want exactly one %s<KME ID>; it has %s", ErrIdentity,
			len(cert.URIs), uriPrefix, describe(cert))
	}
	escaped, ok := strings.CutPrefix(cert.URIs[0].String(), uriPrefix)
	id, err := url.PathUnescape(escaped)
	if !ok || id == "" || err != nil {
		return "", fmt.Errorf("%w: URI SAN %q, want %s<KME ID>; it has %s", ErrIdentity,
			cert.URIs[0], uriPrefix, describe(cert))
	}
	return etsi014.KMEID(id), nil
}

// verify says which peer a chain belongs to, leaf first, or all that a person
// needs to know of why it belongs to none. The ID is returned also with an
// error, when the certificate names one.
func (t *trust) verify(chain []*x509.Certificate, usage x509.ExtKeyUsage, now time.Time) (
	etsi014.KMEID, error) {
	if len(chain) == 0 {
		return "", fmt.Errorf("%w: none was shown", ErrIdentity)
	}
	id, err := kmeOf(chain[0])
	if err != nil {
		return "", err
	}
	set := t.roots[id]
	switch {
	case id == t.self:
		return id, fmt.Errorf("%w: the peer has our own KME ID %q; every KME needs its own; it has %s",
			ErrIdentity, id, describe(chain[0]))
	case set == nil:
		return id, fmt.Errorf("%w: KME %q is no peer of ours, ours are %s; it has %s; enrol that "+
			"site, or correct the address that led here", ErrIdentity, id, t.peers(), describe(chain[0]))
	}
	chains, err := set.verify(chain, usage, now)
	if err != nil {
		return id, fmt.Errorf("%w: KME %q shows %s; held against the roots recorded for it, %s: %w; %s",
			ErrUntrusted, id, describe(chain[0]), set, cause(err, now), t.advice(id, chain, usage, now, err))
	}
	for _, c := range chains {
		if t.listOf(c) == "" {
			return id, nil
		}
	}
	return id, fmt.Errorf("%w: KME %q shows %s; the revocation list %s names it; renew it there",
		ErrUntrusted, id, describe(chain[0]), t.listOf(chains[0]))
}

// listOf is the file of the revocation list that names a member of a verified
// chain; empty if none does.
func (t *trust) listOf(chain []*x509.Certificate) string {
	for i := range len(chain) - 1 {
		if file := t.revoked[markOf(chain[i], chain[i+1])]; file != "" {
			return file
		}
	}
	return ""
}

func (t *trust) peers() string {
	var names []string
	for id := range t.roots {
		names = append(names, fmt.Sprintf("%q", id))
	}
	if names == nil {
		return "none"
	}
	slices.Sort(names)
	return strings.Join(names, ", ")
}

// alone tells whether a KME speaks with no other. One that has a certificate and
// no peers, for one after the only other site was cut off, still says why to
// whom it turns away.
func (c *Config) alone() bool { return len(c.Peers) == 0 && c.TLS.Cert == "" }

// advice is the next step after a chain was refused.
func (t *trust) advice(id etsi014.KMEID, chain []*x509.Certificate, usage x509.ExtKeyUsage,
	now time.Time, err error) string {
	var invalid x509.CertificateInvalidError
	if errors.As(err, &invalid) {
		switch invalid.Reason {
		case x509.Expired:
			return "renew it there, or set the clock that is wrong"
		case x509.IncompatibleUsage:
			return "issue it for client and server authentication"
		}
	}
	for other, set := range t.roots {
		if set == t.roots[id] {
			continue
		}
		if _, err := set.verify(chain, usage, now); err == nil {
			return fmt.Sprintf("it hangs on a root of KME %q, which may not speak for KME %q", other, id)
		}
	}
	return "enrol that site again, or put its root into that file"
}

// verify checks a chain against these roots alone.
func (s *rootSet) verify(chain []*x509.Certificate, usage x509.ExtKeyUsage, now time.Time) (
	[][]*x509.Certificate, error) {
	between := x509.NewCertPool()
	for _, c := range chain[1:] {
		between.AddCert(c)
	}
	return chain[0].Verify(x509.VerifyOptions{Roots: s.pool, Intermediates: between,
		CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{usage}})
}

// String names the file and its roots.
func (s *rootSet) String() string {
	var names []string
	for _, c := range s.certs {
		if len(names) == 4 {
			names = append(names, fmt.Sprintf("and %d more", len(s.certs)-4))
			break
		}
		names = append(names, fmt.Sprintf("%q", c.Subject))
	}
	return s.file + " (" + strings.Join(names, ", ") + ")"
}

// cause puts an expiry into words that are the same for a minute, so that the
// log can leave out repeats.
func cause(err error, now time.Time) error {
	var invalid x509.CertificateInvalidError
	if errors.As(err, &invalid) && invalid.Reason == x509.Expired {
		return fmt.Errorf("certificate %q is valid from %s to %s, the clock here says %s",
			invalid.Cert.Subject, stamp(invalid.Cert.NotBefore), stamp(invalid.Cert.NotAfter), stamp(now))
	}
	return err
}

// describe names a certificate to a person.
func describe(c *x509.Certificate) string {
	return fmt.Sprintf("subject %q, issuer %q, serial %x, valid from %s to %s", c.Subject, c.Issuer,
		c.SerialNumber, stamp(c.NotBefore), stamp(c.NotAfter))
}

func stamp(t time.Time) string { return t.UTC().Format("2006-01-02 15:04 UTC") }
