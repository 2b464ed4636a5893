// Package secret holds key material that hides and wipes itself.
//
// The main type is [Bytes]: a fixed buffer that no print verb, logger or
// encoder shows, and that its owner clears; [NewLocked] makes one in memory
// that never reaches a disk. Beside it stand durable file writes ([WriteFile]),
// reads that refuse a secret others can read ([ReadFile]), and [Harden] for
// daemons.
//
// A caller must keep in mind that Go copies freely: hold a secret in one
// Bytes, pass the pointer, read it with [Bytes.Expose] only where it is used,
// and call [Bytes.Clear] in the function that took ownership. This is the one
// leaf every room may import; it imports none of ours.
package secret

import (
	"fmt"
	"io"
	"log/slog"
	"runtime"
)

// redacted is what every printed form of a secret shows.
const redacted = "[secret]"

// Bytes is a secret of fixed length. The zero value is an empty secret.
// It is not safe for concurrent use while one side clears it.
//
// The buffer sits behind two pointers, because fmt prints unexported fields by
// reflection without asking their methods, and follows one pointer when the
// verb does not fit; a pointer to a pointer prints as an address with any verb.
type Bytes struct {
	buf **buffer
}

type buffer struct {
	b      []byte
	mapped bool // pages of our own, see NewLocked
}

// New returns a secret of n zero bytes, to be filled through Expose.
//
// It is never inlined: else the compiler puts a short one that does not escape
// on the caller's stack (Go 1.25), and a stack that grows leaves a copy behind
// which Clear does not reach.
//
//go:noinline
func New(n int) Bytes { return Own(make([]byte, n)) }

// Own returns a secret that takes ownership of b: the caller must neither keep
// nor change b, and clearing the secret clears b.
func Own(b []byte) Bytes {
	p := &buffer{b: b}
	return Bytes{buf: &p}
}

// Copy returns a secret with a copy of b; b stays the caller's to clear.
func Copy(b []byte) Bytes {
	s := New(len(b))
	copy(s.Expose(), b)
	return s
}

// Expose returns the bytes themselves, not a copy. They are valid until Clear.
func (s Bytes) Expose() []byte {
	if s.buf == nil {
		return nil
	}
	return (*s.buf).b
}

// Len is the length in bytes; 0 after Clear.
func (s Bytes) Len() int { return len(s.Expose()) }

// Clear overwrites the bytes with zeros and drops them. Every copy of the
// Bytes value sees the empty secret afterwards. Clear may be called twice.
func (s Bytes) Clear() {
	if s.buf == nil {
		return
	}
	p := *s.buf
	Wipe(p.b)
	if p.mapped {
		unmap(p.b)
	}
	p.b, p.mapped = nil, false
}

// Wipe overwrites b with zeros in a way the compiler keeps.
func Wipe(b []byte) {
	clear(b)
	runtime.KeepAlive(b)
}

// Format implements [fmt.Formatter]: every verb prints the same placeholder.
func (Bytes) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, redacted) }

// String implements [fmt.Stringer] with the placeholder.
func (Bytes) String() string { return redacted }

// GoString implements [fmt.GoStringer] with the placeholder.
func (Bytes) GoString() string { return redacted }

// LogValue implements [slog.LogValuer] with the placeholder.
func (Bytes) LogValue() slog.Value { return slog.StringValue(redacted) }

// MarshalText implements [encoding.TextMarshaler] with the placeholder, so
// that JSON and YAML encoders cannot leak the bytes; only a wire encoder that
// calls Expose on purpose can.
func (Bytes) MarshalText() ([]byte, error) { return []byte(redacted), nil }
