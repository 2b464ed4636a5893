package gf2

import (
	"encoding/binary"
	"fmt"
	"math/big"
	"math/rand/v2"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

// schoolbook multiplies bit by bit.
func schoolbook(a, b []uint64) []uint64 {
	z := make([]uint64, len(a)+len(b))
	for i := range 64 * len(a) {
		if a[i/64]>>(i%64)&1 == 0 {
			continue
		}
		for j, v := range b {
			z[i/64+j] ^= v << (i % 64)
			if i%64 > 0 {
				z[i/64+j+1] ^= v >> (64 - i%64)
			}
		}
	}
	return z
}

func words(rng *rand.Rand, n int) []uint64 {
	w := make([]uint64, n)
	for i := range w {
		w[i] = rng.Uint64()
	}
	return w
}

func TestMul64AllOnes(t *testing.T) {
	// The densest operands fill the holes between classes to the brim.
	for _, x := range []uint64{0, 1, ^uint64(0), 1 << 63, 0x1111111111111111, 0x8888888888888888} {
		for _, y := range []uint64{0, 1, ^uint64(0), 1 << 63, 0xF << 60, 0x1111111111111111} {
			hi, lo := clmul64(x, y)
			want := schoolbook([]uint64{x}, []uint64{y})
			if lo != want[0] || hi != want[1] {
				t.Errorf("%#x·%#x = %#x %#x, want %#x %#x", x, y, hi, lo, want[1], want[0])
			}
		}
	}
}

func TestMulIsSchoolbook(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		// 64 words are 4096 bits, the longest that schoolbook checks.
		a := rapid.SliceOfN(rapid.Uint64(), 0, 64).Draw(t, "a")
		b := rapid.SliceOfN(rapid.Uint64(), 0, 64).Draw(t, "b")
		if diff := cmp.Diff(schoolbook(a, b), Mul(a, b)); diff != "" {
			t.Fatal(diff)
		}
	})
}

func TestMulLengths(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	for n := 1; n <= 67; n++ {
		for _, m := range []int{1, 2, 3, n, n + 1, 2*n - 1} {
			a, b := words(rng, n), words(rng, m)
			if diff := cmp.Diff(schoolbook(a, b), Mul(a, b)); diff != "" {
				t.Fatalf("%d by %d words: %s", n, m, diff)
			}
		}
	}
}

func TestMulDistributesWhenLarge(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 4))
	a, b, c := words(rng, 1000), words(rng, 700), words(rng, 700)
	sum := make([]uint64, 700)
	for i := range sum {
		sum[i] = b[i] ^ c[i]
	}
	ab, ac, as := Mul(a, b), Mul(a, c), Mul(a, sum)
	for i := range as {
		if as[i] != ab[i]^ac[i] {
			t.Fatalf("word %d: a(b+c) differs from ab+ac", i)
		}
	}
}

func TestToeplitzIsItsMatrix(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n := rapid.IntRange(1, 700).Draw(t, "n")
		m := rapid.IntRange(0, n).Draw(t, "m")
		seed := rapid.SliceOfN(rapid.Uint64(), (n+63)/64, (n+63)/64).Draw(t, "seed")
		x := rapid.SliceOfN(rapid.Uint64(), (n+63)/64, (n+63)/64).Draw(t, "x")
		bit := func(p []uint64, i int) uint64 { return p[i/64] >> (i % 64) & 1 }
		want := make([]uint64, (m+63)/64)
		for i := range m {
			v := bit(x, i)
			for j := range n - m {
				v ^= bit(seed, n-m-1+i-j) & bit(x, m+j)
			}
			want[i/64] |= v << (i % 64)
		}
		if diff := cmp.Diff(want, Toeplitz(x, n, seed, m)); diff != "" {
			t.Fatal(diff)
		}
	})
}

// Over all seeds of a tiny matrix, two different inputs collide exactly for a
// share 2^-m of the seeds: the definition of 2-universal, met with equality.
func TestToeplitzIsUniversal(t *testing.T) {
	const n, m = 6, 3
	for x := uint64(0); x < 1<<n; x++ {
		for y := range x {
			collisions := 0
			for seed := range uint64(1 << (n - 1)) {
				s := []uint64{seed}
				if Toeplitz([]uint64{x}, n, s, m)[0] == Toeplitz([]uint64{y}, n, s, m)[0] {
					collisions++
				}
			}
			if collisions > 1<<(n-1-m) {
				t.Errorf("%06b and %06b collide for %d seeds of %d", x, y, collisions, 1<<(n-1))
			}
		}
	}
}

// mulBig multiplies in GF(2^128) with math/big's shifts, bit by bit.
func mulBig(a, b *big.Int) *big.Int {
	mod := new(big.Int).SetBit(big.NewInt(0x87), 128, 1)
	z := new(big.Int)
	for i := b.BitLen() - 1; i >= 0; i-- {
		z.Lsh(z, 1)
		if z.Bit(128) == 1 {
			z.Xor(z, mod)
		}
		if b.Bit(i) == 1 {
			z.Xor(z, a)
		}
	}
	return z
}

func bigOf(p []byte) *big.Int {
	rev := make([]byte, 16)
	for i, b := range p {
		rev[15-i] = b
	}
	return new(big.Int).SetBytes(rev)
}

func TestHashIsItsPolynomial(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var point [16]byte
		copy(point[:], rapid.SliceOfN(rapid.Byte(), 16, 16).Draw(t, "point"))
		msg := rapid.SliceOfN(rapid.Byte(), 0, 200).Draw(t, "message")
		cut := rapid.IntRange(0, len(msg)).Draw(t, "cut")

		want := new(big.Int)
		add := func(block []byte) {
			want.Xor(want, bigOf(block))
			want = mulBig(want, bigOf(point[:]))
		}
		for at := 0; at < len(msg); at += 16 {
			add(msg[at:min(at+16, len(msg))])
		}
		add(binary.LittleEndian.AppendUint64(nil, uint64(len(msg))))

		h := NewHash(point)
		_, _ = h.Write(msg[:cut])
		_ = h.Sum()
		_, _ = h.Write(msg[cut:])
		got := h.Sum()
		if bigOf(got[:]).Cmp(want) != 0 {
			t.Fatalf("hash is %x, want %x", bigOf(got[:]), want)
		}
	})
}

func TestCollisionBound(t *testing.T) {
	// 2^20 bits: 8192 blocks and the length block.
	got, want := Collision(1<<17), 8193.0/(1<<64)/(1<<64)
	if got < want || got > want*1.01 {
		t.Errorf("bound is %g, want %g", got, want)
	}
}

func BenchmarkMul(b *testing.B) {
	for _, bits := range []int{1 << 14, 1 << 17, 1 << 20} {
		b.Run(fmt.Sprintf("bits=%d", bits), func(b *testing.B) {
			rng := rand.New(rand.NewPCG(5, 6))
			x, y := words(rng, bits/64), words(rng, bits/64)
			for b.Loop() {
				Mul(x, y)
			}
			b.ReportMetric(float64(bits)*float64(b.N)/b.Elapsed().Seconds()/1e6, "Mbit/s")
		})
	}
}

func BenchmarkHash(b *testing.B) {
	msg := make([]byte, 1<<16)
	b.SetBytes(int64(len(msg)))
	h := NewHash([16]byte{1, 2, 3})
	for b.Loop() {
		_, _ = h.Write(msg)
	}
}
