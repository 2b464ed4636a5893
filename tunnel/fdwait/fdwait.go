// Package fdwait holds the descriptors of the packet path, see [Descriptor]: a
// goroutine that owns a direction waits for its descriptor by itself. The
// runtime's poller would wake it through another thread, which costs a
// hand-over for each batch, and merely knowing the descriptor it would wake a
// thread for nothing at each packet.
//
// A caller must keep in mind that a goroutine which waits keeps its processor
// of the Go scheduler (GOMAXPROCS) for up to [Patience]. One always stays for
// the others; [MakeRoom] adds it where there is none.
package fdwait

import (
	"errors"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Descriptor owns a file descriptor that does not block. One goroutine at a
// time may wait to read and one to write; any may close.
//
// Use it between Enter and Leave, so that Close cannot take the number away
// from under a system call.
type Descriptor struct {
	fd    int
	end   int          // eventfd, readable for ever once Close has begun
	use   sync.RWMutex // held for reading between Enter and Leave
	ended atomic.Bool

	read, write wait
	reads       bool // counted in readers
}

// wait is the memory of one direction's waits, so that they allocate nothing.
type wait struct {
	fds  [2]unix.PollFd
	left unix.Timespec // of Patience
	busy atomic.Bool   // the last wait was shorter than Patience
}

// Own takes over fd, which must have been opened with O_NONBLOCK. On error it
// stays the caller's.
func Own(fd int) (*Descriptor, error) {
	end, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, os.NewSyscallError("eventfd", err)
	}
	d := &Descriptor{fd: fd, end: end}
	for _, w := range []*wait{&d.read, &d.write} {
		w.fds[0].Fd, w.fds[1] = int32(fd), unix.PollFd{Fd: int32(end), Events: unix.POLLIN}
	}
	d.read.fds[0].Events, d.write.fds[0].Events = unix.POLLIN, unix.POLLOUT
	return d, nil
}

// Enter returns the descriptor for use until Leave; false after Close, and then
// Leave is not called.
func (d *Descriptor) Enter() (fd uintptr, open bool) {
	d.use.RLock()
	if d.ended.Load() {
		d.use.RUnlock()
		return 0, false
	}
	return uintptr(d.fd), true
}

// Leave ends what Enter began.
func (d *Descriptor) Leave() { d.use.RUnlock() }

// Close ends pending waits, waits until nobody uses the descriptor, and closes
// it. Closed a second time it says [os.ErrClosed].
func (d *Descriptor) Close() error {
	if d.ended.Swap(true) {
		return os.ErrClosed
	}
	// Eight bytes are what eventfd(2) takes; it cannot be full.
	_, _ = unix.Write(d.end, []byte{1, 1, 1, 1, 1, 1, 1, 0})
	d.use.Lock()
	defer d.use.Unlock()
	if d.reads {
		readers.Add(-1)
	}
	d.read.setBusy(false)
	d.write.setBusy(false)
	_ = unix.Close(d.end)
	return os.NewSyscallError("close", unix.Close(d.fd))
}

// Patience is how long a wait goes on without telling the Go scheduler, after
// one that was as short. What
// comes within costs no more than the poll itself. A wait that the scheduler
// knows of makes its monitor thread take the processor away after 20 µs and
// look every 20 µs from then on (runtime.sysmon), and needs a processor anew
// at its end: measured with one TCP stream, 5,000 sleeps of the monitor and 800
// futex calls a second, a fifth of all processor time. It stays below 10 ms,
// from where on the monitor sends signals (forcePreemptNS of runtime/proc.go).
const Patience = 5 * time.Millisecond

// active is how many waits are busy; limit is up to how many these keep their
// processors. Where more are busy, as in a hub of many lines, none does: it would
// be kept from a line that has something to do.
var active, limit atomic.Int32

// processors is how many the scheduler began with: those of the machine, or of
// the cgroup, or what the environment says.
var processors = runtime.GOMAXPROCS(0)

func init() {
	n := processors
	if os.Getenv("GOMAXPROCS") != "" {
		n-- // MakeRoom will add none
	}
	limit.Store(int32(n))
}

// maxRoom bounds what MakeRoom gives: the collector's work grows with it.
const maxRoom = 64

var room struct {
	sync.Mutex
	waiters int
}

// MakeRoom gives the Go scheduler a processor for so many more waiters, and one
// for the other goroutines, up to maxRoom: then the kernel shares out the real
// ones among the threads, which it does more evenly than the scheduler among
// goroutines that rarely stop. The caller calls done when they wait no more. Who
// has set GOMAXPROCS in the environment keeps it.
func MakeRoom(waiters int) (done func()) {
	room.Lock()
	defer room.Unlock()
	room.waiters += waiters
	if os.Getenv("GOMAXPROCS") == "" {
		want := max(min(room.waiters+1, maxRoom), processors+1)
		if want > runtime.GOMAXPROCS(0) {
			runtime.GOMAXPROCS(want)
		}
	}
	return sync.OnceFunc(func() {
		room.Lock()
		defer room.Unlock()
		room.waiters -= waiters
	})
}

// readers is how many open descriptors have been waited for to read.
var readers atomic.Int32

// GiveWay lets the goroutines of other descriptors run first, if there are more
// than processors. Who reads one calls it after each batch: so the lines of a
// hub are served in turn, a batch each, however much comes on one of them.
func GiveWay() {
	if readers.Load() > limit.Load() {
		runtime.Gosched()
	}
}

// Readable waits, between Enter and Leave, until there is something to read or
// an error to tell; false is the end.
func (d *Descriptor) Readable() bool {
	if !d.reads {
		d.reads = true
		readers.Add(1)
	}
	return d.read.ready()
}

// Writable waits, between Enter and Leave, until something can be written or
// there is an error to tell; false is the end.
func (d *Descriptor) Writable() bool { return d.write.ready() }

func (w *wait) ready() bool {
	ready, err := false, error(nil)
	if w.busy.Load() && active.Load() <= limit.Load() {
		ready, err = w.hold()
	}
	if !ready && err == nil {
		err = w.block()
	}
	return err == nil && w.fds[1].Revents == 0
}

// block waits as long as it takes, and sees whether the wait was short.
func (w *wait) block() error {
	began := time.Now()
	for {
		_, err := unix.Poll(w.fds[:], -1)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		w.setBusy(err == nil && time.Since(began) < Patience)
		return err
	}
}

func (w *wait) setBusy(busy bool) {
	switch {
	case w.busy.Swap(busy) == busy:
	case busy:
		active.Add(1)
	default:
		active.Add(-1)
	}
}

// hold waits for Patience at most and keeps the processor. A collection of
// garbage that must stop the world sends a signal, which ends the call with
// EINTR, and finds the goroutine at the next turn of the loop.
func (w *wait) hold() (ready bool, err error) {
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
