// Package codec writes and reads the fixed binary forms of the key manager:
// peer messages, store records and audit entries.
//
// Numbers are big-endian and of fixed width; texts and byte strings carry a
// 16-bit length. [Reader] is strict: the first fault sticks, and [Reader.End]
// tells about it and about bytes left over, so a parser checks once.
package codec

import (
	"encoding/binary"
	"errors"
)

// ErrFormat says that bytes do not have the form they should.
var ErrFormat = errors.New("malformed bytes")

// MaxString is the longest text or byte string, bytes.
const MaxString = 1<<16 - 1

// AppendString appends a text of at most MaxString bytes with its length;
// the caller has checked the length.
func AppendString[S ~string | ~[]byte](b []byte, s S) []byte {
	b = binary.BigEndian.AppendUint16(b, uint16(len(s)))
	return append(b, s...)
}

// AppendBool appends one byte, 0 or 1.
func AppendBool(b []byte, v bool) []byte {
	if v {
		return append(b, 1)
	}
	return append(b, 0)
}

// Reader takes fields off the front of a byte string. Not for concurrent use.
type Reader struct {
	b   []byte
	bad bool
}

// NewReader reads b, which it does not change; fields that are byte strings
// point into b.
func NewReader(b []byte) *Reader { return &Reader{b: b} }

// Take returns the next n bytes, or nil after a fault.
func (r *Reader) Take(n int) []byte {
	if r.bad || n < 0 || len(r.b) < n {
		r.bad = true
		return nil
	}
	v := r.b[:n:n]
	r.b = r.b[n:]
	return v
}

// Copy fills dst with the next bytes.
func (r *Reader) Copy(dst []byte) { copy(dst, r.Take(len(dst))) }

// Uint8 reads one byte.
func (r *Reader) Uint8() uint8 {
	if v := r.Take(1); v != nil {
		return v[0]
	}
	return 0
}

// Bool reads one byte that must be 0 or 1.
func (r *Reader) Bool() bool {
	v := r.Uint8()
	if v > 1 {
		r.bad = true
	}
	return v == 1
}

// Uint16 reads two bytes.
func (r *Reader) Uint16() uint16 {
	if v := r.Take(2); v != nil {
		return binary.BigEndian.Uint16(v)
	}
	return 0
}

// Uint32 reads four bytes.
func (r *Reader) Uint32() uint32 {
	if v := r.Take(4); v != nil {
		return binary.BigEndian.Uint32(v)
	}
	return 0
}

// Uint64 reads eight bytes.
func (r *Reader) Uint64() uint64 {
	if v := r.Take(8); v != nil {
		return binary.BigEndian.Uint64(v)
	}
	return 0
}

// Bytes reads a byte string with its length; it points into the input.
func (r *Reader) Bytes() []byte { return r.Take(int(r.Uint16())) }

// String reads a text with its length.
func (r *Reader) String() string { return string(r.Bytes()) }

// Len is the number of bytes not yet read.
func (r *Reader) Len() int { return len(r.b) }

// Fail marks the input as malformed: a field had a value it must not have.
func (r *Reader) Fail() { r.bad = true }

// Err is ErrFormat after a fault.
func (r *Reader) Err() error {
	if r.bad {
		return ErrFormat
	}
	return nil
}

// End is ErrFormat after a fault or when bytes are left over.
func (r *Reader) End() error {
	if r.bad || len(r.b) != 0 {
		return ErrFormat
	}
	return nil
}
