package tunneltest

import (
	"context"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/quietline/quietline/tunnel/line"
	"github.com/quietline/quietline/tunnel/tun"
)

// loopbackSite is a line over a real socket on the loopback interface.
type loopbackSite struct {
	line *line.Line
	dev  *tun.Memory
	stop func()
}

func startOnLoopback(t *testing.T, end int, keys *Stock, cfg line.UDP) *loopbackSite {
	t.Helper()
	conn, err := line.OpenUDP(cfg)
	if err != nil {
		t.Skip("no such loopback address here:", err)
	}
	s := &loopbackSite{dev: tun.NewMemory("ql0", 1400, 1)}
	s.line, err = line.New(line.Config{Device: s.dev, Conn: conn, Machine: kernelMachine(t, end),
		Keys: keys.ends[end], Keepalive: 200 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.line.Run(ctx) }()
	s.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(s.stop)
	return s
}

// A hub whose peer roams finds it at another address after the peer has come
// back there with nothing in hand, and follows it nowhere for what a stranger
// sends or repeats.
func TestRoamingPeer(t *testing.T) {
	port := func(host string) netip.AddrPort {
		c, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.MustParseAddrPort(host)))
		if err != nil {
			t.Skip("no such loopback address here:", err)
		}
		defer c.Close()
		return c.LocalAddr().(*net.UDPAddr).AddrPort()
	}
	hubAddr, home, away := port("127.0.0.1:0"), port("127.0.0.2:0"), port("127.0.0.3:0")
	keys := newStock(1000)
	hub := startOnLoopback(t, 0, keys, line.UDP{Local: hubAddr, Remote: home, Roam: true})
	peer := startOnLoopback(t, 1, keys, line.UDP{Local: home, Remote: hubAddr})
	up := func(at netip.AddrPort) {
		t.Helper()
		poll(t, "hub and peer at "+at.String(), func() bool {
			h, p := hub.line.Stats(), peer.line.Stats()
			return h.PeerAlive && p.PeerAlive && h.Remote == at
		})
	}
	up(home)
	peer.stop()

	stranger, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(hubAddr))
	if err != nil {
		t.Fatal(err)
	}
	defer stranger.Close()
	for _, noise := range [][]byte{make([]byte, 100), {0x10, 0, 0, 1, 9}, {1, 2, 3}} {
		if _, err := stranger.Write(noise); err != nil {
			t.Fatal(err)
		}
	}
	poll(t, "noise", func() bool {
		d := hub.line.Stats().Drops
		return d["malformed"] >= 2
	})
	if st := hub.line.Stats(); st.Remote != home || st.Moves != 0 {
		t.Errorf("followed a stranger to %s", st.Remote)
	}
	peer = startOnLoopback(t, 1, keys, line.UDP{Local: away, Remote: hubAddr})
	up(away)
	if st := hub.line.Stats(); st.Moves != 1 {
		t.Errorf("%d moves", st.Moves)
	}
	for i := range 20 {
		if err := hub.dev.Inject(0, packet(uint64(i), 100)); err != nil {
			t.Fatal(err)
		}
		if _, err := peer.dev.Take(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
}
