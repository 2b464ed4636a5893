package bundle

import "errors"

// Errors of decoding and generating.
var (
	// ErrFormat says that a bundle's text is not what this package writes.
	ErrFormat = errors.New("bad bundle")
	// ErrVersion says that a bundle is of another format than this program's.
	ErrVersion = errors.New("bundle of another version")
	// ErrSignature says that one of a bundle's two signatures does not hold.
	ErrSignature = errors.New("signature does not hold")
	// ErrExists says that secrets are there already and are not overwritten.
	ErrExists = errors.New("secrets exist already")
)
