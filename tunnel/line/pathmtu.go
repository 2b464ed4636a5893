package line

import (
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/quietline/quietline/tunnel/pad"
	"github.com/quietline/quietline/tunnel/wire"
)

// leastMTU is what the device keeps however narrow the path says it is: IPv6
// has no less (RFC 8200 section 5), and the ICMP that speaks for the path is
// not authenticated. Datagrams too large for such a path go out in fragments.
const leastMTU = 1280

// maxPacket is the largest IPv4 packet, RFC 791 section 3.1.
const maxPacket = 65535

// routed is a Conn that knows how wide its path is.
type routed interface {
	// PathMTU is the largest packet, outer headers included, that the path
	// takes as far as the kernel has heard, in bytes.
	PathMTU() (int, error)
	// InnerMTU is the MTU of a device whose packets fit such a path.
	InnerMTU(pathMTU int) (int, error)
	// AllowFragments tells whether the kernel may cut datagrams that the path
	// does not take; otherwise they carry DF and Write fails for them.
	AllowFragments(allow bool) error
}

// PathMTU implements routed: it follows the interface's MTU and the ICMP
// messages that the kernel believes (RFC 1191, RFC 8201), and forgets after ten
// minutes what these said (net.ipv4.route.mtu_expires).
func (u *udpConn) PathMTU() (mtu int, err error) {
	fd, open := u.route.Enter()
	if !open {
		return 0, net.ErrClosed
	}
	defer u.route.Leave()
	if u.six {
		mtu, err = unix.GetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_MTU)
	} else {
		mtu, err = unix.GetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_MTU)
	}
	// The loopback interface says 65536, which no IP packet has.
	return min(mtu, maxPacket), os.NewSyscallError("getsockopt", err)
}

// InnerMTU implements routed.
func (u *udpConn) InnerMTU(pathMTU int) (int, error) {
	return wire.InnerMTU(pathMTU, u.cfg.Remote.Addr())
}

// AllowFragments implements routed. A burst of several datagrams is never cut,
// so none is sent as such meanwhile.
func (u *udpConn) AllowFragments(allow bool) error {
	fd, open := u.file.Enter()
	if !open {
		return net.ErrClosed
	}
	defer u.file.Leave()
	level, option, mode := unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DO
	if u.six {
		level, option = unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER // same values
	}
	if allow {
		// Without DF, so that routers cut where ICMP is not heard. In IPv6 only
		// we can: to what every path takes.
		mode = unix.IP_PMTUDISC_DONT
	}
	err := unix.SetsockoptInt(int(fd), level, option, mode)
	if u.six && err == nil {
		least := 0 // the route's
		if allow {
			least = leastMTU
		}
		err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_MTU, least)
	}
	if err != nil {
		return fmt.Errorf("set path MTU discovery: %w", err)
	}
	u.fragment.Store(allow)
	return nil
}

// fitPath gives the device the MTU that the path takes, between leastMTU and
// what it had at the start. Then the host answers packets that are too large
// with ICMP itself, and its own TCP sends smaller ones.
func (o *owner) fitPath() {
	conn, ok := o.cfg.Conn.(routed)
	if !ok {
		return
	}
	path, err := conn.PathMTU()
	if err != nil {
		return // no route now: nothing new is known
	}
	inner, err := conn.InnerMTU(path)
	if err == nil && o.cfg.Pad != nil {
		inner, err = wire.PadMTU(inner)
	}
	least := min(leastMTU, o.widest)
	narrow := err != nil || inner < least
	over := path - inner
	switch {
	case narrow:
		inner = least
		o.search = search{}
	case o.cfg.NoProbing:
		inner = min(inner, o.widest)
	default:
		o.search.aim(min(inner, o.widest), least)
		o.probe()
		inner, narrow = o.search.mtu, o.search.narrow
	}
	o.mu.Lock()
	o.snapshot.pathMTU, o.snapshot.proven = path, o.search.phase == resting
	if inner < o.search.top {
		o.snapshot.pathMTU = inner + over
	}
	o.mu.Unlock()
	if narrow != o.narrow {
		if err := conn.AllowFragments(narrow); err != nil {
			o.log.Error("path does not fit", "mtu", path, "err", err)
			return
		}
		o.narrow = narrow
	}
	was := o.cfg.Device.Caps().MTU
	if inner == was {
		return
	}
	if err := o.cfg.Device.SetMTU(inner); err != nil {
		o.log.Error("device keeps its mtu", "mtu", was, "err", err)
		return
	}
	o.log.Info("path has another mtu", "path_mtu", path, "mtu", inner, "was", was,
		"probed", o.search.phase == resting || o.search.phase == narrowing)
}

// probe sends what the search wants to know.
func (o *owner) probe() {
	if o.sending.Load() == nil {
		return // a blocked line says nothing of the path
	}
	if size, number, send := o.search.step(time.Now()); send {
		// The largest packet has as much before it, see wire.PrefixLen.
		size += wire.PrefixLen
		if o.cfg.Pad != nil && size > wire.PrefixLen {
			size = pad.Overhead + pad.Largest(size)
		}
		o.seal(wire.AppendProbe(o.body[:0], number, size))
	}
}

// hear takes the body of a CONTROL record that is not empty.
func (o *owner) hear(body []byte) {
	if body[0] >= wire.ControlPad && o.cfg.Pad != nil {
		o.padStep(pad.Input{Control: body})
		return
	}
	if body[0] != wire.ControlProbe && body[0] != wire.ControlAnswer {
		o.hearState(body)
		return
	}
	number, err := wire.ParseNumber(body)
	switch {
	case err != nil:
		o.own.drop(badRecord)
	case body[0] == wire.ControlProbe:
		o.seal(wire.AppendAnswer(o.body[:0], number))
	case o.search.answered(number, time.Now()):
		o.fitPath()
	}
}
