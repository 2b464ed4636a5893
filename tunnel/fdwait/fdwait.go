// Package fdwait lets a goroutine that owns a direction of the packet path
// wait for its descriptor by itself. The runtime's poller would wake it through
// another thread, which costs a hand-over for each batch.
package fdwait

import (
	"errors"
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// Waiter waits for one descriptor to become readable, or for the end. One
// goroutine waits; any may end it.
type Waiter struct {
	stop *os.File // the writing end of a pipe; closing it is the end
	once sync.Once
	wake *os.File
	fds  [2]unix.PollFd // here, so that waiting allocates nothing
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

// Readable waits until fd has something to read or an error to tell; false is
// the end. It is called while the caller holds fd open, as inside the function
// of a syscall.RawConn.
func (w *Waiter) Readable(fd uintptr) bool {
	w.fds[0].Fd = int32(fd)
	for {
		_, err := unix.Poll(w.fds[:], -1)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		return err == nil && w.fds[1].Revents == 0
	}
}

// End ends pending and later waits. The descriptor's Close may follow, which
// waits for whoever holds it.
func (w *Waiter) End() { w.once.Do(func() { _ = w.stop.Close() }) }

// Close frees what the waiter holds; nobody may wait any more.
func (w *Waiter) Close() {
	w.End()
	_ = w.wake.Close()
}
