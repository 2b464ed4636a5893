package optics

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/sha256"
	"encoding/binary"
	"math"
	"math/rand/v2"
)

// Seed feeds one party's randomness. Whoever knows it can redo the run, so
// alice's and bob's are secrets outside of tests.
type Seed [32]byte

// derive gives independent streams from one seed: purpose names the stream,
// generation makes every session's draws new.
func (s Seed) derive(purpose string, generation uint64) Seed {
	h := sha256.New()
	h.Write([]byte("quietline simulator optics 1\x00" + purpose + "\x00"))
	h.Write(s[:])
	var g [8]byte
	binary.BigEndian.PutUint64(g[:], generation)
	h.Write(g[:])
	var out Seed
	h.Sum(out[:0])
	return out
}

// keyed is a generator that can be asked for any slot: AES-256 in counter
// mode, slot number in, 128 bits out.
type keyed struct {
	block cipher.Block
	buf   *[aes.BlockSize]byte // here, because a local one would escape at each call
}

func newKeyed(seed Seed) keyed {
	b, err := aes.NewCipher(seed[:])
	if err != nil { // a 32-byte key is always right
		panic(err)
	}
	return keyed{b, new([aes.BlockSize]byte)}
}

// at returns the two words of a slot. One goroutine at a time.
func (k keyed) at(slot uint64) (uint64, uint64) {
	b := k.buf[:]
	binary.LittleEndian.PutUint64(b, slot)
	binary.LittleEndian.PutUint64(b[8:], 0)
	k.block.Encrypt(b, b)
	return binary.LittleEndian.Uint64(b), binary.LittleEndian.Uint64(b[8:])
}

// threshold is the number below which a uniform 63-bit word falls with
// probability p; the rounding is below 2^-52.
func threshold(p float64) uint64 { return uint64(p * (1 << 63)) }

// never is a slot that does not come.
const never = math.MaxUint64

// gap draws how many slots pass before the next one that is hit, when each is
// hit with probability 1-exp(-rate): the floor of an exponential variable is
// geometric.
func gap(r *rand.Rand, rate float64) uint64 {
	if rate <= 0 {
		return never
	}
	g := r.ExpFloat64() / rate
	if g >= 1<<62 {
		return never
	}
	return uint64(g)
}

// after is slot+gap without wrapping round.
func after(slot, gap uint64) uint64 {
	if gap >= never-slot {
		return never
	}
	return slot + gap
}
