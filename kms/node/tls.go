package node

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/secret"
)

// TLSFiles are the PEM files of the peer channel.
type TLSFiles struct {
	Cert string // ours; its one URI SAN is urn:quietline:kme:<KME ID>
	Key  string // mode 0600
	CA   string // of KMEs, not of SAEs: who it signed may speak as a KME
}

// uriPrefix comes before the KME ID in a certificate's URI SAN.
const uriPrefix = "urn:quietline:kme:"

// ErrIdentity: a certificate does not say which KME it is, or another one.
var ErrIdentity = errors.New("certificate does not identify the KME")

// config reads the files. Peers must offer TLS 1.3 with X25519MLKEM768: key
// agreements between KMEs are recorded today and broken later.
func (f TLSFiles) config(self etsi014.KMEID) (*tls.Config, error) {
	key, err := secret.ReadFile(f.Key, 1<<20)
	if err != nil {
		return nil, fmt.Errorf("read KME certificate: %w", err)
	}
	defer key.Clear()
	pem, err := os.ReadFile(f.Cert)
	if err != nil {
		return nil, fmt.Errorf("read KME certificate: %w", err)
	}
	cert, err := tls.X509KeyPair(pem, key.Expose())
	if err != nil {
		return nil, fmt.Errorf("read KME certificate %s: %w", f.Cert, err)
	}
	if id, err := kmeOf(cert.Leaf); err != nil {
		return nil, fmt.Errorf("read KME certificate %s: %w", f.Cert, err)
	} else if id != self {
		return nil, fmt.Errorf("read KME certificate %s: %w: it is KME %q's, this is %q",
			f.Cert, ErrIdentity, id, self)
	}
	ca, err := os.ReadFile(f.CA)
	if err != nil {
		return nil, fmt.Errorf("read KME authority: %w", err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(ca) {
		return nil, fmt.Errorf("read KME authority %s: no certificate in it", f.CA)
	}
	return &tls.Config{
		MinVersion:       tls.VersionTLS13,
		CurvePreferences: []tls.CurveID{tls.X25519MLKEM768},
		Certificates:     []tls.Certificate{cert},
		RootCAs:          roots,
		ClientAuth:       tls.RequireAnyClientCert,
		// A KME is known by its URI, not by a host name: verifier checks chain
		// and name on both sides.
		InsecureSkipVerify:     true,
		SessionTicketsDisabled: true, // a resumed session would skip the check of the chain
	}, nil
}

// kmeOf is the KME that a certificate names: exactly one URI SAN.
func kmeOf(cert *x509.Certificate) (etsi014.KMEID, error) {
	if len(cert.URIs) != 1 {
		return "", fmt.Errorf("%w: %d URI SANs, want exactly one %s<KME ID>", ErrIdentity,
			len(cert.URIs), uriPrefix)
	}
	id, ok := strings.CutPrefix(cert.URIs[0].String(), uriPrefix)
	if !ok || id == "" {
		return "", fmt.Errorf("%w: URI SAN %q, want %s<KME ID>", ErrIdentity, cert.URIs[0], uriPrefix)
	}
	return etsi014.KMEID(id), nil
}

// verifier checks the other end's chain and name.
func verifier(roots *x509.CertPool, self etsi014.KMEID, allowed func(etsi014.KMEID) error) func(
	tls.ConnectionState) error {
	return func(cs tls.ConnectionState) error {
		if len(cs.PeerCertificates) == 0 {
			return fmt.Errorf("%w: none was shown", ErrIdentity)
		}
		leaf := cs.PeerCertificates[0]
		opts := x509.VerifyOptions{Roots: roots, Intermediates: x509.NewCertPool(),
			KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}}
		for _, c := range cs.PeerCertificates[1:] {
			opts.Intermediates.AddCert(c)
		}
		id, err := kmeOf(leaf)
		if err != nil {
			return err
		}
		if _, err := leaf.Verify(opts); err != nil {
			return fmt.Errorf("certificate of KME %q is not of our KME authority: %w", id, err)
		}
		if id == self {
			return fmt.Errorf("%w: the peer has our own KME ID %q; every KME needs its own",
				ErrIdentity, id)
		}
		return allowed(id)
	}
}
