//go:build !linux

package secret

import "errors"

func mapLocked(int) ([]byte, error) { return nil, errors.ErrUnsupported }

func unmap([]byte) {}

// Harden is there for Linux only; elsewhere it refuses.
func Harden() error { return errors.ErrUnsupported }
