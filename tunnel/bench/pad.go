package bench

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/quietline/quietline/secret"
	"github.com/quietline/quietline/tunnel"
	"github.com/quietline/quietline/tunnel/line"
	"github.com/quietline/quietline/tunnel/pad"
	"github.com/quietline/quietline/tunnel/rekey"
)

// printer is a key source for measuring: both ends make the bytes of a key from
// its key_ID and a secret of the run, so that pad comes from memory as fast as a
// line can take it. Such keys protect nothing.
type printer struct {
	block cipher.Block
	end   byte // of this end, so that the two never draw the same key_ID
	drawn atomic.Uint64
}

// Sizes of what is drawn.
const (
	printedBits = 8 * 4096 // of the largest key
	printedKeys = 16       // in one call: a block of 64 KiB
	// padTarget is held ready; it is the most that package pad takes.
	padTarget = 64 << 20
	padBlock  = 64 << 10
)

func newPrinter(seed []byte, end byte) (*printer, error) {
	block, err := aes.NewCipher(seed)
	return &printer{block: block, end: end}, err
}

// print makes a key: AES-CTR over nothing.
func (p *printer) print(id tunnel.KeyID, n int) tunnel.Key {
	bits := secret.New(n)
	iv := id // a counter at the front leaves the block counter room behind
	cipher.NewCTR(p.block, iv[:]).XORKeyStream(bits.Expose(), bits.Expose())
	return tunnel.Key{ID: id, Bits: bits}
}

// Status implements [tunnel.KeySource]: there is no end to it.
func (p *printer) Status(context.Context, tunnel.Use) (tunnel.Stock, error) {
	return tunnel.Stock{Keys: 1 << 20, SizeBits: 256, MaxBits: printedBits, MaxKeys: printedKeys,
		At: time.Now()}, nil
}

// New implements [tunnel.KeySource].
func (p *printer) New(_ context.Context, use tunnel.Use, n, sizeBits int) ([]tunnel.Key, error) {
	keys := make([]tunnel.Key, n)
	for i := range keys {
		id := tunnel.KeyID{0: p.end, 1: byte(use)}
		binary.BigEndian.PutUint16(id[2:], uint16(sizeBits/64)) // so that ByID knows it
		binary.BigEndian.PutUint64(id[4:], p.drawn.Add(1))
		keys[i] = p.print(id, sizeBits/8)
	}
	return keys, nil
}

// ByID implements [tunnel.KeySource].
func (p *printer) ByID(_ context.Context, use tunnel.Use, ids []tunnel.KeyID) ([]tunnel.Key, error) {
	keys := make([]tunnel.Key, len(ids))
	for i, id := range ids {
		if id[0] == p.end || id[1] != byte(use) {
			return nil, fmt.Errorf("%w: %x", tunnel.ErrKeyUnknown, id)
		}
		keys[i] = p.print(id, int(binary.BigEndian.Uint16(id[2:]))*8)
	}
	return keys, nil
}

// pad runs a line that hides everything under one-time pad.
func (s *setup) pad(ctx context.Context) error {
	seed := sha256.Sum256(append([]byte("pad of a measurement"), s.Link...))
	keys, err := newPrinter(seed[:], s.End)
	if err != nil {
		return err
	}
	m, err := pad.New(pad.Config{Target: padTarget, BlockLen: padBlock})
	if err != nil {
		return err
	}
	return s.run(ctx, rekey.OTPStrict, line.Config{Keys: keys,
		Pad: &line.Pad{Machine: m, Strict: true}})
}
