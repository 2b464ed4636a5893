package bundle

import (
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/quietline/quietline/secret"
	"github.com/quietline/quietline/tunnel/rekey"
)

// Names of the secret files in a line's folder. Each holds 32 bytes in base64
// and a line end.
const (
	SeedFile = "static.seed"
	LinkFile = "link.secret"
)

const secretSize = 32

// Secrets are what one end keeps to itself, or shares with the other end only.
type Secrets struct {
	Seed secret.Bytes // of the own static KEM key, 32 bytes
	Link secret.Bytes // the link secret, 32 bytes, the same at both ends
}

// Clear wipes both.
func (s *Secrets) Clear() {
	s.Seed.Clear()
	s.Link.Clear()
}

// Generate makes the seed of a static key and, when link is empty, a link
// secret; otherwise it copies link, which stays the caller's. It returns the
// public key that belongs into this end's Bundle.
func Generate(suite rekey.Suite, link secret.Bytes) (*Secrets, []byte, error) {
	s := &Secrets{Seed: secret.New(secretSize), Link: secret.New(secretSize)}
	// crypto/rand.Read never returns an error: it ends the program instead.
	_, _ = rand.Read(s.Seed.Expose())
	if link.Len() == 0 {
		_, _ = rand.Read(s.Link.Expose())
	} else {
		s.Link.Clear()
		s.Link = secret.Copy(link.Expose())
	}
	public, err := rekey.Public(suite, s.Seed)
	if err == nil {
		err = s.check()
	}
	if err != nil {
		s.Clear()
		return nil, nil, fmt.Errorf("generate secrets: %w", err)
	}
	return s, public, nil
}

// NewLinkID returns a random link_id.
func NewLinkID() (id [16]byte) {
	_, _ = rand.Read(id[:])
	return id
}

func (s *Secrets) check() error {
	for _, f := range []struct {
		name string
		b    secret.Bytes
	}{{SeedFile, s.Seed}, {LinkFile, s.Link}} {
		if f.b.Len() != secretSize {
			return fmt.Errorf("%w: %s has %d bytes, not %d", ErrFormat, f.name, f.b.Len(), secretSize)
		}
		var or byte
		for _, x := range f.b.Expose() {
			or |= x
		}
		if or == 0 {
			return fmt.Errorf("%w: %s is all zero", ErrFormat, f.name)
		}
	}
	return nil
}

// WriteSecrets writes the two files into dir, which must exist, with mode
// 0600. It never overwrites: then it returns [ErrExists].
func WriteSecrets(dir string, s *Secrets) error {
	if err := s.check(); err != nil {
		return fmt.Errorf("write secrets: %w", err)
	}
	for _, name := range []string{SeedFile, LinkFile} {
		if _, err := os.Lstat(filepath.Join(dir, name)); !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("write secrets: %w: %s", ErrExists, filepath.Join(dir, name))
		}
	}
	for name, b := range map[string]secret.Bytes{SeedFile: s.Seed, LinkFile: s.Link} {
		if err := WriteSecret(filepath.Join(dir, name), b); err != nil {
			return err
		}
	}
	return nil
}

// WriteSecret writes one secret of 32 bytes durably with mode 0600, over what
// is there.
func WriteSecret(path string, b secret.Bytes) error {
	if b.Len() != secretSize {
		return fmt.Errorf("write secret %s: %w: %d bytes, not %d", path, ErrFormat, b.Len(), secretSize)
	}
	text := encodeSecret(b)
	defer text.Clear()
	if err := secret.WriteFile(path, text.Expose()); err != nil {
		return fmt.Errorf("write secret: %w", err)
	}
	return nil
}

// ReadSecrets reads the two files; it refuses a file that others can read
// ([secret.ErrExposed]). The caller clears the result.
func ReadSecrets(dir string) (*Secrets, error) {
	s := &Secrets{}
	for name, to := range map[string]*secret.Bytes{SeedFile: &s.Seed, LinkFile: &s.Link} {
		b, err := ReadSecret(filepath.Join(dir, name))
		if err != nil {
			s.Clear()
			return nil, err
		}
		*to = b
	}
	return s, nil
}

// ReadSecret reads one secret file of 32 bytes.
func ReadSecret(path string) (secret.Bytes, error) {
	text, err := secret.ReadFile(path, base64.StdEncoding.EncodedLen(secretSize)+1)
	if err != nil {
		return secret.Bytes{}, fmt.Errorf("read secret: %w", err)
	}
	defer text.Clear()
	b, err := decodeSecret(text.Expose())
	if err != nil {
		return secret.Bytes{}, fmt.Errorf("read secret %s: %w", path, err)
	}
	return b, nil
}

func encodeSecret(b secret.Bytes) secret.Bytes {
	n := base64.StdEncoding.EncodedLen(b.Len())
	text := secret.New(n + 1)
	base64.StdEncoding.Encode(text.Expose(), b.Expose())
	text.Expose()[n] = '\n'
	return text
}

// decodeSecret is strict: 44 digits and a line end. Its errors show no bytes.
func decodeSecret(text []byte) (secret.Bytes, error) {
	n := base64.StdEncoding.EncodedLen(secretSize)
	if len(text) != n+1 || text[n] != '\n' {
		return secret.Bytes{}, fmt.Errorf("%w: not %d base64 digits and a line end", ErrFormat, n)
	}
	buf := secret.New(base64.StdEncoding.DecodedLen(n))
	defer buf.Clear()
	// The decoder skips line ends; a text with one inside is one digit short.
	m, err := base64.StdEncoding.Strict().Decode(buf.Expose(), text[:n])
	if err != nil || m != secretSize {
		return secret.Bytes{}, fmt.Errorf("%w: not base64 of %d bytes", ErrFormat, secretSize)
	}
	return secret.Copy(buf.Expose()[:m]), nil
}
