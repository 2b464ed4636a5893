package line

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/quietline/quietline/secret"
	"github.com/quietline/quietline/tunnel"
	"github.com/quietline/quietline/tunnel/rekey"
	"github.com/quietline/quietline/tunnel/seal"
	"github.com/quietline/quietline/tunnel/segment"
	"github.com/quietline/quietline/tunnel/tun"
	"github.com/quietline/quietline/tunnel/wire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// script is a machine that answers each step with the next output.
type script struct {
	mu      sync.Mutex
	outs    []rekey.Output
	ins     []rekey.Input
	cleared bool
}

func (s *script) Step(_ time.Time, in rekey.Input) rekey.Output {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ins = append(s.ins, in)
	if len(s.outs) == 0 {
		return rekey.Output{}
	}
	out := s.outs[0]
	s.outs = s.outs[1:]
	return out
}

func (s *script) State() rekey.State { return rekey.State{} }
func (s *script) Stats() rekey.Stats { return rekey.Stats{} }
func (s *script) Clear() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.cleared = true
}

// epoch is an epoch whose two directions have the same key, so that a line can
// open what it has sealed.
func epoch(index uint32) *rekey.Epoch {
	key := func(n int) secret.Bytes { return secret.Own(bytes.Repeat([]byte{7}, n)) }
	return &rekey.Epoch{Number: 1, RecvIndex: index, SendIndex: index,
		RecvKey: key(seal.KeyLen), RecvIV: key(seal.IVLen),
		SendKey: key(seal.KeyLen), SendIV: key(seal.IVLen)}
}

// mirror is a connection that keeps what is written, and reads what it is given.
type mirror struct {
	in     chan []byte
	closed chan struct{}
	fail   error // of Read

	mu  sync.Mutex
	out [][]byte
	err error // of Write
}

func newMirror() *mirror { return &mirror{in: make(chan []byte, 100), closed: make(chan struct{})} }

func (m *mirror) Read(b *Burst, wait bool) error {
	if m.fail != nil {
		return m.fail
	}
	if !wait && len(m.in) == 0 {
		b.Data = b.Data[:0]
		return nil
	}
	select {
	case d := <-m.in:
		b.Data, b.Size = append(b.Data[:0], d...), len(d)
		return nil
	case <-m.closed:
		return net.ErrClosed
	}
}

func (m *mirror) Write(b Burst) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.err != nil {
		return m.err
	}
	m.out = append(m.out, bytes.Clone(b.Data))
	return nil
}

func (m *mirror) Close() error { close(m.closed); return nil }

// packet is an IPv4 packet of n bytes.
func packet(n int) []byte {
	p := make([]byte, n)
	p[0] = 0x45
	binary.BigEndian.PutUint16(p[2:], uint16(n))
	return p
}

// loopback is a line that sends and receives in one epoch.
func loopback(t *testing.T, conn Conn, dev tunnel.Device) *Line {
	t.Helper()
	l, err := New(Config{Device: dev, Conn: conn, Machine: &script{}})
	if err != nil {
		t.Fatal(err)
	}
	o := &owner{Line: l, ready: map[uint32]*prepared{}}
	if err := o.install(epoch(9)); err != nil {
		t.Fatal(err)
	}
	o.send(9)
	return l
}

// sink is a device and queue that takes everything.
type sink struct {
	err    error
	writes int
}

func (s *sink) Queues() []tunnel.Queue                { return []tunnel.Queue{s} }
func (s *sink) Caps() tunnel.Caps                     { return tunnel.Caps{MTU: 1424, UDP: true} }
func (s *sink) SetMTU(int) error                      { return nil }
func (s *sink) Close() error                          { return nil }
func (s *sink) ReadBatch([]tunnel.Frame) (int, error) { return 0, io.ErrUnexpectedEOF }

func (s *sink) WriteBatch(f []tunnel.Frame) (int, error) {
	s.writes++
	return len(f), s.err
}

// last keeps the burst written last, in place.
type last struct{ burst Burst }

func (l *last) Read(*Burst, bool) error { return net.ErrClosed }
func (l *last) Write(b Burst) error     { l.burst = b; return nil }
func (l *last) Close() error            { return nil }

// A packet, a pack and a super-frame go out and come in without an allocation.
func TestNoAllocation(t *testing.T) {
	conn := &last{}
	dev := &sink{}
	l := loopback(t, conn, dev)
	o, in := newOutbound(l, l.seals[0], 1), newInbound(l, dev)
	super := superFrame(20000)
	writes := map[string]int{"packet": 1, "pack": 3, "super-frame": 1, "flow": 1}
	for name, frames := range map[string][]tunnel.Frame{
		"packet":      {{Data: packet(1400)}},
		"pack":        {{Data: packet(60)}, {Data: packet(600)}, {Data: packet(52)}},
		"super-frame": {super},
		"flow":        flow(10),
	} {
		dev.writes = 0
		before := l.open.packets.Load()
		n := testing.AllocsPerRun(1000, func() {
			mem := o.reset()
			for i, f := range frames {
				mem[i].Data, mem[i].GSO = append(mem[i].Data, f.Data...), f.GSO
			}
			o.batch(mem[:len(frames)])
			in.burst(conn.burst)
			in.burst(conn.burst) // replayed
		})
		if n != 0 {
			t.Errorf("%s: %v allocations", name, n)
		}
		per := uint64(len(frames))
		if name == "super-frame" {
			per = uint64(segment.Count(super))
		}
		if got := l.open.packets.Load() - before; got != 1001*per {
			t.Errorf("%s: %d packets came through, want %d", name, got, 1001*per)
		}
		if dev.writes != 1001*writes[name] {
			t.Errorf("%s: %d writes, want %d", name, dev.writes, 1001*writes[name])
		}
	}
	if got := l.Stats().Drops; got["replayed"] == 0 || got["forged"]+got["bad_record"] != 0 {
		t.Errorf("drops %v", got)
	}
}

// Datagrams that come one by one, as from a card without segmentation, go to
// the host together as long as the next has come already.
func TestRunGoesOnOverBursts(t *testing.T) {
	conn, dev := &last{}, &sink{}
	l := loopback(t, conn, dev)
	o, in := newOutbound(l, l.seals[0], 1), newInbound(l, dev)
	send := func(f tunnel.Frame) (datagrams [][]byte) {
		mem := o.reset()
		mem[0].Data, mem[0].GSO = append(mem[0].Data, f.Data...), f.GSO
		o.batch(mem[:1])
		for data := bytes.Clone(conn.burst.Data); len(data) > 0; {
			n := min(conn.burst.Size, len(data))
			datagrams, data = append(datagrams, data[:n:n]), data[n:]
		}
		return datagrams
	}
	took := func(what string, writes, packets int) {
		t.Helper()
		if got := int(l.open.packets.Swap(0)); dev.writes != writes || got != packets {
			t.Errorf("%s: %d writes, want %d; %d packets, want %d", what, dev.writes, writes,
				got, packets)
		}
		dev.writes = 0
	}
	give := func(d []byte) { in.burst(Burst{Data: d, Size: len(d)}) }
	n := segment.Count(superFrame(20000))
	for _, d := range send(superFrame(20000)) {
		give(d)
	}
	took("one by one", 1, n)
	if in.pending() {
		t.Error("something is held though the super-frame is complete")
	}
	parts := send(superFrame(20000))
	for _, d := range parts[:n-1] {
		give(d)
	}
	took("before the last", 0, 0)
	give(nil)
	took("nothing more is there", 1, n-1)
	give(parts[n-1])
	give([]byte{0x77}) // a stranger's noise does not hold it back
	took("noise", 1, 1)
	if in.pending() {
		t.Error("noise holds a run")
	}
}

// A slice that does not go on as its run does ends the run, though its number
// fits: a longer one, an empty one, one of another super-frame.
func TestSliceThatDoesNotFit(t *testing.T) {
	conn, dev := &last{}, &keep{}
	l := loopback(t, conn, dev)
	f := superFrame(3 * 1384)
	f.GSO.HeaderLen = 40
	sealer := l.sending.Load().sealers[1]
	in := newInbound(l, dev)
	give := func(index, count, payload int) {
		t.Helper()
		record := make([]byte, wire.PrefixLen+40+payload)
		copy(record[wire.PrefixLen:], f.Data[:40])
		wire.Piece{Index: index, Count: count, GSO: f.GSO}.Put(record)
		d, err := sealer.Seal(nil, record)
		if err != nil {
			t.Fatal(err)
		}
		in.burst(Burst{Data: d, Size: len(d)})
	}
	for name, second := range map[string][3]int{
		"longer": {1, 3, 1385}, "empty": {1, 3, 0}, "shorter, not the last": {1, 3, 1000},
		"other count": {1, 4, 1384}, "skips one": {2, 3, 1384},
	} {
		dev.frames = nil
		give(0, 3, 1384)
		give(second[0], second[1], second[2])
		in.burst(Burst{})
		if len(dev.frames) == 0 || len(dev.frames[0].Data) != 40+1384 {
			t.Errorf("%s: %d frames", name, len(dev.frames))
		}
	}
	dev.frames = nil
	give(0, 3, 1384)
	give(1, 3, 1384)
	give(2, 3, 10)
	if len(dev.frames) != 1 || len(dev.frames[0].Data) != 40+2*1384+10 || in.pending() {
		t.Errorf("three that fit: %d frames", len(dev.frames))
	}
}

// flow is n finished UDP packets that follow each other.
func flow(n int) (frames []tunnel.Frame) {
	for i := range n {
		p := packet(92)
		p[5], p[9], p[20], p[22] = byte(i), 17, 1, 2
		f := tunnel.Frame{Data: p, GSO: tunnel.GSO{Type: segment.UDP, HeaderLen: 28, Size: 64,
			Flags: segment.NeedsChecksum, CsumStart: 20, CsumOffset: 6}}
		segment.Cut(&f, 0, true)
		segment.Finish(&f)
		frames = append(frames, f)
	}
	return frames
}

// superFrame is a TCP super-frame with so many bytes of payload.
func superFrame(n int) tunnel.Frame {
	p := packet(40 + n)
	p[9], p[32] = 6, 5<<4
	for i := range n {
		p[40+i] = byte(i ^ i>>8)
	}
	f := tunnel.Frame{Data: p, GSO: tunnel.GSO{Type: segment.TCPv4, Flags: segment.NeedsChecksum,
		Size: 1384, CsumStart: 20, CsumOffset: 16}}
	f.GSO.HeaderLen = 40
	return f
}

func TestDropsBeforeSealing(t *testing.T) {
	conn := newMirror()
	l := loopback(t, conn, &sink{})
	live := l.sending.Load()
	big := superFrame(5000)
	big.GSO.Size = 1420
	broken := superFrame(5000)
	broken.Data[32] = 0
	noChecksum := superFrame(5000)
	noChecksum.GSO.Flags = 0
	tests := []struct {
		name  string
		epoch *sending
		err   error // of the connection
		frame tunnel.Frame
		want  string
		n     uint64
	}{
		{"blocked", nil, nil, tunnel.Frame{Data: packet(100)}, "blocked", 1},
		{"super-frame blocked", nil, nil, superFrame(5000), "blocked", 4},
		{"no packet", live, nil, tunnel.Frame{Data: []byte("hello")}, "not_ip", 1},
		{"empty", live, nil, tunnel.Frame{}, "not_ip", 1},
		{"broken super-frame", live, nil, broken, "not_ip", 1},
		{"super-frame without checksum", live, nil, noChecksum, "not_ip", 1},
		{"too large", live, nil, tunnel.Frame{Data: packet(1440)}, "oversize", 1},
		{"segments too large", live, nil, big, "oversize", 4},
		{"path", live, syscallError(t), tunnel.Frame{Data: packet(100)}, "oversize", 1},
		{"socket", live, io.ErrShortWrite, superFrame(5000), "send_failed", 4},
	}
	for _, tt := range tests {
		o := newOutbound(l, newWorker(), 1)
		l.sending.Store(tt.epoch)
		conn.err = tt.err
		mem := o.reset()
		mem[0].Data, mem[0].GSO = append(mem[0].Data, tt.frame.Data...), tt.frame.GSO
		o.batch(mem[:1])
		for why := range o.worker.drops {
			want := uint64(0)
			if reasonNames[why] == tt.want {
				want = tt.n
			}
			if got := o.worker.drops[why].Load(); got != want {
				t.Errorf("%s: %d dropped as %s, want %d", tt.name, got, reasonNames[why], want)
			}
		}
		if o.worker.packets.Load() != 0 {
			t.Errorf("%s: counted as sent", tt.name)
		}
	}
	if len(conn.out) != 0 {
		t.Errorf("%d datagrams went out", len(conn.out))
	}
}

// syscallError is what a socket says to a datagram that is too large.
func syscallError(t *testing.T) error {
	t.Helper()
	c, err := DialUDP(netip.AddrPort{}, netip.MustParseAddrPort("127.0.0.1:9"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	err = c.Write(Burst{Data: make([]byte, 1<<17), Size: 1 << 17})
	if err == nil {
		t.Fatal("a datagram of 128 KiB was sent")
	}
	return err
}

func TestDropsOnArrival(t *testing.T) {
	conn := newMirror()
	dev := &sink{}
	l := loopback(t, conn, dev)
	in := newInbound(l, dev)
	seal := func(record []byte) []byte {
		d, err := l.sending.Load().sealers[1].Seal(nil, record)
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	other := seal(append([]byte{byte(wire.Whole)}, packet(40)...))
	other[7] ^= 1 // another receiver index
	forged := seal([]byte{byte(wire.Control)})
	forged[len(forged)-1] ^= 1
	tests := []struct {
		name      string
		datagram  []byte
		authentic bool
		want      string
	}{
		{"short", []byte{0x10, 0}, false, "malformed"},
		{"other index", other, false, "unknown_epoch"},
		{"forged", forged, false, "forged"},
		{"unknown kind", seal([]byte{99}), true, "bad_record"},
		{"kind to come", seal([]byte{byte(wire.Pad), 1}), true, "bad_record"},
		{"no packet", seal([]byte{byte(wire.Whole), 1}), true, "bad_record"},
		{"no slice", seal([]byte{byte(wire.Slice), 1}), true, "bad_record"},
		{"pack with a rest", seal(append([]byte{byte(wire.Pack)}, append(packet(40), 1)...)), true,
			"bad_record"},
	}
	for _, tt := range tests {
		before := l.Stats().Drops[tt.want]
		if got := in.datagram(tt.datagram); got != tt.authentic {
			t.Errorf("%s: authentic %v, want %v", tt.name, got, tt.authentic)
		}
		if got := l.Stats().Drops[tt.want] - before; got != 1 {
			t.Errorf("%s: %s grew by %d, want 1", tt.name, tt.want, got)
		}
	}
	in.endRow() // the good packet of the pack
	dev.err = io.ErrShortWrite
	in.datagram(seal(append([]byte{byte(wire.Whole)}, packet(40)...)))
	for range maxDatagrams + 1 {
		in.datagram([]byte{1})
	}
	st := l.Stats()
	if st.Drops["tun_refused"] != 1 || st.Drops["handshake_queue"] != 1 {
		t.Errorf("drops %v", st.Drops)
	}
}

func TestRetiredEpochOpensNothing(t *testing.T) {
	conn := &last{}
	dev := &sink{}
	l := loopback(t, conn, dev)
	o := &owner{Line: l, ready: map[uint32]*prepared{}}
	record := append([]byte{byte(wire.Whole)}, packet(40)...)
	early, _ := l.sending.Load().sealers[1].Seal(nil, record)
	held := l.receiving.Load().find(9)
	o.retire(9)
	if l.sending.Load() != nil {
		t.Error("a retired epoch is still sent in")
	}
	if newInbound(l, dev).datagram(early) {
		t.Error("a record of a retired epoch was taken")
	}
	// A goroutine that had the epoch in hand at that moment finds no key.
	h, err := wire.ParseHeader(early)
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := held.open(early, h); err == nil || openReason(err) != unknownEpoch {
		t.Errorf("open after clear: %v", err)
	}
}

// run starts a line and returns what waits for its end.
func run(t *testing.T, cfg Config) (*Line, context.CancelFunc, func() error) {
	t.Helper()
	l, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- l.Run(ctx) }()
	return l, cancel, func() error {
		select {
		case err := <-done:
			return err
		case <-time.After(10 * time.Second):
			t.Fatal("line does not end")
			return nil
		}
	}
}

func TestRunEnds(t *testing.T) {
	m := &script{}
	dev2 := tun.NewMemory("m", 1500, 2)
	_, cancel, wait := run(t, Config{Device: dev2, Conn: newMirror(), Machine: m})
	cancel()
	if err := wait(); err != nil {
		t.Errorf("cancelled: %v", err)
	}
	if !m.cleared {
		t.Error("the machine is not cleared")
	}
	dev := tun.NewMemory("m", 1500, 1)
	_, _, wait = run(t, Config{Device: dev, Conn: newMirror(), Machine: &script{}})
	if err := dev.Close(); err != nil {
		t.Fatal(err)
	}
	if err := wait(); err != nil {
		t.Errorf("device closed: %v", err)
	}
	_, _, wait = run(t, Config{Device: &sink{}, Conn: newMirror(), Machine: &script{}})
	if err := wait(); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("device broken: %v", err)
	}
	broken := newMirror()
	broken.fail = io.ErrNoProgress
	_, _, wait = run(t, Config{Device: tun.NewMemory("m", 1500, 1), Conn: broken, Machine: &script{}})
	if err := wait(); !errors.Is(err, io.ErrNoProgress) {
		t.Errorf("connection broken: %v", err)
	}
}

func TestNewRefuses(t *testing.T) {
	dev, conn, m := tun.NewMemory("m", 1500, 1), newMirror(), &script{}
	for name, cfg := range map[string]Config{
		"no device":     {Conn: conn, Machine: m},
		"no connection": {Device: dev, Machine: m},
		"no machine":    {Device: dev, Conn: conn},
		"no queue":      {Device: tun.NewMemory("m", 1500, 0), Conn: conn, Machine: m},
		"many queues":   {Device: tun.NewMemory("m", 1500, wire.Queues), Conn: conn, Machine: m},
		"keepalive":     {Device: dev, Conn: conn, Machine: m, Keepalive: -1},
	} {
		if _, err := New(cfg); !errors.Is(err, ErrConfig) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// The outputs of the machine are carried out, in order, whatever they are.
func TestOwnerDoesWhatTheMachineSays(t *testing.T) {
	e := epoch(5)
	m := &script{outs: []rekey.Output{
		{Install: e, Send: 5, Confirm: true, Datagrams: [][]byte{{1, 2, 3}},
			Events: []rekey.Event{{Kind: "alarm", Reason: "test"}}},
		{Request: &rekey.KeyRequest{ID: 77, New: 1, SizeBits: 256, Budget: time.Second}},
		{},
		{Stop: true, Retire: []uint32{5}},
	}}
	conn := newMirror()
	l, cancel, wait := run(t, Config{Device: tun.NewMemory("m", 1500, 1), Conn: conn, Machine: m})
	inputs := func(n int) []rekey.Input {
		t.Helper()
		deadline := time.Now().Add(10 * time.Second)
		for {
			m.mu.Lock()
			ins := append([]rekey.Input(nil), m.ins...)
			m.mu.Unlock()
			if len(ins) >= n {
				return ins
			}
			if time.Now().After(deadline) {
				t.Fatalf("%d steps, want %d", len(ins), n)
			}
		}
	}
	inputs(1)
	l.Rekey()
	ins := inputs(3) // the answer to the request comes by itself: there is no key source
	if !ins[1].Rekey {
		t.Errorf("second input %+v, want the operator's", ins[1])
	}
	if a := ins[2].Keys; a == nil || a.ID != 77 || !errors.Is(a.Err, tunnel.ErrKeyDown) {
		t.Errorf("third input %+v, want the answer", ins[2])
	}
	if ins[1].Sent == 0 {
		t.Error("the confirmation is not in the volume")
	}
	l.Rekey()
	inputs(4)
	cancel()
	if err := wait(); err != nil {
		t.Fatal(err)
	}
	if e.SendKey.Len()+e.SendIV.Len()+e.RecvKey.Len()+e.RecvIV.Len() != 0 {
		t.Error("secrets of the epoch are left")
	}
	conn.mu.Lock()
	defer conn.mu.Unlock()
	if len(conn.out) != 3 || conn.out[2][0] != wire.TypeData || conn.out[0][0] != wire.TypeData ||
		!bytes.Equal(conn.out[1], []byte{1, 2, 3}) {
		t.Errorf("datagrams %x, want a confirmation, then the handshake's, then our state", conn.out)
	}
	if st := l.Stats(); st.Alarms != 1 || st.LastAlarm != "test" || st.Keys.Failures["down"] != 1 {
		t.Errorf("stats %+v", st)
	}
}

func TestUDPConn(t *testing.T) {
	for _, host := range []string{"127.0.0.1", "::1"} {
		t.Run(host, func(t *testing.T) {
			peer, err := net.ListenPacket("udp", net.JoinHostPort(host, "0"))
			if err != nil {
				t.Skip("no such loopback address here:", err)
			}
			remote := peer.LocalAddr().(*net.UDPAddr).AddrPort()
			c, err := DialUDP(netip.AddrPort{}, remote)
			if err != nil {
				t.Fatal(err)
			}
			local := net.UDPAddrFromAddrPort(c.(*udpConn).local)
			if err := c.Write(Burst{Data: []byte("onetwosix!"), Size: 3}); err != nil {
				t.Fatal(err)
			}
			buf := make([]byte, 100)
			for _, want := range []string{"one", "two", "six", "!"} {
				n, _, err := peer.ReadFrom(buf)
				if err != nil || string(buf[:n]) != want {
					t.Errorf("peer got %q, %v; want %q", buf[:n], err, want)
				}
			}
			stranger, err := net.ListenPacket("udp", net.JoinHostPort(host, "0"))
			if err != nil {
				t.Fatal(err)
			}
			defer stranger.Close()
			for _, from := range []net.PacketConn{stranger, peer} {
				if _, err := from.WriteTo([]byte(from.LocalAddr().String()), local); err != nil {
					t.Fatal(err)
				}
			}
			b := Burst{Data: make([]byte, 0, 100)}
			if err := c.Read(&b, true); err != nil || string(b.Data) != remote.String() ||
				b.Size != len(b.Data) {
				t.Errorf("read %q, %v; want what the peer sent", b.Data, err)
			}
			// A peer that is down makes neither reading nor writing fail.
			_ = peer.Close()
			for range 3 {
				if err := c.Write(Burst{Data: []byte("x"), Size: 1}); err != nil {
					t.Errorf("write to a closed port: %v", err)
				}
			}
			done := make(chan error)
			go func() { done <- c.Read(&b, true) }()
			if err := c.Close(); err != nil {
				t.Fatal(err)
			}
			if err := <-done; !closed(err) {
				t.Errorf("read after close: %v", err)
			}
		})
	}
	if _, err := DialUDP(netip.AddrPort{}, netip.AddrPort{}); !errors.Is(err, ErrConfig) {
		t.Errorf("no remote endpoint: %v", err)
	}
	if passing(unix.EBADF) || passing(unix.EINVAL) || passing(0) {
		t.Error("an error of the socket is taken for one of the path")
	}
}

// The two ends of a burst: what goes out in one call comes in whole, and after
// the kernel has refused one, bursts go out datagram by datagram for a while.
func TestUDPOffload(t *testing.T) {
	a, b := connected(t)
	defer a.Close()
	defer b.Close()
	send, receive := a.Offload()
	if !send || !receive {
		t.Skip("this kernel has no UDP_SEGMENT or UDP_GRO")
	}
	burst := Burst{Data: make([]byte, 40*1000+1), Size: 1000}
	for i := range burst.Data {
		burst.Data[i] = byte(i / 1000)
	}
	for _, refused := range []bool{false, true} {
		if refused {
			a.refused.Store(time.Now().UnixNano())
		}
		if send, _ := a.Offload(); send == refused {
			t.Errorf("refused %v, but offload is %v", refused, send)
		}
		if err := a.Write(burst); err != nil {
			t.Fatal(err)
		}
		var got []byte
		calls := 0
		for len(got) < len(burst.Data) {
			in := Burst{Data: make([]byte, 0, 1<<16)}
			if err := b.Read(&in, true); err != nil {
				t.Fatal(err)
			}
			if in.Size != min(1000, len(burst.Data)-len(got)) {
				t.Fatalf("segments of %d bytes", in.Size)
			}
			got = append(got, in.Data...)
			calls++
		}
		if !bytes.Equal(got, burst.Data) {
			t.Error("other bytes came in")
		}
		if !refused && calls > 2 {
			t.Errorf("%d calls to receive one burst", calls)
		}
	}
	a.refused.Store(time.Now().Add(-2 * retryAfter).UnixNano())
	if send, _ := a.Offload(); !send {
		t.Error("offload is not tried again")
	}
	// More segments than a kernel takes in one call go out all the same.
	many := Burst{Data: make([]byte, 2000), Size: 1}
	if err := a.Write(many); err != nil {
		t.Fatal(err)
	}
	if send, _ := a.Offload(); send {
		t.Error("a burst of 2000 segments was not refused")
	}
	in := Burst{Data: make([]byte, 0, 1<<16)}
	if err := b.Read(&in, true); err != nil || in.Size != 1 {
		t.Errorf("read %d bytes, %v", in.Size, err)
	}
}

// connected is two sockets on the loopback interface that know each other.
func connected(t *testing.T) (a, b *udpConn) {
	t.Helper()
	free := func() netip.AddrPort {
		c, err := net.ListenPacket("udp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		return c.LocalAddr().(*net.UDPAddr).AddrPort()
	}
	one, two := free(), free()
	dial := func(local, remote netip.AddrPort) *udpConn {
		c, err := DialUDP(local, remote)
		if err != nil {
			t.Fatal(err)
		}
		return c.(*udpConn)
	}
	return dial(one, two), dial(two, one)
}

// A burst goes out and comes in without an allocation.
func TestUDPNoAllocation(t *testing.T) {
	a, b := connected(t)
	defer a.Close()
	defer b.Close()
	out := Burst{Data: make([]byte, 10*1000), Size: 1000}
	buf := make([]byte, 0, 1<<16)
	n := testing.AllocsPerRun(200, func() {
		if err := a.Write(out); err != nil {
			t.Fatal(err)
		}
		for got := 0; got < len(out.Data); {
			in := Burst{Data: buf}
			if err := b.Read(&in, true); err != nil {
				t.Fatal(err)
			}
			got += len(in.Data)
		}
	})
	if n != 0 {
		t.Errorf("%v allocations a burst", n)
	}
}
