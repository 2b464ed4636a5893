package rekey

import (
	"bytes"
	"crypto/ecdh"
	"crypto/mlkem"
	"crypto/rand"
	"crypto/sha3"
	"errors"
	"testing"

	"github.com/quietline/quietline/secret"
)

// stdXWing composes X-Wing from the standard library after
// draft-connolly-cfrg-xwing-kem section 5: the oracle for the one in use.
type stdXWing struct {
	m *mlkem.DecapsulationKey768
	x *ecdh.PrivateKey
}

func makeStdXWing(seed []byte) stdXWing {
	expanded := sha3.SumSHAKE256(seed, 96)
	m, err := mlkem.NewDecapsulationKey768(expanded[:64])
	if err != nil {
		panic(err) // any 64 bytes are a seed
	}
	x, err := ecdh.X25519().NewPrivateKey(expanded[64:])
	if err != nil {
		panic(err) // any 32 bytes are a key
	}
	return stdXWing{m, x}
}

func (k stdXWing) public() []byte {
	return append(k.m.EncapsulationKey().Bytes(), k.x.PublicKey().Bytes()...)
}

func combine(ssM, ssX, ctX, pkX []byte) []byte {
	h := sha3.New256()
	for _, p := range [][]byte{ssM, ssX, ctX, pkX, []byte(`\.//^\`)} {
		_, _ = h.Write(p)
	}
	return h.Sum(nil)
}

func stdEncapsulate(t testing.TB, public []byte) (ct, ss []byte) {
	m, err := mlkem.NewEncapsulationKey768(public[:mlkem.EncapsulationKeySize768])
	if err != nil {
		t.Fatal(err)
	}
	pkX, err := ecdh.X25519().NewPublicKey(public[mlkem.EncapsulationKeySize768:])
	if err != nil {
		t.Fatal(err)
	}
	eph, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ssX, err := eph.ECDH(pkX)
	if err != nil {
		t.Fatal(err)
	}
	ssM, ctM := m.Encapsulate()
	ctX := eph.PublicKey().Bytes()
	return append(ctM, ctX...), combine(ssM, ssX, ctX, pkX.Bytes())
}

func (k stdXWing) decapsulate(ct []byte) ([]byte, error) {
	ssM, err := k.m.Decapsulate(ct[:mlkem.CiphertextSize768])
	if err != nil {
		return nil, err
	}
	ctX, err := ecdh.X25519().NewPublicKey(ct[mlkem.CiphertextSize768:])
	if err != nil {
		return nil, err
	}
	ssX, err := k.x.ECDH(ctX)
	if err != nil {
		return nil, err
	}
	return combine(ssM, ssX, ctX.Bytes(), k.x.PublicKey().Bytes()), nil
}

func TestXWingAgreesWithStandardLibrary(t *testing.T) {
	for range 50 {
		seed := secret.New(seedSize)
		_, _ = rand.Read(seed.Expose())
		std := makeStdXWing(seed.Expose())
		public, err := xwingKEM{}.public(seed)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(public, std.public()) {
			t.Fatalf("public keys of seed %x differ", seed.Expose())
		}
		ct, ss, err := xwingKEM{}.encapsulate(rand.Reader, public)
		if err != nil {
			t.Fatal(err)
		}
		if opened, err := std.decapsulate(ct); err != nil || !bytes.Equal(opened, ss.Expose()) {
			t.Fatalf("standard library opens our ciphertext otherwise: %v", err)
		}
		ct, want := stdEncapsulate(t, public)
		got, err := xwingKEM{}.decapsulate(seed, ct)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got.Expose(), want) {
			t.Fatal("we open the standard library's ciphertext otherwise")
		}
		ct[0] ^= 1
		if got, err := (xwingKEM{}).decapsulate(seed, ct); err != nil ||
			bytes.Equal(got.Expose(), want) {
			t.Fatalf("a changed ciphertext gives the same secret (err %v)", err)
		}
	}
}

func TestKEMRefusesWrongSizes(t *testing.T) {
	short := secret.New(31)
	if _, err := (xwingKEM{}).public(short); err == nil {
		t.Error("public takes a seed of 31 bytes")
	}
	if _, err := (xwingKEM{}).decapsulate(short, make([]byte, 1120)); err == nil {
		t.Error("decapsulate takes a seed of 31 bytes")
	}
	if _, err := (xwingKEM{}).decapsulate(seeds(0), make([]byte, 1119)); err == nil {
		t.Error("decapsulate takes a ciphertext of 1119 bytes")
	}
	if _, _, err := (xwingKEM{}).encapsulate(rand.Reader, make([]byte, 1215)); err == nil {
		t.Error("encapsulate takes a public key of 1215 bytes")
	}
	// Coefficients of 4095 are not below q = 3329: FIPS 203 section 7.2.
	if _, _, err := (xwingKEM{}).encapsulate(rand.Reader, bytes.Repeat([]byte{255}, 1216)); err == nil {
		t.Error("encapsulate takes a public key out of range")
	}
	if _, _, err := (xwingKEM{}).encapsulate(bytes.NewReader(nil), publics[0]); err == nil {
		t.Error("encapsulate goes on without randomness")
	}
	if _, err := Public(9, seeds(0)); !errors.Is(err, ErrConfig) {
		t.Errorf("suite 9: %v", err)
	}
}
