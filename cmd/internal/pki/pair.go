package pki

import (
	"bytes"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"

	"github.com/quietline/quietline/secret"
)

// Pair is a certificate with its intermediates, leaf first, and its key. On
// disk it is one PEM file of mode 0600, certificates before the key: one
// rename changes both, and TLS reads it where either is asked for.
type Pair struct {
	Chain []*x509.Certificate
	Key   crypto.Signer
}

// Save writes the pair durably; a reader finds the old pair or the new one.
func (p *Pair) Save(path string) error {
	if !SamePublic(p.Key.Public(), p.Chain[0].PublicKey) {
		return fmt.Errorf("write %s: %w: %s", path, ErrKeyPair, Describe(p.Chain[0]))
	}
	der, err := x509.MarshalPKCS8PrivateKey(p.Key)
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	defer secret.Wipe(der)
	var chain bytes.Buffer
	for _, c := range p.Chain {
		_ = pem.Encode(&chain, &pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})
	}
	key := secret.Own(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
	defer key.Clear()
	text := secret.New(chain.Len() + key.Len())
	defer text.Clear()
	copy(text.Expose(), chain.Bytes())
	copy(text.Expose()[chain.Len():], key.Expose())
	return write(path, text.Expose(), 0o600)
}

// LoadPair reads what [Pair.Save] wrote, or any PEM file of certificates, leaf
// first, and one key.
func LoadPair(path string) (*Pair, error) {
	text, err := secret.ReadFile(path, maxFile)
	if err != nil {
		return nil, err
	}
	defer text.Clear()
	p := &Pair{}
	for block, rest := pem.Decode(text.Expose()); block != nil; block, rest = pem.Decode(rest) {
		switch {
		case block.Type == "CERTIFICATE":
			c, err := x509.ParseCertificate(block.Bytes)
			if err != nil {
				return nil, fmt.Errorf("read %s: %w", path, err)
			}
			p.Chain = append(p.Chain, c)
		case strings.HasSuffix(block.Type, "PRIVATE KEY"):
			p.Key, err = parseKey(block)
			if err != nil {
				return nil, fmt.Errorf("read %s: %w", path, err)
			}
		}
	}
	switch {
	case len(p.Chain) == 0:
		return nil, fmt.Errorf("read %s: no certificate is in it", path)
	case p.Key == nil:
		return nil, fmt.Errorf("read %s: no key is in it", path)
	case !SamePublic(p.Key.Public(), p.Chain[0].PublicKey):
		return nil, fmt.Errorf("read %s: %w: %s", path, ErrKeyPair, Describe(p.Chain[0]))
	}
	return p, nil
}

// parseKey reads the forms in which CAs hand out keys.
func parseKey(block *pem.Block) (crypto.Signer, error) {
	defer secret.Wipe(block.Bytes)
	var key any
	var err error
	switch block.Type {
	case "EC PRIVATE KEY":
		key, err = x509.ParseECPrivateKey(block.Bytes)
	case "RSA PRIVATE KEY":
		key, err = x509.ParsePKCS1PrivateKey(block.Bytes)
	default:
		key, err = x509.ParsePKCS8PrivateKey(block.Bytes)
	}
	if err != nil {
		return nil, err
	}
	signer, ok := key.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("a key of type %T cannot sign", key)
	}
	return signer, nil
}

// SamePublic compares two public keys.
func SamePublic(a, b crypto.PublicKey) bool {
	k, ok := a.(interface{ Equal(crypto.PublicKey) bool })
	return ok && k.Equal(b)
}

// KeyPrint is the SHA-256 of a public key (its SubjectPublicKeyInfo).
func KeyPrint(public crypto.PublicKey) string {
	der, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		return "unknown"
	}
	sum := sha256.Sum256(der)
	return hex.EncodeToString(sum[:])
}

// Describe names a certificate for people: whose, from whom, for what, when.
func Describe(c *x509.Certificate) string {
	var names []string
	for _, u := range c.URIs {
		names = append(names, u.String())
	}
	names = append(names, c.DNSNames...)
	for _, ip := range c.IPAddresses {
		names = append(names, ip.String())
	}
	return fmt.Sprintf("subject %q, issuer %q, names %q, valid %s to %s, serial %x",
		c.Subject, c.Issuer, names, c.NotBefore.UTC().Format(clock), c.NotAfter.UTC().Format(clock),
		c.SerialNumber)
}

// clock is how times stand in messages.
const clock = "2006-01-02 15:04 UTC"

func addresses(list []net.IP) []netip.Addr {
	var out []netip.Addr
	for _, ip := range list {
		if a, ok := netip.AddrFromSlice(ip); ok {
			out = append(out, a.Unmap())
		}
	}
	return out
}

// ReadCertificates reads a PEM file of certificates only.
func ReadCertificates(path string) ([]*x509.Certificate, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	list, err := ParseCertificates(data)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	return list, nil
}

// ParseCertificates reads PEM certificates, at least one and nothing else.
func ParseCertificates(data []byte) ([]*x509.Certificate, error) {
	if len(data) > maxFile {
		return nil, fmt.Errorf("%d bytes, at most %d are expected", len(data), maxFile)
	}
	var list []*x509.Certificate
	block, rest := pem.Decode(data)
	for ; block != nil; block, rest = pem.Decode(rest) {
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("it holds a %s, expected certificates only", block.Type)
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("certificate %d: %w", len(list)+1, err)
		}
		list = append(list, c)
	}
	if bytes.Contains(rest, []byte("-----BEGIN")) {
		return nil, fmt.Errorf("damaged after certificate %d; copy it again", len(list))
	}
	if len(list) == 0 {
		return nil, errors.New("no PEM certificate is in it")
	}
	return list, nil
}

// EncodeCertificates writes what [ParseCertificates] reads.
func EncodeCertificates(list []*x509.Certificate) []byte {
	var out bytes.Buffer
	for _, c := range list {
		_ = pem.Encode(&out, &pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})
	}
	return out.Bytes()
}

// JoinPair puts a chain and the key in a file of its own together.
func JoinPair(chain []*x509.Certificate, keyPath string) (*Pair, error) {
	text, err := secret.ReadFile(keyPath, maxFile)
	if err != nil {
		return nil, err
	}
	defer text.Clear()
	for block, rest := pem.Decode(text.Expose()); block != nil; block, rest = pem.Decode(rest) {
		if !strings.HasSuffix(block.Type, "PRIVATE KEY") {
			continue
		}
		key, err := parseKey(block)
		if err != nil {
			return nil, fmt.Errorf("read %s: %w", keyPath, err)
		}
		if !SamePublic(key.Public(), chain[0].PublicKey) {
			return nil, fmt.Errorf("read %s: %w: it is %.16s…, the certificate's is %.16s…: %s", keyPath,
				ErrKeyPair, KeyPrint(key.Public()), KeyPrint(chain[0].PublicKey), Describe(chain[0]))
		}
		return &Pair{Chain: chain, Key: key}, nil
	}
	return nil, fmt.Errorf("read %s: no key is in it", keyPath)
}
