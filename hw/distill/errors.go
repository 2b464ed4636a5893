package distill

import "errors"

// Errors of New.
var (
	// ErrConfig: a value of Config is out of range.
	ErrConfig = errors.New("bad distillation config")
)

// Errors of Step. After any of them the machine is dead: nothing more is
// released and every later Step returns the same error. The caller drops the
// connection and starts a new machine.
var (
	// ErrProtocol: a message cannot be parsed or comes out of turn.
	ErrProtocol = errors.New("protocol violated")
	// ErrMismatch: the two ends are configured differently.
	ErrMismatch = errors.New("ends are configured differently")
	// ErrAuthentication: a tag is wrong; somebody changed a message, or the
	// two ends do not hold the same authentication key.
	ErrAuthentication = errors.New("authentication failed")
	// ErrStalled: the peer has been silent in the middle of a block.
	ErrStalled = errors.New("peer is silent")
	// ErrInput: the caller gave what its role cannot have, or slots out of order.
	ErrInput = errors.New("bad input")
)

// Errors of AuthKeys; Step returns them wrapped.
var (
	// ErrPadUsed: the pad was taken before.
	ErrPadUsed = errors.New("authentication pad was used")
	// ErrPadUnknown: the pool has no such pad.
	ErrPadUnknown = errors.New("authentication pad is unknown")
	// ErrAuthEmpty: both ends share no unused pad; a person must bring a seed.
	ErrAuthEmpty = errors.New("authentication key is used up")
	// ErrRolledBack: the peer has seen pads used that this pool holds as
	// unused: the pool was restored from a copy. A person must bring a seed.
	ErrRolledBack = errors.New("authentication pool was rolled back")
)
