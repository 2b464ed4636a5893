package pki

import (
	"errors"
	"strings"
)

// Errors of this package.
var (
	// ErrRequest: a certificate was asked for that nobody could use.
	ErrRequest = errors.New("certificate request is not valid")
	// ErrKeyPair: a key is not that of its certificate.
	ErrKeyPair = errors.New("key does not belong to the certificate")
	// ErrNotCA: the certificate may not sign others.
	ErrNotCA = errors.New("certificate is not a CA's")
	// ErrExists: a certificate of that name is there and is not overwritten.
	ErrExists = errors.New("certificate exists already")
	// ErrUnknown: no certificate has that name or number.
	ErrUnknown = errors.New("no such certificate")
	// ErrForeign: a certificate is not of this authority.
	ErrForeign = errors.New("certificate is not of this authority")
	// ErrRevoked: a certificate was revoked, and what is asked with it is refused.
	ErrRevoked = errors.New("certificate is revoked")
	// ErrChain: a chain from another CA would not be accepted by anybody.
	ErrChain = errors.New("certificate chain is not usable")
	// ErrPassword: a PKCS#12 file needs a password.
	ErrPassword = errors.New("password is not usable")
)

// Fault is an error that knows what a person does about it; its text ends with
// that.
type Fault struct {
	Err  error
	Next string // a command, or what to ask of whom
}

// Advise adds to an error what to do about it.
func Advise(err error, next string) error { return &Fault{err, next} }

// Error implements error.
func (f *Fault) Error() string { return f.Err.Error() + "; " + f.Next }

// Unwrap gives the error without the advice.
func (f *Fault) Unwrap() error { return f.Err }

// Split parts the text of an error from what to do about it, which is empty if
// the error does not know.
func Split(err error) (found, next string) {
	f := new(Fault)
	if !errors.As(err, &f) {
		return err.Error(), ""
	}
	return strings.TrimSuffix(err.Error(), "; "+f.Next), f.Next
}
