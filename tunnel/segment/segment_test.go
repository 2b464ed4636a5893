package segment

import (
	"bytes"
	"encoding/binary"
	"errors"
	"testing"

	"pgregory.net/rapid"

	"github.com/quietline/quietline/tunnel"
)

// draw makes a super-frame as a kernel hands it over: lengths of the whole,
// checksum field with the pseudo-header sum.
func draw(t *rapid.T) tunnel.Frame {
	v6 := rapid.Bool().Draw(t, "v6")
	udp := rapid.Bool().Draw(t, "udp")
	size := rapid.IntRange(1, 1400).Draw(t, "size")
	payload := rapid.IntRange(1, min(60000, 50*size)).Draw(t, "payload")
	options := 4 * rapid.IntRange(0, 10).Draw(t, "options")
	ip := ipv4Len + options // IPv4 options
	if v6 {
		ip = ipv6Len + options/8*8 // an extension header
	}
	g := tunnel.GSO{Flags: NeedsChecksum, Size: uint16(size), CsumStart: uint16(ip)}
	transport := udpLen
	if !udp {
		transport = tcpLen + 4*rapid.IntRange(0, 10).Draw(t, "tcp options")
	}
	p := make([]byte, ip+transport+payload)
	for i := range p {
		p[i] = byte(i*7 + i>>8)
	}
	if v6 {
		p[0], p[6] = 0x60, 17
		binary.BigEndian.PutUint16(p[4:], uint16(len(p)-40))
	} else {
		p[0], p[9] = 0x40|byte(ip/4), 17
		binary.BigEndian.PutUint16(p[2:], uint16(len(p)))
		setLength(p, 0)
	}
	tr := p[ip:]
	protocol := uint64(17)
	if udp {
		g.Type, g.CsumOffset = UDP, udpChecksum
		binary.BigEndian.PutUint16(tr[4:], uint16(len(tr)))
	} else {
		protocol, g.CsumOffset = 6, tcpChecksum
		g.Type = TCPv4
		if v6 {
			g.Type = TCPv6
		}
		tr[12] = byte(transport/4) << 4
		tr[13] = rapid.Byte().Draw(t, "flags")
	}
	binary.BigEndian.PutUint16(tr[g.CsumOffset:], pseudo(p, ip, protocol))
	f := tunnel.Frame{Data: p, GSO: g}
	checked, err := Check(f)
	if err != nil {
		t.Fatal(err)
	}
	if int(checked.HeaderLen) != ip+transport {
		t.Fatalf("header %d, want %d", checked.HeaderLen, ip+transport)
	}
	f.GSO = checked
	return f
}

// split gathers the packets of a frame.
func split(t *rapid.T, f tunnel.Frame) [][]byte {
	var out [][]byte
	err := Split(f, make([]byte, 0, 65535), func(p []byte) error {
		out = append(out, bytes.Clone(p))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// valid checks lengths and checksums of a packet by the rules a receiver has.
func valid(t *rapid.T, p []byte, g tunnel.GSO) {
	start := int(g.CsumStart)
	protocol := uint64(6)
	if g.Type == UDP {
		protocol = 17
		if got := int(binary.BigEndian.Uint16(p[start+4:])); got != len(p)-start {
			t.Fatalf("UDP length %d of %d", got, len(p)-start)
		}
	}
	if p[0]>>4 == 4 {
		if int(binary.BigEndian.Uint16(p[2:])) != len(p) || fold(sum(p[:int(p[0]&15)*4], 0)) != 0xffff {
			t.Fatal("IPv4 length or checksum")
		}
	} else if int(binary.BigEndian.Uint16(p[4:])) != len(p)-40 {
		t.Fatal("IPv6 length")
	}
	acc := uint64(pseudo(p, start, protocol))
	if fold(sum(p[start:], acc)) != 0xffff {
		t.Fatal("transport checksum")
	}
}

// The packets of a super-frame hold its payload in order, each with valid
// lengths and checksums, sequence numbers and flags as RFC 9293 has them.
func TestSplit(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		f := draw(t)
		whole := bytes.Clone(f.Data)
		packets := split(t, f)
		if len(packets) != Count(f) {
			t.Fatalf("%d packets, want %d", len(packets), Count(f))
		}
		var payload []byte
		h, start := int(f.GSO.HeaderLen), int(f.GSO.CsumStart)
		for i, p := range packets {
			valid(t, p, f.GSO)
			if f.GSO.Type != UDP {
				seq := binary.BigEndian.Uint32(p[start+4:]) - binary.BigEndian.Uint32(whole[start+4:])
				if int(seq) != len(payload) {
					t.Fatalf("packet %d: sequence number +%d, want +%d", i, seq, len(payload))
				}
				want := whole[start+13]
				if i > 0 {
					want &^= 0x80
				}
				if i < len(packets)-1 {
					want &^= 0x09
				}
				if p[start+13] != want {
					t.Fatalf("packet %d: flags %#x, want %#x", i, p[start+13], want)
				}
			}
			payload = append(payload, p[h:]...)
		}
		if !bytes.Equal(payload, whole[h:]) {
			t.Fatal("payload has changed")
		}
		if !bytes.Equal(f.Data, whole) {
			t.Fatal("the super-frame has changed")
		}
	})
}

// Cutting a super-frame in two and splitting the parts gives the same packets
// as splitting the whole.
func TestCut(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		f := draw(t)
		want := split(t, f)
		at := rapid.IntRange(0, len(want)).Draw(t, "at")
		var got [][]byte
		h, size := int(f.GSO.HeaderLen), int(f.GSO.Size)
		part := func(first, end int) {
			if first == end {
				return
			}
			from, to := h+first*size, min(h+end*size, len(f.Data))
			p := tunnel.Frame{Data: append(bytes.Clone(f.Data[:h]), f.Data[from:to]...), GSO: f.GSO}
			Cut(&p, first, end == len(want))
			got = append(got, split(t, p)...)
		}
		part(0, at)
		part(at, len(want))
		if len(got) != len(want) {
			t.Fatalf("%d packets, want %d", len(got), len(want))
		}
		for i := range want {
			if !bytes.Equal(got[i], want[i]) {
				t.Fatalf("packet %d of %d, cut at %d:\n%x\nwant\n%x", i, len(want), at, got[i], want[i])
			}
		}
	})
}

func TestSplitStops(t *testing.T) {
	full := errors.New("full")
	rapid.Check(t, func(t *rapid.T) {
		n := 0
		err := Split(draw(t), make([]byte, 0, 65535), func([]byte) error { n++; return full })
		if !errors.Is(err, full) || n != 1 {
			t.Fatalf("%d packets, %v", n, err)
		}
	})
}

func FuzzCheck(f *testing.F) {
	p := make([]byte, 100)
	p[0], p[32] = 0x45, 5<<4
	f.Add(p, uint8(TCPv4), uint8(NeedsChecksum), uint16(20), uint16(20), uint16(16))
	p6 := bytes.Clone(p)
	p6[0] = 0x60
	f.Add(p6, uint8(UDP), uint8(NeedsChecksum), uint16(20), uint16(40), uint16(6))
	f.Add(p6, uint8(ECN), uint8(NeedsChecksum), uint16(20), uint16(40), uint16(6))
	f.Add(p, uint8(None), uint8(NeedsChecksum), uint16(0), uint16(20), uint16(6))
	f.Fuzz(func(t *testing.T, p []byte, kind, flags uint8, size, start, offset uint16) {
		fr := tunnel.Frame{Data: p, GSO: tunnel.GSO{Type: kind, Flags: flags, Size: size,
			CsumStart: start, CsumOffset: offset}}
		g, err := Check(fr)
		if err != nil {
			return
		}
		fr.GSO = g
		n := 0
		if err := Split(fr, make([]byte, 0, 70000), func([]byte) error { n++; return nil }); err != nil {
			t.Fatal(err)
		}
		if n != Count(fr) {
			t.Fatalf("%d packets, want %d", n, Count(fr))
		}
	})
}
