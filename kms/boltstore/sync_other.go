//go:build !linux

package boltstore

import (
	"errors"
	"os"
)

// syncData flushes a file's bytes; its length has not changed.
func syncData(f *os.File) error { return f.Sync() }

// allocate is not to be had here.
func allocate(*os.File, int64, int64) error { return errors.ErrUnsupported }

// unlock is left to the end of the process.
func unlock(*os.File) {}
