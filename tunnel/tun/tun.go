// Package tun holds the devices that carry IP packets between a line and its
// host, behind [tunnel.Device].
//
// [Open] makes a TUN interface of the kernel and gives it addresses, routes
// and an MTU; [Memory] is a device without a kernel, for tests. The back ends:
//
//	fast    own opener: super-frames of up to 64 KiB whole, checksums left to
//	        whoever sends the packet on a real wire
//	water   songgao/water: one packet a call, works on every Linux
//
// "auto" takes fast where the kernel has what it needs, else water.
//
// A caller must keep in mind that the interface lives in the network namespace
// of the thread that calls Open, and ends with Close or with the process.
package tun

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"runtime"

	"golang.org/x/sys/unix"

	"github.com/quietline/quietline/tunnel"
)

// Config says what interface to make.
type Config struct {
	Name      string         // interface name, at most 15 bytes, e.g. "ql0"
	Addresses []netip.Prefix // own addresses on the interface
	Routes    []netip.Prefix // networks behind the other end
	MTU       int            // bytes; from wire.InnerMTU
	// Backend is "auto" or empty, which takes the best that works here, or the
	// name of one.
	Backend string
	// Queues of the fast back end, each read by a goroutine of its own; 0 lets
	// it choose, 1 to MaxQueues.
	Queues  int
	Offload Offload // of the fast back end
}

// Offload switches off what a kernel or its drivers do wrong. The zero value
// takes all that there is.
type Offload struct {
	NoTSO      bool // no super-frames of TCP; UDP's go with them
	NoUSO      bool // no super-frames of UDP
	NoChecksum bool // checksums are finished by the sending host; no super-frames
}

// MaxQueues is the most queues that a device may have: far above the number of
// cores that one line can use.
const MaxQueues = 16

// perQueue is how many processors the machine has for each queue that the
// device takes by itself. A queue is a core that seals; the host's own TCP, the
// direction that opens, and the load need as much again and more.
const perQueue = 4

// autoQueues bounds what the device takes by itself: one core seals 12 Gbit/s
// or so, and the direction that opens has one core alone.
const autoQueues = 4

// queues is how many queues to open, and why.
func (c Config) queues() (n int, why string) {
	if c.Queues > 0 {
		return c.Queues, fmt.Sprintf("%d queues as asked for", c.Queues)
	}
	cores := runtime.NumCPU()
	n = min(max(cores/perQueue, 1), autoQueues)
	return n, fmt.Sprintf("queues: %d on %d processors", n, cores)
}

const (
	// node is the kernel's door to TUN devices.
	node = "/dev/net/tun"
	// maxName is IFNAMSIZ of linux/if.h less the closing zero.
	maxName = unix.IFNAMSIZ - 1
	minIPv4 = 68   // RFC 791 section 3.2: every network carries so much unfragmented
	minIPv6 = 1280 // RFC 8200 section 5
	maxMTU  = 65535
)

// Open makes the interface, sets it up and brings it up. The error says what
// the user can do about it.
func Open(cfg Config) (tunnel.Device, error) {
	if err := cfg.check(); err != nil {
		return nil, fmt.Errorf("open TUN %s: %w", cfg.Name, err)
	}
	var d tunnel.Device
	var err error
	switch cfg.Backend {
	case "", "auto":
		d, err = openAuto(cfg)
	case "fast":
		d, err = openFast(cfg)
	case "water":
		d, err = openWater(cfg, "asked for by name")
	default:
		err = fmt.Errorf("%w: back end %q is not known", ErrConfig, cfg.Backend)
	}
	if err != nil {
		return nil, fmt.Errorf("open TUN %s: %w", cfg.Name, explain(err))
	}
	return d, nil
}

// openAuto opens the fast back end, and water where the kernel has no virtio
// header for TUN devices.
func openAuto(cfg Config) (tunnel.Device, error) {
	d, err := openFast(cfg)
	if errors.Is(err, unix.EINVAL) {
		return openWater(cfg, fmt.Sprintf("fast is not possible: %v", err))
	}
	if err != nil {
		return nil, err
	}
	return d, nil
}

func (c Config) check() error {
	if c.Name == "" || len(c.Name) > maxName {
		return fmt.Errorf("%w: name %q has not 1 to %d bytes", ErrConfig, c.Name, maxName)
	}
	for _, p := range append(append([]netip.Prefix{}, c.Addresses...), c.Routes...) {
		if !p.IsValid() {
			return fmt.Errorf("%w: an address or route is not valid", ErrConfig)
		}
		if err := checkMTU(c.MTU, p.Addr()); err != nil {
			return err
		}
	}
	if c.Queues < 0 || c.Queues > MaxQueues {
		return fmt.Errorf("%w: %d queues are not 0 to %d", ErrConfig, c.Queues, MaxQueues)
	}
	return checkMTU(c.MTU, netip.IPv4Unspecified())
}

// checkMTU refuses an MTU that cannot carry the family of addr.
func checkMTU(mtu int, addr netip.Addr) error {
	least, family := minIPv6, "IPv6"
	if addr.Unmap().Is4() {
		least, family = minIPv4, "IPv4"
	}
	if mtu < least || mtu > maxMTU {
		return fmt.Errorf("%w: MTU %d is not in %d to %d, as %s needs",
			ErrConfig, mtu, least, maxMTU, family)
	}
	return nil
}

// explain adds to an error of the kernel what it means here and what helps.
func explain(err error) error {
	switch {
	case errors.Is(err, ErrConfig):
		return err
	case errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) ||
		errors.Is(err, unix.ENXIO):
		return fmt.Errorf("%w: %w; try: modprobe tun, in a container: --device %s",
			ErrNoTUN, err, node)
	case errors.Is(err, unix.EACCES):
		return fmt.Errorf("%w: %w; this user may not open %s: try sudo", ErrPermission, err, node)
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("%w: %w; CAP_NET_ADMIN is needed: try sudo, in a service:"+
			" AmbientCapabilities=CAP_NET_ADMIN", ErrPermission, err)
	case errors.Is(err, unix.EBUSY):
		return fmt.Errorf("%w; another process holds an interface of this name", err)
	}
	return err
}
