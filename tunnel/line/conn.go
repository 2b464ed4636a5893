package line

import (
	"syscall"

	"golang.org/x/sys/unix"
)

// Burst is one datagram or several in one buffer.
type Burst struct {
	Data []byte
	// Size is the length of every datagram in Data; the last may be shorter.
	Size int
	// TOS is the type of service or traffic class of the outer packets: DSCP
	// and ECN (RFC 2474, RFC 3168).
	TOS uint8
}

// Conn carries datagrams to and from the one peer. One goroutine reads; several may write. Close ends pending reads.
type Conn interface {
	// Read fills b.Data, up to its capacity, and b.Size with what has come. It
	// waits for that if wait is set, else b.Data may come back empty.
	// [os.ErrClosed] or [net.ErrClosed] after Close; any other error ends the
	// line.
	Read(b *Burst, wait bool) error
	// Write sends every datagram of b, which it does not keep. An error means
	// that some were not sent.
	Write(b Burst) error
	Close() error
}

// roaming is a Conn whose peer may change its address.
type roaming interface {
	// Roams tells whether it may now; without, the rest is not called.
	Roams() bool
	// Sender is where the burst read last came from. For the reading goroutine.
	Sender() Endpoint
	// Adopt makes Sender the peer's endpoint, and tells whether the peer was
	// elsewhere. For the reading goroutine, after an authentic record.
	Adopt() (now Endpoint, changed bool)
	// WriteTo is Write to an endpoint that has not been adopted.
	WriteTo(b Burst, to *Endpoint) error
}

// passing tells whether errno says something about the path, not the socket.
func passing(errno syscall.Errno) bool {
	switch errno {
	case unix.ECONNREFUSED, unix.EHOSTUNREACH, unix.ENETUNREACH, unix.EHOSTDOWN, unix.ENETDOWN,
		unix.EMSGSIZE, unix.ENOPROTOOPT, unix.EPROTO, unix.EACCES, unix.EPERM, unix.ETIMEDOUT,
		unix.EINTR, unix.ENOBUFS:
		return true
	}
	return false
}
