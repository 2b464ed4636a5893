package gf2

import "encoding/binary"

// HashBytes is the length of a hash and of its key, bytes.
const HashBytes = 16

// Hash evaluates the message as a polynomial over GF(2^128) at a secret
// point: for blocks m_1 … m_L, the last padded with zeros, and the length
// block, H = ((m_1·k + m_2)·k + … + length)·k. Two different messages of at
// most L blocks have hashes that differ by a given value with probability at
// most (L+1)/2^128 over the point ([Collision]).
//
// The field is GF(2)[x]/(x^128+x^7+x^2+x+1) as in NIST SP 800-38D, but bits
// count from the low end: byte i holds coefficients 8i to 8i+7.
//
// The zero value is not usable. Not safe for concurrent use.
type Hash struct {
	point, acc word128
	rest       [16]byte
	used       int
	length     uint64
}

type word128 struct{ hi, lo uint64 }

// NewHash returns a running hash at the given point.
func NewHash(point [HashBytes]byte) *Hash { return &Hash{point: load(point[:])} }

// Write adds to the message. It never fails.
func (h *Hash) Write(p []byte) (int, error) {
	n := len(p)
	h.length += uint64(n)
	if h.used > 0 {
		c := copy(h.rest[h.used:], p)
		h.used += c
		p = p[c:]
		if h.used < 16 {
			return n, nil
		}
		h.block(load(h.rest[:]))
		h.used = 0
	}
	for len(p) >= 16 {
		h.block(load(p))
		p = p[16:]
	}
	h.used = copy(h.rest[:], p)
	return n, nil
}

// Sum returns the hash of what was written so far and changes nothing.
func (h *Hash) Sum() [HashBytes]byte {
	c := *h
	if c.used > 0 {
		clear(c.rest[c.used:])
		c.block(load(c.rest[:]))
	}
	c.block(word128{lo: c.length})
	var out [HashBytes]byte
	binary.LittleEndian.PutUint64(out[:8], c.acc.lo)
	binary.LittleEndian.PutUint64(out[8:], c.acc.hi)
	return out
}

func (h *Hash) block(m word128) {
	h.acc.hi ^= m.hi
	h.acc.lo ^= m.lo
	h.acc = mul128(h.acc, h.point)
}

func load(p []byte) word128 {
	return word128{
		lo: binary.LittleEndian.Uint64(p),
		hi: binary.LittleEndian.Uint64(p[8:]),
	}
}

func mul128(a, b word128) word128 {
	h0, l0 := clmul64(a.lo, b.lo)
	h1, l1 := clmul64(a.hi, b.hi)
	hm, lm := clmul64(a.lo^a.hi, b.lo^b.hi)
	z0, z1 := l0, h0^lm^l0^l1
	z2, z3 := l1^hm^h0^h1, h1
	// x^128 = x^7+x^2+x+1: fold z3, then z2.
	z1 ^= z3 ^ z3<<1 ^ z3<<2 ^ z3<<7
	z2 ^= z3>>63 ^ z3>>62 ^ z3>>57
	z0 ^= z2 ^ z2<<1 ^ z2<<2 ^ z2<<7
	z1 ^= z2>>63 ^ z2>>62 ^ z2>>57
	return word128{hi: z1, lo: z0}
}

// Collision bounds the probability that two different messages of at most the
// given length have hashes that differ by a given value.
func Collision(messageBytes int) float64 {
	blocks := (float64(messageBytes)+15)/16 + 1
	return blocks / (1 << 64) / (1 << 64)
}
