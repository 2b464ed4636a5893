// Package seal turns records into data datagrams and back: AES-256-GCM with a
// key per epoch, direction and queue, and a replay window.
//
// The main types are [Sealer] and [Opener], one of each per queue. The key of
// a queue is derived from the epoch's direction key:
//
//	queue key = HKDF-Expand(direction key, "QLE1 queue" || queue (2 bytes), 32)
//	nonce     = IV of the direction XOR (4 zero bytes || counter (8 bytes))
//
// with SHA-384 (RFC 5869). Keys of different queues differ, so counters are
// per queue and no two cores share one. A counter starts at 0, never wraps and
// is never stored: the key dies with the process.
//
// A caller must keep in mind that the Go standard library keeps an expanded
// key in memory until it is collected: dropping a Sealer or Opener is all the
// wiping there is. The direction key itself is the caller's to clear.
package seal

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/sha512"
	"encoding/binary"
	"fmt"

	"github.com/quietline/quietline/secret"
	"github.com/quietline/quietline/tunnel/wire"
)

// Sizes in bytes.
const (
	KeyLen = 32 // of a direction key
	IVLen  = 12 // of a direction IV
)

// MaxBytes is how much one queue key may seal, tags included: the hard limit
// of the key schedule. At 2^38 bytes the advantage against confidentiality is
// 2^-60.9 ((s+q)^2/2^129 for s blocks and q records); rekeying by volume acts
// at a quarter of it.
const MaxBytes = 1 << 38

// AEAD is what seals a record; [crypto/cipher.AEAD] has it. Nonces are IVLen
// bytes, tags wire.TagLen. It must accept dst and plaintext at the same place.
type AEAD interface {
	Seal(dst, nonce, plaintext, additionalData []byte) []byte
	Open(dst, nonce, ciphertext, additionalData []byte) ([]byte, error)
}

// Cipher makes the AEAD of a queue key, which it does not keep.
type Cipher func(key []byte) (AEAD, error)

// AES256GCM is the cipher of suite 1, from the standard library.
func AES256GCM(key []byte) (AEAD, error) {
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(block)
}

// half is what a Sealer and an Opener share.
type half struct {
	aead  AEAD
	iv    [IVLen]byte
	queue uint16
	nonce [IVLen]byte // scratch: on the heap once, not once a record
}

func newHalf(c Cipher, key, iv secret.Bytes, queue uint16) (half, error) {
	if key.Len() != KeyLen || iv.Len() != IVLen {
		return half{}, fmt.Errorf("set up queue %d: %w", queue, ErrKeySize)
	}
	info := string(binary.BigEndian.AppendUint16([]byte("QLE1 queue"), queue))
	qk, err := hkdf.Expand(sha512.New384, key.Expose(), info, KeyLen)
	if err != nil {
		return half{}, fmt.Errorf("derive key of queue %d: %w", queue, err)
	}
	defer secret.Wipe(qk)
	aead, err := c(qk)
	if err != nil {
		return half{}, fmt.Errorf("set up queue %d: %w", queue, err)
	}
	h := half{aead: aead, queue: queue}
	copy(h.iv[:], iv.Expose())
	return h, nil
}

// nonceOf sets and returns the nonce of a counter.
func (h *half) nonceOf(counter uint64) []byte {
	h.nonce = h.iv
	low := h.nonce[IVLen-8:]
	binary.BigEndian.PutUint64(low, binary.BigEndian.Uint64(low)^counter)
	return h.nonce[:]
}

// Sealer seals the records of one queue in one epoch. One goroutine at a time.
type Sealer struct {
	half
	index   uint32
	counter uint64
	bytes   uint64
}

// NewSealer returns the sealer of a queue for the epoch that the peer knows by
// index. It keeps neither key nor iv.
func NewSealer(c Cipher, key, iv secret.Bytes, index uint32, queue uint16) (*Sealer, error) {
	h, err := newHalf(c, key, iv, queue)
	if err != nil {
		return nil, err
	}
	return &Sealer{half: h, index: index}, nil
}

// Seal appends the datagram that carries record to dst and returns the longer
// slice. It allocates nothing if dst has room for wire.HeaderLen + len(record)
// + wire.TagLen more bytes. The record may lie where it will end up, at
// dst[len(dst)+wire.HeaderLen:], and is then sealed in place; otherwise the
// two must not overlap. [ErrSpent] means that the key is at its limit and
// nothing was sealed.
func (s *Sealer) Seal(dst, record []byte) ([]byte, error) {
	cost := uint64(len(record) + wire.TagLen)
	// The counter cannot wrap: each record costs a tag, so MaxBytes stops it
	// below 2^34.
	if s.bytes+cost > MaxBytes {
		return dst, ErrSpent
	}
	var header []byte
	dst, header = grow(dst, wire.HeaderLen)
	wire.Header{Queue: s.queue, Index: s.index, Counter: s.counter}.Put(header)
	dst = s.aead.Seal(dst, s.nonceOf(s.counter), record, header)
	s.counter++
	s.bytes += cost
	return dst, nil
}

// grow lengthens b by n bytes, whose content is not defined, and returns them
// as well.
func grow(b []byte, n int) (longer, tail []byte) {
	total := len(b) + n
	if total > cap(b) {
		longer = append(b, make([]byte, n)...)
	} else {
		longer = b[:total]
	}
	return longer, longer[total-n : total : total]
}

// Sealed is the number of bytes sealed so far, tags included.
func (s *Sealer) Sealed() uint64 { return s.bytes }

// Opener opens the records of one of the peer's queues in one epoch. One
// goroutine at a time.
type Opener struct {
	half
	window window
}

// NewOpener returns the opener of a queue of the peer. It keeps neither key
// nor iv.
func NewOpener(c Cipher, key, iv secret.Bytes, queue uint16) (*Opener, error) {
	h, err := newHalf(c, key, iv, queue)
	if err != nil {
		return nil, err
	}
	return &Opener{half: h}, nil
}

// Open appends the record of a datagram with header h, as parsed from it by
// [wire.ParseHeader], to dst. It refuses what has been seen, with [ErrTooOld]
// or [ErrReplayed], and what is not authentic, with [ErrForged]. Only an
// authentic record moves the window. With dst = datagram[wire.HeaderLen:][:0]
// the record is opened in place; otherwise the two must not overlap.
func (o *Opener) Open(dst, datagram []byte, h wire.Header) ([]byte, error) {
	if err := o.window.check(h.Counter); err != nil {
		return nil, err
	}
	header, sealed := datagram[:wire.HeaderLen], datagram[wire.HeaderLen:]
	record, err := o.aead.Open(dst, o.nonceOf(h.Counter), sealed, header)
	if err != nil {
		return nil, ErrForged
	}
	o.window.mark(h.Counter)
	return record, nil
}
