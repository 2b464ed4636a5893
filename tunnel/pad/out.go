package pad

import (
	"crypto/subtle"
	"encoding/binary"
	"sync"
	"time"

	"github.com/quietline/quietline/secret"
)

// Mark says how full the pool of pad is (handshake.md 4.9).
type Mark uint8

// Marks, fullest last.
const (
	Empty    Mark = iota // below 2 %: the smallest records of urgent traffic only
	Critical             // below 10 %: urgent traffic only
	Low                  // below 25 %: the rest no faster than pad comes in
	Good
)

// String is the mark's name as shown to people.
func (m Mark) String() string { return [...]string{"empty", "critical", "low", "good"}[m] }

// block is a block of pad for sending.
type block struct {
	number uint32
	bits   secret.Bytes
}

// Out is the pad for sending. Safe for concurrent use.
type Out struct {
	mu     sync.Mutex
	target int      // bytes that count as full
	blocks []*block // oldest first
	at     int      // offset in blocks[0]
	left   int      // bytes in all blocks that are not used
	used   uint64   // bytes used for records, ever
	wasted uint64   // bytes wiped unused, ever
	count  uint64   // records sealed, ever

	rate   float64 // bytes a second that come in
	tokens float64 // of the bucket below the low mark, bytes
	filled time.Time
}

// burst is how much the token bucket holds, seconds of the key rate.
const burst = 1.0

// Seal appends to dst a PAD record that hides record, of Largest(n) bytes of
// ciphertext at most. Urgent traffic is admitted longest. The pad is wiped. On
// error nothing was used and dst comes back as it was.
func (o *Out) Seal(dst, record []byte, largest int, urgent bool, now time.Time) ([]byte, error) {
	n := Bucket(len(record), largest)
	if n == 0 {
		return dst, ErrSize
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if err := o.admit(n, urgent, now); err != nil {
		return dst, err
	}
	b := o.reserve(n + Cost)
	if b == nil {
		return dst, ErrEmpty
	}
	start := len(dst)
	dst = append(dst, make([]byte, Overhead+n)...)
	out := dst[start:]
	pad := b.bits.Expose()
	head(out, b.number, uint32(o.at))
	text := out[headLen : headLen+n]
	binary.BigEndian.PutUint16(text, uint16(len(record)))
	copy(text[lenLen:], record)
	subtle.XORBytes(text, text, pad[o.at:o.at+n])
	tag((*[tagLen]byte)(out[headLen+n:]), pad[:rLen], pad[o.at+n:o.at+n+Cost], out[:headLen+n])
	clear(pad[o.at : o.at+n+Cost])
	o.at += n + Cost
	o.left -= n + Cost
	o.used += uint64(n + Cost)
	o.count++
	return dst, nil
}

// admit keeps what is left for urgent traffic.
func (o *Out) admit(n int, urgent bool, now time.Time) error {
	switch m := o.mark(); {
	case o.left == 0:
		return ErrEmpty
	case m == Good || urgent && m > Empty:
		return nil
	case urgent && n == buckets[0]:
		return nil
	case m != Low:
		return ErrReserved
	}
	if elapsed := now.Sub(o.filled).Seconds(); elapsed > 0 {
		o.tokens = min(o.tokens+elapsed*o.rate, max(burst*o.rate, float64(n+Cost)))
		o.filled = now
	}
	if o.tokens < float64(n+Cost) {
		return ErrReserved
	}
	o.tokens -= float64(n + Cost)
	return nil
}

// reserve finds the block whose next n bytes are to be used. What is too short
// at a block's end is wiped with it.
func (o *Out) reserve(n int) *block {
	for len(o.blocks) > 0 {
		b := o.blocks[0]
		if o.at+n <= b.bits.Len() {
			return b
		}
		o.drop()
	}
	return nil
}

// drop wipes the oldest block.
func (o *Out) drop() {
	b := o.blocks[0]
	rest := b.bits.Len() - o.at
	o.left -= rest
	o.wasted += uint64(rest)
	b.bits.Clear()
	o.blocks = o.blocks[1:]
	o.at = rLen
}

// mark is how full the pool is.
func (o *Out) mark() Mark {
	switch {
	case o.left*100 < 2*o.target:
		return Empty
	case o.left*100 < 10*o.target:
		return Critical
	case o.left*100 < 25*o.target:
		return Low
	}
	return Good
}

// add takes a block into use, after those before it.
func (o *Out) add(b *block) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if len(o.blocks) == 0 {
		o.at = rLen
	}
	o.blocks = append(o.blocks, b)
	o.left += b.bits.Len() - rLen
}

// void wipes all pad.
func (o *Out) void() {
	o.mu.Lock()
	defer o.mu.Unlock()
	for len(o.blocks) > 0 {
		o.drop()
	}
}

// level returns what is left, its mark, and the bytes used so far; it sets the
// rate at which pad comes in, bytes a second.
func (o *Out) level(rate float64) (left int, m Mark, used uint64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.rate = rate
	return o.left, o.mark(), o.used
}
