package peer

import (
	"encoding/binary"
	"fmt"
	"math/bits"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/kms"
	"github.com/quietline/quietline/kms/codec"
	"github.com/quietline/quietline/secret"
)

// Reserved is the number of bytes at the front of each block that serve its
// comparison and never become key: a hash key and one mask per direction.
const Reserved = 3 * 16

// SlotBytes is the length of a slot: 256 bits, the usual key.
const SlotBytes = 32

// Weights say which share of a link's segments each KME owns: of Low+High
// consecutive numbers the first Low belong to the KME whose ID sorts first.
// Both KMEs must be set the same. The zero value means 1 and 1.
type Weights struct{ Low, High uint8 }

func (w Weights) orDefault() Weights {
	if w == (Weights{}) {
		return Weights{1, 1}
	}
	return w
}

// Owner is the KME whose initiators draw from the segment of that number.
func (w Weights) Owner(number uint64, a, b etsi014.KMEID) etsi014.KMEID {
	w = w.orDefault()
	if number%(uint64(w.Low)+uint64(w.High)) < uint64(w.Low) {
		return min(a, b)
	}
	return max(a, b)
}

// Cut makes a NEW segment of a block: who owns it, how many slots it has, and
// the tags of both OFFERs. It returns the segment and the part of block that
// is cut into slots, which points into block. The reserved bytes are wiped:
// a mask used for two messages would give the hash key away.
//
// The tag is a polynomial hash over GF(2^128), evaluated at the hash key, of
// the OFFER's fields and the block, plus the sender's mask (Wegman and
// Carter 1981; the field is that of NIST SP 800-38D). Two different blocks of
// n 16-byte words pass with probability at most n/2^128, whatever computing
// power made them.
func Cut(id kms.SegmentID, self, other etsi014.KMEID, w Weights, simulated bool, block []byte) (
	kms.Segment, []byte, error) {
	slots := (len(block) - Reserved) / SlotBytes
	if slots < 1 {
		return kms.Segment{}, nil, fmt.Errorf("cut block %s: %w: %d bytes hold no slot", id,
			kms.ErrChange, len(block))
	}
	seg := kms.Segment{
		ID: id, State: kms.StateNew, BlockBytes: len(block), SlotBytes: SlotBytes, Slots: slots,
		Owner: w.Owner(id.Number, self, other), Simulated: simulated,
	}
	h := newHash(block[:16])
	fields := offerFields(nil, &seg)
	h.write(fields)
	h.write(block[Reserved:])
	sum := h.sum(uint64(len(fields)), uint64(len(block)-Reserved))
	low, high := sum, sum
	for i := range sum {
		low[i] ^= block[16+i]
		high[i] ^= block[32+i]
	}
	seg.Sent, seg.Expected = low, high
	if self > other {
		seg.Sent, seg.Expected = high, low
	}
	secret.Wipe(block[:Reserved])
	return seg, block[Reserved : Reserved+slots*SlotBytes], nil
}

// offerFields is what an OFFER says of a segment, in the order hashed.
func offerFields(b []byte, s *kms.Segment) []byte {
	b = appendID(b, s.ID)
	b = binary.BigEndian.AppendUint32(b, uint32(s.BlockBytes))
	b = binary.BigEndian.AppendUint32(b, uint32(s.SlotBytes))
	b = binary.BigEndian.AppendUint32(b, uint32(s.Slots))
	b = codec.AppendString(b, s.Owner)
	return codec.AppendBool(b, s.Simulated)
}

// element is an element of GF(2^128) in two halves, bit 0 of the polynomial in
// the top bit of hi, as in SP 800-38D section 6.3.
type element struct{ hi, lo uint64 }

// hash is a running polynomial hash. Its arithmetic has no secret-dependent
// branch or table: block bits are one-time key.
type hash struct{ key, acc element }

func newHash(key []byte) *hash { return &hash{key: load(key)} }

func load(b []byte) element {
	return element{binary.BigEndian.Uint64(b), binary.BigEndian.Uint64(b[8:])}
}

// write adds data, padded with zeros to whole 16-byte words.
func (h *hash) write(data []byte) {
	for len(data) >= 16 {
		h.add(load(data))
		data = data[16:]
	}
	if len(data) > 0 {
		var last [16]byte
		copy(last[:], data)
		h.add(load(last[:]))
		secret.Wipe(last[:])
	}
}

func (h *hash) add(e element) {
	h.acc = multiply(element{h.acc.hi ^ e.hi, h.acc.lo ^ e.lo}, h.key)
}

// sum ends the hash with the lengths of the two parts, so that padding and
// the border between them count.
func (h *hash) sum(a, b uint64) (tag kms.Tag) {
	h.add(element{a, b})
	binary.BigEndian.PutUint64(tag[:8], h.acc.hi)
	binary.BigEndian.PutUint64(tag[8:], h.acc.lo)
	*h = hash{}
	return tag
}

// multiply is the product in GF(2^128) modulo x^128 + x^7 + x^2 + x + 1, bits
// reflected, by Karatsuba over carry-less 64-bit products.
func multiply(x, y element) element {
	h1, h0 := clmul(x.hi, y.hi)
	l1, l0 := clmul(x.lo, y.lo)
	m1, m0 := clmul(x.hi^x.lo, y.hi^y.lo)
	m1 ^= h1 ^ l1
	m0 ^= h0 ^ l0
	// The 255-bit product of reflected numbers stands one bit too low.
	w := [4]uint64{h1, h0 ^ m1, l1 ^ m0, l0}
	w[0] = w[0]<<1 | w[1]>>63
	w[1] = w[1]<<1 | w[2]>>63
	w[2] = w[2]<<1 | w[3]>>63
	w[3] <<= 1
	// Fold the upper half of the polynomial (the right end) down.
	w[1] ^= w[3] ^ w[3]>>1 ^ w[3]>>2 ^ w[3]>>7
	w[2] ^= w[3]<<63 ^ w[3]<<62 ^ w[3]<<57
	w[0] ^= w[2] ^ w[2]>>1 ^ w[2]>>2 ^ w[2]>>7
	w[1] ^= w[2]<<63 ^ w[2]<<62 ^ w[2]<<57
	return element{w[0], w[1]}
}

// clmul is the carry-less product of two 64-bit numbers in constant time:
// integer products of numbers with holes of three bits, wide enough that no
// carry reaches the next bit kept (T. Pornin, BearSSL, ghash_ctmul64). Sixteen
// set bits of one class meet at most, so that a sum of 16 needs one bit more
// than the hole has; the low half is exact as only bits up to 63 count there,
// and the high half is the low half of the reversed product.
func clmul(x, y uint64) (hi, lo uint64) {
	lo = clmulLow(x, y)
	hi = bits.Reverse64(clmulLow(bits.Reverse64(x), bits.Reverse64(y))) >> 1
	return hi, lo
}

func clmulLow(x, y uint64) uint64 {
	const m0, m1, m2, m3 = 0x1111111111111111, 0x2222222222222222,
		0x4444444444444444, 0x8888888888888888
	x0, x1, x2, x3 := x&m0, x&m1, x&m2, x&m3
	y0, y1, y2, y3 := y&m0, y&m1, y&m2, y&m3
	z0 := x0*y0 ^ x1*y3 ^ x2*y2 ^ x3*y1
	z1 := x0*y1 ^ x1*y0 ^ x2*y3 ^ x3*y2
	z2 := x0*y2 ^ x1*y1 ^ x2*y0 ^ x3*y3
	z3 := x0*y3 ^ x1*y2 ^ x2*y1 ^ x3*y0
	return z0&m0 | z1&m1 | z2&m2 | z3&m3
}
