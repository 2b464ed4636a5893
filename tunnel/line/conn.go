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
	// Read waits for datagrams and fills b.Data, up to its capacity, and
	// b.Size. [os.ErrClosed] or [net.ErrClosed] after Close; any other error
	// ends the line.
	Read(b *Burst) error
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

// udpConn is a connected UDP socket: the kernel drops what others send.
type udpConn struct {
	*net.UDPConn
}

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
	if err := raiseBuffers(c); err != nil {
		_ = c.Close()
		return nil, fmt.Errorf("open UDP socket: %w", err)
	}
	return &udpConn{c}, nil
}

// raiseBuffers asks for large socket buffers: above the system's limit where
// that is allowed, else up to it.
func raiseBuffers(c *net.UDPConn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	err = raw.Control(func(fd uintptr) {
		set := func(force, plain int) {
			if unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, force, socketBuffer) != nil {
				failed = errors.Join(failed,
					unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, plain, socketBuffer))
			}
		}
		set(unix.SO_RCVBUFFORCE, unix.SO_RCVBUF)
		set(unix.SO_SNDBUFFORCE, unix.SO_SNDBUF)
	})
	return errors.Join(err, failed)
}

// Read implements [Conn]. What ICMP reports about earlier datagrams is no
// error of reading: the peer may be down for a while.
func (c *udpConn) Read(b *Burst) error {
	for {
		n, err := c.UDPConn.Read(b.Data[:cap(b.Data)])
		if err == nil {
			b.Data, b.Size = b.Data[:n], n
			return nil
		}
		if !passing(err) {
			return err
		}
	}
}

// Write implements [Conn].
func (c *udpConn) Write(b Burst) error {
	for data := b.Data; len(data) > 0; {
		n := min(b.Size, len(data))
		if err := c.send(data[:n]); err != nil {
			return err
		}
		data = data[n:]
	}
	return nil
}

func (c *udpConn) send(datagram []byte) error {
	_, err := c.UDPConn.Write(datagram)
	if errors.Is(err, syscall.ECONNREFUSED) {
		// That was the fate of an earlier one; this one has not been sent.
		_, err = c.UDPConn.Write(datagram)
	}
	return err
}

// passing tells whether err says something about the path, not the socket.
func passing(err error) bool {
	var errno syscall.Errno
	if !errors.As(err, &errno) {
		return false
	}
	switch errno {
	case unix.ECONNREFUSED, unix.EHOSTUNREACH, unix.ENETUNREACH, unix.EHOSTDOWN, unix.ENETDOWN,
		unix.EMSGSIZE, unix.ENOPROTOOPT, unix.EPROTO, unix.EACCES, unix.EPERM, unix.ETIMEDOUT,
		unix.EINTR, unix.EAGAIN, unix.ENOBUFS:
		return true
	}
	return false
}
