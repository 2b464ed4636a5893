package line

import (
	"encoding/binary"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/quietline/quietline/tunnel/fdwait"
)

// udpConn is a connected UDP socket: the kernel drops what others send. Bursts
// go out in one call with UDP_SEGMENT and come in with UDP_GRO where the kernel
// has them (Linux 4.18 and 5.0).
type udpConn struct {
	conn *net.UDPConn
	raw  syscall.RawConn

	waiter *fdwait.Waiter // of the reading goroutine

	segment bool         // the kernel knows UDP_SEGMENT
	refused atomic.Int64 // when it last failed on this route, Unix nanoseconds
	gather  bool         // the kernel knows UDP_GRO

	remote   netip.Addr
	six      bool        // IPv6 outside
	fragment atomic.Bool // the kernel may cut datagrams into fragments

	in  message // the reading goroutine's
	mu  sync.Mutex
	out message // guarded by mu: the lines' loops and owner write
}

// message is the arguments and results of recvmsg or sendmsg. The function is
// stored because a closure made on the way would be an allocation a call.
type message struct {
	call    func(fd uintptr) bool
	header  unix.Msghdr
	iov     unix.Iovec
	control [64]byte
	wait    bool // for something to receive
	n       int
	errno   syscall.Errno
}

// retryAfter is how long bursts go out one datagram a call after the kernel
// has refused one: routes and their MTU change.
const retryAfter = time.Minute

func newUDP(c *net.UDPConn) (*udpConn, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	waiter, err := fdwait.New()
	if err != nil {
		return nil, err
	}
	peer := c.RemoteAddr().(*net.UDPAddr).AddrPort().Addr()
	u := &udpConn{conn: c, raw: raw, waiter: waiter, remote: peer,
		six: !peer.Unmap().Is4()}
	var failed error
	err = raw.Control(func(fd uintptr) {
		failed = raiseBuffers(int(fd))
		_, serr := unix.GetsockoptInt(int(fd), unix.SOL_UDP, unix.UDP_SEGMENT)
		u.segment = serr == nil
		u.gather = unix.SetsockoptInt(int(fd), unix.SOL_UDP, unix.UDP_GRO, 1) == nil
	})
	if err == nil {
		err = failed
	}
	if err == nil {
		err = u.AllowFragments(false)
	}
	u.in.call, u.out.call = u.receive, u.send
	for _, m := range []*message{&u.in, &u.out} {
		m.header.Iov = &m.iov
		m.header.SetIovlen(1)
	}
	if err != nil {
		waiter.Close()
		return nil, err
	}
	return u, nil
}

// Offload tells whether bursts go out and come in with one call now.
func (u *udpConn) Offload() (send, receive bool) { return u.segments(), u.gather }

// segments tells whether UDP_SEGMENT may be used now.
func (u *udpConn) segments() bool {
	if !u.segment {
		return false
	}
	at := u.refused.Load()
	return at == 0 || time.Since(time.Unix(0, at)) >= retryAfter
}

// Read implements [Conn]. What ICMP reports about earlier datagrams is no
// error of reading: the peer may be down for a while.
func (u *udpConn) Read(b *Burst, wait bool) error {
	m := &u.in
	m.wait = wait
	buf := b.Data[:cap(b.Data)]
	m.iov.Base = unsafe.SliceData(buf)
	m.iov.SetLen(len(buf))
	err := u.raw.Read(m.call)
	m.iov.Base = nil
	switch {
	case err != nil:
		return err
	case m.errno == unix.EAGAIN:
		b.Data, b.Size = buf[:0], 0
		return nil
	case m.errno == unix.EBADF:
		return net.ErrClosed
	case m.errno != 0:
		return os.NewSyscallError("recvmsg", m.errno)
	}
	b.Data, b.Size = buf[:m.n], m.n
	if size := m.segmentSize(); size > 0 {
		b.Size = size
	}
	return nil
}

// receive is one recvmsg, if asked to after waiting for something to receive. The
// call does not block, so it needs no hand-over of the processor: RawSyscall.
func (u *udpConn) receive(fd uintptr) bool {
	m := &u.in
	m.header.Control = &m.control[0]
	for {
		m.header.SetControllen(len(m.control))
		n, _, errno := syscall.RawSyscall(unix.SYS_RECVMSG, fd,
			uintptr(unsafe.Pointer(&m.header)), 0)
		switch {
		case errno == unix.EAGAIN && m.wait:
			if !u.waiter.Readable(fd) {
				m.errno = unix.EBADF
				return true
			}
			continue
		case passing(errno):
			continue
		}
		m.n, m.errno = int(n), errno
		return true
	}
}

// segmentSize reads the UDP_GRO control message; 0 if there is none.
func (m *message) segmentSize() int {
	const head = unix.SizeofCmsghdr
	c := m.control[:m.header.Controllen]
	if len(c) < head+4 {
		return 0
	}
	h := (*unix.Cmsghdr)(unsafe.Pointer(&c[0]))
	if h.Level != unix.SOL_UDP || h.Type != unix.UDP_GRO {
		return 0
	}
	return int(binary.NativeEndian.Uint32(c[head:]))
}

// Write implements [Conn].
func (u *udpConn) Write(b Burst) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	if len(b.Data) > b.Size && u.segments() && !u.fragment.Load() {
		err := u.sendmsg(b.Data, b.Size)
		if err != unix.EIO && err != unix.EINVAL {
			return result(err)
		}
		// The device of this route cannot make the checksums, or the route's
		// MTU is below a segment.
		u.refused.Store(time.Now().UnixNano())
	}
	for data := b.Data; len(data) > 0; {
		n := min(b.Size, len(data))
		if err := u.sendmsg(data[:n], 0); err != nil {
			return result(err)
		}
		data = data[n:]
	}
	return nil
}

// result names the call in an error of it.
func result(err error) error {
	if errno, ok := err.(syscall.Errno); ok {
		return os.NewSyscallError("sendmsg", errno)
	}
	return err
}

// sendmsg sends data as one datagram, or as datagrams of size bytes.
func (u *udpConn) sendmsg(data []byte, size int) error {
	m := &u.out
	m.iov.Base = unsafe.SliceData(data)
	m.iov.SetLen(len(data))
	m.setSegmentSize(size)
	err := u.raw.Write(m.call)
	if err == nil && m.errno == unix.ECONNREFUSED {
		// That was the fate of an earlier one; this one has not been sent.
		err = u.raw.Write(m.call)
	}
	m.iov.Base = nil
	if err == nil && m.errno != 0 {
		return m.errno
	}
	return err
}

// setSegmentSize writes the UDP_SEGMENT control message; none for 0.
func (m *message) setSegmentSize(size int) {
	if size == 0 {
		m.header.Control = nil
		m.header.SetControllen(0)
		return
	}
	h := (*unix.Cmsghdr)(unsafe.Pointer(&m.control[0]))
	h.Level, h.Type = unix.SOL_UDP, unix.UDP_SEGMENT
	h.SetLen(unix.CmsgLen(2))
	binary.NativeEndian.PutUint16(m.control[unix.SizeofCmsghdr:], uint16(size))
	m.header.Control = &m.control[0]
	m.header.SetControllen(unix.CmsgSpace(2))
}

// send is one sendmsg; false asks the runtime to wait.
func (u *udpConn) send(fd uintptr) bool {
	m := &u.out
	for {
		_, _, m.errno = syscall.RawSyscall(unix.SYS_SENDMSG, fd,
			uintptr(unsafe.Pointer(&m.header)), 0)
		if m.errno != unix.EINTR {
			return m.errno != unix.EAGAIN
		}
	}
}

// Close implements [Conn].
func (u *udpConn) Close() error {
	u.waiter.End()
	defer u.waiter.Close()
	return u.conn.Close() // waits until nobody reads
}
