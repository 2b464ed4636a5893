package kms

import (
	"errors"

	"github.com/quietline/quietline/etsi014"
)

// Opening a store or its keys.
var (
	// ErrLocked: another process has the store open.
	ErrLocked = errors.New("store is open in another process")
	// ErrNewer: a newer Quietline wrote the store; this one must not touch it.
	ErrNewer = errors.New("store has a newer schema")
	// ErrOlder: an older Quietline wrote the store and its form is no longer read.
	ErrOlder = errors.New("store has an older schema")
	// ErrCorrupt: stored bytes are not what was written.
	ErrCorrupt = errors.New("stored bytes are damaged")
	// ErrRootKey: the root key does not open this KME's keys.
	ErrRootKey = errors.New("root key does not fit")
	// ErrPassphrase: the passphrase does not open the root key.
	ErrPassphrase = errors.New("passphrase does not fit")
	// ErrSealed: the root key is under a passphrase that nobody has given yet.
	ErrSealed = errors.New("key manager is sealed")
	// ErrRotation: the root key is being changed already.
	ErrRotation = errors.New("another change of the root key is under way")
	// ErrForeign: the store belongs to another KME.
	ErrForeign = errors.New("store belongs to another KME")
)

// Refusals of a commit: nothing was stored and the store goes on.
var (
	// ErrFenced: another writer has taken over.
	ErrFenced = errors.New("writer is fenced off")
	// ErrClaimed: a slot was claimed before in that role.
	ErrClaimed = errors.New("slot is claimed already")
	// ErrState: the segment's state does not allow the change.
	ErrState = errors.New("segment state does not allow this")
	// ErrSession: the segment was opened under another session.
	ErrSession = errors.New("segment is open under another session")
	// ErrGrant: no grant covers the slots for that SAE, or grants overlap.
	ErrGrant = errors.New("slots are not granted so")
	// ErrNoSegment: the segment is not here (never, or no longer).
	ErrNoSegment = errors.New("segment is not here")
	// ErrSeen: a block of this number was ingested before.
	ErrSeen = errors.New("block number was seen before")
	// ErrFull: the link holds as many segments as it may; the device keeps the
	// block until some are used up.
	ErrFull = errors.New("stock is full")
	// ErrSpace: the disk has no room for another block beside what is kept for
	// claims, voids and turns.
	ErrSpace = errors.New("disk is full")
	// ErrChange: the change itself makes no sense.
	ErrChange = errors.New("change is not valid")
)

// ErrStopped: a write failed earlier; nothing is certain until a restart.
var ErrStopped = errors.New("store has stopped after a failed write")

// ErrErasure: the epoch has not turned for so long that delivered keys would
// stay readable on disk; nothing more is delivered until it turns.
var ErrErasure = errors.New("delivered keys cannot be erased")

// What an SAE's allowance refuses; each is the cause of an etsi014.Error that
// says when to ask again.
var (
	// ErrRate: more calls or keys a second than the SAE may have.
	ErrRate = errors.New("rate of the SAE is reached")
	// ErrQuota: the SAE has drawn its share of the stock.
	ErrQuota = errors.New("share of the SAE is drawn")
	// ErrReserve: what is left is kept for other SAEs.
	ErrReserve = errors.New("stock is reserved for other SAEs")
)

// refusals are the errors after which a store is as it was before.
var refusals = []error{
	ErrFenced, ErrClaimed, ErrState, ErrSession, ErrGrant, ErrNoSegment, ErrSeen, ErrSpace,
	ErrChange,
}

// Refused tells whether err is a store's refusal: nothing was stored.
func Refused(err error) bool {
	for _, r := range refusals {
		if errors.Is(err, r) {
			return true
		}
	}
	return false
}

// refusalReason is the audit log's word for a request that was turned away;
// empty for anything else.
func refusalReason(err error) string {
	switch {
	case errors.Is(err, etsi014.ErrDenied):
		return "denied"
	case errors.Is(err, etsi014.ErrUnknownKey):
		return "unknown key"
	case errors.Is(err, etsi014.ErrRequest), errors.Is(err, etsi014.ErrSize),
		errors.Is(err, etsi014.ErrMandatory):
		return "bad request"
	case errors.Is(err, ErrRate):
		return "rate"
	case errors.Is(err, ErrQuota):
		return "quota"
	case errors.Is(err, ErrReserve):
		return "reserve"
	}
	return ""
}
