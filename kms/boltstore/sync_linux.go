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

// allocate gives a file the blocks of a range on its disk, all or an error.
func allocate(f *os.File, at, length int64) error {
	for {
		if err := unix.Fallocate(int(f.Fd()), 0, at, length); err != unix.EINTR {
			return os.NewSyscallError("fallocate", err)
		}
	}
}

// unlock ends the lock of a file, which is no error if it is closed.
func unlock(f *os.File) { _ = unix.Flock(int(f.Fd()), unix.LOCK_UN) }
