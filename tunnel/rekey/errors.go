package rekey

import "errors"

// Errors of [New] and [ParsePolicy].
var (
	// ErrPolicy refuses a policy that has no meaning.
	ErrPolicy = errors.New("unknown policy")
	// ErrConfig refuses a configuration; the text says which field and why.
	ErrConfig = errors.New("bad rekey configuration")
)
