package line

import (
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/quietline/quietline/tunnel/fdwait"
)

// udpConn is a UDP socket of one peer. With a fixed endpoint it is connected,
// and the kernel drops what others send; a roaming one takes what comes and
// sends to whoever was adopted last, from the address that one has written to.
// Bursts go out in one call with UDP_SEGMENT and come in with UDP_GRO where the
// kernel has them (Linux 4.18 and 5.0).
type udpConn struct {
	file *fdwait.Descriptor
	// route is a connected socket on which the kernel is asked how wide the
	// path is; file itself, if that is connected.
	route *fdwait.Descriptor

	cfg     UDP
	local   netip.AddrPort
	segment bool         // the kernel knows UDP_SEGMENT
	refused atomic.Int64 // when it last failed on this route, Unix nanoseconds
	gather  bool         // the kernel knows UDP_GRO
	buffers Buffers

	six      bool        // IPv6 outside
	fragment atomic.Bool // the kernel may cut datagrams into fragments

	target atomic.Pointer[Endpoint] // where to; nil = connected
	sender Endpoint                 // of the burst read last; the reading goroutine's
	in     message                  // the reading goroutine's
	out    [writers]outMessage
	full   sync.Mutex // held by who waits for the socket to take more
}

// writers is how many goroutines can be in sendmsg at once; more wait.
const writers = 4

type outMessage struct {
	mu sync.Mutex
	message
}

// Endpoint is where a peer is: its address, and which of ours it writes to.
type Endpoint struct {
	Peer netip.AddrPort
	Own  netip.Addr // the zero Addr lets the routing choose
}

// retryAfter is how long bursts go out one datagram a call after the kernel
// has refused one: routes and their MTU change.
const retryAfter = time.Minute

// Offload tells whether bursts go out and come in with one call now.
func (u *udpConn) Offload() (send, receive bool) { return u.segments(), u.gather }

// Buffers tells how large the socket's buffers are.
func (u *udpConn) Buffers() Buffers { return u.buffers }

// segments tells whether UDP_SEGMENT may be used now.
func (u *udpConn) segments() bool {
	if !u.segment {
		return false
	}
	at := u.refused.Load()
	return at == 0 || time.Since(time.Unix(0, at)) >= retryAfter
}

// Read implements [Conn]. What ICMP reports about earlier datagrams is no
// error of reading: the peer may be down for a while. The call does not block,
// so it needs no hand-over of the processor: RawSyscall.
func (u *udpConn) Read(b *Burst, wait bool) error {
	fd, open := u.file.Enter()
	if !open {
		return net.ErrClosed
	}
	defer u.file.Leave()
	m := &u.in
	buf := b.Data[:cap(b.Data)]
	m.data(buf)
	for {
		m.receiver(u.cfg.Roam)
		n, errno := m.call(unix.SYS_RECVMSG, fd)
		switch {
		case errno == 0:
			u.took(b, buf[:n])
			return nil
		case errno == unix.EAGAIN && !wait:
			b.Data, b.Size = buf[:0], 0
			return nil
		case errno == unix.EAGAIN:
			if !u.file.Readable() {
				return net.ErrClosed
			}
		case !passing(errno):
			return os.NewSyscallError("recvmsg", errno)
		}
	}
}

// took describes what has been received.
func (u *udpConn) took(b *Burst, data []byte) {
	said := u.in.parse()
	b.Data, b.Size, b.TOS = data, len(data), said.tos
	if said.size > 0 {
		b.Size = said.size
	}
	if u.cfg.Roam {
		u.sender = Endpoint{Peer: u.in.peer(), Own: said.own}
	}
}

// Roams implements roaming.
func (u *udpConn) Roams() bool { return u.cfg.Roam }

// Sender implements roaming.
func (u *udpConn) Sender() Endpoint { return u.sender }

// Adopt implements roaming.
func (u *udpConn) Adopt() (Endpoint, bool) {
	was := *u.target.Load()
	if u.sender == was {
		return was, false
	}
	now := u.sender
	u.target.Store(&now)
	u.refused.Store(0) // it is another route
	_ = u.reroute(now.Peer)
	return now, now.Peer != was.Peer
}

// Remote is where the peer is now.
func (u *udpConn) Remote() netip.AddrPort {
	if to := u.target.Load(); to != nil {
		return to.Peer
	}
	return u.cfg.Remote
}

// Write implements [Conn].
func (u *udpConn) Write(b Burst) error { return u.WriteTo(b, u.target.Load()) }

// WriteTo implements roaming; to is nil on a connected socket.
func (u *udpConn) WriteTo(b Burst, to *Endpoint) error {
	fd, open := u.file.Enter()
	if !open {
		return net.ErrClosed
	}
	defer u.file.Leave()
	m := u.lockOut()
	defer m.mu.Unlock()
	m.address(to)
	defer m.data(nil)
	if len(b.Data) > b.Size && u.segments() && !u.fragment.Load() {
		errno := u.send(fd, m, b.Data, b.Size, b.TOS, to)
		if errno != unix.EIO && errno != unix.EINVAL {
			return result(errno)
		}
		// The device of this route cannot make the checksums, or the route's
		// MTU is below a segment.
		u.refused.Store(time.Now().UnixNano())
	}
	for data := b.Data; len(data) > 0; {
		n := min(b.Size, len(data))
		errno := u.send(fd, m, data[:n], 0, b.TOS, to)
		if foreign(errno) && to != nil && to.Own.IsValid() {
			// The address that the peer wrote to may be ours no longer.
			next := Endpoint{Peer: to.Peer}
			u.target.CompareAndSwap(to, &next)
			to = &next
			continue
		}
		if errno != 0 {
			return result(errno)
		}
		data = data[n:]
	}
	return nil
}

// foreign tells whether errno is what kernels say of a source address that is
// not theirs, or that the route does not take.
func foreign(errno syscall.Errno) bool {
	return errno == unix.EINVAL || errno == unix.ENETUNREACH || errno == unix.EADDRNOTAVAIL
}

// lockOut is a message that nobody else uses now.
func (u *udpConn) lockOut() *outMessage {
	for i := range u.out[:writers-1] {
		if m := &u.out[i]; m.mu.TryLock() {
			return m
		}
	}
	m := &u.out[writers-1]
	m.mu.Lock()
	return m
}

// result names the call in an error of it.
func result(errno syscall.Errno) error {
	if errno == 0 {
		return nil
	}
	return os.NewSyscallError("sendmsg", errno)
}

// send sends data as one datagram, or as datagrams of size bytes.
func (u *udpConn) send(fd uintptr, m *outMessage, data []byte, size int, tos uint8,
	to *Endpoint) syscall.Errno {
	m.data(data)
	m.beginControl()
	if size != 0 {
		m.addSegments(size)
	}
	if tos != 0 {
		m.addTOS(u.six, tos)
	}
	if to != nil && to.Own.IsValid() {
		m.addSource(to.Own)
	}
	again := true
	for {
		_, errno := m.call(unix.SYS_SENDMSG, fd)
		switch {
		case errno == unix.EINTR:
		case errno == unix.EAGAIN:
			if !u.waitOut() {
				return unix.EBADF
			}
		case errno == unix.ECONNREFUSED && again:
			again = false // that was the fate of an earlier one; this one has not been sent
		default:
			return errno
		}
	}
}

// waitOut waits until the socket takes more. One goroutine at a time may wait;
// the others go on trying after it.
func (u *udpConn) waitOut() bool {
	u.full.Lock()
	defer u.full.Unlock()
	return u.file.Writable()
}

// Close implements [Conn].
func (u *udpConn) Close() error {
	if u.route != u.file {
		_ = u.route.Close()
	}
	return u.file.Close() // waits until nobody uses it
}
