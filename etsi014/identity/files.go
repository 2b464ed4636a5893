package identity

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/quietline/quietline/secret"
)

// Bounds of the files, so that a wrong path cannot fill the memory. A chain of
// four RSA-4096 certificates has 8 KiB; a CA file may hold a few hundred.
const (
	maxCertFile = 1 << 20
	maxKeyFile  = 64 << 10
)

// loadPair reads a certificate and its key.
func loadPair(p Pair, now time.Time) (tls.Certificate, error) {
	fail := func(err error) (tls.Certificate, error) {
		return tls.Certificate{}, fmt.Errorf("load certificate %s: %w", p.Cert, err)
	}
	chain, err := readPublic(p.Cert)
	if err != nil {
		return fail(err)
	}
	if block, _ := pem.Decode(chain); block == nil || block.Type != "CERTIFICATE" {
		return fail(errors.New("no PEM certificate is in it; name the .crt file here"))
	}
	key, err := secret.ReadFile(p.Key, maxKeyFile)
	if err != nil {
		return fail(fmt.Errorf("its key: %w", err))
	}
	defer key.Clear()
	if block, _ := pem.Decode(key.Expose()); block == nil {
		return fail(fmt.Errorf("its key %s: no PEM key is in it; name the .key file here", p.Key))
	}
	c, err := tls.X509KeyPair(chain, key.Expose())
	if err != nil {
		return fail(fmt.Errorf("its key %s: %w; name the pair that was made together", p.Key, err))
	}
	const day = "2006-01-02 15:04 MST"
	switch leaf := c.Leaf; {
	case now.After(leaf.NotAfter):
		return fail(fmt.Errorf("it expired on %s; renew it", leaf.NotAfter.Format(day)))
	case now.Before(leaf.NotBefore):
		return fail(fmt.Errorf("it is not valid before %s; check this machine's clock",
			leaf.NotBefore.Format(day)))
	}
	return c, nil
}

// loadAuthorities reads a file of authorities.
func loadAuthorities(path string) ([]*x509.Certificate, error) {
	if path == "" {
		return nil, errors.New("load CA file: none is named")
	}
	rest, err := readPublic(path)
	if err != nil {
		return nil, fmt.Errorf("load CA file %s: %w", path, err)
	}
	var list []*x509.Certificate
	for {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("load CA file %s: it holds a %s; leave only certificates in it",
				path, block.Type)
		}
		n := len(list) + 1
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("load CA file %s: certificate %d: %w", path, n, err)
		}
		if !c.IsCA {
			return nil, fmt.Errorf("load CA file %s: certificate %d (%s) is no authority; "+
				"name the file of the CA that signed it", path, n, c.Subject)
		}
		list = append(list, c)
	}
	if len(list) == 0 {
		return nil, fmt.Errorf("load CA file %s: no PEM certificate is in it; name a .crt file", path)
	}
	if bytes.Contains(rest, []byte("-----BEGIN")) {
		return nil, fmt.Errorf("load CA file %s: damaged after certificate %d; copy it again", path,
			len(list))
	}
	return list, nil
}

func readPublic(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxCertFile+1))
	if err == nil && len(b) > maxCertFile {
		err = fmt.Errorf("file is longer than %d bytes; check the path", maxCertFile)
	}
	return b, err
}
