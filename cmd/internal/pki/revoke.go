package pki

import (
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"math/big"
	"os"
	"time"
)

// Revoke takes back every certificate issued to a name (its common name), or
// the one with a serial number in hexadecimal, and returns those newly revoked.
// The lists are in force for whoever reads them anew; see [Authority.CRLFile].
func (a *Authority) Revoke(who string) ([]Entry, error) {
	list, err := a.List()
	if err != nil {
		return nil, fmt.Errorf("revoke %s: %w", who, err)
	}
	found := false
	var fresh []Entry
	add := map[Root][]*big.Int{}
	for _, e := range list {
		if e.Cert.Subject.CommonName != who && fmt.Sprintf("%x", e.Cert.SerialNumber) != who {
			continue
		}
		found = true
		if !e.Revoked {
			add[e.Root] = append(add[e.Root], e.Cert.SerialNumber)
			e.Revoked = true
			fresh = append(fresh, e)
		}
	}
	if !found {
		return nil, fmt.Errorf("revoke %s: %w; quietline pki show lists them", who, ErrUnknown)
	}
	for root, serials := range add {
		if err := a.writeCRL(root, serials); err != nil {
			return nil, fmt.Errorf("revoke %s: %w", who, err)
		}
	}
	return fresh, nil
}

// Revoked tells the serial numbers (decimal) on a root's list, and since when.
func (a *Authority) Revoked(root Root) (map[string]time.Time, error) {
	list, err := a.readCRL(root)
	if err != nil {
		return nil, err
	}
	gone := make(map[string]time.Time, len(list.RevokedCertificateEntries))
	for _, e := range list.RevokedCertificateEntries {
		gone[e.SerialNumber.String()] = e.RevocationTime
	}
	return gone, nil
}

func (a *Authority) readCRL(root Root) (*x509.RevocationList, error) {
	path := a.CRLFile(root)
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(text)
	if block == nil || block.Type != "X509 CRL" {
		return nil, fmt.Errorf("read %s: no PEM block X509 CRL", path)
	}
	list, err := x509.ParseRevocationList(block.Bytes)
	if err == nil {
		err = list.CheckSignatureFrom(a.cas[root].cert)
	}
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	return list, nil
}

// writeCRL adds serial numbers to a root's list, which begins empty. A list is
// good as long as its root: whoever cannot fetch a newer one keeps what it has,
// and short-lived certificates end by themselves.
func (a *Authority) writeCRL(root Root, add []*big.Int) error {
	ca, now := a.cas[root], time.Now()
	next := &x509.RevocationList{Number: big.NewInt(1), ThisUpdate: now.Add(-lag),
		NextUpdate: ca.cert.NotAfter}
	if add != nil {
		old, err := a.readCRL(root)
		if err != nil {
			return err
		}
		next.Number.Add(old.Number, big.NewInt(1))
		next.RevokedCertificateEntries = old.RevokedCertificateEntries
	}
	for _, serial := range add {
		next.RevokedCertificateEntries = append(next.RevokedCertificateEntries,
			x509.RevocationListEntry{SerialNumber: serial, RevocationTime: now})
	}
	der, err := x509.CreateRevocationList(rand.Reader, next, ca.cert, ca.key)
	if err != nil {
		return fmt.Errorf("sign revocation list: %w", err)
	}
	text := pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: der})
	return write(a.CRLFile(root), text, 0o644)
}
