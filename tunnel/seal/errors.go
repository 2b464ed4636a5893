package seal

import "errors"

// Errors of sealing.
var (
	// ErrSpent says that the key has sealed as much as it may. A new epoch is
	// the only way on.
	ErrSpent = errors.New("key has sealed its last byte")
	// ErrKeySize says that a direction key or IV has a wrong length.
	ErrKeySize = errors.New("key or IV has a wrong length")
)

// Errors of opening. All mean: drop the datagram.
var (
	// ErrTooOld says that the counter lies behind the replay window.
	ErrTooOld = errors.New("record is older than the replay window")
	// ErrReplayed says that the counter has been seen.
	ErrReplayed = errors.New("record has been seen")
	// ErrForged says that the tag does not fit key, header and record.
	ErrForged = errors.New("record is not authentic")
)
