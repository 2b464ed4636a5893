package pad

import "errors"

// Errors of sealing.
var (
	// ErrEmpty says that there is no pad for the record.
	ErrEmpty = errors.New("one-time pad is used up")
	// ErrReserved says that what pad is left is kept for more urgent traffic.
	ErrReserved = errors.New("one-time pad is kept for urgent traffic")
	// ErrSize says that the record is larger than the largest bucket.
	ErrSize = errors.New("record does not fit a bucket of one-time pad")
)

// Errors of opening. All mean: drop the record; no pad was used up.
var (
	// ErrForm says that the bytes are no PAD record of this version.
	ErrForm = errors.New("no pad record")
	// ErrBlock says that the block is not held: it has retired, or this end has
	// restarted.
	ErrBlock = errors.New("pad block is not held")
	// ErrUsed says that the bytes of pad have been used.
	ErrUsed = errors.New("pad was used before")
	// ErrForged says that the tag does not fit.
	ErrForged = errors.New("pad record is not authentic")
)

// ErrConfig refuses a configuration; ErrMessage a message that says nothing
// that is known.
var (
	ErrConfig  = errors.New("bad pad configuration")
	ErrMessage = errors.New("pad message is malformed")
)
