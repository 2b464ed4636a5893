package line

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strconv"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/quietline/quietline/tunnel/fdwait"
)

// UDP says what socket to open.
type UDP struct {
	Local  netip.AddrPort // zero = any address, a port of the kernel's choice
	Remote netip.AddrPort // where the peer is; at first, if it roams
	// Roam lets the peer be where its newest authentic record came from, in
	// Remote's address family, and answers from the address that it wrote to.
	// Otherwise its endpoint is fixed.
	Roam bool
	// NoGSO and NoGRO send and receive datagrams one by one, for routes whose
	// devices or drivers do it wrong.
	NoGSO, NoGRO bool
}

// Buffers are the sizes of a socket's buffers, in bytes of data.
type Buffers struct {
	Send, Receive int
}

// DialUDP opens the socket of a line between two fixed endpoints, see
// [OpenUDP].
func DialUDP(local, remote netip.AddrPort) (Conn, error) {
	return OpenUDP(UDP{Local: local, Remote: remote})
}

// OpenUDP opens the socket of a line. It belongs to the network namespace of
// the calling thread.
func OpenUDP(cfg UDP) (Conn, error) {
	u, err := openUDP(cfg)
	if err != nil {
		return nil, fmt.Errorf("open UDP socket: %w", err)
	}
	return u, nil
}

func openUDP(cfg UDP) (*udpConn, error) {
	if !cfg.Remote.IsValid() || cfg.Remote.Port() == 0 {
		return nil, fmt.Errorf("%w: remote endpoint %s", ErrConfig, cfg.Remote)
	}
	cfg.Remote = netip.AddrPortFrom(cfg.Remote.Addr().Unmap(), cfg.Remote.Port())
	u := &udpConn{cfg: cfg, six: cfg.Remote.Addr().Is6()}
	local, err := u.bindTo()
	if err != nil {
		return nil, err
	}
	if u.file, err = u.socket(&local); err != nil {
		return nil, err
	}
	u.route = u.file
	if cfg.Roam {
		u.target.Store(&Endpoint{Peer: cfg.Remote})
		if u.route, err = u.socket(nil); err != nil {
			return nil, errors.Join(err, u.file.Close())
		}
	}
	if err := u.setUp(); err != nil {
		return nil, errors.Join(err, u.Close())
	}
	u.in.init()
	for i := range u.out {
		u.out[i].init()
	}
	return u, nil
}

// bindTo is the local endpoint in the remote's family.
func (u *udpConn) bindTo() (netip.AddrPort, error) {
	local := u.cfg.Local
	addr := local.Addr().Unmap()
	if !addr.IsValid() || addr.IsUnspecified() {
		addr = netip.IPv4Unspecified()
		if u.six {
			addr = netip.IPv6Unspecified()
		}
	}
	if addr.Is6() != u.six {
		return local, fmt.Errorf("%w: local %s and remote %s are of unlike families", ErrConfig,
			local, u.cfg.Remote)
	}
	return netip.AddrPortFrom(addr, local.Port()), nil
}

// socket opens a socket, bound to local if that is not nil.
func (u *udpConn) socket(local *netip.AddrPort) (*fdwait.Descriptor, error) {
	family := unix.AF_INET
	if u.six {
		family = unix.AF_INET6
	}
	fd, err := unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	if u.six {
		err = os.NewSyscallError("setsockopt",
			unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1))
	}
	if local != nil && err == nil {
		if err = unix.Bind(fd, sockaddr(*local)); err != nil {
			err = fmt.Errorf("bind to %s: %w", *local, err)
		}
	}
	var d *fdwait.Descriptor
	if err == nil {
		d, err = fdwait.Own(fd)
	}
	if err != nil {
		_ = unix.Close(fd)
		return nil, err
	}
	return d, nil
}

// setUp sets options and connects.
func (u *udpConn) setUp() error {
	fd, _ := u.file.Enter() // nobody closes it yet
	defer u.file.Leave()
	s := int(fd)
	err := errors.Join(raiseBuffers(s), u.AllowFragments(false), u.askBeside(s))
	u.buffers = Buffers{Send: bufferSize(s, unix.SO_SNDBUF), Receive: bufferSize(s, unix.SO_RCVBUF)}
	_, serr := unix.GetsockoptInt(s, unix.SOL_UDP, unix.UDP_SEGMENT)
	u.segment = serr == nil && !u.cfg.NoGSO
	u.gather = !u.cfg.NoGRO && unix.SetsockoptInt(s, unix.SOL_UDP, unix.UDP_GRO, 1) == nil
	if err != nil {
		return err
	}
	if err := u.reroute(u.cfg.Remote); err != nil {
		return err
	}
	name, err := unix.Getsockname(s)
	if err != nil {
		return os.NewSyscallError("getsockname", err)
	}
	switch a := name.(type) {
	case *unix.SockaddrInet4:
		u.local = netip.AddrPortFrom(netip.AddrFrom4(a.Addr), uint16(a.Port))
	case *unix.SockaddrInet6:
		u.local = netip.AddrPortFrom(netip.AddrFrom16(a.Addr), uint16(a.Port))
	}
	return nil
}

// askBeside asks for what is to come beside the data.
func (u *udpConn) askBeside(fd int) error {
	level, tos, info := unix.IPPROTO_IP, unix.IP_RECVTOS, unix.IP_PKTINFO
	if u.six {
		level, tos, info = unix.IPPROTO_IPV6, unix.IPV6_RECVTCLASS, unix.IPV6_RECVPKTINFO
	}
	err := unix.SetsockoptInt(fd, level, tos, 1)
	if u.cfg.Roam && err == nil {
		err = unix.SetsockoptInt(fd, level, info, 1)
	}
	return os.NewSyscallError("setsockopt", err)
}

// reroute connects the route's socket to where the peer is.
func (u *udpConn) reroute(peer netip.AddrPort) error {
	fd, open := u.route.Enter()
	if !open {
		return net.ErrClosed
	}
	defer u.route.Leave()
	if err := unix.Connect(int(fd), sockaddr(peer)); err != nil {
		if u.route != u.file {
			return nil // it has no route now; it may have one later
		}
		return fmt.Errorf("connect to %s: %w", peer, err)
	}
	return nil
}

// sockaddr is an address as the kernel takes it.
func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16(),
		ZoneId: zoneIndex(a.Addr().Zone())}
}

// address makes to where a message goes; nil is where the socket is connected.
func (m *message) address(to *Endpoint) {
	if to == nil {
		m.header.Name, m.header.Namelen = nil, 0
		return
	}
	port := to.Peer.Port()
	if littleEndian {
		port = port>>8 | port<<8
	}
	m.header.Name = (*byte)(unsafe.Pointer(&m.name))
	if addr := to.Peer.Addr(); addr.Is4() {
		four := (*unix.RawSockaddrInet4)(unsafe.Pointer(&m.name))
		*four = unix.RawSockaddrInet4{Family: unix.AF_INET, Port: port, Addr: addr.As4()}
		m.header.Namelen = unix.SizeofSockaddrInet4
	} else {
		m.name = unix.RawSockaddrInet6{Family: unix.AF_INET6, Port: port, Addr: addr.As16(),
			Scope_id: zoneIndex(addr.Zone())}
		m.header.Namelen = unix.SizeofSockaddrInet6
	}
}

// zoneIndex is the number of an interface; zoneName keeps to numbers, so that
// both work without asking the kernel for names on the packet path.
func zoneIndex(zone string) uint32 {
	if zone == "" {
		return 0
	}
	if n, err := strconv.ParseUint(zone, 10, 32); err == nil {
		return uint32(n)
	}
	if i, err := net.InterfaceByName(zone); err == nil {
		return uint32(i.Index)
	}
	return 0
}

func zoneName(index uint32) string { return strconv.FormatUint(uint64(index), 10) }

// socketBuffer is asked for each socket and direction, in bytes. With the
// defaults of most systems a burst of records overflows the receive buffer;
// 7 MiB brought wireguard-go from 4.1 to 5.3 Gbit/s and its retransmissions to
// zero (its commit f26efb6).
const socketBuffer = 7 << 20

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

// bufferSize is what the kernel has granted; it reports twice as much, for its
// own book-keeping (socket(7)).
func bufferSize(fd, option int) int {
	n, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, option)
	if err != nil {
		return 0
	}
	return n / 2
}
