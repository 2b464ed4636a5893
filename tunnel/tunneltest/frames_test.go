package tunneltest

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"math/rand/v2"
	"os"
	"sync/atomic"
	"testing"
	"time"

	"github.com/quietline/quietline/tunnel"
	"github.com/quietline/quietline/tunnel/lab"
	"github.com/quietline/quietline/tunnel/segment"
)

// shapes draws frames as kernels hand them over, all that the packet path
// knows: TCP and UDP super-frames, checksums still to be made, other protocols,
// fragments, IPv4 and IPv6, options, tiny, full and odd sizes. Each packet
// carries a number, so that no two are equal.
type shapes struct {
	rng *rand.Rand
	n   uint64
	mtu int

	flow []byte // the last datagram of a flow of small ones; nil = none
	left int    // datagrams that are still to come in it
}

func (s *shapes) draw() tunnel.Frame {
	s.n++
	if s.left > 0 {
		return s.next()
	}
	v6 := s.rng.IntN(2) == 0
	options := 4 * s.rng.IntN(4) * s.rng.IntN(2)
	ip := 20 + options
	if v6 {
		ip = 40 + options/8*8
	}
	switch s.rng.IntN(6) {
	case 0:
		return s.other(v6, ip)
	case 5:
		n := 8 + s.rng.IntN(100)
		s.flow, s.left = s.packet(v6, ip, ip+8+n, 17), 1+s.rng.IntN(30)
		binary.BigEndian.PutUint16(s.flow[ip+4:], uint16(8+n))
		return s.next()
	case 1, 2:
		return s.offload(v6, ip, 6)
	default:
		return s.offload(v6, ip, 17)
	}
}

// next is the next small datagram of a flow: finished, numbered in a row, and
// now and then shorter or with a gap in the numbers.
func (s *shapes) next() tunnel.Frame {
	s.left--
	ip := 40
	if s.flow[0]>>4 == 4 {
		ip = int(s.flow[0]&15) * 4
		id := binary.BigEndian.Uint16(s.flow[4:]) + 1
		if s.rng.IntN(20) == 0 {
			id += 7
		}
		binary.BigEndian.PutUint16(s.flow[4:], id)
	}
	p := bytes.Clone(s.flow)
	binary.BigEndian.PutUint64(p[ip+8:], s.n)
	if s.rng.IntN(10) == 0 {
		p = p[:ip+8+8]
	}
	f := tunnel.Frame{Data: p, GSO: tunnel.GSO{Type: segment.UDP, Flags: segment.NeedsChecksum,
		HeaderLen: uint16(ip + 8), Size: uint16(len(p)), CsumStart: uint16(ip), CsumOffset: 6}}
	segment.Cut(&f, 0, true)
	segment.Finish(&f)
	return f
}

// other is a packet with nothing left to be done: ICMP, a fragment, anything.
func (s *shapes) other(v6 bool, ip int) tunnel.Frame {
	p := s.packet(v6, ip, ip+8+s.rng.IntN(s.mtu-ip-8+1), byte(s.rng.IntN(256)))
	if !v6 && s.rng.IntN(2) == 0 {
		binary.BigEndian.PutUint16(p[6:], uint16(s.rng.IntN(1<<14))) // a fragment
	}
	return tunnel.Frame{Data: p}
}

// offload is a packet or super-frame of TCP (6) or UDP (17) that the kernel
// leaves to us.
func (s *shapes) offload(v6 bool, ip int, protocol byte) tunnel.Frame {
	transport, g := 8, tunnel.GSO{Flags: segment.NeedsChecksum, CsumStart: uint16(ip), CsumOffset: 6}
	if protocol == 6 {
		transport, g.CsumOffset = 20+4*s.rng.IntN(11), 16
	}
	size := 8 + s.rng.IntN(s.mtu-ip-transport-8+1)
	payload := 8 + s.rng.IntN(size-7)
	segments := s.rng.IntN(3) > 0
	if segments {
		if s.rng.IntN(2) == 0 {
			size = s.mtu - ip - transport // full segments are the common case
		}
		payload = size + 1 + s.rng.IntN(min(60000-size, 60*size))
	}
	p := s.packet(v6, ip, ip+transport+payload, protocol)
	t := p[ip:]
	if protocol == 6 {
		t[12] = byte(transport/4) << 4
	}
	whole := tunnel.Frame{Data: p, GSO: g}
	if segments {
		whole.GSO.Size = uint16(size)
		switch {
		case protocol == 17:
			whole.GSO.Type = segment.UDP
		case v6:
			whole.GSO.Type = segment.TCPv6
		default:
			whole.GSO.Type = segment.TCPv4
		}
		if protocol == 6 && s.rng.IntN(4) == 0 {
			whole.GSO.Type |= segment.ECN
		}
		cut := whole
		cut.GSO.HeaderLen = uint16(ip + transport)
		segment.Cut(&cut, 0, true) // writes lengths and checksum of the whole
	} else if protocol == 17 {
		binary.BigEndian.PutUint16(t[4:], uint16(len(t)))
	}
	return whole
}

// packet is n bytes of IP packet with a random body and a number.
func (s *shapes) packet(v6 bool, ip, n int, protocol byte) []byte {
	p := make([]byte, n)
	for i := range p {
		p[i] = byte(s.rng.Uint32())
	}
	if v6 {
		clear(p[:40])
		p[0], p[6] = 0x60, protocol
		binary.BigEndian.PutUint16(p[4:], uint16(n-40))
		binary.BigEndian.PutUint64(p[8:], s.n)
		return p
	}
	clear(p[:20])
	p[0], p[9] = 0x40|byte(ip/4), protocol
	binary.BigEndian.PutUint16(p[2:], uint16(n))
	binary.BigEndian.PutUint64(p[12:], s.n)
	return p
}

// crossing sends so many frames through a pair and returns the packets that
// are missing at the other end, of how many. What comes must be what a kernel
// would have made of the frames, each packet once.
func crossing(t *testing.T, p *Pair, frames int, seed uint64) (missing, sent int) {
	t.Helper()
	s := &shapes{rng: rand.New(rand.NewPCG(seed, 1)), mtu: p.Tokyo.opt.MTU}
	at := p.Kochi.Receive()
	want := map[[32]byte]bool{} // false: not come yet
	buf := make([]byte, 0, 65535)
	for range frames {
		f := s.draw()
		checked := f
		if f.GSO != (tunnel.GSO{}) {
			g, err := segment.Check(f)
			if err != nil {
				t.Fatalf("seed %d: %v", seed, err)
			}
			checked.GSO = g
		}
		err := segment.Split(checked, buf, func(p []byte) error {
			want[sha256.Sum256(p)] = false
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		if err := p.Tokyo.Device.InjectFrame(0, f); err != nil {
			t.Fatal(err)
		}
		if s.rng.IntN(4) > 0 { // else more than one in a batch
			time.Sleep(time.Millisecond)
		}
	}
	time.Sleep(time.Second)
	for _, p := range at.Packets() {
		id := sha256.Sum256(p)
		if came, ok := want[id]; !ok || came {
			t.Fatalf("seed %d: a packet that was not sent, or twice (%v): %x",
				seed, came, p[:min(80, len(p))])
		}
		want[id] = true
	}
	for _, came := range want {
		if !came {
			missing++
		}
	}
	return missing, len(want)
}

// Every shape arrives as the kernel would have made it: in good weather all of
// them, in bad weather all but what the network lost.
func TestShapes(t *testing.T) {
	rounds := uint64(1)
	if os.Getenv("QUIETLINE_LONG") == "1" {
		rounds = 70 // 10^7 packets
	}
	total := 0
	for seed := range rounds {
		for _, coalesce := range []bool{false, true} {
			total += goodWeather(t, coalesce, seed)
			total += badWeather(t, coalesce, seed)
		}
	}
	t.Logf("%d packets", total)
}

// shapeFrames is how many frames cross in one run: about 36,000 packets.
const shapeFrames = 2500

func goodWeather(t *testing.T, coalesce bool, seed uint64) (sent int) {
	t.Helper()
	opt := Options{Coalesce: coalesce, Weather: lab.Weather{Delay: 5 * time.Millisecond}}
	bubble(t, opt, func(t *testing.T, p *Pair) {
		p.Up(10 * time.Second)
		var missing int
		if missing, sent = crossing(t, p, shapeFrames, seed); missing != 0 {
			t.Errorf("coalesce %v: %d of %d packets are missing (seed %d)",
				coalesce, missing, sent, seed)
		}
		for name, n := range p.Kochi.Line.Stats().Drops {
			if n != 0 {
				t.Errorf("coalesce %v: %d dropped as %s (seed %d)", coalesce, n, name, seed)
			}
		}
	})
	return sent
}

func badWeather(t *testing.T, coalesce bool, seed uint64) (sent int) {
	t.Helper()
	opt := Options{Coalesce: coalesce, EpochLife: 2 * time.Second,
		Weather: lab.Weather{Loss: 0.01, Duplicate: 0.01, Reorder: 0.02,
			Delay: 5 * time.Millisecond, Jitter: time.Millisecond, Seed: seed}}
	bubble(t, opt, func(t *testing.T, p *Pair) {
		p.Up(30 * time.Second)
		var missing int
		missing, sent = crossing(t, p, shapeFrames, seed)
		lost, _ := p.Net.Counts()
		out := p.Tokyo.Line.Stats().Sent
		// A lost slice takes one packet, a lost pack takes its few.
		most := float64(lost.Lost) * float64(out.Packets) / float64(out.Datagrams) * 1.5
		if missing == 0 || float64(missing) > most {
			t.Errorf("coalesce %v: %d of %d packets are missing, the network lost %d datagrams"+
				" (seed %d)", coalesce, missing, sent, lost.Lost, seed)
		}
	})
	return sent
}

// One lost slice costs one segment: the frames around the gap are mended.
func TestLostSliceCostsOneSegment(t *testing.T) {
	bubble(t, Options{Coalesce: true}, func(t *testing.T, p *Pair) {
		p.Up(10 * time.Second)
		var datagrams atomic.Int64
		p.Net.Tap(func(from int, d []byte) []byte {
			if from == 0 && d[0] == 0x10 && len(d) > 50 {
				switch datagrams.Add(1) {
				case 1, 20, 41:
					return nil // first, middle and last of the frame below
				}
			}
			return d
		})
		s := &shapes{rng: rand.New(rand.NewPCG(1, 2)), mtu: 1424}
		data := s.packet(false, 20, 40+40*1384+1, 6)
		data[32] = 5 << 4
		f := tunnel.Frame{Data: data, GSO: tunnel.GSO{Type: segment.TCPv4, HeaderLen: 40,
			Flags: segment.NeedsChecksum, Size: 1384, CsumStart: 20, CsumOffset: 16}}
		segment.Cut(&f, 0, true)
		at := p.Kochi.Receive()
		if err := p.Tokyo.Device.InjectFrame(0, f); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		var want [][]byte
		_ = segment.Split(f, make([]byte, 0, 2000), func(p []byte) error {
			want = append(want, bytes.Clone(p))
			return nil
		})
		if len(want) != 41 || datagrams.Load() != 41 {
			t.Fatalf("%d segments in %d datagrams, want 41", len(want), datagrams.Load())
		}
		want = append(want[1:19:19], want[20:40]...)
		got := at.Packets()
		if len(got) != len(want) {
			t.Fatalf("%d packets came, want %d", len(got), len(want))
		}
		for i := range want {
			// PSH and FIN travel with the last segment, which is lost.
			if !bytes.Equal(got[i], want[i]) {
				t.Errorf("packet %d:\n%x, want\n%x", i, got[i][:60], want[i][:60])
			}
		}
	})
}
