package doctor

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"fmt"
	"strings"
)

// stampForm tells minutes: a certificate may live for hours.
const stampForm = "2006-01-02 15:04 UTC"

// describe names a certificate for a person.
func describe(c *x509.Certificate) string {
	var names []string
	for _, u := range c.URIs {
		names = append(names, "URI:"+u.String())
	}
	for _, d := range c.DNSNames {
		names = append(names, "DNS:"+d)
	}
	for _, ip := range c.IPAddresses {
		names = append(names, "IP:"+ip.String())
	}
	if names == nil {
		names = []string{"none"}
	}
	return fmt.Sprintf("subject %q, issuer %q, names %s, %v, valid %s to %s", c.Subject, c.Issuer,
		strings.Join(names, " "), c.PublicKeyAlgorithm, c.NotBefore.UTC().Format(stampForm),
		c.NotAfter.UTC().Format(stampForm))
}

// nameOf reads a distinguished name as it stands in a certificate request.
func nameOf(raw []byte) string {
	var rdn pkix.RDNSequence
	if rest, err := asn1.Unmarshal(raw, &rdn); err != nil || len(rest) > 0 {
		return "an unreadable name"
	}
	var n pkix.Name
	n.FillFromRDNSequence(&rdn)
	return n.String()
}
