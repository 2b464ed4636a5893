package line

import (
	"encoding/binary"
	"net/netip"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// message is the arguments of recvmsg or sendmsg, kept so that a call allocates
// nothing.
type message struct {
	header  unix.Msghdr
	iov     unix.Iovec
	control [128]byte // UDP_SEGMENT or UDP_GRO, TOS, packet information
	name    unix.RawSockaddrInet6
}

// init ties the parts together; a message must not move afterwards.
func (m *message) init() {
	m.header.Iov = &m.iov
	m.header.SetIovlen(1)
}

// data makes b what is sent, or where is received to.
func (m *message) data(b []byte) {
	m.iov.Base = unsafe.SliceData(b)
	m.iov.SetLen(len(b))
}

// call is one system call that does not block.
func (m *message) call(trap, fd uintptr) (int, syscall.Errno) {
	n, _, errno := syscall.RawSyscall(trap, fd, uintptr(unsafe.Pointer(&m.header)), 0)
	return int(n), errno
}

// receiver makes room for what comes beside the data.
func (m *message) receiver(named bool) {
	m.header.Control = &m.control[0]
	m.header.SetControllen(len(m.control))
	if named {
		m.header.Name = (*byte)(unsafe.Pointer(&m.name))
		m.header.Namelen = uint32(unsafe.Sizeof(m.name))
	}
}

// beside is what the kernel says of received data.
type beside struct {
	size int        // of a datagram, UDP_GRO; 0 = it is one
	tos  uint8      // or traffic class
	own  netip.Addr // where it was sent to
}

// parse reads the control messages.
func (m *message) parse() (b beside) {
	const head = unix.SizeofCmsghdr
	for c := m.control[:m.header.Controllen]; len(c) >= head; {
		h := (*unix.Cmsghdr)(unsafe.Pointer(&c[0]))
		n := int(h.Len)
		if n < head || n > len(c) {
			return b
		}
		data := c[head:n]
		switch level, kind := h.Level, h.Type; {
		case level == unix.SOL_UDP && kind == unix.UDP_GRO && len(data) >= 4:
			b.size = int(binary.NativeEndian.Uint32(data))
		case level == unix.IPPROTO_IP && kind == unix.IP_TOS && len(data) >= 1:
			b.tos = data[0]
		case level == unix.IPPROTO_IPV6 && kind == unix.IPV6_TCLASS && len(data) >= 4:
			b.tos = uint8(binary.NativeEndian.Uint32(data))
		case level == unix.IPPROTO_IP && kind == unix.IP_PKTINFO && len(data) >= 12:
			b.own = netip.AddrFrom4([4]byte(data[8:12])) // ipi_addr of struct in_pktinfo
		case level == unix.IPPROTO_IPV6 && kind == unix.IPV6_PKTINFO && len(data) >= 20:
			b.own = netip.AddrFrom16([16]byte(data[:16]))
		}
		c = c[min(len(c), unix.CmsgSpace(len(data))):]
	}
	return b
}

// peer is the sender of received data.
func (m *message) peer() netip.AddrPort {
	n := &m.name
	port := uint16(n.Port)
	port = port>>8 | port<<8 // network byte order; machines are little endian or this is the same
	if !littleEndian {
		port = n.Port
	}
	if n.Family == unix.AF_INET {
		four := (*unix.RawSockaddrInet4)(unsafe.Pointer(n))
		return netip.AddrPortFrom(netip.AddrFrom4(four.Addr), port)
	}
	addr := netip.AddrFrom16(n.Addr)
	if n.Scope_id != 0 {
		addr = addr.WithZone(zoneName(n.Scope_id))
	}
	return netip.AddrPortFrom(addr, port)
}

// beginControl empties the control messages of a message to send.
func (m *message) beginControl() { m.header.Control, m.header.Controllen = nil, 0 }

// add appends a control message with room for n bytes and returns these.
func (m *message) add(level, kind int32, n int) []byte {
	at := int(m.header.Controllen)
	h := (*unix.Cmsghdr)(unsafe.Pointer(&m.control[at]))
	h.Level, h.Type = level, kind
	h.SetLen(unix.CmsgLen(n))
	m.header.Control = &m.control[0]
	m.header.SetControllen(at + unix.CmsgSpace(n))
	data := m.control[at+unix.SizeofCmsghdr:][:n]
	clear(data)
	return data
}

// addSegments asks for datagrams of size bytes each.
func (m *message) addSegments(size int) {
	binary.NativeEndian.PutUint16(m.add(unix.SOL_UDP, unix.UDP_SEGMENT, 2), uint16(size))
}

// addTOS sets the type of service or traffic class.
func (m *message) addTOS(six bool, tos uint8) {
	level, kind := int32(unix.IPPROTO_IP), int32(unix.IP_TOS)
	if six {
		level, kind = unix.IPPROTO_IPV6, unix.IPV6_TCLASS
	}
	binary.NativeEndian.PutUint32(m.add(level, kind, 4), uint32(tos))
}

// addSource sets the address to send from.
func (m *message) addSource(own netip.Addr) {
	if own.Is4() {
		b := own.As4()
		copy(m.add(unix.IPPROTO_IP, unix.IP_PKTINFO, 12)[4:8], b[:]) // ipi_spec_dst
		return
	}
	b := own.As16()
	copy(m.add(unix.IPPROTO_IPV6, unix.IPV6_PKTINFO, 20), b[:]) // ipi6_addr
}

// littleEndian tells how this machine orders bytes.
var littleEndian = binary.NativeEndian.Uint16([]byte{1, 0}) == 1
