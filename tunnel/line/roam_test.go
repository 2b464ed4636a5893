package line

import (
	"errors"
	"net"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"
)

// plainSocket is a socket of a test, on an address of the loopback interface.
func plainSocket(t *testing.T, addr string) (*net.UDPConn, netip.AddrPort) {
	t.Helper()
	c, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.MustParseAddrPort(addr)))
	if err != nil {
		t.Skip("no such loopback address here:", err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c, c.LocalAddr().(*net.UDPAddr).AddrPort()
}

// A roaming socket sends to whom it has adopted, from the address that he wrote
// to, and reads from all.
func TestRoamingSocket(t *testing.T) {
	for name, test := range map[string]struct{ home, away, other string }{
		"IPv4": {"127.0.0.1:0", "127.0.0.2:0", "127.0.0.9"},
		"IPv6": {"[::1]:0", "[::1]:0", "::1"},
	} {
		t.Run(name, func(t *testing.T) {
			home, homeAddr := plainSocket(t, test.home)
			away, awayAddr := plainSocket(t, test.away)
			c, err := OpenUDP(UDP{Remote: homeAddr, Roam: true})
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			u := c.(*udpConn)
			read := func(what string) {
				t.Helper()
				b := Burst{Data: make([]byte, 0, 100)}
				if err := c.Read(&b, true); err != nil || string(b.Data) != what {
					t.Fatalf("read %q, %v; want %q", b.Data, err, what)
				}
			}
			write := func(what string) {
				t.Helper()
				if err := c.Write(Burst{Data: []byte(what), Size: len(what)}); err != nil {
					t.Fatal(err)
				}
			}
			got := func(at *net.UDPConn, what string) netip.AddrPort {
				t.Helper()
				buf := make([]byte, 100)
				n, from, err := at.ReadFromUDPAddrPort(buf)
				if err != nil || string(buf[:n]) != what {
					t.Fatalf("peer got %q, %v; want %q", buf[:n], err, what)
				}
				return netip.AddrPortFrom(from.Addr().Unmap(), from.Port())
			}
			write("to home")
			got(home, "to home")
			own := netip.AddrPortFrom(netip.MustParseAddr(test.other), u.local.Port())
			if _, err := away.WriteToUDPAddrPort([]byte("from away"), own); err != nil {
				t.Fatal(err)
			}
			read("from away")
			write("still home") // nobody has said that the sender was authentic
			got(home, "still home")
			now, changed := u.Adopt()
			if !changed || now.Peer != awayAddr || now.Own != own.Addr() || u.Remote() != awayAddr {
				t.Errorf("adopted %+v, %v; want %s from %s", now, changed, awayAddr, own)
			}
			if _, changed := u.Adopt(); changed {
				t.Error("the same endpoint is adopted twice")
			}
			write("to away")
			if from := got(away, "to away"); from != own {
				t.Errorf("answered from %s, written to %s", from, own)
			}
			if mtu, err := u.PathMTU(); err != nil || mtu < 1280 {
				t.Errorf("path MTU %d, %v", mtu, err)
			}
			// Our address may go; then the routing chooses another.
			gone := netip.MustParseAddr("192.0.2.77")
			if u.six {
				gone = netip.MustParseAddr("2001:db8::77")
			}
			u.target.Store(&Endpoint{Peer: awayAddr, Own: gone})
			write("from where we can")
			got(away, "from where we can")
			if to := u.target.Load(); to.Own.IsValid() {
				t.Errorf("still sent from %s, which is not ours", to.Own)
			}
		})
	}
}

// TOS goes out and comes in, for each datagram and each burst.
func TestTOSOnTheSocket(t *testing.T) {
	for _, host := range []string{"127.0.0.1", "::1"} {
		t.Run(host, func(t *testing.T) {
			addr := netip.MustParseAddr(host)
			probe, at := plainSocket(t, netip.AddrPortFrom(addr, 0).String())
			a, err := openUDP(UDP{Remote: at})
			if err != nil {
				t.Fatal(err)
			}
			defer a.Close()
			_ = probe.Close()
			b, err := openUDP(UDP{Local: at, Remote: netip.AddrPortFrom(addr, a.local.Port())})
			if err != nil {
				t.Fatal(err)
			}
			defer b.Close()
			for _, tos := range []uint8{0, 46 << 2, ce, 10<<2 | ect0} {
				for _, n := range []int{1, 3} {
					if err := a.Write(Burst{Data: make([]byte, 100*n), Size: 100, TOS: tos}); err != nil {
						t.Fatal(err)
					}
					for got := 0; got < 100*n; {
						in := Burst{Data: make([]byte, 0, 1000)}
						if err := b.Read(&in, true); err != nil {
							t.Fatal(err)
						}
						if in.TOS != tos || in.Size != 100 {
							t.Errorf("TOS %#x of datagrams of %d bytes, want %#x", in.TOS, in.Size, tos)
						}
						got += len(in.Data)
					}
				}
			}
		})
	}
}

func TestSocketSwitches(t *testing.T) {
	_, at := plainSocket(t, "127.0.0.1:0")
	c, err := OpenUDP(UDP{Remote: at, NoGSO: true, NoGRO: true})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	u := c.(*udpConn)
	if send, receive := u.Offload(); send || receive {
		t.Errorf("send %v, receive %v, both are switched off", send, receive)
	}
	if b := u.Buffers(); b.Send <= 0 || b.Receive <= 0 || b.Send > socketBuffer {
		t.Errorf("buffers %+v", b)
	}
	for name, cfg := range map[string]UDP{
		"no remote":       {},
		"unlike families": {Local: netip.MustParseAddrPort("[::1]:0"), Remote: at},
	} {
		if _, err := OpenUDP(cfg); !errors.Is(err, ErrConfig) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := OpenUDP(UDP{Local: netip.MustParseAddrPort("192.0.2.1:0"),
		Remote: at}); !errors.Is(err, unix.EADDRNOTAVAIL) {
		t.Errorf("an address that is not ours: %v", err)
	}
	// Any address of the other family is any of the peer's.
	any6, err := OpenUDP(UDP{Local: netip.MustParseAddrPort("[::]:0"), Remote: at})
	if err != nil {
		t.Fatal(err)
	}
	_ = any6.Close()
}
