// Package pad is the one-time pad of a line: raw QKD bytes, each used once,
// under which payload rests on no computational assumption.
//
// [Machine] is a pure state machine that draws blocks of pad from its own SAE,
// announces them to the other end and takes them into use when that end has
// collected the same keys. It does no I/O and reads no clock; one goroutine
// owns it. Its two pools, [Out] and [In], seal and open records and are safe
// for concurrent use.
//
// A block is the bytes of its keys in their order. Its first 16 bytes are r of
// Poly1305 for the whole block; the rest is taken from front to back, never
// back again: for each record the bytes that hide it, then 16 bytes s:
//
//	ciphertext = (length || record || zeros) XOR pad[offset:]
//	tag        = Poly1305(r, s; the first 12 bytes of the PAD record || ciphertext)
//
// That is a Wegman–Carter tag: one polynomial for the block, hidden anew by a
// fresh s (handshake.md 4.9). A forgery succeeds with at most
// 8*ceil(n/16)/2^106 for n bytes under the tag. The tag does not cover the
// outer header: block and offset already name the one place a record can have.
// The whole stands inside an AES-256-GCM record, so forgeries and replays die
// before pad is touched, and pad that leaked still leaves what the epoch gives.
//
// A caller must keep in mind:
//   - pad lives in memory only and is void at a restart of either end;
//   - after [Input.Void], which a restored machine needs, nothing of what was
//     held is used;
//   - bytes are wiped when they are used, at both ends, and what is skipped when
//     its block retires; Go gives no guarantee about copies in registers.
//
// The PAD record, version 1, integers big endian:
//
//	+---------------+---------------+-------------------------------+
//	| kind 4        | version 1     | 0                             |
//	+---------------+---------------+-------------------------------+
//	| block number, from 1                                          |
//	+---------------------------------------------------------------+
//	| offset in the block, bytes, a multiple of 16                  |
//	+---------------------------------------------------------------+
//	| ciphertext: 128, 512 or as much as the path takes; of it, in  |
//	| clear: length of the record (2 bytes), record, zeros          |
//	+---------------------------------------------------------------+
//	| tag (16 bytes)                                                |
//	+---------------------------------------------------------------+
//
// The record inside is a WHOLE, SLICE or PACK.
package pad

import (
	"encoding/binary"

	//lint:ignore SA1019 A Wegman–Carter tag is what it is for: r and s are one-time pad here.
	"golang.org/x/crypto/poly1305"
)

// Sizes in bytes.
const (
	headLen = 12               // of a PAD record before the ciphertext
	tagLen  = poly1305.TagSize // 16
	rLen    = 16               // of a block: r of Poly1305
	unit    = 16               // offsets and buckets are multiples of it
	lenLen  = 2                // length of the record inside
	version = 1
	// Overhead is what a PAD record has beside its bucket.
	Overhead = headLen + tagLen
	// Cost is the pad that a record takes beside its bucket: s.
	Cost = tagLen
)

// buckets are the lengths of ciphertext beside the largest, which follows from
// the path: length is all that a one-time pad shows (handshake.md 4.9).
var buckets = [...]int{128, 512}

// Largest is the largest bucket for records of so many bytes at most.
func Largest(record int) int { return (record + lenLen + unit - 1) &^ (unit - 1) }

// Bucket is the ciphertext that hides a record of n bytes; 0 if it does not fit
// the largest.
func Bucket(n, largest int) int {
	for _, b := range buckets {
		if n+lenLen <= b && b <= largest {
			return b
		}
	}
	if n+lenLen <= largest {
		return largest
	}
	return 0
}

// head writes the first bytes of a PAD record.
func head(b []byte, block, offset uint32) {
	b[0], b[1], b[2], b[3] = kindPad, version, 0, 0
	binary.BigEndian.PutUint32(b[4:], block)
	binary.BigEndian.PutUint32(b[8:], offset)
}

// kindPad is wire.Pad; this package stands below that one's users and needs
// nothing else of it.
const kindPad = 4

// tag is the Wegman–Carter tag over head and ciphertext, which stand in a row.
func tag(out *[tagLen]byte, r, s, message []byte) {
	var key [32]byte
	copy(key[:16], r)
	copy(key[16:], s)
	poly1305.Sum(out, message, &key)
	clear(key[:])
}

// authentic compares in constant time.
func authentic(mac, r, s, message []byte) bool {
	var key [32]byte
	copy(key[:16], r)
	copy(key[16:], s)
	ok := poly1305.Verify((*[tagLen]byte)(mac), message, &key)
	clear(key[:])
	return ok
}
