package tunneltest

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/quietline/quietline/tunnel"
	"github.com/quietline/quietline/tunnel/lab"
	"github.com/quietline/quietline/tunnel/line"
	"github.com/quietline/quietline/tunnel/rekey"
	"github.com/quietline/quietline/tunnel/tun"
	"github.com/quietline/quietline/tunnel/wire"
)

// kernelSite is a line in a namespace of its own, with a real TUN device.
type kernelSite struct {
	ns   *lab.Namespace
	line *line.Line
	stop func()
}

var (
	tunAddr = [2][]netip.Prefix{
		{netip.MustParsePrefix("198.51.100.1/30"), netip.MustParsePrefix("2001:db8:1::1/64")},
		{netip.MustParsePrefix("198.51.100.2/30"), netip.MustParsePrefix("2001:db8:1::2/64")},
	}
	wanAddr = [2][]netip.Prefix{
		{netip.MustParsePrefix("192.0.2.1/24"), netip.MustParsePrefix("2001:db8::1/64")},
		{netip.MustParsePrefix("192.0.2.2/24"), netip.MustParsePrefix("2001:db8::2/64")},
	}
)

// kernelPair runs two lines in two namespaces joined by a cable; family 0 has
// IPv4 outside, 1 IPv6; a plain cable has no offload.
func kernelPair(t *testing.T, family int, backend [2]string, plain bool) [2]*kernelSite {
	t.Helper()
	lab.Need(t)
	stock := newStock(10000)
	var sites [2]*kernelSite
	var ends [2]lab.End
	for i, name := range []string{"tokyo", "kochi"} {
		ns, err := lab.NewNamespace(name)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = ns.Close() })
		sites[i] = &kernelSite{ns: ns}
		ends[i] = lab.End{Namespace: ns, Name: "wan0", Addresses: wanAddr[i], NoOffload: plain}
	}
	if err := lab.Veth(ends[0], ends[1]); err != nil {
		t.Fatal(err)
	}
	for i, s := range sites {
		cfg := line.Config{Machine: kernelMachine(t, i), Keys: stock.ends[i]}
		err := s.ns.Do(func() (err error) {
			cfg.Device, cfg.Conn, err = kernelIO(i, family, backend[i])
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		s.start(t, cfg)
	}
	return sites
}

// kernelIO opens device and socket in the namespace of this thread.
func kernelIO(i, family int, backend string) (tunnel.Device, line.Conn, error) {
	const port = 51820 // the namespace is the test's own
	local := netip.AddrPortFrom(wanAddr[i][family].Addr(), port)
	remote := netip.AddrPortFrom(wanAddr[1-i][family].Addr(), port)
	mtu, err := wire.InnerMTU(1500, remote.Addr())
	if err != nil {
		return nil, nil, err
	}
	dev, err := tun.Open(tun.Config{Name: "ql0", Addresses: tunAddr[i], MTU: mtu, Backend: backend})
	if err != nil {
		return nil, nil, err
	}
	conn, err := line.DialUDP(local, remote)
	if err != nil {
		return nil, nil, errors.Join(err, dev.Close())
	}
	return dev, conn, nil
}

func kernelMachine(t *testing.T, i int) *rekey.Machine {
	t.Helper()
	own, other := byte(0x11+i), byte(0x12-i)
	peer, err := rekey.Public(rekey.XWing, seed(other))
	if err != nil {
		t.Fatal(err)
	}
	m, err := rekey.New(rekey.Config{StaticSeed: seed(own), PeerStatic: peer,
		LinkSecret: seed(0x33), Policy: rekey.QKDStrict, EpochLife: time.Second})
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func (s *kernelSite) start(t *testing.T, cfg line.Config) {
	t.Helper()
	l, err := line.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	s.line = l
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- l.Run(ctx) }()
	s.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("%s: %v", s.ns.Name(), err)
		}
	})
	t.Cleanup(s.stop)
}

// poll looks until what holds; the test fails after 20 s.
func poll(t *testing.T, what string, holds func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !holds(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within 20 s", what)
		}
	}
}

// transfer sends data by TCP from one site to an address of the other and
// compares the hashes.
func transfer(t *testing.T, from, to *kernelSite, addr netip.Addr, data []byte) {
	t.Helper()
	ln, err := to.ns.Listen("tcp", net.JoinHostPort(addr.String(), "0"))
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	sent := make(chan error, 1)
	go func() {
		c, err := from.ns.Dial(context.Background(), "tcp", ln.Addr().String())
		if err == nil {
			_, err = c.Write(data)
			err = errors.Join(err, c.Close())
		}
		sent <- err
	}()
	c, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	hash := sha256.New()
	_, err = io.Copy(hash, c)
	if err := errors.Join(err, <-sent, c.Close()); err != nil {
		t.Fatal(err)
	}
	if want := sha256.Sum256(data); !bytes.Equal(hash.Sum(nil), want[:]) {
		t.Error("the file has changed on its way")
	}
}

// backends are what the two ends have: the two need not agree.
var backends = [][2]string{{"water", "water"}, {"fast", "fast"}, {"fast", "water"}}

// A file by TCP through two kernels, two TUN devices and two lines, inside and
// outside IPv4 and IPv6: whole, and nothing of it on the cable.
func TestFileThroughTheKernel(t *testing.T) {
	data := make([]byte, 2<<20)
	rng := rand.New(rand.NewPCG(1, 2))
	for i := 0; i < len(data); i += 8 {
		binary.LittleEndian.PutUint64(data[i:], rng.Uint64())
	}
	patterns := lab.Sample(data, 500, 32)
	for family, name := range []string{"IPv4 outside", "IPv6 outside, plain cable"} {
		for _, backend := range backends {
			t.Run(fmt.Sprint(name, " ", backend), func(t *testing.T) {
				sites := kernelPair(t, family, backend, family == 1)
				dir := t.TempDir()
				captures := map[string]*lab.Recorder{}
				for _, ifname := range []string{"wan0", "ql0"} {
					r, err := lab.Capture(sites[1].ns, ifname, filepath.Join(dir, ifname))
					if err != nil {
						t.Fatal(err)
					}
					captures[ifname] = r
				}
				for _, addr := range tunAddr[1] {
					transfer(t, sites[0], sites[1], addr.Addr(), data)
				}
				found := map[string]lab.Found{}
				for ifname, r := range captures {
					if err := r.Stop(); err != nil {
						t.Fatal(err)
					}
					if r.Dropped() != 0 {
						t.Errorf("%s: the capture has lost %d packets", ifname, r.Dropped())
					}
					f, err := lab.Search(filepath.Join(dir, ifname), patterns)
					if err != nil {
						t.Fatal(err)
					}
					found[ifname] = f
				}
				if f := found["wan0"]; f.Any() || f.Bytes < 2*uint64(len(data)) {
					t.Errorf("on the cable: %+v", f)
				}
				if f := found["ql0"]; f.InStreams != len(patterns) || f.Streams < 2 {
					t.Errorf("positive control on the TUN device: %+v of %d", f, len(patterns))
				}
			})
		}
	}
}

// Rekeys under paced load lose no datagram, there or back: a thousand of them
// with the long switch.
func TestRekeysThroughTheKernel(t *testing.T) {
	rekeys, chosen := uint64(3), backends[1:2]
	if os.Getenv("QUIETLINE_LONG") == "1" {
		rekeys, chosen = 1000, backends[:2]
	}
	for _, backend := range chosen {
		sites := kernelPair(t, 0, backend, false)
		echo, err := sites[1].ns.ListenPacket("udp", "198.51.100.2:7")
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			buf := make([]byte, 2000)
			for {
				n, from, err := echo.ReadFrom(buf)
				if err != nil {
					return
				}
				_, _ = echo.WriteTo(buf[:n], from)
			}
		}()
		conn, err := sites[0].ns.Dial(t.Context(), "udp", "198.51.100.2:7")
		if err != nil {
			t.Fatal(err)
		}
		poll(t, "line up", func() bool {
			return sites[0].line.Stats().PeerAlive && sites[1].line.Stats().PeerAlive
		})
		sent, came := pace(t, conn, sites[0].line, rekeys)
		if came != sent {
			t.Errorf("%s: %d of %d datagrams came back over %d rekeys", backend, came, sent, rekeys)
		}
		for _, s := range sites {
			st := s.line.Stats()
			t.Logf("%s: epoch %d, %d packets sent", s.ns.Name(), st.Epoch, st.Sent.Packets)
			for why, n := range st.Drops {
				if n != 0 {
					t.Errorf("%s dropped %d: %s", s.ns.Name(), n, why)
				}
			}
		}
		_, _ = conn.Close(), echo.Close()
		sites[0].stop()
		sites[1].stop()
	}
}

// pace sends numbered datagrams, 500 a second, until so many epochs have
// passed, asking for each as soon as the one before carries traffic, and counts
// what comes back.
func pace(t *testing.T, conn net.Conn, l *line.Line, rekeys uint64) (sent, came int) {
	t.Helper()
	counted := make(chan int)
	go func() {
		seen := map[uint64]bool{}
		buf := make([]byte, 2000)
		for {
			n, err := conn.Read(buf)
			if err != nil || n < 8 {
				counted <- len(seen)
				return
			}
			seen[binary.BigEndian.Uint64(buf)] = true
		}
	}()
	ticker := time.NewTicker(2 * time.Millisecond)
	defer ticker.Stop()
	first := l.Stats().Handshakes.Epochs
	p := make([]byte, 1000)
	var asked uint64
	for deadline := time.Now().Add(20 * time.Minute); ; {
		now := l.Stats().Handshakes.Epochs
		if now >= first+rekeys {
			break
		}
		if now > asked {
			asked = now
			l.Rekey()
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d new epochs in 20 minutes", now-first)
		}
		binary.BigEndian.PutUint64(p, uint64(sent))
		if _, err := conn.Write(p); err != nil {
			t.Fatal(err)
		}
		sent++
		<-ticker.C
	}
	if err := conn.SetReadDeadline(time.Now().Add(time.Second)); err != nil {
		t.Fatal(err)
	}
	return sent, <-counted
}
