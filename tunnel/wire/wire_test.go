package wire

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// ipv4 is a packet of n bytes with a true length field.
func ipv4(n int) []byte {
	p := make([]byte, n)
	p[0] = 0x45
	binary.BigEndian.PutUint16(p[2:], uint16(n))
	return p
}

// ipv6 is a packet of n bytes with a true length field.
func ipv6(n int) []byte {
	p := make([]byte, n)
	p[0] = 0x60
	binary.BigEndian.PutUint16(p[4:], uint16(n-40))
	return p
}

// datagram is a data datagram with the given header and n bytes after it.
func datagram(h Header, n int) []byte {
	b := make([]byte, HeaderLen+n)
	h.Put(b)
	return b
}

func TestHeaderBytes(t *testing.T) {
	got := datagram(Header{Queue: 0x0203, Index: 0x04050607, Counter: 0x08090a0b0c0d0e0f}, 0)
	want := []byte{0x10, 0, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("header bytes (-want +got):\n%s", diff)
	}
}

func TestParseHeader(t *testing.T) {
	good := Header{Queue: Queues - 1, Index: 7, Counter: 1 << 63}
	set := func(i int, v byte) []byte {
		b := datagram(good, 1+TagLen)
		b[i] = v
		return b
	}
	tests := []struct {
		name string
		b    []byte
		want Header
		err  error
	}{
		{"good", datagram(good, 1+TagLen), good, nil},
		{"empty", nil, Header{}, ErrShort},
		{"no room for a kind", datagram(good, TagLen), Header{}, ErrShort},
		{"handshake type", set(0, 1), Header{}, ErrType},
		{"unknown type", set(0, 0x11), Header{}, ErrType},
		{"flags", set(1, 0x80), Header{}, ErrFlags},
		{"queue one too high", set(3, Queues), Header{}, ErrQueue},
		{"queue high byte", set(2, 1), Header{}, ErrQueue},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := ParseHeader(tt.b)
			if !errors.Is(err, tt.err) {
				t.Fatalf("error %v, want %v", err, tt.err)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("header (-want +got):\n%s", diff)
			}
		})
	}
}

func TestIsHandshake(t *testing.T) {
	for first := range 256 {
		b := []byte{byte(first), 1, 2}
		if got, want := IsHandshake(b), first >= 1 && first <= 15; got != want {
			t.Errorf("first byte %#x: handshake %v, want %v", first, got, want)
		}
	}
	if IsHandshake(nil) {
		t.Error("an empty datagram is taken for a handshake")
	}
}

func TestParse(t *testing.T) {
	record := func(k Kind, body []byte) []byte { return append([]byte{byte(k)}, body...) }
	short := ipv4(40)[:39]
	tests := []struct {
		name string
		b    []byte
		kind Kind
		body []byte
		err  error
	}{
		{"whole ipv4", record(Whole, ipv4(20)), Whole, ipv4(20), nil},
		{"whole ipv6", record(Whole, ipv6(1280)), Whole, ipv6(1280), nil},
		{"empty control", record(Control, nil), Control, []byte{}, nil},
		{"nothing", nil, 0, nil, ErrShort},
		{"whole without packet", record(Whole, nil), Whole, nil, ErrNotPacket},
		{"cut packet", record(Whole, short), Whole, nil, ErrNotPacket},
		{"packet and more", record(Whole, append(ipv6(60), 0)), Whole, nil, ErrNotPacket},
		{"version 5", record(Whole, []byte{0x55}), Whole, nil, ErrNotPacket},
		{"control with body", record(Control, []byte{1}), Control, []byte{1}, nil},
		{"slice", record(Slice, ipv4(20)), Slice, ipv4(20), nil},
		{"pack", record(Pack, ipv4(20)), Pack, ipv4(20), nil},
		{"pad", record(Pad, ipv4(20)), Pad, ipv4(20), nil},
		{"kind 0", record(0, nil), 0, nil, ErrKind},
		{"kind 6", record(6, nil), 6, nil, ErrKind},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			kind, body, err := Parse(tt.b)
			if !errors.Is(err, tt.err) {
				t.Fatalf("error %v, want %v", err, tt.err)
			}
			if kind != tt.kind {
				t.Errorf("kind %v, want %v", kind, tt.kind)
			}
			if diff := cmp.Diff(tt.body, body); diff != "" {
				t.Errorf("body (-want +got):\n%s", diff)
			}
		})
	}
}

func TestKindNames(t *testing.T) {
	want := []string{"kind 0", "WHOLE", "SLICE", "PACK", "PAD", "CONTROL", "kind 6"}
	var got []string
	for k := range Kind(7) {
		got = append(got, k.String())
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("names (-want +got):\n%s", diff)
	}
}

// The largest record of each built kind and of a slice must fit the path.
func TestInnerMTU(t *testing.T) {
	v4, v6 := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")
	mapped := netip.MustParseAddr("::ffff:192.0.2.1")
	tests := []struct {
		path  int
		outer netip.Addr
		want  int
		err   error
	}{
		{1500, v4, 1424, nil},
		{1500, mapped, 1424, nil},
		{1500, v6, 1404, nil},
		{9000, v6, 8904, nil},
		{1280, v6, 1184, nil},
		{576 + 76, v4, 576, nil},
		{576 + 75, v4, 0, ErrMTU},
		{0, v6, 0, ErrMTU},
	}
	for _, tt := range tests {
		got, err := InnerMTU(tt.path, tt.outer)
		if !errors.Is(err, tt.err) || got != tt.want {
			t.Errorf("path %d over %s: %d, %v; want %d, %v",
				tt.path, tt.outer, got, err, tt.want, tt.err)
		}
	}
	if _, err := InnerMTU(65536, v4); err == nil {
		t.Error("a path MTU above 65535 is taken")
	}
}

// TestPadMTU: a full packet fits the largest bucket, and that fits the record.
func TestPadMTU(t *testing.T) {
	for inner := 700; inner < 9000; inner++ {
		mtu, err := PadMTU(inner)
		if err != nil {
			t.Fatal(err)
		}
		bucket := (mtu + PrefixLen + 2 + 15) / 16 * 16
		if 12+bucket+16 > inner+PrefixLen || inner+PrefixLen-(12+bucket+16) >= 16 {
			t.Fatalf("mtu %d of %d: bucket of %d", mtu, inner, bucket)
		}
	}
	if mtu, err := PadMTU(1424); mtu != 1390 || err != nil {
		t.Errorf("%d, %v", mtu, err)
	}
	if _, err := PadMTU(600); !errors.Is(err, ErrMTU) {
		t.Errorf("600: %v", err)
	}
}

func FuzzParseHeader(f *testing.F) {
	f.Add(datagram(Header{Queue: 1, Index: 2, Counter: 3}, 40))
	f.Add(datagram(Header{}, 0))
	f.Add([]byte{0x10})
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := ParseHeader(b)
		if err != nil {
			return
		}
		again := make([]byte, HeaderLen)
		h.Put(again)
		if !bytes.Equal(again, b[:HeaderLen]) {
			t.Errorf("header %x parses and prints as %x", b[:HeaderLen], again)
		}
	})
}

func FuzzParse(f *testing.F) {
	f.Add([]byte{})
	f.Add(append([]byte{byte(Whole)}, ipv4(28)...))
	f.Add(append([]byte{byte(Whole)}, ipv6(48)...))
	for k := range Kind(7) {
		f.Add([]byte{byte(k), 1, 2, 3})
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		kind, body, err := Parse(b)
		if err != nil {
			if body != nil {
				t.Errorf("a body comes with %v", err)
			}
			return
		}
		if !bytes.Equal(append([]byte{byte(kind)}, body...), b) {
			t.Errorf("record %x parses as %v %x", b, kind, body)
		}
		if kind == Whole && body[0]>>4 != 4 && body[0]>>4 != 6 {
			t.Errorf("packet of version %d", body[0]>>4)
		}
	})
}
