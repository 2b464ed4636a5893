package tun

import (
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/quietline/quietline/tunnel/wire"
)

// link is the kernel's side of an interface. The handle keeps a socket in the
// namespace where it was made, so that later calls from any thread reach it.
type link struct {
	handle *netlink.Handle
	dev    netlink.Link
}

// setUp finds the interface cfg names and gives it what cfg says.
func setUp(cfg Config) (*link, error) {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open netlink: %w", err)
	}
	dev, err := h.LinkByName(cfg.Name)
	if err != nil {
		h.Close()
		return nil, fmt.Errorf("find interface: %w", err)
	}
	l := &link{handle: h, dev: dev}
	if err := l.apply(cfg); err != nil {
		h.Close()
		return nil, err
	}
	return l, nil
}

func (l *link) apply(cfg Config) error {
	if err := l.setMTU(cfg.MTU); err != nil {
		return err
	}
	// Without this the kernel sends router solicitations and multicast reports
	// of a link-local address that nobody asked for through the line. A kernel
	// without IPv6 refuses it, and then there is nothing to prevent.
	_ = l.handle.LinkSetIP6AddrGenMode(l.dev, nl.IN6_ADDR_GEN_MODE_NONE)
	for _, p := range cfg.Addresses {
		if err := l.handle.AddrAdd(l.dev, address(p)); err != nil {
			return fmt.Errorf("add address %s: %w", p, err)
		}
	}
	if err := l.handle.LinkSetUp(l.dev); err != nil {
		return fmt.Errorf("bring interface up: %w", err)
	}
	for _, p := range cfg.Routes {
		if err := l.addRoute(p); err != nil {
			return err
		}
	}
	return nil
}

func (l *link) setMTU(mtu int) error {
	if err := l.handle.LinkSetMTU(l.dev, mtu); err != nil {
		return fmt.Errorf("set MTU %d: %w", mtu, err)
	}
	return nil
}

// fitSuperFrames makes the kernel build super-frames that go out in one call
// each: no more segments than UDP_SEGMENT takes, no more bytes than a UDP
// datagram has. A kernel that will not (before 4.16) costs speed only: the rest
// of a frame then goes in a call of its own.
func (l *link) fitSuperFrames(mtu int) {
	const maxSegments = 64 // UDP_MAX_SEGMENTS of linux/udp.h
	const tcpIPv4 = 40     // a segment's payload is the MTU less so much at most
	datagram := mtu + wire.HeaderLen + wire.PrefixLen + wire.TagLen
	segments := min(maxSegments, wire.MaxDatagram/datagram)
	_ = l.handle.LinkSetGSOMaxSize(l.dev, segments*(mtu-tcpIPv4))
}

// addRoute sends the network p into the interface. It replaces no route that
// stands already: whose it is cannot be known here.
func (l *link) addRoute(p netip.Prefix) error {
	err := l.handle.RouteAdd(&netlink.Route{
		LinkIndex: l.dev.Attrs().Index,
		Dst:       ipNet(p.Masked()),
		Scope:     netlink.SCOPE_LINK,
	})
	if errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("add route %s: %w: another route to it stands already", p, err)
	}
	if err != nil {
		return fmt.Errorf("add route %s: %w", p, err)
	}
	return nil
}

func address(p netip.Prefix) *netlink.Addr {
	a := &netlink.Addr{IPNet: ipNet(p)}
	if p.Addr().Is6() {
		a.Flags = unix.IFA_F_NODAD // there is no neighbour that could have the address
	}
	return a
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{
		IP:   p.Addr().AsSlice(),
		Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen()),
	}
}
