// Package gf2 multiplies polynomials over GF(2) for the two universal hashes
// of distillation: the Toeplitz hash that amplifies ([Toeplitz]) and the
// polynomial hash over GF(2^128) that verifies and authenticates ([Hash]).
//
// Bit i of a polynomial is bit i%64 of word i/64: the coefficient of x^i.
//
// A caller must keep in mind: no function here branches or looks up tables by
// its operands, so its time tells only lengths; results share no memory with
// operands.
package gf2

import "math/bits"

// clmul64 is the carry-less product of two 64-bit polynomials.
//
// Bits are spread over four classes with three zero bits between, so that
// carries of an integer product stay in the holes. A coefficient then sums at
// most 16 terms, one more than a hole of four bits holds; the top bit of each
// class of y is taken out and multiplied by shifts.
func clmul64(x, y uint64) (hi, lo uint64) {
	const m0, m1, m2, m3 = 0x1111111111111111, 0x2222222222222222,
		0x4444444444444444, 0x8888888888888888
	const low = 1<<60 - 1
	x0, x1, x2, x3 := x&m0, x&m1, x&m2, x&m3
	y0, y1, y2, y3 := y&m0&low, y&m1&low, y&m2&low, y&m3&low

	h0, l0 := mul4(x0, y0, x1, y3, x2, y2, x3, y1)
	h1, l1 := mul4(x0, y1, x1, y0, x2, y3, x3, y2)
	h2, l2 := mul4(x0, y2, x1, y1, x2, y0, x3, y3)
	h3, l3 := mul4(x0, y3, x1, y2, x2, y1, x3, y0)
	lo = l0&m0 | l1&m1 | l2&m2 | l3&m3
	hi = h0&m0 | h1&m1 | h2&m2 | h3&m3

	b0, b1, b2, b3 := -(y >> 60 & 1), -(y >> 61 & 1), -(y >> 62 & 1), -(y >> 63)
	lo ^= x<<60&b0 ^ x<<61&b1 ^ x<<62&b2 ^ x<<63&b3
	hi ^= x>>4&b0 ^ x>>3&b1 ^ x>>2&b2 ^ x>>1&b3
	return hi, lo
}

func mul4(a, b, c, d, e, f, g, h uint64) (hi, lo uint64) {
	h0, l0 := bits.Mul64(a, b)
	h1, l1 := bits.Mul64(c, d)
	h2, l2 := bits.Mul64(e, f)
	h3, l3 := bits.Mul64(g, h)
	return h0 ^ h1 ^ h2 ^ h3, l0 ^ l1 ^ l2 ^ l3
}

// Mul returns the product of a and b, len(a)+len(b) words.
func Mul(a, b []uint64) []uint64 {
	z := make([]uint64, len(a)+len(b))
	if len(a) < len(b) {
		a, b = b, a
	}
	if len(b) == 0 {
		return z
	}
	// Cut the longer operand into pieces as long as the shorter, so that
	// Karatsuba sees equal lengths.
	n := len(b)
	piece := make([]uint64, n)
	prod := make([]uint64, 2*n)
	scratch := make([]uint64, 4*n+128)
	for at := 0; at < len(a); at += n {
		clear(piece)
		used := copy(piece, a[at:])
		karatsuba(prod, piece, b, scratch)
		for i := range prod[:used+n] {
			z[at+i] ^= prod[i]
		}
	}
	clear(piece)
	clear(prod)
	clear(scratch)
	return z
}

// karatsuba sets z, 2n words, to the product of x and y, n words each.
// Scratch must hold at least 4n+128 words (measured need: 2(n+1) per level,
// halving).
func karatsuba(z, x, y, scratch []uint64) {
	n := len(x)
	if n <= 2 {
		small(z, x, y)
		return
	}
	// x = x1·X^h + x0 with h = ceil(n/2); the middle term is
	// (x0+x1)(y0+y1) - x0·y0 - x1·y1.
	h := (n + 1) / 2
	x0, x1, y0, y1 := x[:h], x[h:], y[:h], y[h:]
	mid, rest := scratch[:2*h], scratch[2*h:]
	xs, ys := z[:h], z[h:2*h]
	copy(xs, x0)
	copy(ys, y0)
	for i := range x1 {
		xs[i] ^= x1[i]
		ys[i] ^= y1[i]
	}
	karatsuba(mid, xs, ys, rest)
	karatsuba(z[:2*h], x0, y0, rest)
	karatsuba(z[2*h:], x1, y1, rest)
	for i := range 2 * h {
		mid[i] ^= z[i]
	}
	for i, v := range z[2*h:] {
		mid[i] ^= v
	}
	// 3h words are needed for the middle; what lies beyond 2n is zero.
	m := min(2*h, 2*n-h)
	for i, v := range mid[:m] {
		z[h+i] ^= v
	}
}

// small is [karatsuba] for one or two words.
func small(z, x, y []uint64) {
	if len(x) == 0 {
		return
	}
	h0, l0 := clmul64(x[0], y[0])
	if len(x) == 1 {
		z[0], z[1] = l0, h0
		return
	}
	h1, l1 := clmul64(x[1], y[1])
	hm, lm := clmul64(x[0]^x[1], y[0]^y[1])
	z[0], z[1] = l0, h0^lm^l0^l1
	z[2], z[3] = l1^hm^h0^h1, h1
}
