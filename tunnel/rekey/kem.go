package rekey

import (
	"fmt"
	"io"

	"github.com/cloudflare/circl/kem/xwing"

	"github.com/quietline/quietline/secret"
)

// kem is a key encapsulation mechanism. A seed of 32 bytes stands for a key
// pair, so that the same form serves static and ephemeral keys.
type kem interface {
	sizes() (public, ciphertext int)
	public(seed secret.Bytes) ([]byte, error)
	encapsulate(rand io.Reader, public []byte) (ciphertext []byte, shared secret.Bytes, err error)
	decapsulate(seed secret.Bytes, ciphertext []byte) (shared secret.Bytes, err error)
}

const seedSize = 32

// suiteKEM returns the KEM of a suite and the protocol name that starts the
// chaining key.
func suiteKEM(s Suite) (kem, string, error) {
	switch s {
	case XWing:
		return xwingKEM{}, "QLE1 X-Wing HKDF-SHA384 AES256-GCM", nil
	case MLKEM1024P384:
		return nil, "", fmt.Errorf("use suite MLKEM1024-P384: %w", ErrNotBuilt)
	}
	return nil, "", fmt.Errorf("%w: suite %d", ErrConfig, s)
}

// Public is the static public key of a seed (32 bytes), as the peer pins it.
func Public(s Suite, seed secret.Bytes) ([]byte, error) {
	k, _, err := suiteKEM(s)
	if err != nil {
		return nil, err
	}
	return k.public(seed)
}

// CheckPublic tells why a static public key is not one of the suite's.
func CheckPublic(s Suite, public []byte) error {
	k, _, err := suiteKEM(s)
	if err != nil {
		return err
	}
	// Encapsulating to the key is the check: the coins are thrown away.
	_, shared, err := k.encapsulate(zeros{}, public)
	shared.Clear()
	return err
}

type zeros struct{}

func (zeros) Read(b []byte) (int, error) { clear(b); return len(b), nil }

// xwingKEM is X-Wing, draft-connolly-cfrg-xwing-kem: X25519 and ML-KEM-768.
type xwingKEM struct{}

func (xwingKEM) sizes() (int, int) { return xwing.PublicKeySize, xwing.CiphertextSize }

func (xwingKEM) public(seed secret.Bytes) ([]byte, error) {
	if seed.Len() != seedSize {
		return nil, fmt.Errorf("derive public key: seed has %d bytes", seed.Len())
	}
	_, pk := xwing.DeriveKeyPair(seed.Expose())
	return pk.MarshalBinary()
}

func (xwingKEM) encapsulate(rand io.Reader, public []byte) ([]byte, secret.Bytes, error) {
	if len(public) != xwing.PublicKeySize {
		return nil, secret.Bytes{}, fmt.Errorf("encapsulate: public key has %d bytes", len(public))
	}
	coins := secret.New(xwing.EncapsulationSeedSize)
	defer coins.Clear()
	if _, err := io.ReadFull(rand, coins.Expose()); err != nil {
		return nil, secret.Bytes{}, fmt.Errorf("encapsulate: %w", err)
	}
	ss, ct, err := xwing.Encapsulate(public, coins.Expose())
	if err != nil {
		return nil, secret.Bytes{}, fmt.Errorf("encapsulate: %w", err)
	}
	return ct, secret.Own(ss), nil
}

func (xwingKEM) decapsulate(seed secret.Bytes, ciphertext []byte) (secret.Bytes, error) {
	if seed.Len() != seedSize || len(ciphertext) != xwing.CiphertextSize {
		return secret.Bytes{}, fmt.Errorf("decapsulate: seed has %d, ciphertext %d bytes",
			seed.Len(), len(ciphertext))
	}
	return secret.Own(xwing.Decapsulate(ciphertext, seed.Expose())), nil
}
