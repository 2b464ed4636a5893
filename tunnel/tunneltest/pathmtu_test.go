package tunneltest

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/quietline/quietline/tunnel/lab"
	"github.com/quietline/quietline/tunnel/line"
	"github.com/quietline/quietline/tunnel/tun"
)

// forward makes a router of the namespace that the writing thread is in.
const forward = "/proc/sys/net/ipv4/ip_forward"

// routedPair is two lines with a router between, whose second cable has
// another MTU.
func routedPair(t *testing.T, mtu int) (sites [2]*kernelSite) {
	t.Helper()
	lab.Need(t)
	names := []string{"tokyo", "kochi", "router"}
	var ns [3]*lab.Namespace
	for i, name := range names {
		n, err := lab.NewNamespace(name)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = n.Close() })
		ns[i] = n
	}
	if err := ns[2].Do(func() error { return os.WriteFile(forward, []byte("1"), 0) }); err != nil {
		t.Skip("this lab cannot forward:", err)
	}
	nets := [2]netip.Prefix{
		netip.MustParsePrefix("192.0.2.0/25"), netip.MustParsePrefix("192.0.2.128/25")}
	var own, via [2]netip.Addr
	for i, n := range nets {
		via[i] = n.Addr().Next()
		own[i] = via[i].Next()
	}
	for i := range nets {
		size := []int{1500, mtu}[i]
		err := lab.Veth(
			lab.End{Namespace: ns[i], Name: "wan0", MTU: size,
				Addresses: []netip.Prefix{netip.PrefixFrom(own[i], 25)},
				Routes:    []lab.Route{{To: nets[1-i], Via: via[i]}}},
			lab.End{Namespace: ns[2], Name: "wan" + names[i][:1], MTU: size,
				Addresses: []netip.Prefix{netip.PrefixFrom(via[i], 25)}})
		if err != nil {
			t.Fatal(err)
		}
	}
	stock := newStock(100)
	for i := range sites {
		sites[i] = &kernelSite{ns: ns[i]}
		cfg := line.Config{Machine: kernelMachine(t, i), Keys: stock.ends[i]}
		err := ns[i].Do(func() (err error) {
			cfg.Device, err = tun.Open(tun.Config{Name: "ql0", Addresses: tunAddr[i], MTU: 1424})
			if err != nil {
				return err
			}
			cfg.Conn, err = line.DialUDP(netip.AddrPortFrom(own[i], 51820),
				netip.AddrPortFrom(own[1-i], 51820))
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		sites[i].start(t, cfg)
	}
	return sites
}

// A router with a narrower cable behind it: TCP gets through, the device takes
// the MTU of the path, and nothing is fragmented; or, where the path is
// narrower than IPv6 allows a device to be, fragments carry it.
func TestPathNarrowerThanTheCable(t *testing.T) {
	for _, tt := range []struct {
		path, device int
		fragments    bool
	}{{1400, 1324, false}, {1300, 1280, true}} {
		sites := routedPair(t, tt.path)
		file := filepath.Join(t.TempDir(), "wan0")
		r, err := lab.Capture(sites[1].ns, "wan0", file)
		if err != nil {
			t.Fatal(err)
		}
		poll(t, "line up", func() bool {
			return sites[0].line.Stats().PeerAlive && sites[1].line.Stats().PeerAlive
		})
		transfer(t, sites[0], sites[1], tunAddr[1][0].Addr(), make([]byte, 1<<20))
		for _, s := range sites {
			poll(t, "device fits the path", func() bool { return s.line.Stats().Device.MTU == tt.device })
		}
		transfer(t, sites[1], sites[0], tunAddr[0][1].Addr(), make([]byte, 1<<20)) // IPv6
		if got := heardInside(t, sites[0]); got != tt.device {
			t.Errorf("path of %d: a host behind the line heard of MTU %d, want %d", tt.path, got,
				tt.device)
		}
		if err := r.Stop(); err != nil {
			t.Fatal(err)
		}
		if n := fragments(t, file); (n > 0) != tt.fragments {
			t.Errorf("path of %d: %d fragments on the cable", tt.path, n)
		}
		sites[0].stop()
		sites[1].stop()
	}
}

// heardInside is the MTU that a host behind a site learns by ICMP when it sends
// a datagram with DF that fills its own Ethernet.
func heardInside(t *testing.T, s *kernelSite) (mtu int) {
	t.Helper()
	host, err := lab.NewNamespace("host")
	if err != nil {
		t.Fatal(err)
	}
	defer host.Close()
	lan := [2]netip.Prefix{
		netip.MustParsePrefix("203.0.113.1/24"), netip.MustParsePrefix("203.0.113.2/24")}
	err = lab.Veth(lab.End{Namespace: s.ns, Name: "lan0", Addresses: lan[:1]},
		lab.End{Namespace: host, Name: "lan0", Addresses: lan[1:],
			Routes: []lab.Route{{To: tunAddr[0][0], Via: lan[0].Addr()}}})
	if err == nil {
		err = s.ns.Do(func() error { return os.WriteFile(forward, []byte("1"), 0) })
	}
	if err != nil {
		t.Fatal(err)
	}
	conn, err := host.Dial(t.Context(), "udp", tunAddr[1][0].Addr().String()+":9")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	raw, err := conn.(*net.UDPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	option := func(f func(fd int) error) {
		t.Helper()
		if cerr := raw.Control(func(fd uintptr) { err = f(int(fd)) }); cerr != nil || err != nil {
			t.Fatal(cerr, err)
		}
	}
	option(func(fd int) error {
		return unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DO)
	})
	full := make([]byte, 1500-20-8)
	poll(t, "ICMP for a datagram that does not fit", func() bool {
		_, err := conn.Write(full)
		return errors.Is(err, unix.EMSGSIZE)
	})
	option(func(fd int) (err error) {
		mtu, err = unix.GetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_MTU)
		return err
	})
	return mtu
}

// fragments counts the IPv4 fragments in a capture.
func fragments(t *testing.T, file string) (n int) {
	t.Helper()
	err := lab.ReadCapture(file, func(p lab.Packet) error {
		const ethernet = 14
		b := p.Data
		if len(b) > ethernet+20 && binary.BigEndian.Uint16(b[12:]) == 0x0800 &&
			binary.BigEndian.Uint16(b[ethernet+6:])&0x3fff != 0 {
			n++
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return n
}
