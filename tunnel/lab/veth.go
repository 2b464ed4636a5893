package lab

import (
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"unsafe"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// End is one end of a virtual cable.
type End struct {
	Namespace *Namespace
	Name      string // interface name, at most 15 bytes
	Addresses []netip.Prefix
	Routes    []Route
	MTU       int // bytes; 0 = 1500
	// NoOffload takes segmentation and checksum offload from the interface, so
	// that every packet travels by itself, as on a plain network card.
	NoOffload bool
	// NoSegmentation takes only segmentation from the interface: as a common
	// network card, which makes checksums but has no UDP segmentation.
	NoSegmentation bool
	// GRO lets the interface join packets that come in a row, as network cards
	// do unless told otherwise; a virtual cable does not.
	GRO bool
}

// Route is a network reached through a neighbour on the cable.
type Route struct {
	To  netip.Prefix
	Via netip.Addr
}

// Veth joins two namespaces by a virtual Ethernet cable and brings both ends
// up. The cable goes with either namespace.
func Veth(a, b End) error {
	if err := a.Namespace.Do(func() error { return makeVeth(a, b) }); err != nil {
		return fmt.Errorf("make cable %s to %s: %w", a.Name, b.Name, err)
	}
	// Both are up before routes are set, which need a carrier.
	for _, e := range []End{a, b} {
		if err := e.Namespace.Do(e.raise); err != nil {
			return fmt.Errorf("set up %s in %s: %w", e.Name, e.Namespace.name, err)
		}
	}
	for _, e := range []End{a, b} {
		if err := e.Namespace.Do(e.route); err != nil {
			return fmt.Errorf("set up %s in %s: %w", e.Name, e.Namespace.name, err)
		}
	}
	return nil
}

func (e End) mtu() int {
	if e.MTU == 0 {
		return 1500
	}
	return e.MTU
}

func makeVeth(a, b End) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = a.Name, a.mtu()
	return netlink.LinkAdd(&netlink.Veth{
		LinkAttrs:     attrs,
		PeerName:      b.Name,
		PeerMTU:       uint32(b.mtu()),
		PeerNamespace: netlink.NsFd(b.Namespace.file.Fd()),
	})
}

func (e End) raise() error {
	link, err := netlink.LinkByName(e.Name)
	if err != nil {
		return err
	}
	for _, p := range e.Addresses {
		addr := &netlink.Addr{IPNet: ipNet(p)}
		if p.Addr().Is6() {
			// Duplicate address detection would hold the address back for a second.
			addr.Flags = unix.IFA_F_NODAD
		}
		if err := netlink.AddrAdd(link, addr); err != nil {
			return fmt.Errorf("add address %s: %w", p, err)
		}
	}
	if e.NoOffload {
		// Segmentation offload builds on checksum offload, and goes with it.
		if err := ethtool(e.Name, unix.ETHTOOL_STXCSUM, 0); err != nil {
			return fmt.Errorf("take offload away: %w", err)
		}
	}
	if e.NoSegmentation {
		// What has more is cut before it comes to the interface. And while the
		// sending end could segment TCP, a cable joins nothing at the other
		// (veth_skb_is_eligible_for_gro of drivers/net/veth.c).
		err := netlink.LinkSetGSOMaxSegs(link, 1)
		if err == nil {
			err = ethtool(e.Name, unix.ETHTOOL_STSO, 0)
		}
		if err != nil {
			return fmt.Errorf("take segmentation away: %w", err)
		}
	}
	if e.GRO {
		if err := ethtool(e.Name, unix.ETHTOOL_SGRO, 1); err != nil {
			return fmt.Errorf("switch GRO on: %w", err)
		}
	}
	return netlink.LinkSetUp(link)
}

// ethtool sets one value of an interface.
func ethtool(name string, command, data uint32) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	value := struct{ command, data uint32 }{command, data} // struct ethtool_value
	// struct ifreq with a pointer, as SIOCETHTOOL wants it (linux/sockios.h).
	var request struct {
		name [unix.IFNAMSIZ]byte
		data unsafe.Pointer
		_    [24 - unsafe.Sizeof(uintptr(0))]byte
	}
	copy(request.name[:unix.IFNAMSIZ-1], name)
	request.data = unsafe.Pointer(&value)
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCETHTOOL,
		uintptr(unsafe.Pointer(&request)))
	runtime.KeepAlive(&value)
	if errno != 0 {
		return errno
	}
	return nil
}

func (e End) route() error {
	for _, r := range e.Routes {
		err := netlink.RouteAdd(&netlink.Route{Dst: ipNet(r.To.Masked()), Gw: r.Via.AsSlice()})
		if err != nil {
			return fmt.Errorf("add route %s via %s: %w", r.To, r.Via, err)
		}
	}
	return nil
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
