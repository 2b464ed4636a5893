//go:build !linux

package boltstore

import "os"

// syncData flushes a file's bytes; its length has not changed.
func syncData(f *os.File) error { return f.Sync() }
