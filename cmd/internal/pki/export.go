package pki

import (
	"crypto/x509"
	"fmt"

	"software.sslmate.com/src/go-pkcs12"

	"github.com/quietline/quietline/secret"
)

// minPassword is the least length of a PKCS#12 password, characters: the file
// can be guessed at off-line (NIST SP 800-63B section 5.1.1.2 takes 8 on-line).
const minPassword = 12

// WritePKCS12 writes a pair and its roots as one PKCS#12 file of mode 0600,
// for boxes and browsers that take nothing else: AES-256 and SHA-256, as
// FortiGate, Junos and OpenSSL 1.1.1 read it.
func WritePKCS12(path string, p *Pair, roots []*x509.Certificate, password secret.Bytes) error {
	if password.Len() < minPassword {
		return fmt.Errorf("write %s: %w: %d characters, at least %d are needed", path, ErrPassword,
			password.Len(), minPassword)
	}
	with := append(append([]*x509.Certificate{}, p.Chain[1:]...), roots...)
	data, err := pkcs12.Modern2023.Encode(p.Key, p.Chain[0], with, string(password.Expose()))
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	defer secret.Wipe(data)
	return secret.WriteFile(path, data)
}

// WritePEM writes a pair as two files, for programs that want them apart: the
// key with mode 0600 first, then the chain with 0644.
func WritePEM(certPath, keyPath string, p *Pair) error {
	if err := writeKey(keyPath, p.Key); err != nil {
		return err
	}
	return secret.WriteFileMode(certPath, EncodeCertificates(p.Chain), 0o644)
}
