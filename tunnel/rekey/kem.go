package rekey

import (
	"crypto/hpke"
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
		return hpkeKEM{hpke.MLKEM1024P384()}, "QLE1 MLKEM1024-P384 HKDF-SHA384 AES256-GCM", nil
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

// hpkeKEM is a KEM of draft-ietf-hpke-pq, through the export interface of HPKE
// (RFC 9180 section 5.3) with HKDF-SHA-384: the shared secret is one exported
// value. crypto/hpke takes its own randomness, not the caller's.
type hpkeKEM struct{ k hpke.KEM }

const (
	hpkeInfo   = "QLE1 KEM"
	hpkeExport = "shared secret"
	// MLKEM1024-P384: ML-KEM-1024 key or ciphertext of 1568 bytes (FIPS 203)
	// and an uncompressed point of 97 bytes (SEC 1).
	mlkem1024P384Size = 1568 + 97
)

func (k hpkeKEM) sizes() (int, int) { return mlkem1024P384Size, mlkem1024P384Size }

func (k hpkeKEM) private(seed secret.Bytes) (hpke.PrivateKey, error) {
	if seed.Len() != seedSize {
		return nil, fmt.Errorf("derive private key: seed has %d bytes", seed.Len())
	}
	return k.k.NewPrivateKey(seed.Expose())
}

func (k hpkeKEM) public(seed secret.Bytes) ([]byte, error) {
	sk, err := k.private(seed)
	if err != nil {
		return nil, err
	}
	return sk.PublicKey().Bytes(), nil
}

func (k hpkeKEM) encapsulate(_ io.Reader, public []byte) ([]byte, secret.Bytes, error) {
	pk, err := k.k.NewPublicKey(public)
	if err != nil {
		return nil, secret.Bytes{}, fmt.Errorf("encapsulate: %w", err)
	}
	ct, sender, err := hpke.NewSender(pk, hpke.HKDFSHA384(), hpke.ExportOnly(), []byte(hpkeInfo))
	if err != nil {
		return nil, secret.Bytes{}, fmt.Errorf("encapsulate: %w", err)
	}
	ss, err := sender.Export(hpkeExport, hashSize)
	if err != nil {
		return nil, secret.Bytes{}, fmt.Errorf("encapsulate: %w", err)
	}
	return ct, secret.Own(ss), nil
}

func (k hpkeKEM) decapsulate(seed secret.Bytes, ciphertext []byte) (secret.Bytes, error) {
	sk, err := k.private(seed)
	if err != nil {
		return secret.Bytes{}, err
	}
	r, err := hpke.NewRecipient(ciphertext, sk, hpke.HKDFSHA384(), hpke.ExportOnly(), []byte(hpkeInfo))
	if err != nil {
		return secret.Bytes{}, fmt.Errorf("decapsulate: %w", err)
	}
	ss, err := r.Export(hpkeExport, hashSize)
	if err != nil {
		return secret.Bytes{}, fmt.Errorf("decapsulate: %w", err)
	}
	return secret.Own(ss), nil
}
