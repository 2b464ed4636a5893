package segment

import (
	"bytes"
	"encoding/binary"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

// syn is a SYN with these options, checksum finished. The header is padded to
// a multiple of four.
func syn(v6 bool, ipOptions int, options, data []byte) []byte {
	for len(options)%4 != 0 {
		options = append(options, optionEnd)
	}
	start := ipv4Len + ipOptions
	if v6 {
		start = ipv6Len
	}
	p := make([]byte, start+tcpLen)
	t := p[start:]
	binary.BigEndian.PutUint16(t, 40000)
	binary.BigEndian.PutUint16(t[2:], 443)
	t[12], t[13] = byte(tcpLen+len(options))/4<<4, flagSYN
	p = append(append(p, options...), data...)
	if v6 {
		p[0], p[6], p[23], p[39] = 0x60, protocolTCP, 1, 2
		binary.BigEndian.PutUint16(p[4:], uint16(len(p)-ipv6Len))
	} else {
		p[0], p[9], p[15], p[19] = 0x40|byte(start/4), protocolTCP, 1, 2
		binary.BigEndian.PutUint16(p[2:], uint16(len(p)))
	}
	t = p[start:]
	binary.BigEndian.PutUint16(t[tcpChecksum:], pseudo(p, start, protocolTCP))
	binary.BigEndian.PutUint16(t[tcpChecksum:], ^fold(sum(t, 0)))
	return p
}

// whole tells whether the TCP checksum of a finished packet is right.
func whole(p []byte) bool {
	start := tcpStart(p)
	return fold(sum(p[start:], uint64(pseudo(p, start, protocolTCP)))) == 0xffff
}

func TestClampMSS(t *testing.T) {
	mss := func(n int) []byte { return []byte{optionMSS, mssLen, byte(n >> 8), byte(n)} }
	cookie := []byte{34, 4, 0, 0} // fast open, RFC 7413
	change := func(p []byte, at int, b byte) []byte { p[at] = b; return p }
	tests := []struct {
		name string
		p    []byte
		mtu  int
		want int // value of the option after; 0 = the packet stays as it is
	}{
		{"IPv4", syn(false, 0, mss(1460), nil), 1424, 1384},
		{"IPv6", syn(true, 0, mss(1440), nil), 1424, 1364},
		{"IPv4 with options", syn(false, 8, mss(1460), nil), 1424, 1384},
		{"behind another option", syn(false, 0, append(cookie, mss(1460)...), nil), 1424, 1384},
		{"at an odd place", syn(false, 0, append([]byte{optionNone}, mss(1460)...), nil), 1424, 1384},
		{"jumbo", syn(true, 0, mss(65535), nil), 8924, 8864},
		{"with data", syn(false, 0, mss(1460), []byte("hello")), 1424, 1384},
		{"equal", syn(false, 0, mss(1384), nil), 1424, 0},
		{"smaller", syn(false, 0, mss(536), nil), 1424, 0},
		{"no option", syn(false, 0, nil, nil), 1424, 0},
		{"behind the end", syn(false, 0, append([]byte{0, 0, 0, 0}, mss(1460)...), nil), 1424, 0},
		{"cut option", syn(false, 0, []byte{optionNone, optionMSS, mssLen, 9}, nil), 1424, 0},
		{"option of no length", syn(false, 0, append([]byte{8, 0}, mss(1460)...), nil), 1424, 0},
		{"option of another length", syn(false, 0, []byte{optionMSS, 6, 5, 180, 0, 0}, nil), 1424, 0},
		{"no SYN", change(syn(false, 0, mss(1460), nil), 33, 0x10), 1424, 0},
		{"UDP", change(syn(false, 0, mss(1460), nil), 9, 17), 1424, 0},
		{"IPv6 extension", change(syn(true, 0, mss(1460), nil), 6, 60), 1424, 0},
		{"later fragment", change(syn(false, 0, mss(1460), nil), 7, 1), 1424, 0},
		{"header beyond the packet", change(syn(false, 0, mss(1460), nil), 32, 0xf0), 1424, 0},
		{"IP header beyond the packet", change(syn(false, 0, mss(1460), nil), 0, 0x4f), 1424, 0},
		{"IP version 5", change(syn(false, 0, mss(1460), nil), 0, 0x55), 1424, 0},
		{"short", syn(false, 0, mss(1460), nil)[:39], 1424, 0},
		{"MTU that nobody has", syn(false, 0, mss(1460), nil), 100, 0},
	}
	for _, tt := range tests {
		before := bytes.Clone(tt.p)
		if got := ClampMSS(tt.p, tt.mtu, false); got != (tt.want != 0) {
			t.Errorf("%s: %v", tt.name, got)
		}
		if tt.want == 0 {
			if diff := cmp.Diff(before, tt.p); diff != "" {
				t.Errorf("%s has changed: %s", tt.name, diff)
			}
			continue
		}
		start := tcpStart(tt.p)
		at := findMSS(tt.p[start:])
		if got := int(binary.BigEndian.Uint16(tt.p[start+at:])); got != tt.want || !whole(tt.p) {
			t.Errorf("%s: %d, want %d; checksum right: %v", tt.name, got, tt.want, whole(tt.p))
		}
		// Nothing else has changed.
		copy(tt.p[start+at:][:2], before[start+at:])
		copy(tt.p[start+tcpChecksum:][:2], before[start+tcpChecksum:])
		if !bytes.Equal(before, tt.p) {
			t.Errorf("%s: more than the option has changed", tt.name)
		}
	}
}

// A checksum that is still to be made stays as it is: it holds the sum of the
// addresses, and the rest is summed when the packet is final.
func TestClampMSSWithOpenChecksum(t *testing.T) {
	p := syn(false, 0, []byte{optionMSS, mssLen, 5, 180}, nil)
	binary.BigEndian.PutUint16(p[20+tcpChecksum:], pseudo(p, 20, protocolTCP))
	if !ClampMSS(p, 1424, true) {
		t.Fatal("not clamped")
	}
	binary.BigEndian.PutUint16(p[20+tcpChecksum:], ^fold(sum(p[20:], 0)))
	if !whole(p) {
		t.Error("the finished checksum is wrong")
	}
}

// Whatever the options and where they stand, the checksum stays right and the
// offer fits.
func TestClampMSSProperty(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var options []byte
		for range rapid.IntRange(0, 12).Draw(t, "no-ops") {
			options = append(options, optionNone)
		}
		offer := rapid.Uint16().Draw(t, "offer")
		options = append(options, optionMSS, mssLen, byte(offer>>8), byte(offer))
		v6, mtu := rapid.Bool().Draw(t, "v6"), rapid.IntRange(148, 9000).Draw(t, "mtu")
		data := rapid.SliceOfN(rapid.Byte(), 0, 9).Draw(t, "data")
		p := syn(v6, 4*rapid.IntRange(0, 10).Draw(t, "IP options"), options, data)
		ClampMSS(p, mtu, false)
		start := tcpStart(p)
		got := int(binary.BigEndian.Uint16(p[start+findMSS(p[start:]):]))
		header := ipv4Len
		if v6 {
			header = ipv6Len
		}
		if want := min(int(offer), mtu-header-tcpLen); got != want || !whole(p) {
			t.Fatalf("%d, want %d; checksum right: %v", got, want, whole(p))
		}
	})
}

func FuzzClampMSS(f *testing.F) {
	f.Add(syn(false, 0, []byte{2, 4, 5, 180}, nil), uint16(1424))
	f.Add(syn(true, 0, []byte{1, 2, 4, 5, 180, 3, 3, 7}, nil), uint16(1280))
	f.Fuzz(func(t *testing.T, p []byte, mtu uint16) {
		before := bytes.Clone(p)
		done := ClampMSS(p, int(mtu), false)
		changed := 0
		for i := range p {
			if p[i] != before[i] {
				changed++
			}
		}
		if len(p) != len(before) || changed > 4 || !done && changed > 0 {
			t.Errorf("%x became %x", before, p)
		}
		if ClampMSS(p, int(mtu), false) {
			t.Error("clamped twice")
		}
	})
}
