package secret

import (
	"errors"
	"fmt"
)

// ErrNotLocked says that the system gives no memory that stays off the disk.
var ErrNotLocked = errors.New("no locked memory")

// NewLocked returns a secret of n zero bytes, n > 0, in memory of its own that
// the kernel neither swaps out nor writes to a core file: for the few keys
// that live as long as the process. Where the system cannot, it fails with
// [ErrNotLocked]; it never falls back to ordinary memory.
//
// Each one takes whole pages of the process's RLIMIT_MEMLOCK (4 KiB of, often,
// 8 MiB). Clear wipes and gives the pages back, so a slice from Expose must
// not be touched afterwards: the process would fault. A secret that is dropped
// without Clear keeps its pages until the process ends.
func NewLocked(n int) (Bytes, error) {
	if n <= 0 {
		return Bytes{}, fmt.Errorf("lock %d bytes: a length above 0 is needed", n)
	}
	b, err := mapLocked(n)
	if err != nil {
		return Bytes{}, fmt.Errorf("lock %d bytes: %w: %w; raise RLIMIT_MEMLOCK "+
			"(ulimit -l, or LimitMEMLOCK= in the systemd unit) or give CAP_IPC_LOCK",
			n, ErrNotLocked, err)
	}
	p := &buffer{b: b, mapped: true}
	return Bytes{buf: &p}, nil
}
