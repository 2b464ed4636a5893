// Package tunnel is one encrypted line between two sites: IP packets in from a
// TUN device, sealed, out over UDP, and back.
//
// Its contracts: [Device] and [Queue] for what moves IP packets, [KeySource]
// for where QKD keys come from. The engine that drives them is package line,
// beside this one, because it also drives package rekey, which builds on these
// types.
package tunnel

import (
	"context"
	"errors"
	"time"

	"github.com/quietline/quietline/secret"
)

// Frame is one read from or write to a queue: a packet, or a super-frame of
// segments that the kernel treats as one (GSO).
type Frame struct {
	// Data holds the packet from Data[0]. A reader fills a slice that the
	// caller supplied with its capacity and sets its length; a writer does not
	// keep it.
	Data []byte
	// GSO is zero for a plain packet.
	GSO GSO
}

// GSO says how a super-frame falls into segments, as in the kernel's
// struct virtio_net_hdr.
type GSO struct {
	Type       uint8  // VIRTIO_NET_HDR_GSO_*; 0 = none
	Flags      uint8  // VIRTIO_NET_HDR_F_*
	HeaderLen  uint16 // bytes of IP and transport header
	Size       uint16 // payload bytes per segment
	CsumStart  uint16
	CsumOffset uint16
}

// Queue moves frames. One goroutine reads and one writes.
type Queue interface {
	// ReadBatch waits for at least one frame and fills as many as are ready.
	ReadBatch(frames []Frame) (int, error)
	// WriteBatch writes all frames and returns how many went out.
	WriteBatch(frames []Frame) (int, error)
}

// Caps tells what a device can do, and what it took and why.
type Caps struct {
	Name    string // interface name, e.g. "ql0"
	Backend string // "water", "fast" or "memory"
	Offload bool   // super-frames of TCP in and out, checksums left open
	UDP     bool   // super-frames of UDP too
	MTU     int    // bytes
	Reason  string // why this back end, for a person
}

// Device is a TUN device. Close ends pending reads.
type Device interface {
	Queues() []Queue
	Caps() Caps
	SetMTU(mtu int) error
	Close() error
}

// Use says what a key is for. Each use has its own SAE ID, so that raw pad
// bytes never pass a KDF and epoch keys are never used raw.
type Use uint8

// Uses of QKD keys.
const (
	UseEpoch Use = iota
	UsePad
)

// KeyID is a key_ID on the handshake's wire.
type KeyID [16]byte

// Key is one QKD key. Whoever receives it clears Bits.
type Key struct {
	ID   KeyID
	Bits secret.Bytes
}

// Stock is what a key source holds for this line now.
type Stock struct {
	Keys      int // of SizeBits each
	SizeBits  int
	MaxBits   int // largest key that may be drawn; 0 = not known
	MaxKeys   int // keys in one call; 0 = not known
	Simulated bool
	At        time.Time
}

// KeySource is where a line draws QKD keys: an adapter over an ETSI 014
// client. Safe for concurrent use. New takes fresh keys (this end initiates),
// ByID collects the keys that the other end drew.
type KeySource interface {
	Status(ctx context.Context, use Use) (Stock, error)
	New(ctx context.Context, use Use, n, sizeBits int) ([]Key, error)
	ByID(ctx context.Context, use Use, ids []KeyID) ([]Key, error)
}

// Errors of a KeySource; each wraps the cause.
var (
	ErrKeyEmpty   = errors.New("no QKD key in stock")
	ErrKeyUnknown = errors.New("QKD key is not known")
	ErrKeyDenied  = errors.New("key manager denies this line")
	ErrKeyDown    = errors.New("key manager does not answer")
)
