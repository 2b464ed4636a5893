package pad

import (
	"crypto/subtle"
	"encoding/binary"
	"sync"

	"github.com/quietline/quietline/secret"
)

// incoming is a block of the peer's pad.
type incoming struct {
	bits secret.Bytes
	used []uint64 // a bit a unit
}

// spent tells whether any unit of [from, from+n) has been used, and marks them
// if mark is set. Both are multiples of unit.
func (b *incoming) spent(from, n int, mark bool) bool {
	for u := from / unit; u < (from+n)/unit; u++ {
		if bit := uint64(1) << (u % 64); b.used[u/64]&bit != 0 {
			return true
		} else if mark {
			b.used[u/64] |= bit
		}
	}
	return false
}

// In is the pad of what the peer sends. Safe for concurrent use.
type In struct {
	mu     sync.Mutex
	blocks map[uint32]*incoming
	newest uint32 // the highest block that an authentic record named
	used   uint64 // bytes, ever
	count  uint64 // records opened, ever
}

// Open appends to dst the record that a PAD record hides, and wipes the pad.
// The record lies in dst until the caller uses it up.
func (in *In) Open(dst, record []byte) ([]byte, error) {
	n := len(record) - Overhead
	if n < unit || n%unit != 0 || record[0] != kindPad || record[1] != version ||
		record[2]|record[3] != 0 {
		return dst, ErrForm
	}
	number := binary.BigEndian.Uint32(record[4:])
	offset := uint64(binary.BigEndian.Uint32(record[8:]))
	in.mu.Lock()
	defer in.mu.Unlock()
	b := in.blocks[number]
	if b == nil {
		return dst, ErrBlock
	}
	end := offset + uint64(n+Cost)
	if offset%unit != 0 || offset < rLen || end > uint64(b.bits.Len()) {
		return dst, ErrForm
	}
	at := int(offset)
	if b.spent(at, n+Cost, false) {
		return dst, ErrUsed
	}
	pad := b.bits.Expose()
	if !authentic(record[headLen+n:], pad[:rLen], pad[at+n:at+n+Cost], record[:headLen+n]) {
		return dst, ErrForged
	}
	b.spent(at, n+Cost, true)
	in.newest = max(in.newest, number)
	in.used += uint64(n + Cost)
	in.count++
	start := len(dst)
	dst = append(dst, record[headLen:headLen+n]...)
	text := dst[start:]
	subtle.XORBytes(text, text, pad[at:at+n])
	clear(pad[at : at+n+Cost])
	inner := int(binary.BigEndian.Uint16(text))
	if inner > n-lenLen {
		return dst[:start], ErrForm // authentic, but the peer's fault
	}
	copy(text, text[lenLen:lenLen+inner])
	return dst[:start+inner], nil
}

// add takes a block; false if it is there, or a later one is in use: a block
// that has retired never comes back.
func (in *In) add(number uint32, bits secret.Bytes) bool {
	in.mu.Lock()
	defer in.mu.Unlock()
	if number <= in.newest || in.blocks[number] != nil {
		return false
	}
	in.blocks[number] = &incoming{bits, make([]uint64, (bits.Len()/unit+63)/64)}
	return true
}

// retire wipes the blocks below number.
func (in *In) retire(number uint32) {
	in.mu.Lock()
	defer in.mu.Unlock()
	for n, b := range in.blocks {
		if n < number {
			b.bits.Clear()
			delete(in.blocks, n)
		}
	}
}

// void wipes all pad and begins anew.
func (in *In) void() {
	in.retire(1<<32 - 1)
	in.mu.Lock()
	defer in.mu.Unlock()
	in.newest = 0
}

// state returns the newest block in use, and how many there are.
func (in *In) state() (newest uint32, held int) {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.newest, len(in.blocks)
}

// holds tells whether a block is there.
func (in *In) holds(number uint32) bool {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.blocks[number] != nil
}
