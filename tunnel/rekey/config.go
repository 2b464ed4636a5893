package rekey

import (
	"crypto/rand"
	"fmt"
	"io"
	"time"

	"github.com/quietline/quietline/secret"
)

// Suite names a fixed set of algorithms; both ends must be set to the same.
type Suite uint8

// Suites. Both use HKDF with SHA-384 and AES-256-GCM.
const (
	XWing         Suite = 1 // X25519 and ML-KEM-768
	MLKEM1024P384 Suite = 2 // P-384 and ML-KEM-1024
)

// Config is what one end of a line needs. Zero fields take the default named
// with them.
type Config struct {
	LinkID [16]byte // the same at both ends
	Suite  Suite    // default XWing

	StaticSeed secret.Bytes // 32 bytes: seed of our static KEM key; New takes ownership
	PeerStatic []byte       // the peer's static KEM public key, pinned; not kept
	LinkSecret secret.Bytes // 32 bytes, the same at both ends, not all zero; New takes ownership

	Policy Policy // no default

	// EpochLife is 1 s to 1 h, default 120 s (handshake.md 4.7). The scheduled
	// initiator rekeys up to 1/24 of it earlier, so that lines do not rekey in
	// step; the other end starts only when the epoch is overdue by
	// clamp(EpochLife/8, 2 s, 15 s).
	EpochLife time.Duration
	// EpochBytes starts a rekey when so many bytes were sealed in one epoch;
	// default 2^36, at most 2^38, where the epoch stops in any case (4.8).
	EpochBytes uint64
	// HoldMax is the greatest age of an epoch: without a newer one by then the
	// line is blocked. Default 600 s, or twice EpochLife if that is longer.
	HoldMax time.Duration
	// ProbeEvery is the pause between attempts while there is no QKD key or
	// the peer refuses; default 10 s.
	ProbeEvery time.Duration
	// MaxChain and maxChainAge (1 h, handshake.md 4.10) bound qkd-required: so
	// many epochs in a row may be chained. Default 1 h / EpochLife.
	MaxChain int
	// MaxDegraded bounds qkd-preferred: without a fresh QKD key for so long,
	// no new epoch is made and the line blocks at HoldMax. 0 = no bound.
	MaxDegraded time.Duration
	// KeyBudget is the time one call to the key manager may take; default 2 s.
	KeyBudget time.Duration
	// KeysPerEpoch is the number of QKD keys in one epoch under a policy with
	// QKD, 1 to 4; default 1. More than one is for disjoint paths.
	KeysPerEpoch int
	// KeyBits is the size of one QKD key, 128 to 4096, a multiple of 8;
	// default 256.
	KeyBits int
	// RTT is taken as the round trip until the first one is measured; default
	// 100 ms. Reorder is how long the network may hold a record back; default
	// 50 ms. An old receive epoch is kept clamp(EpochLife/4, 2*RTT+Reorder, 10 s).
	RTT     time.Duration
	Reorder time.Duration

	// Rand is the source of every random byte; nil = crypto/rand. Only a test
	// that wants the same transcript twice sets it.
	Rand io.Reader
}

const (
	minEpochLife = time.Second
	maxEpochLife = time.Hour
	hardBytes    = 1 << 38 // handshake.md 4.8: confidentiality advantage 2^-60.9
	maxChainAge  = time.Hour
	softBytes    = 1 << 36 // handshake.md 4.8: confidentiality advantage 2^-64.9
)

func (c *Config) setDefaults() {
	def(&c.Suite, XWing)
	def(&c.EpochLife, 120*time.Second)
	def(&c.EpochBytes, softBytes)
	def(&c.HoldMax, max(600*time.Second, 2*c.EpochLife))
	def(&c.ProbeEvery, 10*time.Second)
	def(&c.MaxChain, max(1, int(maxChainAge/max(c.EpochLife, 1))))
	def(&c.KeyBudget, 2*time.Second)
	def(&c.KeysPerEpoch, 1)
	def(&c.KeyBits, 256)
	def(&c.RTT, 100*time.Millisecond)
	def(&c.Reorder, 50*time.Millisecond)
	if c.Rand == nil {
		c.Rand = rand.Reader
	}
}

func def[T comparable](field *T, value T) {
	var zero T
	if *field == zero {
		*field = value
	}
}

func (c *Config) check() error {
	bad := func(format string, args ...any) error {
		return fmt.Errorf("%w: %s", ErrConfig, fmt.Sprintf(format, args...))
	}
	if err := c.Policy.check(); err != nil {
		return err
	}
	switch {
	case c.StaticSeed.Len() != 32:
		return bad("static seed has %d bytes, 32 are needed", c.StaticSeed.Len())
	case c.LinkSecret.Len() != 32:
		return bad("link secret has %d bytes, 32 are needed", c.LinkSecret.Len())
	case allZero(c.LinkSecret.Expose()):
		return bad("link secret is all zero")
	case c.EpochLife < minEpochLife || c.EpochLife > maxEpochLife:
		return bad("epoch life %v is outside %v to %v", c.EpochLife, minEpochLife, maxEpochLife)
	case c.EpochBytes > hardBytes:
		return bad("epoch bytes %d are more than 2^38", c.EpochBytes)
	case c.HoldMax <= c.EpochLife:
		return bad("hold time %v is not longer than the epoch life %v", c.HoldMax, c.EpochLife)
	case c.ProbeEvery < time.Second:
		return bad("probe interval %v is shorter than 1s", c.ProbeEvery)
	case c.MaxChain < 1:
		return bad("chain of %d epochs", c.MaxChain)
	case c.MaxDegraded < 0:
		return bad("degraded time %v is negative", c.MaxDegraded)
	case c.KeyBudget < 100*time.Millisecond || c.KeyBudget > maxKeyBudget:
		return bad("key budget %v is outside 100ms to %v", c.KeyBudget, maxKeyBudget)
	case c.KeysPerEpoch < 1 || c.KeysPerEpoch > maxKeys:
		return bad("%d QKD keys per epoch, 1 to %d are possible", c.KeysPerEpoch, maxKeys)
	case c.KeyBits < 128 || c.KeyBits > 4096 || c.KeyBits%8 != 0:
		return bad("QKD key size %d bits is not a multiple of 8 from 128 to 4096", c.KeyBits)
	case c.RTT < 0 || c.Reorder < 0:
		return bad("a round trip or reorder time is negative")
	}
	return nil
}

func allZero(b []byte) bool {
	var or byte
	for _, x := range b {
		or |= x
	}
	return or == 0
}
