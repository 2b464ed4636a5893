package peer

import (
	"crypto/aes"
	"crypto/cipher"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"testing"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/kms"
)

// TestHashAgainstGMAC: with hash key AES_K(0) the polynomial hash of
// (additional data) and its length is GHASH, which the standard library's
// GCM shows masked by AES_K(nonce || 1): SP 800-38D algorithm 4.
func TestHashAgainstGMAC(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	for n := range 200 {
		key, data := randomBytes(rng, 16), randomBytes(rng, n)
		block, err := aes.NewCipher(key)
		if err != nil {
			t.Fatal(err)
		}
		gcm, err := cipher.NewGCM(block)
		if err != nil {
			t.Fatal(err)
		}
		want := gcm.Seal(nil, make([]byte, 12), nil, data)
		var h, mask, counter [16]byte
		block.Encrypt(h[:], h[:])
		counter[15] = 1
		block.Encrypt(mask[:], counter[:])
		x := newHash(h[:])
		x.write(data)
		got := x.sum(8*uint64(n), 0)
		for i := range got {
			got[i] ^= mask[i]
		}
		if string(got[:]) != string(want) {
			t.Fatalf("%d bytes: hash %x, GMAC %x", n, got, want)
		}
	}
}

func randomBytes(rng *rand.Rand, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(rng.Uint32())
	}
	return b
}

func TestClmulAgainstShifts(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 4))
	cases := [][2]uint64{{0, 0}, {^uint64(0), ^uint64(0)}, {1 << 63, 1 << 63}, {1, ^uint64(0)}}
	for range 1000 {
		cases = append(cases, [2]uint64{rng.Uint64(), rng.Uint64()})
	}
	for _, c := range cases {
		var hi, lo uint64
		for i := range 64 {
			if c[1]>>i&1 == 1 {
				lo ^= c[0] << i
				if i > 0 {
					hi ^= c[0] >> (64 - i)
				}
			}
		}
		if h, l := clmul(c[0], c[1]); h != hi || l != lo {
			t.Fatalf("clmul(%x, %x) = %x %x, want %x %x", c[0], c[1], h, l, hi, lo)
		}
	}
}

func TestCutAgreesOrDiffers(t *testing.T) {
	rng := rand.New(rand.NewPCG(5, 6))
	id := kms.SegmentID{Link: "l", Generation: 1, Number: 8}
	block := randomBytes(rng, 5000)
	cut := func(id kms.SegmentID, self, other etsi014.KMEID, w Weights, block []byte) kms.Segment {
		t.Helper()
		b := append([]byte(nil), block...)
		seg, payload, err := Cut(id, self, other, w, false, b)
		if err != nil {
			t.Fatal(err)
		}
		if len(payload) != seg.Slots*SlotBytes {
			t.Fatalf("payload of %d bytes for %d slots", len(payload), seg.Slots)
		}
		if string(b[:Reserved]) != string(make([]byte, Reserved)) {
			t.Fatal("the reserved bytes were not wiped")
		}
		return seg
	}
	a, b := cut(id, "a", "b", Weights{}, block), cut(id, "b", "a", Weights{}, block)
	if a.Sent != b.Expected || a.Expected != b.Sent {
		t.Error("equal blocks give other tags")
	}
	if a.Sent == a.Expected {
		t.Error("both directions show the same tag")
	}
	for bit := Reserved * 8; bit < 8*len(block); bit += 797 {
		block[bit/8] ^= 1 << (bit % 8)
		if c := cut(id, "b", "a", Weights{}, block); c.Sent == a.Expected {
			t.Fatalf("bit %d differs and the tags agree", bit)
		}
		block[bit/8] ^= 1 << (bit % 8)
	}
	other := id
	other.Number = 10
	if c := cut(other, "b", "a", Weights{}, block); c.Sent == a.Expected {
		t.Error("the segment's number does not count")
	}
	if c := cut(id, "b", "a", Weights{1, 200}, block); c.Owner == a.Owner || c.Sent == a.Expected {
		t.Error("the owner does not count")
	}
}

func TestCutRefusesShortBlock(t *testing.T) {
	_, _, err := Cut(kms.SegmentID{}, "a", "b", Weights{}, false, make([]byte, Reserved+31))
	if !errors.Is(err, kms.ErrChange) {
		t.Errorf("Cut = %v, want ErrChange", err)
	}
}

func TestWeights(t *testing.T) {
	count := map[etsi014.KMEID]int{}
	for n := range uint64(40) {
		o := Weights{3, 1}.Owner(n, "b", "a")
		if o != (Weights{3, 1}).Owner(n, "a", "b") {
			t.Fatal("the owner depends on who asks")
		}
		count[o]++
	}
	if count["a"] != 30 || count["b"] != 10 {
		t.Errorf("shares %v, want 30 and 10", count)
	}
}

func BenchmarkCut(b *testing.B) {
	block := randomBytes(rand.New(rand.NewPCG(7, 8)), 1<<15)
	b.SetBytes(int64(len(block)))
	for b.Loop() {
		binary.BigEndian.PutUint64(block, 1)
		if _, _, err := Cut(kms.SegmentID{Link: "l"}, "a", "b", Weights{}, false, block); err != nil {
			b.Fatal(err)
		}
	}
}
