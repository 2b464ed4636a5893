package secret

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// mapLocked gives n bytes of memory that never reach a disk: pages the kernel
// takes out of its own map where it can (memfd_secret(2), Linux 5.14), else
// pages that are locked, left out of core files and zeroed in a forked child.
func mapLocked(n int) ([]byte, error) {
	b, err := mapSecret(n)
	if err == nil {
		return b, nil
	}
	b, lockErr := mapPinned(n)
	if lockErr == nil {
		return b, nil
	}
	return nil, fmt.Errorf("%w, %w", err, lockErr)
}

// mapSecret maps pages of memfd_secret: not even the process's own mem file
// in procfs reads them, nor does ptrace. The kernel never swaps or dumps them.
func mapSecret(n int) ([]byte, error) {
	fd, err := unix.MemfdSecret(unix.O_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("memfd_secret: %w", err)
	}
	defer unix.Close(fd) // the mapping keeps the pages
	if err := unix.Ftruncate(fd, int64(n)); err != nil {
		return nil, fmt.Errorf("memfd_secret: %w", err)
	}
	// The kernel allows shared mappings only.
	b, err := unix.Mmap(fd, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("memfd_secret: %w", err)
	}
	// A forked child would share the pages; it gets a hole instead.
	return advised(b, unix.MADV_DONTFORK)
}

// mapPinned maps ordinary pages and pins them.
func mapPinned(n int) ([]byte, error) {
	b, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE,
		unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, fmt.Errorf("mmap: %w", err)
	}
	if err := unix.Mlock(b); err != nil {
		return nil, errors.Join(fmt.Errorf("mlock: %w", err), unix.Munmap(b))
	}
	return advised(b, unix.MADV_DONTDUMP, unix.MADV_WIPEONFORK)
}

func advised(b []byte, advice ...int) ([]byte, error) {
	for _, a := range advice {
		if err := unix.Madvise(b, a); err != nil {
			return nil, errors.Join(fmt.Errorf("madvise %d: %w", a, err), unix.Munmap(b))
		}
	}
	return b, nil
}

// unmap gives the pages back. It can fail only on a slice that was not mapped
// here, or when the kernel has no memory for its own tables; the bytes are
// zero by then, so nothing is lost but the pages.
func unmap(b []byte) { _ = unix.Munmap(b) }

// Harden makes the process keep its memory to itself; a daemon that holds keys
// calls it first thing in main. It clears the dumpable flag (no core file, and
// no ptrace or reading of our mem file in procfs by other processes of the
// same user; root still can), sets the core limit to 0 for good, and the umask
// to 077, so that files it makes are its own. The umask counts for the whole
// process. Exec of another program sets the dumpable flag again; the core
// limit and the umask are inherited.
func Harden() error {
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("clear dumpable flag: %w", err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("set core limit: %w", err)
	}
	unix.Umask(0o077)
	return nil
}
