package etsi014

import (
	"errors"
	"time"
)

// What a KME may answer instead of keys. The door maps them to the standard's
// codes and texts (clause 6.4 and tables 2 to 4); the cause goes to the log.
var (
	// ErrDenied: the caller is not identified or not entitled; 401.
	ErrDenied = errors.New("caller is not entitled")
	// ErrRequest: the request breaks a rule; 400.
	ErrRequest = errors.New("request is not valid")
	// ErrUnknownKey: a key_ID is not (or no longer) here; 400 with the
	// standard's text "one or more keys specified are not found on KME".
	ErrUnknownKey = errors.New("one or more keys specified are not found on KME")
	// ErrSize: not a multiple of 8; 400 with the standard's text.
	ErrSize = errors.New("size shall be a multiple of 8")
	// ErrMandatory: an unknown mandatory extension; 400, standard's text.
	ErrMandatory = errors.New("not all extension_mandatory parameters are supported")
	// ErrUnmet: a known mandatory extension whose wish cannot be met; 400,
	// standard's text.
	ErrUnmet = errors.New("not all extension_mandatory request options could be met")
	// ErrEmpty: not enough key now; 503.
	ErrEmpty = errors.New("not enough key material")
	// ErrDown: the KME, its store or its peer cannot serve now; 503.
	ErrDown = errors.New("key manager cannot serve")
)

// Error carries what the door should tell the caller beyond the sentinel it
// wraps. Message and Details go to the client, Cause only to the log. For
// ErrDenied and the kinds whose text the standard fixes, the client gets the
// kind's text and nothing else, whatever Message says.
type Error struct {
	Kind    error // one of the sentinels
	Message string
	Details []map[string]string
	// MissingBits tells, with ErrEmpty, how much key is missing; 0 = unknown.
	// On the wire it is the member missing_bits of one detail.
	MissingBits int
	RetryAfter  time.Duration // 0 = none; only with ErrEmpty and ErrDown
	Cause       error
}

// Error implements error with everything, for the log.
func (e *Error) Error() string {
	s := e.Kind.Error()
	if e.Message != "" {
		s = e.Message
	}
	if e.Cause != nil {
		s += ": " + e.Cause.Error()
	}
	return s
}

// Unwrap makes errors.Is see the kind and the cause.
func (e *Error) Unwrap() []error {
	if e.Cause == nil {
		return []error{e.Kind}
	}
	return []error{e.Kind, e.Cause}
}
