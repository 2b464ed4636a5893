package lab

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// scratchPoint is where Scratch mounts. The Filesystem Hierarchy Standard
// keeps it free for such use, and inside nobody else sees the mount.
const scratchPoint = "/mnt"

// Scratch returns a folder in memory that only this process and those it
// starts see, and that is gone with them, however they end. It holds at most
// half of the machine's memory. Only [Inside]; call it once.
func Scratch() (string, error) {
	if !Inside() {
		return "", fmt.Errorf("make scratch folder: %w", ErrOutside)
	}
	const flags = unix.MS_NOSUID | unix.MS_NODEV
	if err := unix.Mount("tmpfs", scratchPoint, "tmpfs", flags, "mode=0700"); err != nil {
		return "", fmt.Errorf("make scratch folder: %w",
			&os.PathError{Op: "mount", Path: scratchPoint, Err: err})
	}
	return scratchPoint, nil
}
