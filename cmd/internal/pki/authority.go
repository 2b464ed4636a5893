package pki

import (
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"
)

// Root names one of the roots of an authority.
type Root string

// The roots. SAEs and the doors that they call hang on the first, the channel
// between key managers on the second, people on the third.
const (
	SAERoot   Root = "sae"
	PeerRoot  Root = "peer"
	AdminRoot Root = "admin"
)

// Roots lists them all.
var Roots = []Root{SAERoot, PeerRoot, AdminRoot}

// Lives of certificates. Leaves are short because expiry is the revocation
// that needs no network (reference: RFC 5280 section 3.3 names the lag of
// lists), and long enough that a box which was off for a month comes back.
const (
	RootLife = 10 * 365 * 24 * time.Hour
	LeafLife = 90 * 24 * time.Hour
)

// issuedDir holds a copy of every certificate issued, by serial number: what
// was never written down could never be revoked.
const issuedDir = "issued"

// Authority is the folder of a site's roots: <root>-ca.crt, <root>-ca.key,
// <root>.crl, issued/, and a file <name>.pem per certificate with its key. It
// has no state besides the folder; one process at a time writes.
type Authority struct {
	dir string
	cas map[Root]*CA
}

// Init makes what is missing in the folder: the folder itself with mode 0700,
// the three roots, an empty CRL for each. What is there stays, so that it can
// be repeated after it was interrupted.
func Init(dir, site string) (*Authority, error) {
	if !nameForm.MatchString(site) {
		return nil, fmt.Errorf("make authority: site %q: %w", site, ErrRequest)
	}
	if err := os.MkdirAll(filepath.Join(dir, issuedDir), 0o700); err != nil {
		return nil, fmt.Errorf("make authority: %w", err)
	}
	if err := private(dir); err != nil {
		return nil, err
	}
	a := &Authority{dir: dir, cas: map[Root]*CA{}}
	for _, root := range Roots {
		if err := a.init(root, site); err != nil {
			return nil, fmt.Errorf("make authority: %w", err)
		}
	}
	return a, nil
}

// init makes or loads one root. The key is written before the certificate, so
// a certificate means a whole root.
func (a *Authority) init(root Root, site string) error {
	ca, err := LoadCA(a.RootFile(root), a.keyFile(root))
	if errors.Is(err, fs.ErrNotExist) {
		if _, serr := os.Stat(a.RootFile(root)); serr == nil {
			return fmt.Errorf("%w; restore %s from a backup", err, a.keyFile(root))
		}
		if ca, err = NewCA(fmt.Sprintf("Quietline %s root of %s", root, site), RootLife); err == nil {
			err = ca.Save(a.RootFile(root), a.keyFile(root))
		}
	}
	if err != nil {
		return err
	}
	a.cas[root] = ca
	if _, err := os.Stat(a.CRLFile(root)); errors.Is(err, fs.ErrNotExist) {
		return a.writeCRL(root, nil)
	}
	return nil
}

// Open loads the roots of a folder that [Init] made. A folder or key that
// others can read is refused with [secret.ErrExposed].
func Open(dir string) (*Authority, error) {
	if err := private(dir); err != nil {
		return nil, fmt.Errorf("open authority: %w", err)
	}
	a := &Authority{dir: dir, cas: map[Root]*CA{}}
	for _, root := range Roots {
		ca, err := LoadCA(a.RootFile(root), a.keyFile(root))
		if err != nil {
			return nil, fmt.Errorf("open authority: %w", err)
		}
		a.cas[root] = ca
	}
	return a, nil
}

// private refuses a folder in which others could exchange files.
func private(dir string) error {
	info, err := os.Stat(dir)
	if err != nil {
		return err
	}
	if mode := info.Mode().Perm(); mode&0o022 != 0 {
		return fmt.Errorf("folder %s is writable by others (mode %04o); run: chmod 700 %s",
			dir, mode, dir)
	}
	return nil
}

// Dir is the folder.
func (a *Authority) Dir() string { return a.dir }

// Root is one of the roots.
func (a *Authority) Root(root Root) *CA { return a.cas[root] }

// RootFile is the path of a root's certificate, CRLFile of its revocation list.
func (a *Authority) RootFile(root Root) string {
	return filepath.Join(a.dir, string(root)+"-ca.crt")
}

// CRLFile is the path of a root's revocation list.
func (a *Authority) CRLFile(root Root) string { return filepath.Join(a.dir, string(root)+".crl") }

func (a *Authority) keyFile(root Root) string {
	return filepath.Join(a.dir, string(root)+"-ca.key")
}

// nameForm is that of names which become file names, as in site files.
var nameForm = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$`)

// PairFile is the path of a certificate with its key.
func (a *Authority) PairFile(name string) string { return filepath.Join(a.dir, name+".pem") }

// Make issues a certificate under a root and writes it with its new key to
// [Authority.PairFile] of the name. It refuses a name that is taken with
// [ErrExists].
func (a *Authority) Make(root Root, name string, req Request) (*Pair, error) {
	if !nameForm.MatchString(name) {
		return nil, fmt.Errorf("issue certificate %q: %w: not a file name", name, ErrRequest)
	}
	if _, err := os.Lstat(a.PairFile(name)); err == nil {
		return nil, fmt.Errorf("issue certificate: %w: %s", ErrExists, a.PairFile(name))
	}
	issued, err := a.cas[root].Issue(req)
	if err != nil {
		return nil, err
	}
	return a.keep(name, issued)
}

// keep writes down a certificate and then its pair.
func (a *Authority) keep(name string, issued *Issued) (*Pair, error) {
	if err := a.record(issued.cert); err != nil {
		return nil, err
	}
	p := &Pair{Chain: []*x509.Certificate{issued.cert}, Key: issued.key}
	if err := p.Save(a.PairFile(name)); err != nil {
		return nil, err
	}
	return p, nil
}

// record keeps a copy before anybody can show the certificate.
func (a *Authority) record(cert *x509.Certificate) error {
	name := fmt.Sprintf("%x.crt", cert.SerialNumber)
	return writeCertificate(filepath.Join(a.dir, issuedDir, name), cert)
}

// Renew replaces a pair of this authority by one with the same names, a new
// key and a full life. What was there stays until the new file is whole.
func (a *Authority) Renew(name string) (*Pair, error) {
	old, err := LoadPair(a.PairFile(name))
	if err != nil {
		return nil, fmt.Errorf("renew %s: %w", name, err)
	}
	ca, err := a.issuer(old.Chain[0])
	if err != nil {
		return nil, fmt.Errorf("renew %s: %w", name, err)
	}
	issued, err := ca.Issue(requestOf(old.Chain[0]))
	if err != nil {
		return nil, fmt.Errorf("renew %s: %w", name, err)
	}
	return a.keep(name, issued)
}

// issuer finds the root that signed a certificate, and refuses a revoked one.
func (a *Authority) issuer(cert *x509.Certificate) (*CA, error) {
	for _, root := range Roots {
		if cert.CheckSignatureFrom(a.cas[root].cert) != nil {
			continue
		}
		gone, err := a.Revoked(root)
		if err != nil {
			return nil, err
		}
		if _, ok := gone[cert.SerialNumber.String()]; ok {
			return nil, fmt.Errorf("%w: %s; issue a new one under a new name",
				ErrRevoked, Describe(cert))
		}
		return a.cas[root], nil
	}
	return nil, fmt.Errorf("%w: %s; compared with the roots in %s; renew it where its issuer is",
		ErrForeign, Describe(cert), a.dir)
}

// requestOf asks for a certificate like one that was issued before.
func requestOf(cert *x509.Certificate) Request {
	return Request{CommonName: cert.Subject.CommonName, Life: lifeOf(cert),
		uris: cert.URIs, DNS: cert.DNSNames, IPs: addresses(cert.IPAddresses),
		Server: slices.Contains(cert.ExtKeyUsage, x509.ExtKeyUsageServerAuth),
		Client: slices.Contains(cert.ExtKeyUsage, x509.ExtKeyUsageClientAuth)}
}

// Entry is one certificate that was issued.
type Entry struct {
	Root    Root
	Cert    *x509.Certificate
	Revoked bool
}

// List tells every certificate issued, the one that ends first at the front.
func (a *Authority) List() ([]Entry, error) {
	files, err := filepath.Glob(filepath.Join(a.dir, issuedDir, "*.crt"))
	if err != nil {
		return nil, fmt.Errorf("list certificates: %w", err)
	}
	gone := map[Root]map[string]time.Time{}
	for _, root := range Roots {
		if gone[root], err = a.Revoked(root); err != nil {
			return nil, fmt.Errorf("list certificates: %w", err)
		}
	}
	var list []Entry
	for _, f := range files {
		cert, err := readCertificate(f)
		if err != nil {
			return nil, fmt.Errorf("list certificates: %w", err)
		}
		for _, root := range Roots {
			if cert.CheckSignatureFrom(a.cas[root].cert) == nil {
				_, dead := gone[root][cert.SerialNumber.String()]
				list = append(list, Entry{root, cert, dead})
			}
		}
	}
	slices.SortFunc(list, func(x, y Entry) int {
		if c := x.Cert.NotAfter.Compare(y.Cert.NotAfter); c != 0 {
			return c
		}
		return strings.Compare(x.Cert.SerialNumber.String(), y.Cert.SerialNumber.String())
	})
	return list, nil
}
