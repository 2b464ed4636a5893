// Package distill turns raw detections into secret blocks: sift, estimate,
// reconcile, verify, amplify.
//
// The main type is [Machine]: one state machine per end of a link, alice and
// bob, without I/O of its own, clock or goroutine. [Machine.Step] is given
// detections, preparations and the peer's messages, and says what to send and
// which blocks are finished. The two ends talk over a classical channel that
// the caller carries; the machines authenticate it.
//
// A caller must keep in mind: the classical channel must be reliable and in
// order (a TCP connection is); a machine lives for one connection and is
// replaced, with a higher generation, when the connection breaks or Step
// returns an error; detections are kept by bob until a whole block's worth is
// there and only then announced, so alice must be able to say what she sent
// for as long as a block takes; a finished block may be missing at one end,
// and the key managers must confirm it before they use it.
//
// # Messages
//
// A message is kind u8, block u64, body; integers are little-endian, bits are
// packed from the low end with unused bits zero. The transport frames it.
//
//	kind            body
//	 1 hello        both, block 0: version u8 = 1; role u8; generation u64;
//	                SHA-256 of the common config (Config.digest); number of
//	                segments u16; for each: generation u64, seq u64, pads u32,
//	                next of alice u32, of bob u32
//	 2 announce     bob: count u32; for each detection the distance of its
//	                slot to the one before (from 0 in a block), uvarint; bases,
//	                1 bit each; bits of those in the test basis
//	 3 sifted       alice, one for each announce: count u32; for each detection
//	                2 bits: 0 = other basis, drop; k+1 = same basis, sent with
//	                intensity k; her bits of those in the test basis
//	 4 begin        alice: error ratio to plan for u16, in 1e-5; shuffle u64
//	 5 parities     alice: of the round's blocks, in the order of
//	                hw/distill/cascade
//	 6 differences  bob: to his own
//	 7 verify       alice: key and hash of her bits, 16 bytes each
//	 8 verified     bob: empty
//	 9 amplify      alice: secret bits u32; bytes for the pool u32; Toeplitz
//	                seed of n-1 bits; tag
//	10 accept       bob: tag
//	11 ack          alice: tag
//	12 abort        either: reason u8, see outcomes
//
// A tag is the name of a pad (generation u64, seq u64, index u32) and 16 bytes:
// the hash of hw/distill/gf2, at the sender's long-lived point, of all the
// sender has sent in the block (each message after its length as u32, the tag
// field left out) after config digest, role, generation and block, XORed with
// the pad (Wegman, Carter, JCSS 22, 265 (1981)). Alice's messages are covered
// by the tags of amplify and ack, bob's by that of accept. Nothing that is not
// covered by a checked tag leads to a released block.
//
// Bob releases after alice: if ack is lost, alice alone has the block.
package distill

import (
	"io"
	"time"

	"github.com/quietline/quietline/hw"
)

// Basis of a preparation or measurement. Key bits come from Key, the phase
// error is estimated in Test.
type Basis uint8

// The two bases of efficient BB84 (Lo, Chau, Ardehali, J. Cryptology 18, 133).
const (
	Key Basis = iota
	Test
)

// Role of an end of the quantum link.
type Role uint8

// Alice prepares, Bob measures.
const (
	Alice Role = iota
	Bob
)

// Preparation is what alice sent in one slot.
type Preparation struct {
	Basis     Basis
	Bit       uint8 // 0 or 1
	Intensity uint8 // index into Config.Intensities
}

// Detection is one click at bob. Double clicks come with a random Bit.
type Detection struct {
	Slot  uint64 // counts pulses of the session
	Basis Basis
	Bit   uint8 // 0 or 1
}

// Input is what one Step is given; any part may be empty. The machine copies
// what it keeps: slices stay the caller's.
type Input struct {
	Detections   []Detection   // bob only: clicks in rising slot order
	Slots        uint64        // bob only: all slots below this one are over
	Preparations []Preparation // alice only: answer to Output.Prepared, same order
	Message      []byte        // one message of the peer, as it came
}

// Output is what one Step asks for. Slices are the caller's to keep.
type Output struct {
	Messages [][]byte // to the peer, in order; each at most MaxMessage bytes
	// Prepared, alice only: slots whose preparations are wanted. The caller
	// answers with as many Preparations, in this order, in one or several
	// later Inputs; a later Prepared comes after an earlier one.
	Prepared []uint64
	// Blocks are finished: authenticated, verified, amplified; rising Seq. The
	// caller owns and clears Bits.
	Blocks []hw.Block
	Alarms []hw.Event    // QBER above the limit, authentication failed, …
	Wake   time.Duration // call Step again after this long; 0 = no need
}

// MaxMessage is the largest message of either end, bytes; a reader may refuse
// a longer one unread.
const MaxMessage = 1 << 22

// Intensity is one of the mean photon numbers alice chooses from.
type Intensity struct {
	Mu          float64 // mean photon number of a pulse, above 0
	Probability float64 // with which alice chooses it, 0 to 1
}

// Config of one end. Both ends must have the same Intensities, KeyBasis,
// BlockBits, epsilons and MaxQBER: the first messages compare them.
type Config struct {
	Role Role
	// Generation is the lowest one this end accepts for the session; the
	// session's is the larger of both ends'. An end that gives a strictly
	// larger number to each new machine never sees one twice: a persisted
	// counter, or the milliseconds since 1970 where the clock never goes back.
	Generation uint64
	// Intensities, signal first: exactly two, Mu falling, probabilities
	// summing to 1 (one decoy: Rusca et al., APL 112, 171104 (2018)).
	Intensities []Intensity
	// KeyBasis is the probability with which each end, on its own, chooses the
	// key basis; above 0 and below 1.
	KeyBasis float64
	// BlockBits is the aim for the sifted key-basis bits of a block, n_K, 4096
	// to 1<<22. Bob closes a block after ceil(BlockBits/KeyBasis²) detections,
	// a number that does not depend on the bases (Pfister et al., New J. Phys.
	// 18, 053001 (2016), show why it must not).
	BlockBits int
	// EpsSec and EpsCor are the secrecy and correctness parameters of one
	// block; 0 means 1e-9 and 1e-15 (Rusca 2018). EpsAuth bounds what one tag
	// may add; 0 means 1e-15; New refuses if the hash cannot keep it.
	EpsSec, EpsCor, EpsAuth float64
	// MaxQBER aborts a block whose error ratio in either basis is above it; 0
	// means 0.11, where 1-2h(Q) crosses zero (Shor, Preskill, PRL 85, 441).
	MaxQBER float64
	// Auth holds the authentication key shared with the peer; needed.
	Auth AuthKeys
	// Rand is the source of verification keys and amplification seeds; it must
	// be true randomness. nil means crypto/rand.
	Rand io.Reader
	// Simulated is copied to every block; it is true when no photon was sent.
	Simulated bool
}

// AuthKeys is one end's pool of authentication key, equal at both ends. It
// holds two long-lived hash points and segments of one-time pads: the seed
// laid down at set-up and, later, what finished blocks gave. A pad is 16 bytes
// and serves one tag. Of a segment's pads, index 0, 1, …, those with index mod
// 3 equal to 2 are for bob's tags, the others for alice's, so that the two
// ends can never put one pad on two messages. One machine uses a pool at a
// time. [AuthFile] is the implementation in a file.
type AuthKeys interface {
	// Point is the hash point for tags sent by the given role. It never
	// changes.
	Point(sender Role) [16]byte
	// Segments lists the segments with pads left, oldest first.
	Segments() []AuthSegment
	// Take, for a tag of one's own or one of the peer's that was right, marks
	// the pad and all of its sender before it in the segment as used, makes
	// that durable, and only then returns the pad. A pad is returned once in
	// the life of the pool: ErrPadUsed afterwards.
	Take(name PadName) ([16]byte, error)
	// Peek returns a pad that was not taken, to check a tag of the peer's. A
	// forged tag must not cost pads; that the forger may try again against
	// the same pad gains him no more than EpsAuth a try.
	Peek(name PadName) ([16]byte, error)
	// Add appends a segment made of bits, a multiple of 48 bytes; bits stay
	// the caller's to clear. It is durable when Add returns.
	Add(generation, seq uint64, bits []byte) error
}

// AuthSegment describes one segment of a pool.
type AuthSegment struct {
	Generation, Seq uint64    // block it came from; 0, 0 is the seed
	Pads            uint32    // in all, a multiple of 3
	Next            [2]uint32 // by Role: lowest unused index of that sender, or ≥ Pads
}

// PadName names one pad. The sender follows from the index: index mod 3 is 2
// for bob.
type PadName struct {
	Generation, Seq uint64
	Index           uint32
}

// Report is the certificate of one block: the counts and what was made of
// them, so that a third party can recompute the length.
type Report struct {
	Generation, Seq uint64
	Outcome         string // "secret" or the constant reason of the abort
	Detections      int    // announced by bob
	Key, Test       Counts // sifted events and errors by intensity
	Leak            int    // bits told for reconciliation and verification
	Efficiency      float64
	PhaseError      float64 // upper bound on the single-photon phase error, 0 to 0.5
	SecretBits      int     // amplified length, before replenishment
	AuthBits        int     // of these put back into the authentication pool
	Epsilon         float64 // EpsSec + EpsCor + tags × EpsAuth
}

// Counts of sifted events in one basis, by intensity.
type Counts struct {
	N [2]int // n_{B,k}: events
	M [2]int // m_{B,k}: errors among them
}

// QBER is the error ratio over both intensities, 0 when there are no events.
func (c Counts) QBER() float64 {
	if n := c.N[0] + c.N[1]; n > 0 {
		return float64(c.M[0]+c.M[1]) / float64(n)
	}
	return 0
}

// Stats are totals of a machine since New, for metrics and status.
type Stats struct {
	Generation  uint64 // of the session; 0 before the peer's first message
	Slots       uint64 // bob only: slots that are over
	Detections  uint64 // bob: given; alice: announced to her
	Dropped     uint64 // bob only: detections dropped because distillation lags
	SiftedBits  uint64 // key-basis bits of closed blocks
	SecretBits  uint64 // released in blocks, without what went to the pool
	LeakBits    uint64 // told for reconciliation and verification
	Blocks      uint64 // released
	Aborted     uint64 // closed without key
	Rounds      uint64 // question messages of reconciliation
	AuthUsed    uint64 // bits of authentication key used by this machine, both directions
	AuthAdded   uint64 // bits put into the pool by this machine
	AuthLeft    int64  // bits left in the pool
	Pending     int    // bob only: detections waiting for a block
	BlockEvents int    // detections that make a block
	Last        Report // the block closed last; zero before the first
}
