package kms

import (
	"context"
	"iter"
	"time"

	"github.com/quietline/quietline/etsi014"
)

// Fence numbers writers. A store refuses a writer whose fence is not the
// newest for what it changes, so that a process that lost its lease cannot
// write late.
type Fence uint64

// Position is the length of a KME's chained log, in entries, and the hash of
// its last one. The empty log has the zero position.
type Position struct {
	Length uint64
	Hash   [32]byte
}

// Memory is what a KME durably remembers of a peer.
type Memory struct {
	Peer        etsi014.KMEID
	Incarnation uint64   // highest counter seen
	Position    Position // furthest position seen
}

// Wrapped is a key sealed under the epoch key of that number.
type Wrapped struct {
	Epoch uint64
	Bytes []byte
}

// Sealed is the key material of a segment: its data key, wrapped, and every
// slot sealed under that data key, each SlotBytes+16 bytes long.
type Sealed struct {
	Key   Wrapped
	Slots []byte
}

// Bitmap has one bit per slot, lowest bit of the first byte first.
type Bitmap []byte

// Get tells whether bit i is set.
func (b Bitmap) Get(i int) bool { return i/8 < len(b) && b[i/8]&(1<<(i%8)) != 0 }

// Set sets bit i, which must lie inside.
func (b Bitmap) Set(i int) { b[i/8] |= 1 << (i % 8) }

// NewBitmap has room for n bits.
func NewBitmap(n int) Bitmap { return make(Bitmap, (n+7)/8) }

// Lease is the right to write, and what stood in the store when it was given.
//
// A KME has one writer. Whoever leases its own state (the empty link) is it,
// from that moment on and for every link; what had been leased before is worth
// nothing: each later commit under an older fence is refused whole, with
// ErrFenced, and changes nothing. A link's lease is the state of that link for
// the writer to start from. It carries no fence and no right, so that a process
// that was fenced off cannot come by a newer fence without taking over.
//
// So of two processes at one KME, one writes and the other may read what Load
// and Scan show. Several that draw from one KME at a time would have to lease
// parts of a link, each under a fence of its own; no store does that yet.
type Lease struct {
	Fence Fence     // of the KME's own state; zero in a link's lease
	Until time.Time // commits later than that are ErrFenced; zero: no such time

	// With the empty link: the KME's own state.
	Incarnation uint64 // of the last start
	Epoch       uint64 // that all keys are wrapped under; 0 = never turned
	Position    Position
	Memories    []Memory
	Links       []LinkID // of which anything is stored

	// With a link: its state and its segments, oldest first.
	Generation uint64 // newest seen
	Floor      uint64 // lowest number of that generation that may still come
	IDKey      Wrapped
	Ledger     Ledger
	Segments   []Segment
	// Segments whose records cannot be read, with their ID and, in BlockBytes,
	// the bytes that their sealed slots take. Nothing but OpVoid is taken for
	// them, and no OpTurn before it.
	Unreadable []Segment
}

// Op says what a [Change] does.
type Op uint8

// The changes. Each is an entry of the audit log, but for OpRemember, OpTally,
// OpReseal and OpRewrap.
const (
	OpBoot     Op = 1 + iota // Incarnation: a process start, or a step above a clone
	OpRemember               // Memory: what a peer showed of itself
	OpLink                   // IDKey of Segment.Link
	OpIngest                 // Meta, Sealed: a block became a NEW segment
	OpConfirm                // NEW to CONFIRMED
	OpGive                   // Owner: of a CONFIRMED segment
	OpOpen                   // CONFIRMED to OPEN under Session
	OpGrant                  // Grant, under Session
	OpClaim                  // slots [First, First+Slots) delivered to SAE in role Target
	OpExpire                 // as OpClaim, but destroyed undelivered
	OpClose                  // OPEN to CLOSED: bytes destroyed
	OpFinish                 // CLOSED to FINISHED
	OpVoid                   // NEW, CONFIRMED or OPEN to VOID: bytes destroyed
	OpTally                  // Ledger of Segment.Link
	OpReseal                 // Sealed: the slots that live on, under a fresh data key
	OpRewrap                 // Key: the segment's data key under the new epoch
	OpTurn                   // Epoch: from now on; no key may be left under another
	OpNote                   // audit only: Reason, and SAE or Peer it is about
)

// Reasons of an OpNote about the KME itself; Count is 1 unless said. Those about callers
// are "refused: " and why, with the caller's SAE and a count.
const (
	NoteUnsealed     = "unsealed"              // the root key opened the epoch keys
	NoteSealed       = "sealed"                // keys were dropped from memory by command
	NoteRootAdmitted = "root key admitted"     // another root key opens the epoch keys too
	NoteRefusedSeal  = "unseal refused"        // Count: tries with a wrong passphrase
	NoteRootRotated  = "root key rotated"      // epoch keys are under another root key
	NoteConfig       = "configuration changed" // what changed follows after ": "
	// NoteReread: keys given again within an SAE's re-read window; the SAE and,
	// in Count, how many of them in about a minute.
	NoteReread = "given again"
)

// RoleInitiator is the role of the SAE that drew; a role k >= 0 is that of
// Targets[k] of the grant.
const RoleInitiator = -1

// Change is one step that a commit makes durable. Which fields count follows
// from Op; the others are zero. A store keeps none of its slices.
type Change struct {
	Op           Op
	Segment      SegmentID // Link alone where the change is about a link
	Session      Session
	Grant        Grant
	First, Slots int
	Role         int
	SAE          etsi014.SAEID
	Owner        etsi014.KMEID
	Memory       Memory
	Incarnation  uint64
	Meta         Segment
	Sealed       Sealed
	IDKey        Wrapped
	Key          Wrapped // OpRewrap
	Epoch        uint64
	Ledger       Ledger
	Reason       string
	Count        uint64 // OpNote: how many times
}

// Record is one entry of the audit log: the changes of one commit. Names of
// SAEs stand in it as long as their salt is kept.
type Record struct {
	Position Position // after this record
	At       time.Time
	Changes  []Change // without Sealed, IDKey and tags
}

// Store keeps segments, claims and the audit log. It is the last guard: a
// change that breaks a rule is refused inside the transaction, whatever the
// caller believed. Methods may be called from several goroutines.
type Store interface {
	// Lease takes the KME over from whoever had it (empty link), or tells the
	// state of a link and its n oldest segments, n < 0 all; see [Lease]. What
	// n leaves out is not held back: the writer may change every segment.
	Lease(ctx context.Context, link LinkID, n int) (Lease, error)
	// Commit makes all changes and their audit record durable, or none. It
	// returns the log's new position. After any error but a refusal (see
	// errors.go) the store may hold the changes or not, and answers ErrStopped.
	Commit(ctx context.Context, fence Fence, changes []Change) (Position, error)
	// Load returns a live segment's sealed bytes, a copy, and its claims:
	// first the initiator's bitmap, then one for each target's place.
	Load(ctx context.Context, id SegmentID) (Sealed, []Bitmap, error)
	// Scan yields the audit records after the given length, in order, and
	// checks the chain from there on; ErrCorrupt names the first bad record.
	Scan(ctx context.Context, from uint64) iter.Seq2[Record, error]
	// Close ends the store; a commit under way is finished first.
	Close() error
}
