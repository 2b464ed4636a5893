package tun

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io/fs"
	"net/netip"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/quietline/quietline/tunnel"
	"github.com/quietline/quietline/tunnel/lab"
	"github.com/quietline/quietline/tunnel/segment"
)

func TestMain(m *testing.M) { os.Exit(lab.Main(m)) }

func prefixes(list ...string) []netip.Prefix {
	var out []netip.Prefix
	for _, s := range list {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}

// backends are those that can be asked for by name.
var backends = []string{"water", "fast"}

func testConfig() Config {
	return Config{Name: "ql0", MTU: 1424, Backend: "water",
		Addresses: prefixes("198.51.100.1/30", "2001:db8:1::1/64"),
		Routes:    prefixes("203.0.113.0/24", "2001:db8:2::/48", "203.0.113.77/24")[:2]}
}

// open opens a device in a namespace of its own.
func open(t *testing.T, cfg Config) (tunnel.Device, *lab.Namespace) {
	t.Helper()
	lab.Need(t)
	ns, err := lab.NewNamespace("host")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ns.Close() })
	var d tunnel.Device
	if err := ns.Do(func() (err error) { d, err = Open(cfg); return err }); err != nil {
		t.Fatal(err)
	}
	return d, ns
}

func TestOpenSetsUpTheInterface(t *testing.T) {
	for _, backend := range backends {
		cfg := testConfig()
		cfg.Backend = backend
		t.Run(backend, func(t *testing.T) { testOpenSetsUpTheInterface(t, cfg) })
	}
}

func testOpenSetsUpTheInterface(t *testing.T, cfg Config) {
	d, ns := open(t, cfg)
	defer d.Close()
	want := tunnel.Caps{Name: "ql0", Backend: cfg.Backend, MTU: 1424, Offload: cfg.Backend == "fast",
		UDP: d.Caps().UDP, Reason: d.Caps().Reason}
	if diff := cmp.Diff(want, d.Caps()); diff != "" || want.Reason == "" {
		t.Errorf("caps (-want +got):\n%s", diff)
	}
	// From another thread, in another namespace: the device remembers its own.
	if err := d.SetMTU(1400); err != nil {
		t.Fatal(err)
	}
	var got []string
	err := ns.Do(func() error {
		link, err := netlink.LinkByName("ql0")
		if err != nil {
			return err
		}
		if link.Attrs().MTU != 1400 || d.Caps().MTU != 1400 {
			t.Errorf("MTU %d, caps %d, want 1400", link.Attrs().MTU, d.Caps().MTU)
		}
		addrs, err := netlink.AddrList(link, netlink.FAMILY_ALL)
		if err != nil {
			return err
		}
		for _, a := range addrs {
			got = append(got, "address "+a.IPNet.String())
		}
		routes, err := netlink.RouteList(link, netlink.FAMILY_ALL)
		for _, r := range routes {
			got = append(got, "route "+r.Dst.String())
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	text := strings.Join(got, "\n") + "\n"
	for _, want := range []string{"address 198.51.100.1/30", "address 2001:db8:1::1/64",
		"route 203.0.113.0/24", "route 2001:db8:2::/48"} {
		if !strings.Contains(text, want+"\n") {
			t.Errorf("%s is missing in\n%s", want, text)
		}
	}
	if strings.Contains(text, "fe80") {
		t.Errorf("a link-local address that nobody asked for:\n%s", text)
	}
}

func TestPacketsThroughTheKernel(t *testing.T) {
	for _, backend := range backends {
		cfg := testConfig()
		cfg.Backend = backend
		t.Run(backend, func(t *testing.T) { testPacketsThroughTheKernel(t, cfg) })
	}
}

func testPacketsThroughTheKernel(t *testing.T, cfg Config) {
	d, ns := open(t, cfg)
	defer d.Close()
	q := d.Queues()[0]
	// Out: what the host sends to a routed network comes out of the device.
	conn, err := ns.Dial(t.Context(), "udp", "203.0.113.9:7")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := conn.Write([]byte("out through the line")); err != nil {
		t.Fatal(err)
	}
	frames := []tunnel.Frame{{Data: make([]byte, 0, 2000)}}
	n, err := q.ReadBatch(frames)
	if err != nil || n != 1 || !bytes.HasSuffix(frames[0].Data, []byte("out through the line")) {
		t.Fatalf("read %d: %q, %v", n, frames[0].Data, err)
	}
	// In: the same packet with its ends exchanged is an answer to the host.
	// The checksum may be left open by the device, so it is finished here.
	if frames[0].GSO.Flags&segment.NeedsChecksum != 0 {
		if frames[0].GSO, err = segment.Check(frames[0]); err != nil {
			t.Fatal(err)
		}
		segment.Finish(&frames[0])
	}
	p := frames[0].Data
	for i := range 4 {
		p[12+i], p[16+i] = p[16+i], p[12+i]
	}
	p[20], p[21], p[22], p[23] = p[22], p[23], p[20], p[21]
	if n, err := q.WriteBatch(frames); err != nil || n != 1 {
		t.Fatalf("write %d, %v", n, err)
	}
	if err := conn.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 100)
	if n, err := conn.Read(buf); err != nil || string(buf[:n]) != "out through the line" {
		t.Errorf("host got %q, %v", buf[:n], err)
	}
	// What is no packet is refused and ends nothing.
	if n, err := q.WriteBatch([]tunnel.Frame{{Data: []byte("\x00junk")}}); err == nil || n != 0 {
		t.Errorf("junk: wrote %d, %v", n, err)
	}
	if n, err := q.ReadBatch(nil); n != 0 || err != nil {
		t.Errorf("no frames: %d, %v", n, err)
	}
}

// A reader that waits gets what comes later.
func TestReadWaits(t *testing.T) {
	for _, backend := range backends {
		cfg := testConfig()
		cfg.Backend = backend
		d, ns := open(t, cfg)
		type result struct {
			n   int
			err error
		}
		done := make(chan result)
		frames := []tunnel.Frame{{Data: make([]byte, 0, 2000)}, {Data: make([]byte, 0, 2000)}}
		go func() {
			n, err := d.Queues()[0].ReadBatch(frames)
			done <- result{n, err}
		}()
		conn, err := ns.Dial(t.Context(), "udp", "203.0.113.9:7")
		if err != nil {
			t.Fatal(err)
		}
		// Until the reader has surely been waiting, and then some.
		for sent := true; sent; {
			select {
			case r := <-done:
				if r.n != 1 || r.err != nil || !bytes.HasSuffix(frames[0].Data, []byte("late")) {
					t.Errorf("%s: read %d, %q, %v", backend, r.n, frames[0].Data, r.err)
				}
				sent = false
			case <-time.After(10 * time.Millisecond):
				if _, err := conn.Write([]byte("late")); err != nil {
					t.Fatal(err)
				}
			}
		}
		_, _ = conn.Close(), d.Close()
	}
}

// A batch ends when there is enough to seal, and the rest comes with the next.
func TestEnough(t *testing.T) {
	cfg := testConfig()
	cfg.Backend = "fast"
	d, ns := open(t, cfg)
	defer d.Close()
	conn, err := ns.Dial(t.Context(), "udp", "203.0.113.9:7")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	const packets, payload = 60, 1000
	for range packets {
		if _, err := conn.Write(make([]byte, payload)); err != nil {
			t.Fatal(err)
		}
	}
	for came := 0; came < packets; {
		frames := make([]tunnel.Frame, packets)
		for i := range frames {
			frames[i].Data = make([]byte, 0, 2000)
		}
		n, err := d.Queues()[0].ReadBatch(frames)
		if err != nil {
			t.Fatal(err)
		}
		if most := enough/payload + 1; n > most || came == 0 && n < most-2 {
			t.Errorf("a batch of %d packets; about %d are enough", n, most)
		}
		came += n
	}
}

func TestCloseEndsPendingRead(t *testing.T) {
	for _, backend := range backends {
		cfg := testConfig()
		cfg.Backend = backend
		t.Run(backend, func(t *testing.T) { testCloseEndsPendingRead(t, cfg) })
	}
}

func testCloseEndsPendingRead(t *testing.T, cfg Config) {
	d, _ := open(t, cfg)
	reading := make(chan struct{})
	ended := make(chan error)
	go func() {
		close(reading)
		frames := []tunnel.Frame{{Data: make([]byte, 0, 2000)}}
		_, err := d.Queues()[0].ReadBatch(frames)
		ended <- err
	}()
	<-reading
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; !errors.Is(err, os.ErrClosed) {
		t.Errorf("pending read: %v", err)
	}
}

func TestOpenRefuses(t *testing.T) {
	change := func(f func(*Config)) Config {
		c := testConfig()
		f(&c)
		return c
	}
	tests := map[string]Config{
		"no name":       change(func(c *Config) { c.Name = "" }),
		"long name":     change(func(c *Config) { c.Name = "quietline-tokyo0" }),
		"back end":      change(func(c *Config) { c.Backend = "steam" }),
		"tiny MTU":      change(func(c *Config) { c.MTU = 67 }),
		"MTU for IPv6":  change(func(c *Config) { c.MTU = 1279 }),
		"huge MTU":      change(func(c *Config) { c.MTU = 65536 }),
		"zero address":  change(func(c *Config) { c.Addresses = []netip.Prefix{{}} }),
		"queues":        change(func(c *Config) { c.Queues = MaxQueues + 1 }),
		"IPv6 by route": change(func(c *Config) { c.MTU, c.Addresses = 600, nil }),
	}
	for name, cfg := range tests {
		if d, err := Open(cfg); !errors.Is(err, ErrConfig) || d != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestAutoTakesFast(t *testing.T) {
	cfg := testConfig()
	cfg.Backend = "auto"
	d, _ := open(t, cfg)
	defer d.Close()
	if c := d.Caps(); c.Backend != "fast" || c.Reason == "" {
		t.Errorf("auto took %+v; a kernel of the last ten years has what fast needs", c)
	}
}

// Several queues take the flows in turn, and each is read and written.
func TestQueues(t *testing.T) {
	cfg := testConfig()
	cfg.Backend, cfg.Queues = "fast", 3
	d, ns := open(t, cfg)
	defer d.Close()
	if n := len(d.Queues()); n != 3 || !strings.Contains(d.Caps().Reason, "3 queues as asked for") {
		t.Fatalf("%d queues: %s", n, d.Caps().Reason)
	}
	const flows = 60
	came := make(chan int, flows)
	for i, q := range d.Queues() {
		go func() {
			for {
				frames := []tunnel.Frame{{Data: make([]byte, 0, 2000)}}
				if _, err := q.ReadBatch(frames); err != nil {
					return
				}
				came <- i
			}
		}()
	}
	for range flows {
		conn, err := ns.Dial(t.Context(), "udp", "203.0.113.9:7")
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if _, err := conn.Write([]byte("a flow of its own")); err != nil {
			t.Fatal(err)
		}
	}
	by := map[int]int{}
	for range flows {
		by[<-came]++
	}
	if len(by) < 2 {
		t.Errorf("packets by queue: %v", by)
	}
	conn, err := ns.ListenPacket("udp", "198.51.100.1:7")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	for _, q := range d.Queues() {
		if _, err := q.WriteBatch([]tunnel.Frame{udpSuperFrame(500)}); err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, 2000)
		if err := conn.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
			t.Fatal(err)
		}
		if n, _, err := conn.ReadFrom(buf); n != 500 || err != nil {
			t.Errorf("%d bytes, %v", n, err)
		}
	}
}

func TestQueuesByMachine(t *testing.T) {
	n, why := Config{}.queues()
	if n < 1 || n > autoQueues || why == "" {
		t.Errorf("%d queues: %q", n, why)
	}
}

// With an offload switched off the device says so, and what a peer sends with
// it comes to the host as finished packets.
func TestOffloadSwitches(t *testing.T) {
	for name, test := range map[string]struct {
		off      Offload
		tcp, udp bool
	}{
		"all on":   {Offload{}, true, true},
		"uso":      {Offload{NoUSO: true}, true, false},
		"tso":      {Offload{NoTSO: true}, false, false},
		"tso, uso": {Offload{NoTSO: true, NoUSO: true}, false, false},
		"checksum": {Offload{NoChecksum: true}, false, false},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := testConfig()
			cfg.Backend, cfg.Offload = "fast", test.off
			d, ns := open(t, cfg)
			defer d.Close()
			if c := d.Caps(); c.Offload != test.tcp || c.UDP && !test.udp ||
				!strings.Contains(c.Reason, "off") && test.off != (Offload{}) {
				t.Errorf("%+v", c)
			}
			conn, err := ns.ListenPacket("udp", "198.51.100.1:7")
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			if _, err := d.Queues()[0].WriteBatch([]tunnel.Frame{udpSuperFrame(3500)}); err != nil {
				t.Fatal(err)
			}
			if err := conn.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
				t.Fatal(err)
			}
			got, buf := 0, make([]byte, 2000)
			for got < 3500 {
				n, _, err := conn.ReadFrom(buf)
				if err != nil {
					t.Fatalf("after %d bytes: %v", got, err)
				}
				got += n
			}
			if split := d.(*fast).Split(); test.udp != (split == 0) {
				t.Errorf("%d frames went in as packets", split)
			}
		})
	}
}

// A super-frame that is written comes to the host whole, with either back end;
// one whose segments make no sense to the kernel comes as packets.
func TestSuperFramesIn(t *testing.T) {
	for _, backend := range backends {
		t.Run(backend, func(t *testing.T) {
			cfg := testConfig()
			cfg.Backend = backend
			d, ns := open(t, cfg)
			defer d.Close()
			conn, err := ns.ListenPacket("udp", "198.51.100.1:7")
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			f := udpSuperFrame(10*1000 + 1)
			if n, err := d.Queues()[0].WriteBatch([]tunnel.Frame{f}); n != 1 || err != nil {
				t.Fatalf("wrote %d, %v", n, err)
			}
			if err := conn.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
				t.Fatal(err)
			}
			var got []byte
			buf := make([]byte, 2000)
			for len(got) < 10*1000+1 {
				n, _, err := conn.ReadFrom(buf)
				if err != nil {
					t.Fatalf("after %d bytes: %v", len(got), err)
				}
				got = append(got, buf[:n]...)
			}
			if !bytes.Equal(got, f.Data[28:]) {
				t.Error("the host got other bytes")
			}
		})
	}
}

// udpSuperFrame is datagrams of 1000 bytes to 198.51.100.1 port 7.
func udpSuperFrame(n int) tunnel.Frame {
	p := packet(28 + n)
	p[8], p[9] = 64, 17
	copy(p[12:], []byte{198, 51, 100, 2, 198, 51, 100, 1})
	binary.BigEndian.PutUint16(p[20:], 99)
	binary.BigEndian.PutUint16(p[22:], 7)
	for i := range n {
		p[28+i] = byte(i ^ i>>8)
	}
	f := tunnel.Frame{Data: p, GSO: tunnel.GSO{Type: segment.UDP, Flags: segment.NeedsChecksum,
		HeaderLen: 28, Size: 1000, CsumStart: 20, CsumOffset: 6}}
	segment.Cut(&f, 0, true) // lengths and checksum of the whole
	return f
}

// Whatever fails after the device is there takes the device with it.
func TestFailedOpenLeavesNothing(t *testing.T) {
	d, ns := open(t, testConfig())
	defer d.Close()
	err := ns.Do(func() error {
		if _, err := Open(testConfig()); !errors.Is(err, unix.EBUSY) {
			t.Errorf("same name again: %v", err)
		}
		cfg := testConfig()
		cfg.Name, cfg.Addresses = "ql1", nil
		if _, err := Open(cfg); !errors.Is(err, unix.EEXIST) {
			t.Errorf("same route again: %v", err)
		}
		if _, err := netlink.LinkByName("ql1"); err == nil {
			t.Error("the interface is left behind")
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestExplain(t *testing.T) {
	for cause, want := range map[error]error{
		fs.ErrNotExist: ErrNoTUN, unix.ENODEV: ErrNoTUN, unix.ENXIO: ErrNoTUN,
		unix.EACCES: ErrPermission, unix.EPERM: ErrPermission,
	} {
		err := explain(cause)
		if !errors.Is(err, want) || !errors.Is(err, cause) || !strings.Contains(err.Error(), "try") &&
			!strings.Contains(err.Error(), "sudo") {
			t.Errorf("%v is explained as %v", cause, err)
		}
	}
	if err := explain(unix.EIO); err != unix.EIO {
		t.Errorf("EIO is explained as %v", err)
	}
}

// packet is an IPv4 packet of n bytes.
func packet(n int) []byte {
	p := make([]byte, n)
	p[0] = 0x45
	binary.BigEndian.PutUint16(p[2:], uint16(n))
	return p
}

func TestMemory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := NewMemory("mem0", 1400, 2)
		if len(m.Queues()) != 2 || m.Caps().Backend != "memory" || m.Caps().Name != "mem0" {
			t.Errorf("caps %+v, %d queues", m.Caps(), len(m.Queues()))
		}
		q := m.Queues()[1]
		frames := make([]tunnel.Frame, 3)
		for i := range frames {
			frames[i].Data = make([]byte, 0, 1500)
		}
		for n := 20; n < 24; n++ {
			if err := m.Inject(1, packet(n)); err != nil {
				t.Fatal(err)
			}
		}
		for _, want := range []int{3, 1} {
			if n, err := q.ReadBatch(frames); n != want || err != nil {
				t.Fatalf("read %d, %v; want %d", n, err, want)
			}
		}
		if len(frames[0].Data) != 23 {
			t.Errorf("last packet has %d bytes, want 23", len(frames[0].Data))
		}
		if n, err := q.WriteBatch([]tunnel.Frame{{Data: packet(30)}, {Data: packet(31)}}); n != 2 {
			t.Errorf("wrote %d, %v", n, err)
		}
		for _, want := range []int{30, 31} {
			if p, err := m.Take(t.Context()); err != nil || len(p) != want {
				t.Errorf("took %d bytes, %v; want %d", len(p), err, want)
			}
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := m.Take(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("nothing to take: %v", err)
		}
		if err := m.Inject(0, packet(1401)); err == nil {
			t.Error("a packet above the MTU goes in")
		}
		if err := m.SetMTU(1401); err != nil || m.Inject(0, packet(1401)) != nil {
			t.Errorf("MTU raised: %v", err)
		}
		var full error
		for full == nil {
			full = m.Inject(0, packet(20))
		}
		if !errors.Is(full, ErrFull) {
			t.Errorf("queue is full: %v", full)
		}
		for full = nil; full == nil; {
			_, full = q.WriteBatch([]tunnel.Frame{{Data: packet(20)}})
		}
		if !errors.Is(full, ErrFull) {
			t.Errorf("host takes no more: %v", full)
		}
		testMemoryClosed(t, m, q, frames)
	})
}

func testMemoryClosed(t *testing.T, m *Memory, q tunnel.Queue, frames []tunnel.Frame) {
	pending := make(chan error)
	go func() { _, err := q.ReadBatch(frames); pending <- err }()
	synctest.Wait()
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	if err := m.Close(); err != nil {
		t.Errorf("second close: %v", err)
	}
	_, rerr := q.ReadBatch(frames)
	_, werr := q.WriteBatch([]tunnel.Frame{{Data: packet(20)}})
	for name, err := range map[string]error{"pending read": <-pending, "read": rerr,
		"write": werr, "inject": m.Inject(0, packet(20))} {
		if !errors.Is(err, os.ErrClosed) {
			t.Errorf("%s after close: %v", name, err)
		}
	}
	if n, err := q.ReadBatch(nil); n != 0 || err != nil {
		t.Errorf("no frames: %d, %v", n, err)
	}
}
