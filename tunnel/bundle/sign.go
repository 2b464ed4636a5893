package bundle

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"strings"

	"github.com/cloudflare/circl/sign/mldsa/mldsa65"

	"github.com/quietline/quietline/secret"
)

// Sizes of an enrolment key, bytes: Ed25519 (RFC 8032) and ML-DSA-65 (FIPS 204
// table 2) one behind the other, in seeds, public keys and signatures alike.
const (
	SignerSeedSize = ed25519.SeedSize + mldsa65.SeedSize
	PublicSize     = ed25519.PublicKeySize + mldsa65.PublicKeySize
	SignatureSize  = ed25519.SignatureSize + mldsa65.SignatureSize
)

// Signer is a site's enrolment key: it signs what other sites must know of
// this one. It is safe for concurrent use.
type Signer struct {
	classic ed25519.PrivateKey
	lattice *mldsa65.PrivateKey
	public  []byte
}

// NewSignerSeed draws the seed of an enrolment key. The caller clears it.
func NewSignerSeed() secret.Bytes {
	s := secret.New(SignerSeedSize)
	_, _ = rand.Read(s.Expose()) // never fails, see crypto/rand
	return s
}

// NewSigner makes the key of a seed, which stays the caller's.
func NewSigner(seed secret.Bytes) (*Signer, error) {
	b := seed.Expose()
	if len(b) != SignerSeedSize {
		return nil, fmt.Errorf("%w: enrolment seed of %d bytes, not %d", ErrFormat, len(b), SignerSeedSize)
	}
	s := &Signer{classic: ed25519.NewKeyFromSeed(b[:ed25519.SeedSize])}
	pub, priv := mldsa65.NewKeyFromSeed((*[mldsa65.SeedSize]byte)(b[ed25519.SeedSize:]))
	s.lattice = priv
	s.public = append(append(s.public, b2pub(s.classic)...), pub.Bytes()...)
	return s, nil
}

func b2pub(k ed25519.PrivateKey) []byte { return k.Public().(ed25519.PublicKey) }

// Public is the public key, [PublicSize] bytes; the caller must not change it.
func (s *Signer) Public() []byte { return s.public }

// Sign signs text for one purpose, which no other use of the key shares. Both
// signatures cover the same bytes: SHA-256 of the purpose, then the text.
func (s *Signer) Sign(purpose string, text []byte) ([]byte, error) {
	m := signed(purpose, text)
	sig := make([]byte, SignatureSize)
	copy(sig, ed25519.Sign(s.classic, m))
	err := mldsa65.SignTo(s.lattice, m, []byte("quietline"), true, sig[ed25519.SignatureSize:])
	if err != nil {
		return nil, fmt.Errorf("sign %s: %w", purpose, err)
	}
	return sig, nil
}

// Verify holds both signatures of Sign against a public key. One that fails is
// [ErrSignature], whichever it is.
func Verify(public []byte, purpose string, text, sig []byte) error {
	if len(public) != PublicSize || len(sig) != SignatureSize {
		return fmt.Errorf("verify %s: %w: key of %d bytes, signature of %d", purpose, ErrSignature,
			len(public), len(sig))
	}
	m := signed(purpose, text)
	var lattice mldsa65.PublicKey
	if err := lattice.UnmarshalBinary(public[ed25519.PublicKeySize:]); err != nil {
		return fmt.Errorf("verify %s: %w: %w", purpose, ErrSignature, err)
	}
	classic := ed25519.Verify(public[:ed25519.PublicKeySize], m, sig[:ed25519.SignatureSize])
	if !classic || !mldsa65.Verify(&lattice, m, []byte("quietline"), sig[ed25519.SignatureSize:]) {
		return fmt.Errorf("verify %s: %w: signer %s", purpose, ErrSignature, FingerprintOf(public))
	}
	return nil
}

func signed(purpose string, text []byte) []byte {
	sum := sha256.Sum256([]byte("quietline " + purpose))
	return append(sum[:], text...)
}

// FingerprintOf is the first half of SHA-256 of a public key, in groups of
// four digits, to be read over the telephone. 128 bits: whoever wants another
// key with the same digits needs 2^128 trials.
func FingerprintOf(public []byte) string {
	sum := sha256.Sum256(public)
	return groups(hex.EncodeToString(sum[:16]))
}

func groups(text string) string {
	var list []string
	for i := 0; i < len(text); i += 4 {
		list = append(list, text[i:i+4])
	}
	return strings.Join(list, " ")
}
