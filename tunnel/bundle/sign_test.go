package bundle

import (
	"bytes"
	"crypto/ed25519"
	"errors"
	"testing"

	"github.com/quietline/quietline/secret"
)

// TestBothSignaturesMustHold breaks each half of key and signature by itself.
func TestBothSignaturesMustHold(t *testing.T) {
	s := signer(t)
	text := []byte("what kochi must know of tokyo")
	sig, err := s.Sign("test", text)
	if err != nil {
		t.Fatal(err)
	}
	if err := Verify(s.Public(), "test", text, sig); err != nil {
		t.Fatal(err)
	}
	flip := func(b []byte, at int) []byte {
		b = bytes.Clone(b)
		b[at] ^= 1
		return b
	}
	for name, tc := range map[string]struct {
		public    []byte
		purpose   string
		text, sig []byte
	}{
		"classic signature": {s.Public(), "test", text, flip(sig, 3)},
		"lattice signature": {s.Public(), "test", text, flip(sig, ed25519.SignatureSize+3)},
		"classic key":       {flip(s.Public(), 3), "test", text, sig},
		"lattice key":       {flip(s.Public(), ed25519.PublicKeySize+3), "test", text, sig},
		"text":              {s.Public(), "test", flip(text, 0), sig},
		"purpose":           {s.Public(), "tests", text, sig},
		"short signature":   {s.Public(), "test", text, sig[:len(sig)-1]},
		"only classic":      {s.Public(), "test", text, sig[:ed25519.SignatureSize]},
		"short key":         {s.Public()[:32], "test", text, sig},
		"nothing":           {nil, "test", text, nil},
	} {
		if err := Verify(tc.public, tc.purpose, tc.text, tc.sig); !errors.Is(err, ErrSignature) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestSignerSeed(t *testing.T) {
	a, b := NewSignerSeed(), NewSignerSeed()
	x, err := NewSigner(a)
	if err != nil {
		t.Fatal(err)
	}
	y, err := NewSigner(a)
	if err != nil {
		t.Fatal(err)
	}
	z, err := NewSigner(b)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(x.Public(), y.Public()) || bytes.Equal(x.Public(), z.Public()) {
		t.Error("a seed is not a key")
	}
	if _, err := NewSigner(secret.New(SignerSeedSize - 1)); !errors.Is(err, ErrFormat) {
		t.Errorf("a short seed: %v", err)
	}
}
