package tunneltest

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/quietline/quietline/tunnel/lab"
	"github.com/quietline/quietline/tunnel/line"
	"github.com/quietline/quietline/tunnel/rekey"
	"github.com/quietline/quietline/tunnel/tun"
)

// hubSites is how many sites hang on the hub.
const hubSites = 64

// inner is the address inside of one end of line i.
func inner(i, end int) netip.Addr { return netip.AddrFrom4([4]byte{10, 9, byte(i), byte(1 + end)}) }

// startHub runs one end of every line in its namespace, all in this process.
func startHub(t *testing.T, ns *lab.Namespace, end int) (lines [hubSites]*line.Line) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	t.Cleanup(func() { cancel(); running.Wait() })
	for i := range lines {
		var cfg line.Config
		peer, err := rekey.Public(rekey.XWing, seed(byte(1+i)^byte(0x80*(1-end))))
		if err != nil {
			t.Fatal(err)
		}
		cfg.Machine, err = rekey.New(rekey.Config{StaticSeed: seed(byte(1+i) ^ byte(0x80*end)),
			PeerStatic: peer, LinkSecret: seed(0x33), Policy: rekey.PQCOnly})
		if err != nil {
			t.Fatal(err)
		}
		port := uint16(51000 + i)
		err = ns.Do(func() (err error) {
			cfg.Device, err = tun.Open(tun.Config{Name: fmt.Sprintf("ql%d", i), MTU: 1400,
				Addresses: []netip.Prefix{netip.PrefixFrom(inner(i, end), 30)}})
			if err != nil {
				return err
			}
			cfg.Conn, err = line.DialUDP(netip.AddrPortFrom(wanAddr[end][0].Addr(), port),
				netip.AddrPortFrom(wanAddr[1-end][0].Addr(), port))
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		l, err := line.New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		lines[i] = l
		running.Go(func() {
			if err := l.Run(ctx); err != nil {
				t.Errorf("line %d: %v", i, err)
			}
		})
	}
	return lines
}

// One process serves 64 sites. While a site floods its line, each other gets
// its own packets through, there and back.
func TestHubIsFair(t *testing.T) {
	lab.Need(t)
	var ns [2]*lab.Namespace
	var ends [2]lab.End
	for i, name := range []string{"hub", "sites"} {
		n, err := lab.NewNamespace(name)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = n.Close() })
		ns[i] = n
		ends[i] = lab.End{Namespace: n, Name: "wan0", Addresses: wanAddr[i]}
	}
	if err := lab.Veth(ends[0], ends[1]); err != nil {
		t.Fatal(err)
	}
	hub, sites := startHub(t, ns[0], 0), startHub(t, ns[1], 1)
	poll(t, "all lines up", func() bool {
		for i := range hub {
			if !hub[i].Stats().PeerAlive || !sites[i].Stats().PeerAlive {
				return false
			}
		}
		return true
	})
	for i := 1; i < hubSites; i++ {
		defer answer(t, ns[1], netip.AddrPortFrom(inner(i, 1), 7))()
	}
	stop := flood(t, ns[0], netip.AddrPortFrom(inner(0, 1), 9))
	defer stop()
	poll(t, "flood", func() bool { return sites[0].Stats().Received.Packets > 1000 })
	const packets = 20
	came := modest(t, ns[0], packets)
	stop()
	for i, n := range came {
		if i > 0 && n < packets*9/10 {
			t.Errorf("line %d: %d of %d packets came back beside a flood", i, n, packets)
		}
	}
	t.Logf("flood: %d packets there", sites[0].Stats().Received.Packets)
}

// answer sends back what comes, until it is stopped.
func answer(t *testing.T, ns *lab.Namespace, at netip.AddrPort) (stop func()) {
	t.Helper()
	conn, err := ns.ListenPacket("udp", at.String())
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, 2000)
		for {
			n, from, err := conn.ReadFrom(buf)
			if err != nil {
				return
			}
			_, _ = conn.WriteTo(buf[:n], from)
		}
	}()
	return func() { _ = conn.Close(); <-done }
}

// flood sends as much as one thread can until it is stopped.
func flood(t *testing.T, ns *lab.Namespace, to netip.AddrPort) (stop func()) {
	t.Helper()
	conn, err := ns.Dial(t.Context(), "udp", to.String())
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		p := make([]byte, 1300)
		for {
			if _, err := conn.Write(p); errors.Is(err, net.ErrClosed) {
				return
			}
		}
	}()
	return sync.OnceFunc(func() { _ = conn.Close(); <-done })
}

// modest sends so many packets on every line but the first, 20 ms apart, and
// counts what comes back.
func modest(t *testing.T, ns *lab.Namespace, packets int) (came [hubSites]int) {
	t.Helper()
	var wg sync.WaitGroup
	for i := 1; i < hubSites; i++ {
		conn, err := ns.Dial(t.Context(), "udp", netip.AddrPortFrom(inner(i, 1), 7).String())
		if err != nil {
			t.Fatal(err)
		}
		wg.Go(func() {
			defer conn.Close()
			seen := map[uint32]bool{}
			_ = conn.SetReadDeadline(time.Now().Add(
				time.Duration(packets)*20*time.Millisecond + raced*5*time.Second))
			sent := make(chan struct{})
			go func() {
				defer close(sent)
				tick := time.NewTicker(20 * time.Millisecond)
				defer tick.Stop()
				for n := range packets {
					_, _ = conn.Write(binary.BigEndian.AppendUint32(nil, uint32(n)))
					<-tick.C
				}
			}()
			buf := make([]byte, 100)
			for len(seen) < packets {
				n, err := conn.Read(buf)
				if err != nil || n < 4 {
					break
				}
				seen[binary.BigEndian.Uint32(buf)] = true
			}
			<-sent
			came[i] = len(seen)
		})
	}
	wg.Wait()
	return came
}
