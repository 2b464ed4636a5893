// Package cascade reconciles bob's bits with alice's by comparing parities
// (Brassard, Salvail, EUROCRYPT 1993), in the variant "opt. (8)" of
// Martinez-Mateo et al., QIC 15, 453 (2015), arXiv:1407.3257, with sub-block
// reuse: power-of-two blocks, every parity ever compared stays a known block.
//
// The main type is [Party], of which each end has one. Both go through the
// same rounds: alice sends the parities of the nodes the round compares,
// bob answers with the differences to his own, and both know which nodes come
// next. So a round is one bit a node in each direction, all frames together,
// and both ends end up with the same list of errors.
//
//	alice                                bob
//	p := a.Parities()  ── parities ──►   d := p xor b.Parities(); b.Compare(d)
//	a.Compare(d)       ◄─ differences ─
//
// A caller must keep in mind: a parity told is a bit told ([Party.Leak] counts
// alice's; bob's differences make the error pattern public); reconciled is
// not verified: residual errors are rare, not impossible.
package cascade

import (
	"encoding/binary"
	"math"
	"math/bits"
	"math/rand/v2"
)

const (
	// passes is the number of passes of opt. (7) and (8) in Martinez-Mateo 2015.
	passes = 14
	// frameBits is the aim for a frame's length: f falls with longer frames
	// and hardly beyond 2^16 (own simulation, BenchmarkReconcile).
	frameBits = 1 << 16
	// thirdBlock is k_3 of opt. (8).
	thirdBlock = 12
	// smallBlock is log2 of the largest block bisected while another pass is
	// being bisected too.
	smallBlock = 6
)

// Plan says how a run of bits is cut and in which order parities are compared.
// Both ends must have equal plans.
type Plan struct {
	Frames    int // number of frames, at least 1
	FrameBits int // bits of each, a multiple of 64
	log       [passes]int
	perm      [passes][]uint32 // position at an index; nil in the first pass
	inv       [passes][]uint32 // index of a position
}

// MinBits is the least a plan can be made for.
const MinBits = 64

// NewPlan plans for n bits, at least MinBits, at an expected error ratio. The
// last n - Bits bits, less than 64 a frame, are left out. The seed orders the
// later passes; it is public.
func NewPlan(n int, qber float64, seed uint64) *Plan {
	p := &Plan{Frames: max(1, (n+frameBits/2)/frameBits)}
	p.FrameBits = n / p.Frames / 64 * 64
	// log2 of half a frame, rounded down: rounded up, the last block of a frame
	// just above a power of two would be too short to tell errors apart.
	half := bits.Len(uint(p.FrameBits)) - 2
	// k_1 = 2^⌈a⌉ with a = log2(1/Q) - 1/2; k_2 = 2^⌈(a+12)/2⌉; k_3 = 4096;
	// then half the frame. Below 1 in 2000, blocks longer than 1024 would not
	// pay for their bisection.
	a := -math.Log2(min(max(qber, 1.0/2000), 0.25)) - 0.5
	p.log = [passes]int{int(math.Ceil(a)), int(math.Ceil((a + 12) / 2)), thirdBlock}
	for i := range p.log {
		if i > 2 || p.log[i] > half {
			p.log[i] = half
		}
	}
	for i := 1; i < passes; i++ {
		p.perm[i], p.inv[i] = permutation(p.FrameBits, seed, i)
	}
	return p
}

// Bits is the number of bits that are reconciled.
func (p *Plan) Bits() int { return p.Frames * p.FrameBits }

// permutation is a Fisher-Yates shuffle drawn from ChaCha8 (the generator of
// C2SP chacha8rand) keyed with seed and pass.
func permutation(n int, seed uint64, pass int) (perm, inv []uint32) {
	var key [32]byte
	binary.LittleEndian.PutUint64(key[:], seed)
	binary.LittleEndian.PutUint64(key[8:], uint64(pass))
	rng := rand.NewChaCha8(key)
	perm, inv = make([]uint32, n), make([]uint32, n)
	for i := range perm {
		perm[i] = uint32(i)
	}
	for i := n - 1; i > 0; i-- {
		// The top of a 64-bit product: its bias of n/2^64 does not matter.
		j, _ := bits.Mul64(rng.Uint64(), uint64(i+1))
		perm[i], perm[j] = perm[j], perm[i]
	}
	for i, at := range perm {
		inv[at] = uint32(i)
	}
	return perm, inv
}

// stages groups the passes whose top blocks are compared in one round. The
// half-frame passes only look for rare leftovers: opened together they cost
// one round instead of eleven, and no more bits.
var stages = [...][2]int{{0, 1}, {1, 2}, {2, 3}, {3, passes}}
