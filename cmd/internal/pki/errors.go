package pki

import "errors"

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
