// Package fdwait lets a goroutine that owns a direction of the packet path
// wait for its descriptor by itself: see [Waiter]. The runtime's poller would
// wake it through another thread, which costs a hand-over for each batch.
//
// A caller must keep in mind that a goroutine which waits keeps its processor
// of the Go scheduler (GOMAXPROCS) for up to [Patience]. One always stays for
// the others; [MakeRoom] adds it where there is none.
package fdwait

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Waiter waits for one descriptor to become readable, or for the end. One
// goroutine waits; any may end it.
type Waiter struct {
	stop *os.File // the writing end of a pipe; closing it is the end
	once sync.Once
	wake *os.File
	fds  [2]unix.PollFd // here, so that waiting allocates nothing
	left unix.Timespec  // of Patience
}

// New returns a waiter.
func New() (*Waiter, error) {
	wake, stop, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("make waiter: %w", err)
	}
	w := &Waiter{stop: stop, wake: wake}
	w.fds[0].Events, w.fds[1].Events = unix.POLLIN, unix.POLLIN
	w.fds[1].Fd = int32(wake.Fd())
	return w, nil
}

// Patience is how long Readable waits without telling the Go scheduler. What
// comes within costs no more than the poll itself. A wait that the scheduler
// knows of makes its monitor thread take the processor away after 20 µs and
// look every 20 µs from then on (runtime.sysmon), and needs a processor anew
// at its end: measured with one TCP stream, 5,000 sleeps of the monitor and 800
// futex calls a second, a fifth of all processor time. It stays below 10 ms,
// from where on the monitor sends signals (forcePreemptNS of runtime/proc.go).
const Patience = 5 * time.Millisecond

// holders is how many goroutines keep a processor while they wait; limit is how
// many may.
var holders, limit atomic.Int32

func init() { limit.Store(int32(runtime.GOMAXPROCS(0)) - 1) }

// MakeRoom gives the Go scheduler one processor more than the machine has, once
// for the process, so that waiters leave one to the other goroutines even where
// every direction of the packet path has a core of its own. Who has set
// GOMAXPROCS in the environment keeps it.
func MakeRoom() {
	if os.Getenv("GOMAXPROCS") != "" {
		return
	}
	makeRoom.Do(func() {
		n := max(runtime.GOMAXPROCS(0), runtime.NumCPU()+1)
		runtime.GOMAXPROCS(n)
		limit.Store(int32(n) - 1)
	})
}

var makeRoom sync.Once

// Readable waits until fd has something to read or an error to tell; false is
// the end. It is called while the caller holds fd open, as inside the function
// of a syscall.RawConn.
func (w *Waiter) Readable(fd uintptr) bool {
	w.fds[0].Fd = int32(fd)
	ready, err := false, error(nil)
	if holders.Add(1) <= limit.Load() {
		ready, err = w.hold()
	}
	holders.Add(-1)
	for !ready && err == nil {
		_, err = unix.Poll(w.fds[:], -1)
		ready = err == nil
		if errors.Is(err, unix.EINTR) {
			err = nil
		}
	}
	return err == nil && w.fds[1].Revents == 0
}

// hold waits for Patience at most and keeps the processor. A collection of
// garbage that must stop the world sends a signal, which ends the call with
// EINTR, and finds the goroutine at the next turn of the loop.
func (w *Waiter) hold() (ready bool, err error) {
	w.left = unix.NsecToTimespec(int64(Patience))
	for {
		// The kernel leaves in w.left what remains of it.
		n, _, errno := syscall.RawSyscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(&w.fds[0])),
			uintptr(len(w.fds)), uintptr(unsafe.Pointer(&w.left)), 0, 0, 0)
		if errno == unix.EINTR {
			yield()
			continue
		}
		if errno != 0 {
			return false, errno
		}
		return n > 0, nil
	}
}

// yield is a call that is not inlined: the scheduler stops a goroutine there.
//
//go:noinline
func yield() {}

// End ends pending and later waits. The descriptor's Close may follow, which
// waits for whoever holds it.
func (w *Waiter) End() { w.once.Do(func() { _ = w.stop.Close() }) }

// Close frees what the waiter holds; nobody may wait any more.
func (w *Waiter) Close() {
	w.End()
	_ = w.wake.Close()
}
