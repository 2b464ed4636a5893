package boltstore

import (
	"os"

	"golang.org/x/sys/unix"
)

// syncData flushes a file's bytes; its length has not changed.
func syncData(f *os.File) error {
	for {
		if err := unix.Fdatasync(int(f.Fd())); err != unix.EINTR {
			return os.NewSyscallError("fdatasync", err)
		}
	}
}
