package lab

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

// pair is two namespaces joined by a cable.
func pair(t *testing.T) (a, b *Namespace) {
	t.Helper()
	Need(t)
	ns := func(name string) *Namespace {
		n, err := NewNamespace(name)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = n.Close() })
		return n
	}
	a, b = ns("a"), ns("b")
	prefix := netip.MustParsePrefix
	err := Veth(
		End{Namespace: a, Name: "wan0", Addresses: []netip.Prefix{
			prefix("192.0.2.1/24"), prefix("2001:db8::1/64")},
			Routes: []Route{{prefix("198.51.100.0/24"), netip.MustParseAddr("192.0.2.2")}}},
		End{Namespace: b, Name: "wan0", MTU: 1400, Addresses: []netip.Prefix{
			prefix("192.0.2.2/24"), prefix("2001:db8::2/64")}})
	if err != nil {
		t.Fatal(err)
	}
	return a, b
}

func TestNamespaceOfThreadsAndProcesses(t *testing.T) {
	a, _ := pair(t)
	link := func() string {
		s, err := os.Readlink(threadNet)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	home := link()
	var inside string
	if err := a.Do(func() error { inside = link(); return nil }); err != nil {
		t.Fatal(err)
	}
	if inside == home || link() != home {
		t.Errorf("home %s, inside %s, back %s", home, inside, link())
	}
	failed := errors.New("failed")
	if err := a.Do(func() error { return failed }); !errors.Is(err, failed) || link() != home {
		t.Errorf("f failed: %v, back %s", err, link())
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), playEnv+"=namespace")
	var out bytes.Buffer
	cmd.Stdout = &out
	if err := a.Start(cmd); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil || !strings.Contains(out.String(), inside) {
		t.Errorf("process is in %q, %v; want %s", out.String(), err, inside)
	}
	if _, err := a.Dial(t.Context(), "tcp", "localhost:1"); err == nil {
		t.Error("a name is dialled")
	}
}

// transfer sends data by TCP from a to an address of b.
func transfer(t *testing.T, a, b *Namespace, addr string, data []byte) {
	t.Helper()
	ln, err := b.Listen("tcp", net.JoinHostPort(addr, "0"))
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	sent := make(chan error, 1)
	go func() {
		c, err := a.Dial(context.Background(), "tcp", ln.Addr().String())
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
	got, err := io.ReadAll(c)
	if err := errors.Join(err, <-sent, c.Close()); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, data) {
		t.Fatalf("%d bytes arrived, not as sent", len(got))
	}
}

func TestCaptureFindsWhatPassed(t *testing.T) {
	a, b := pair(t)
	rng := rand.New(rand.NewPCG(1, 2))
	data := make([]byte, 4<<20)
	for i := range data {
		data[i] = byte(rng.Uint32())
	}
	for _, addr := range []string{"192.0.2.2", "2001:db8::2"} {
		path := filepath.Join(t.TempDir(), "wan.pcap")
		rec, err := Capture(b, "wan0", path)
		if err != nil {
			t.Fatal(err)
		}
		transfer(t, a, b, addr, data)
		if err := rec.Stop(); err != nil {
			t.Fatal(err)
		}
		patterns := Sample(data, 200, 64)
		absent := [][]byte{[]byte("this has never been on the cable")}
		found, err := Search(path, append(patterns, absent...))
		if err != nil {
			t.Fatal(err)
		}
		if rec.Dropped() != 0 || rec.Packets() == 0 || found.Packets != rec.Packets() {
			t.Errorf("%s: %d packets, %d dropped, %d in the file",
				addr, rec.Packets(), rec.Dropped(), found.Packets)
		}
		if found.InStreams != len(patterns) || found.InPackets == 0 || found.Streams != 1 {
			t.Errorf("%s: found %+v of %d patterns", addr, found, len(patterns))
		}
		found, err = Search(path, absent)
		if err != nil || found.Any() {
			t.Errorf("%s: found what was never sent: %+v, %v", addr, found, err)
		}
	}
}

// Without offload, or without segmentation alone, no packet on the cable is
// larger than its MTU; with it, some are.
func TestNoOffload(t *testing.T) {
	Need(t)
	for name, want := range map[string]End{"as it is": {}, "no offload": {NoOffload: true},
		"no segmentation": {NoSegmentation: true, GRO: true}} {
		plain := name != "as it is"
		var ns [2]*Namespace
		var ends [2]End
		for i := range ns {
			n, err := NewNamespace("n")
			if err != nil {
				t.Fatal(err)
			}
			defer n.Close()
			addr := netip.PrefixFrom(netip.AddrFrom4([4]byte{192, 0, 2, byte(1 + i)}), 24)
			want.Namespace, want.Name, want.Addresses = n, "wan0", []netip.Prefix{addr}
			ends[i] = want
			ns[i] = n
		}
		if err := Veth(ends[0], ends[1]); err != nil {
			t.Fatal(err)
		}
		var recs [2]*Recorder
		dir := t.TempDir()
		for i := range ns {
			r, err := Capture(ns[i], "wan0", filepath.Join(dir, fmt.Sprint(i)))
			if err != nil {
				t.Fatal(err)
			}
			recs[i] = r
		}
		transfers := 1
		if want.GRO {
			transfers = 10 // what is joined depends on what comes in one poll
		}
		for range transfers {
			transfer(t, ns[0], ns[1], "192.0.2.2", make([]byte, 4<<20))
		}
		var largest [2]int
		for i, r := range recs {
			if err := r.Stop(); err != nil {
				t.Fatal(err)
			}
			if err := ReadCapture(filepath.Join(dir, fmt.Sprint(i)), func(p Packet) error {
				largest[i] = max(largest[i], len(p.Data))
				return nil
			}); err != nil {
				t.Fatal(err)
			}
		}
		const frame = 1514
		if (largest[0] <= frame) != plain || (largest[1] > frame) != (!plain || want.GRO) {
			t.Errorf("%s: the largest packet has %d bytes at the sender, %d where it arrives", name,
				largest[0], largest[1])
		}
	}
}

func TestCaptureErrors(t *testing.T) {
	a, _ := pair(t)
	if _, err := Capture(a, "nope0", filepath.Join(t.TempDir(), "x")); err == nil {
		t.Error("an interface that is not there is captured")
	}
	if _, err := Capture(a, "wan0", t.TempDir()); err == nil {
		t.Error("a folder is taken for the file")
	}
}

// segment4 is an Ethernet frame with a TCP segment in IPv4.
func segment4(seq uint32, payload string) []byte {
	b := make([]byte, 14+20+20, 14+40+len(payload))
	binary.BigEndian.PutUint16(b[12:], 0x0800)
	ip := b[14:]
	ip[0], ip[9] = 0x45, 6
	binary.BigEndian.PutUint16(ip[2:], uint16(40+len(payload)))
	tcp := ip[20:]
	binary.BigEndian.PutUint16(tcp, 1234)
	binary.BigEndian.PutUint32(tcp[4:], seq)
	tcp[12] = 5 << 4
	return append(b, payload...)
}

// writeCapture writes frames as a capture of an Ethernet interface.
func writeCapture(t *testing.T, frames ...[]byte) string {
	t.Helper()
	b := binary.LittleEndian.AppendUint32(nil, pcapMagic)
	b = append(b, make([]byte, 16)...)
	b = binary.LittleEndian.AppendUint32(b, linkEthernet)
	for _, f := range frames {
		b = append(b, make([]byte, 8)...)
		b = binary.LittleEndian.AppendUint32(b, uint32(len(f)))
		b = binary.LittleEndian.AppendUint32(b, uint32(len(f)))
		b = append(b, f...)
	}
	path := filepath.Join(t.TempDir(), "test.pcap")
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestSearchStreams(t *testing.T) {
	start := uint32(1<<32 - 10) // the sequence number wraps within the stream
	pattern := []byte("confidential patient record")
	tests := []struct {
		name   string
		frames [][]byte
		want   Found
	}{
		{"in one packet", [][]byte{segment4(1, "a "+string(pattern)+"!")},
			Found{Packets: 1, Streams: 1, InPackets: 1, InStreams: 1}},
		{"cut in two", [][]byte{segment4(5, "confidential pa"), segment4(20, "tient record")},
			Found{Packets: 2, Streams: 1, InStreams: 1}},
		{"out of order, over the wrap", [][]byte{
			segment4(start+13, "patient "), segment4(start, "confidential "),
			segment4(start+21, "record")},
			Found{Packets: 3, Streams: 1, InStreams: 1}},
		{"sent twice, overlapping", [][]byte{
			segment4(5, "confidential pa"), segment4(5, "confidential"),
			segment4(9, "idential patient"), segment4(20, "tient record")},
			Found{Packets: 4, Streams: 1, InStreams: 1}},
		{"with a hole", [][]byte{segment4(5, "confidential pa"), segment4(21, "ient record")},
			Found{Packets: 2, Streams: 1}},
		{"not TCP, not IP", [][]byte{append(make([]byte, 14), pattern...), {1, 2}},
			Found{Packets: 2, InPackets: 1}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := Search(writeCapture(t, tt.frames...), [][]byte{pattern})
			if err != nil {
				t.Fatal(err)
			}
			got.Bytes = 0
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("found (-want +got):\n%s", diff)
			}
		})
	}
}

func TestSearchRefuses(t *testing.T) {
	good := writeCapture(t, segment4(1, "hello"))
	b, err := os.ReadFile(good)
	if err != nil {
		t.Fatal(err)
	}
	write := func(b []byte) string {
		path := filepath.Join(t.TempDir(), "bad.pcap")
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	pattern := [][]byte{[]byte("12345678")}
	for name, path := range map[string]string{
		"cut header": write(b[:10]), "cut packet": write(b[:len(b)-1]),
		"cut packet header": write(b[:30]), "magic": write(append([]byte{0}, b[1:]...)),
	} {
		if _, err := Search(path, pattern); !errors.Is(err, ErrCapture) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := Search(good, [][]byte{[]byte("short")}); err == nil {
		t.Error("a short pattern is taken")
	}
	if _, err := Search(good+"x", pattern); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
}

func FuzzTCPSegment(f *testing.F) {
	f.Add(segment4(1, "hello"), false)
	f.Add(segment4(1, "hello")[14:], true)
	v6 := append(make([]byte, 60), "hello"...)
	v6[0], v6[6], v6[5], v6[52] = 0x60, 6, 25, 5<<4
	f.Add(v6, true)
	f.Fuzz(func(t *testing.T, b []byte, raw bool) {
		_, _, payload, ok := tcpSegment(Packet{Data: b, raw: raw})
		if ok && !bytes.Contains(b, payload) {
			t.Error("payload is not part of the packet")
		}
	})
}

// collect runs n numbered datagrams through a path, one a millisecond, and
// returns them as they arrive with the time each took.
func collect(w Weather, n int) (order []int, took []time.Duration, c PathCounts) {
	sent := make([]time.Time, n)
	p := NewPath(w, func(b []byte) {
		i := int(binary.BigEndian.Uint32(b))
		order = append(order, i)
		took = append(took, time.Since(sent[i]))
	})
	for i := range n {
		sent[i] = time.Now()
		p.Send(binary.BigEndian.AppendUint32(nil, uint32(i)))
		time.Sleep(time.Millisecond) // fake time: the rhythm of the sender
	}
	time.Sleep(time.Minute)
	c = p.Counts()
	p.Close()
	p.Send([]byte("into the void"))
	return order, took, c
}

func TestPathFair(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		order, took, c := collect(Weather{Delay: 30 * time.Millisecond}, 100)
		if c.Delivered != 100 || c.Lost != 0 {
			t.Fatalf("counts %+v", c)
		}
		for i := range 100 {
			if order[i] != i || took[i] != 30*time.Millisecond {
				t.Fatalf("place %d: datagram %d after %v", i, order[i], took[i])
			}
		}
	})
}

func TestPathWeather(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const n = 20000
		w := Weather{Loss: 0.1, Duplicate: 0.05, Reorder: 0.02, Seed: 7}
		order, _, c := collect(w, n)
		// Five standard deviations of a binomial draw.
		near := func(name string, got uint64, p float64) {
			if d := float64(got)/n - p; d*d > 25*p*(1-p)/n {
				t.Errorf("%s: %d of %d, want a share of %v (seed %d)", name, got, n, p, w.Seed)
			}
		}
		near("lost", c.Lost, 0.1)
		near("duplicated", c.Duplicated, 0.9*0.05)
		near("held back", c.HeldBack, 0.9*0.02)
		if got := uint64(len(order)); got != n-c.Lost+c.Duplicated || got != c.Delivered {
			t.Errorf("%d arrived, counts %+v", got, c)
		}
		late := 0
		for i := 1; i < len(order); i++ {
			if order[i] < order[i-1] {
				late++
			}
		}
		if late == 0 {
			t.Error("nothing was overtaken")
		}
		again, _, c2 := collect(w, n)
		if c2 != c || cmp.Diff(order, again) != "" {
			t.Errorf("the same seed gives another run: %+v, %+v", c, c2)
		}
	})
}

func TestPathChangesWeather(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		arrived := 0
		p := NewPath(Weather{}, func([]byte) { arrived++ })
		defer p.Close()
		p.SetWeather(Weather{Loss: 1})
		p.Send(nil)
		p.SetWeather(Weather{})
		p.Send(nil)
		synctest.Wait()
		if arrived != 1 {
			t.Errorf("%d datagrams arrived, want 1", arrived)
		}
	})
}

func TestRelay(t *testing.T) {
	open := func() (net.PacketConn, netip.AddrPort) {
		c, err := net.ListenPacket("udp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		if err := c.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
			t.Fatal(err)
		}
		return c, c.LocalAddr().(*net.UDPAddr).AddrPort()
	}
	a, aAddr := open()
	b, bAddr := open()
	stranger, _ := open()
	conn, relayAddr := open()
	r := NewRelay(conn, aAddr, bAddr, Weather{})
	send := func(c net.PacketConn, text string) {
		if _, err := c.WriteTo([]byte(text), net.UDPAddrFromAddrPort(relayAddr)); err != nil {
			t.Fatal(err)
		}
	}
	receive := func(c net.PacketConn) string {
		buf := make([]byte, 100)
		n, _, err := c.ReadFrom(buf)
		if err != nil {
			t.Fatal(err)
		}
		return string(buf[:n])
	}
	send(stranger, "spam")
	send(a, "ping")
	if got := receive(b); got != "ping" {
		t.Errorf("b got %q", got)
	}
	send(b, "pong")
	if got := receive(a); got != "pong" {
		t.Errorf("a got %q", got)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	if ab, ba := r.Counts(); ab.Sent != 1 || ba.Sent != 1 {
		t.Errorf("counts %+v, %+v: the stranger was relayed", ab, ba)
	}
}
