// Package kms is one key manager (KME): blocks of secret bits in, keys out,
// each key delivered once.
//
// The main type is [KME]: it stands behind the ETSI GS QKD 014 door, knows
// which SAE is served where, and turns a request into draws and fetches from
// a [Pool]. The pool is the protocol between the two KMEs of a link
// (kms/peer) over a [Store] (kms/boltstore); kms/node joins them to a running
// KME.
//
// Words: a link yields equal blocks at two KMEs. A [Segment] is the slots cut
// from one block; a slot is 256 bits. A [Grant] gives a range of slots to one
// initiator and its targets; a claim takes slots of a grant for one of them,
// once. A caller must keep in mind that nothing may leave before the changes
// it follows from are durable, and that a store whose commit failed is not
// asked again: the KME stops.
package kms

import (
	"encoding/hex"
	"fmt"

	"github.com/quietline/quietline/etsi014"
)

// LinkID names a link; both its KMEs use the same name. 1 to 64 bytes.
type LinkID string

// Loopback names the pool from which a KME serves keys between two of its own
// SAEs: random bits of the KME itself. They are no QKD keys, and status, audit
// log and metrics name them so; no link may have this name.
const Loopback LinkID = "loopback"

// SegmentID names a segment for ever: the block's number within the link
// generation that the device counted it in.
type SegmentID struct {
	Link       LinkID
	Generation uint64
	Number     uint64
}

// String is link/generation/number, for logs.
func (id SegmentID) String() string {
	return fmt.Sprintf("%s/%d/%d", id.Link, id.Generation, id.Number)
}

// Less orders the segments of one link by age.
func (id SegmentID) Less(o SegmentID) bool {
	if id.Generation != o.Generation {
		return id.Generation < o.Generation
	}
	return id.Number < o.Number
}

// State is where a segment stands: NEW, CONFIRMED, OPEN, CLOSED, FINISHED, or
// VOID from any of the first three. docs/key-lifecycle.md has the table.
type State uint8

// The states of a segment.
const (
	StateNew       State = 1 + iota // durable here, not yet compared with the peer's
	StateConfirmed                  // equal at both KMEs
	StateOpen                       // bound to a session; its owner grants and draws
	StateClosed                     // nothing more to deliver; bytes destroyed
	StateFinished                   // both sides know; remembered by the floor alone
	StateVoid                       // destroyed before its time
)

// String is the state's word in capitals.
func (s State) String() string {
	names := [...]string{"?", "NEW", "CONFIRMED", "OPEN", "CLOSED", "FINISHED", "VOID"}
	if int(s) >= len(names) {
		return names[0]
	}
	return names[s]
}

// May tells whether a segment may go from s to the state to.
func (s State) May(to State) bool {
	switch to {
	case StateConfirmed:
		return s == StateNew
	case StateOpen:
		return s == StateConfirmed
	case StateClosed:
		return s == StateOpen
	case StateFinished:
		return s == StateClosed
	case StateVoid:
		return s == StateNew || s == StateConfirmed || s == StateOpen
	}
	return false
}

// Session names the pair of incarnations that two KMEs agreed by HELLO. The
// zero value is no session.
type Session [16]byte

// String is hexadecimal, for logs.
func (s Session) String() string { return hex.EncodeToString(s[:]) }

// Tag is a masked universal hash of a block; it says nothing about its bits.
type Tag [16]byte

// Segment is what is known of a segment besides its key bytes.
type Segment struct {
	ID         SegmentID
	State      State
	BlockBytes int           // length of the driver's block, bytes
	SlotBytes  int           // length of a slot, bytes
	Slots      int           // slots cut from the block
	Owner      etsi014.KMEID // the KME whose initiators draw
	Given      bool          // the owner of old gave it to this one; nobody gives it again
	Session    Session       // that it was opened under
	Sent       Tag           // of our OFFER
	Expected   Tag           // of the peer's OFFER
	Simulated  bool          // no photon was sent for it
}

// Grant gives Slots slots of a segment from First on to one initiator and its
// targets, as keys of SizeBits bits. It never changes.
type Grant struct {
	First, Slots int
	SizeBits     int
	Initiator    etsi014.SAEID
	Targets      []etsi014.SAEID
}

// slotBytes is the length of a slot in the protocol, bytes: peer.SlotBytes.
const slotBytes = 32

// KeySlots is the number of whole slots that a key of sizeBits takes.
func KeySlots(sizeBits, slotBytes int) int {
	return (sizeBits + 8*slotBytes - 1) / (8 * slotBytes)
}

// Ledger counts what became of a link's bits at this KME. All are bits and
// Ingested = Delivered + Void + Expired + Burnt + Tag + Stored at every step.
type Ledger struct {
	Ingested  uint64 // in blocks taken over from the driver
	Delivered uint64 // drawn here by initiators, or fetched here by targets
	Void      uint64 // in segments destroyed before their time
	Expired   uint64 // drawn over there, not fetched here within the retention
	Burnt     uint64 // cuts, key tails, and slots never drawn before CLOSE
	Tag       uint64 // reserved for the comparison of blocks
	Stored    uint64 // still here
}

// Balanced tells whether the ledger's sum holds.
func (l Ledger) Balanced() bool {
	return l.Ingested == l.Delivered+l.Void+l.Expired+l.Burnt+l.Tag+l.Stored
}
