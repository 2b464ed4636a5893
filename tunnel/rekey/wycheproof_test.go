package rekey

import (
	"bytes"
	"compress/gzip"
	"crypto/ecdh"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/sha512"
	"encoding/hex"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/cloudflare/circl/kem/mlkem/mlkem768"

	"github.com/quietline/quietline/secret"
)

// hexBytes is a byte string as Wycheproof writes it.
type hexBytes []byte

func (h *hexBytes) UnmarshalText(b []byte) (err error) {
	*h, err = hex.DecodeString(string(b))
	return err
}

// wycheproof is one vector of any kind; each kind fills its own fields.
type wycheproof struct {
	ID      int `json:"tcId"`
	Comment string
	Flags   []string
	Result  string

	Key, IV, AAD, Msg, CT, Tag hexBytes // AES-GCM, HMAC
	IKM, Salt, Info, OKM       hexBytes // HKDF
	Size                       int
	Public, Private, Shared    hexBytes // X25519
	Seed, EK, M, C             hexBytes // ML-KEM
	K                          hexBytes `json:"K"`
}

// vectors reads one file and calls each for the vectors in it. The count
// guards against a file that lost its vectors.
func vectors(t *testing.T, name string, count int, each func(*testing.T, group, wycheproof)) {
	t.Helper()
	f, err := os.Open(filepath.Join("testdata", "wycheproof", name+"_test.json.gz"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	var file struct {
		NumberOfTests int
		TestGroups    []struct {
			group
			Tests []wycheproof
		}
	}
	if err := json.NewDecoder(z).Decode(&file); err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, g := range file.TestGroups {
		for _, v := range g.Tests {
			n++
			each(t, g.group, v)
		}
	}
	if n != count || n != file.NumberOfTests {
		t.Errorf("%s: %d vectors for %d, its head says %d", name, n, count, file.NumberOfTests)
	}
}

type group struct{ KeySize, IVSize, TagSize int }

// TestWycheproofGCM opens boxes by newGCM, as the transcript does: keys of 256
// bits, nonces of 96.
func TestWycheproofGCM(t *testing.T) {
	ran := 0
	vectors(t, "aes_gcm", 316, func(t *testing.T, g group, v wycheproof) {
		if g.KeySize != 8*keySize || g.IVSize != 8*nonceSize || g.TagSize != 8*tagSize {
			return
		}
		ran++
		gcm := newGCM(secret.Copy(v.Key))
		plain, err := gcm.Open(nil, v.IV, slices.Concat(v.CT, v.Tag), v.AAD)
		if valid := v.Result == "valid"; valid != (err == nil) || valid && !bytes.Equal(plain, v.Msg) {
			t.Errorf("vector %d, %s %s: opens to %x, %v", v.ID, v.Result, v.Comment, plain, err)
		}
		if v.Result != "valid" {
			return
		}
		if got := gcm.Seal(nil, v.IV, v.Msg, v.AAD); !bytes.Equal(got, slices.Concat(v.CT, v.Tag)) {
			t.Errorf("vector %d, %s: seals to %x", v.ID, v.Comment, got)
		}
	})
	if ran != 66 {
		t.Errorf("%d vectors ran", ran)
	}
}

// TestWycheproofHKDF runs Extract and expand as mixKey and derive do.
func TestWycheproofHKDF(t *testing.T) {
	vectors(t, "hkdf_sha384", 83, func(t *testing.T, _ group, v wycheproof) {
		prk, err := hkdf.Extract(sha512.New384, v.IKM, v.Salt)
		if err != nil {
			t.Fatal(err)
		}
		var got []byte
		stopped := stops(func() { got = expand(prk, string(v.Info), v.Size).Expose() })
		if valid := v.Result == "valid"; valid == stopped || valid && !bytes.Equal(got, v.OKM) {
			t.Errorf("vector %d, %s %s: %x, stopped %v", v.ID, v.Result, v.Comment, got, stopped)
		}
	})
}

// stops tells whether f panics, as must does where a length cannot be.
func stops(f func()) (stopped bool) {
	defer func() { stopped = recover() != nil }()
	f()
	return false
}

// TestWycheproofHMAC checks tags as unwrap checks mac1, cut to 128 bits.
func TestWycheproofHMAC(t *testing.T) {
	ran := 0
	vectors(t, "hmac_sha256", 174, func(t *testing.T, g group, v wycheproof) {
		if g.TagSize != 8*macSize {
			return
		}
		ran++
		good := hmac.Equal(mac1(secret.Copy(v.Key), v.Msg), v.Tag)
		if good != (v.Result == "valid") {
			t.Errorf("vector %d, %s %s: good %v", v.ID, v.Result, v.Comment, good)
		}
	})
	if ran != 87 {
		t.Errorf("%d vectors ran", ran)
	}
}

// TestWycheproofX25519 makes X-Wing ciphertexts whose X25519 part is the
// vector: the coins end in the private key, the public key in the public one.
// A shared secret of zeros is taken, as X-Wing has it: ML-KEM still stands.
func TestWycheproofX25519(t *testing.T) {
	m := mlkem768Vector(t)
	vectors(t, "x25519", 518, func(t *testing.T, _ group, v wycheproof) {
		own, err := ecdh.X25519().NewPrivateKey(v.Private)
		if err != nil {
			t.Fatal(err)
		}
		ct, ss, err := xwingKEM{}.encapsulate(bytes.NewReader(slices.Concat(m.M, v.Private)),
			slices.Concat(m.EK, v.Public))
		if err != nil {
			t.Fatalf("vector %d: %v", v.ID, err)
		}
		public := own.PublicKey().Bytes()
		want := combine(m.K, v.Shared, public, v.Public)
		if !bytes.Equal(ct, slices.Concat(m.C, public)) || !bytes.Equal(ss.Expose(), want) {
			t.Errorf("vector %d, %s %v: another shared secret", v.ID, v.Comment, v.Flags)
		}
	})
}

// mlkem768Vector is some valid encapsulation.
func mlkem768Vector(t *testing.T) (m wycheproof) {
	t.Helper()
	vectors(t, "mlkem_768_encaps", 265, func(_ *testing.T, _ group, v wycheproof) {
		if v.Result == "valid" && m.EK == nil {
			m = v
		}
	})
	return m
}

// TestWycheproofEncapsulate gives CheckPublic and encapsulate every public key:
// those of a wrong length or with a coefficient above the modulus are refused.
func TestWycheproofEncapsulate(t *testing.T) {
	point, err := ecdh.X25519().NewPrivateKey(bytes.Repeat([]byte{9}, 32))
	if err != nil {
		t.Fatal(err)
	}
	x := point.PublicKey().Bytes()
	vectors(t, "mlkem_768_encaps", 265, func(t *testing.T, _ group, v wycheproof) {
		public := slices.Concat(v.EK, x)
		err := CheckPublic(XWing, public)
		if valid := v.Result == "valid"; valid != (err == nil) {
			t.Errorf("vector %d, %s %v: %v", v.ID, v.Result, v.Flags, err)
		}
		if v.Result != "valid" {
			return
		}
		coins := slices.Concat(v.M, point.Bytes())
		ct, ss, err := xwingKEM{}.encapsulate(bytes.NewReader(coins), public)
		if err != nil {
			t.Fatal(err)
		}
		shared, err := point.ECDH(point.PublicKey())
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(ct, slices.Concat(v.C, x)) ||
			!bytes.Equal(ss.Expose(), combine(v.K, shared, x, x)) {
			t.Errorf("vector %d, %s: another shared secret", v.ID, v.Comment)
		}
	})
}

// TestWycheproofDecapsulate runs the two calls that X-Wing makes for its
// ML-KEM part, and our decapsulate for what has a wrong length. X-Wing makes
// its seeds itself by SHAKE-256, so they cannot be given to it.
func TestWycheproofDecapsulate(t *testing.T) {
	vectors(t, "mlkem_768", 193, func(t *testing.T, _ group, v wycheproof) {
		if len(v.Seed) != mlkem768.KeySeedSize || len(v.C) != mlkem768.CiphertextSize {
			seed := secret.New(seedSize)
			if len(v.Seed) != mlkem768.KeySeedSize {
				seed = secret.Copy(v.Seed)
			}
			_, err := xwingKEM{}.decapsulate(seed, slices.Concat(v.C, make([]byte, 32)))
			if err == nil || v.Result != "invalid" {
				t.Errorf("vector %d, %s %s: %v", v.ID, v.Result, v.Comment, err)
			}
			return
		}
		public, private := mlkem768.NewKeyFromSeed(v.Seed)
		ek, err := public.MarshalBinary()
		if err != nil {
			t.Fatal(err)
		}
		got := make([]byte, mlkem768.SharedKeySize)
		private.DecapsulateTo(got, v.C)
		if v.Result != "valid" || !bytes.Equal(ek, v.EK) || !bytes.Equal(got, v.K) {
			t.Errorf("vector %d, %s %s: another key or secret", v.ID, v.Result, v.Comment)
		}
	})
}
