package etsi014

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"strings"
)

// explain says of a handshake that failed for a certificate whose it was, what
// it was held against, and what to do. own is what this end shows; nil = not
// known. Other errors stay as they are.
func explain(err error, own *x509.Certificate) error {
	if refused := new(tls.CertificateVerificationError); errors.As(err, &refused) &&
		len(refused.UnverifiedCertificates) > 0 {
		return fmt.Errorf("we refuse the other end's certificate, %s; held against the authorities "+
			"trusted here: %w; %s", certificateText(refused.UnverifiedCertificates[0]), err, remedy(err))
	}
	op := new(net.OpError)
	if !errors.As(err, &op) || op.Op != "remote error" || !strings.Contains(err.Error(), "certificate") {
		return err
	}
	shown := ""
	if own != nil {
		shown = ", " + certificateText(own)
	}
	return fmt.Errorf("the other end refuses our certificate%s: %w; its log says what it was held "+
		"against, and so does quietline doctor", shown, err)
}

// remedy is the next step after a certificate was refused here.
func remedy(err error) string {
	var invalid x509.CertificateInvalidError
	var host x509.HostnameError
	switch {
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		return "renew it there, or set the clock that is wrong"
	case errors.As(err, &invalid) && invalid.Reason == x509.IncompatibleUsage:
		return "issue it with the extended key usage of its end, clientAuth or serverAuth"
	case errors.As(err, &host):
		return "call it by a name that it carries, or issue it with this one"
	}
	return "trust the CA of that issuer here, or let the other end show a certificate of one that is " +
		"trusted, with its intermediates"
}

// certificateText names a certificate for the log.
func certificateText(c *x509.Certificate) string {
	const day = "2006-01-02 15:04 UTC"
	var names []string
	for _, u := range c.URIs {
		names = append(names, u.String())
	}
	names = append(names, c.DNSNames...)
	for _, ip := range c.IPAddresses {
		names = append(names, ip.String())
	}
	return fmt.Sprintf("subject %q, issuer %q, names %q, valid %s to %s", c.Subject, c.Issuer, names,
		c.NotBefore.UTC().Format(day), c.NotAfter.UTC().Format(day))
}

// telling is a connection whose end by the other side's TLS is explained: in
// TLS 1.3 a client hears only after its handshake that its certificate is
// refused.
type telling struct {
	net.Conn
	own *x509.Certificate
}

// Read implements net.Conn.
func (t telling) Read(b []byte) (int, error) {
	n, err := t.Conn.Read(b)
	if err != nil {
		err = explain(err, t.own)
	}
	return n, err
}

// ownLeaf is the certificate that a configuration shows; nil if it is not one.
func ownLeaf(t *tls.Config) *x509.Certificate {
	if len(t.Certificates) == 0 || len(t.Certificates[0].Certificate) == 0 {
		return nil
	}
	if leaf := t.Certificates[0].Leaf; leaf != nil {
		return leaf
	}
	leaf, err := x509.ParseCertificate(t.Certificates[0].Certificate[0])
	if err != nil {
		return nil
	}
	return leaf
}

// show gives a door our certificate even if it did not ask for one of its
// issuer: then both ends can say whose was refused, where the door else knows
// only that none was shown.
func show(list []tls.Certificate) func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
	return func(r *tls.CertificateRequestInfo) (*tls.Certificate, error) {
		for i := range list {
			if r.SupportsCertificate(&list[i]) == nil {
				return &list[i], nil
			}
		}
		if len(list) == 0 {
			return new(tls.Certificate), nil
		}
		return &list[0], nil
	}
}
