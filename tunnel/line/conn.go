package line

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"

	"golang.org/x/sys/unix"
)

// Burst is one datagram or several in one buffer.
type Burst struct {
	Data []byte
	// Size is the length of every datagram in Data; the last may be shorter.
	Size int
}

// Conn carries datagrams to and from the one peer, whose address is fixed. One
// goroutine reads; several may write. Close ends pending reads.
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

// socketBuffer is asked for each socket and direction, in bytes. With the
// defaults of most systems a burst of records overflows the receive buffer;
// 7 MiB brought wireguard-go from 4.1 to 5.3 Gbit/s and its retransmissions to
// zero (its commit f26efb6).
const socketBuffer = 7 << 20

// DialUDP opens the socket of a line between two fixed endpoints. The kernel
// hands over only datagrams that come from remote. The socket belongs to the
// network namespace of the calling thread.
func DialUDP(local, remote netip.AddrPort) (Conn, error) {
	if !remote.IsValid() || remote.Port() == 0 {
		return nil, fmt.Errorf("open UDP socket: %w: remote endpoint %s", ErrConfig, remote)
	}
	var from *net.UDPAddr
	if local.IsValid() {
		from = net.UDPAddrFromAddrPort(local)
	}
	c, err := net.DialUDP("udp", from, net.UDPAddrFromAddrPort(remote))
	if err != nil {
		return nil, fmt.Errorf("open UDP socket: %w", err)
	}
	u, err := newUDP(c)
	if err != nil {
		_ = c.Close()
		return nil, fmt.Errorf("open UDP socket: %w", err)
	}
	return u, nil
}

// raiseBuffers asks for large socket buffers: above the system's limit where
// that is allowed, else up to it.
func raiseBuffers(fd int) error {
	set := func(force, plain int) error {
		if unix.SetsockoptInt(fd, unix.SOL_SOCKET, force, socketBuffer) == nil {
			return nil
		}
		return unix.SetsockoptInt(fd, unix.SOL_SOCKET, plain, socketBuffer)
	}
	return errors.Join(set(unix.SO_RCVBUFFORCE, unix.SO_RCVBUF),
		set(unix.SO_SNDBUFFORCE, unix.SO_SNDBUF))
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
