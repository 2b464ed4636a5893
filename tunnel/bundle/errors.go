package bundle

import "errors"

// Errors of decoding and generating.
var (
	// ErrFormat says that a bundle's text is not what this package writes.
	ErrFormat = errors.New("bad bundle")
	// ErrVersion says that a bundle is of a format newer than this program.
	ErrVersion = errors.New("bundle of another version")
	// ErrExists says that secrets are there already and are not overwritten.
	ErrExists = errors.New("secrets exist already")
)
