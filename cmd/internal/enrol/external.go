package enrol

import (
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"github.com/quietline/quietline/cmd/internal/pki"
	"github.com/quietline/quietline/secret"
)

// Pending says which certificates of a site an external CA has still to sign.
type Pending struct {
	Site string
	Dir  string
	// Requests are files (PKCS #10, PEM), each with what it is for.
	Requests []PendingRequest
}

// PendingRequest is one of them.
type PendingRequest struct{ File, For string }

// Error implements error.
func (p *Pending) Error() string {
	var list []string
	for _, r := range p.Requests {
		list = append(list, fmt.Sprintf("%s (%s)", r.File, r.For))
	}
	return "the CA has to sign " + strings.Join(list, ", ")
}

func (h *Home) pendingKey(name string) string { return h.Path("pki", name+".new.key") }
func (h *Home) csrFile(name string) string    { return h.Path("pki", name+".csr") }

// request makes key and request of each certificate that is not there yet.
func (h *Home) request() error {
	p := &Pending{Site: h.plan.Site, Dir: h.dir}
	for _, c := range h.wanted() {
		if _, err := os.Lstat(h.Path("pki", c.name+".pem")); err == nil {
			continue
		}
		if err := pki.WriteCSR(c.req, h.pendingKey(c.name), h.csrFile(c.name)); err != nil {
			return err
		}
		step()
		p.Requests = append(p.Requests, PendingRequest{h.csrFile(c.name), purpose(c)})
	}
	if len(p.Requests) > 0 {
		return p
	}
	return nil
}

// purpose says what the CA must put into a certificate.
func purpose(c wanted) string {
	var uses []string
	if c.req.Server {
		uses = append(uses, "serverAuth")
	}
	if c.req.Client {
		uses = append(uses, "clientAuth")
	}
	names := append([]string{}, c.req.DNS...)
	for _, a := range c.req.IPs {
		names = append(names, a.String())
	}
	switch {
	case c.req.KME != "":
		names = append(names, pki.KMEURI(c.req.KME))
	case c.req.SAE != "":
		names = append(names, pki.SAEURI(c.req.SAE))
	}
	return fmt.Sprintf("by the CA for %s; extended key usage %s; SAN %s",
		map[pki.Root]string{pki.SAERoot: "applications", pki.PeerRoot: "key managers"}[c.root],
		strings.Join(uses, " and "), strings.Join(names, " and "))
}

// Signed is what an external CA gave.
type Signed struct {
	// Chains are PEM files, each with a leaf and the intermediates behind it.
	Chains []string
	// SAECA and PeerCA are the PEM files of the CAs for applications and for
	// key managers: roots, or intermediates of one root.
	SAECA, PeerCA string
}

// ErrOneCA: one CA would sign for applications and for key managers.
var ErrOneCA = errors.New("one CA for applications and key managers")

// Take completes a site that [Create] began with an external CA. Each chain
// goes to the request whose key it is for, and is held against its CA. What
// fits is kept: after a fault the same call, also with other files, goes on.
// [*Pending] tells which are missing.
func Take(dir string, s Signed) (*Home, error) {
	fail := func(err error) (*Home, error) { return nil, fmt.Errorf("make site: %w", err) }
	h, err := openPlan(dir)
	if err != nil {
		return fail(err)
	}
	if h.plan.CA != External {
		return fail(fmt.Errorf("%s was begun with its own CA: %w", dir, ErrExists))
	}
	roots, err := h.takeRoots(s)
	if err != nil {
		return fail(err)
	}
	for _, file := range s.Chains {
		if err := h.takeChain(file, roots); err != nil {
			return fail(fmt.Errorf("take %s: %w", file, err))
		}
	}
	if err := h.request(); err != nil {
		return fail(err)
	}
	deny := h.Path("pki", denyFile)
	if _, err := os.Lstat(deny); errors.Is(err, fs.ErrNotExist) {
		text := "# SHA-256 of applications' certificates that are refused, one a line; read again when\n" +
			"# it changes. openssl x509 -in CERT -noout -fingerprint -sha256 prints it.\n"
		if err := secret.WriteFileMode(deny, []byte(text), 0o644); err != nil {
			return fail(err)
		}
	}
	if _, err := os.Lstat(h.SiteFile()); err == nil {
		return h, nil // done before
	}
	if err := h.writeSite(); err != nil {
		return fail(err)
	}
	return h, nil
}

// denyFile takes the place of a revocation list under an external CA.
const denyFile = "deny.txt"

// takeRoots reads the two CAs, which must not be one: with one, whoever may be
// an application could pass for a key manager.
func (h *Home) takeRoots(s Signed) (map[pki.Root][]*x509.Certificate, error) {
	roots := map[pki.Root][]*x509.Certificate{}
	for root, file := range map[pki.Root]string{pki.SAERoot: s.SAECA, pki.PeerRoot: s.PeerCA} {
		list, err := pki.ReadCertificates(file)
		if err != nil {
			return nil, err
		}
		for _, c := range list {
			if !c.IsCA {
				return nil, pki.Advise(fmt.Errorf("read %s: %w: %s", file, pki.ErrNotCA, pki.Describe(c)),
					"name the file of the CA that signed it")
			}
		}
		roots[root] = list
	}
	for _, a := range roots[pki.SAERoot] {
		for _, b := range roots[pki.PeerRoot] {
			if a.Equal(b) {
				return nil, pki.Advise(fmt.Errorf("%w: %s and %s hold the same %s", ErrOneCA, s.SAECA,
					s.PeerCA, pki.Describe(a)), "have two CAs, or two intermediates under one root, and "+
					"name those")
			}
		}
	}
	for root, list := range roots {
		if err := secret.WriteFileMode(h.rootFile(root), pki.EncodeCertificates(list), 0o644); err != nil {
			return nil, err
		}
		step()
	}
	return roots, nil
}

// takeChain gives a chain to the request whose key it is for.
func (h *Home) takeChain(file string, roots map[pki.Root][]*x509.Certificate) error {
	chain, err := pki.ReadCertificates(file)
	if err != nil {
		return err
	}
	var keys []string
	for _, c := range h.wanted() {
		pair := h.Path("pki", c.name+".pem")
		public, err := pki.PublicKey(h.pendingKey(c.name))
		if errors.Is(err, fs.ErrNotExist) { // taken before
			p, err := pki.LoadPair(pair)
			if err != nil {
				return err
			}
			public = p.Key.Public()
		} else if err != nil {
			return err
		}
		if !pki.SamePublic(public, chain[0].PublicKey) {
			keys = append(keys, fmt.Sprintf("%.16s… of %s", pki.KeyPrint(public), h.csrFile(c.name)))
			continue
		}
		if err := h.checkDoor(c.name, chain[0]); err != nil {
			return err
		}
		if _, err := pki.Import(h.pendingKey(c.name), pair, chain, roots[c.root], c.use); err != nil {
			return err
		}
		step()
		if err := os.Remove(h.csrFile(c.name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return nil
	}
	return pki.Advise(fmt.Errorf("%w: it is for the key %.16s…: %s; the requests have %s", pki.ErrChain,
		pki.KeyPrint(chain[0].PublicKey), pki.Describe(chain[0]), strings.Join(keys, ", ")),
		"have the CA sign the latest request, leaf first in the file")
}

// checkDoor wants one name under which the line of this machine calls the door.
func (h *Home) checkDoor(name string, leaf *x509.Certificate) error {
	if name != doorPair || leaf.VerifyHostname("localhost") == nil {
		return nil
	}
	return named(leaf, loopback.String())
}

// doorURL is how the line of this machine calls the door: by the address, or
// by localhost where a CA signs no addresses.
func (h *Home) doorURL() string {
	host := loopback.String()
	if p, err := pki.LoadPair(h.Path("pki", doorPair+".pem")); err == nil &&
		p.Chain[0].VerifyHostname(host) != nil {
		host = "localhost"
	}
	return fmt.Sprintf("https://%s:%d", host, doorPort)
}
