package wire

import (
	"bytes"
	"encoding/binary"
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/quietline/quietline/tunnel"
	"github.com/quietline/quietline/tunnel/segment"
)

// tcp4 is the GSO of a TCP super-frame with headers of 40 bytes.
var tcp4 = tunnel.GSO{Type: segment.TCPv4, Flags: segment.NeedsChecksum, HeaderLen: 40,
	Size: 1000, CsumStart: 20, CsumOffset: 16}

// sliceRecord is a SLICE record with headers of 40 bytes and n bytes of slice.
func sliceRecord(s Piece, n int) []byte {
	b := make([]byte, PrefixLen, PrefixLen+40+n)
	s.Put(b)
	p := make([]byte, 40+n)
	p[0], p[32] = 0x45, 5<<4
	return append(b, p...)
}

func TestPiece(t *testing.T) {
	alone := tunnel.GSO{Flags: segment.NeedsChecksum, HeaderLen: 20, CsumStart: 20, CsumOffset: 16}
	change := func(i int, v byte) []byte {
		b := sliceRecord(Piece{Index: 1, Count: 3, GSO: tcp4}, 1000)
		b[i] = v
		return b
	}
	tests := []struct {
		name   string
		record []byte
		want   Piece
		err    error
	}{
		{"middle", sliceRecord(Piece{1, 3, tcp4}, 1000), Piece{1, 3, tcp4}, nil},
		{"last, short", sliceRecord(Piece{2, 3, tcp4}, 1), Piece{2, 3, tcp4}, nil},
		{"last, full", sliceRecord(Piece{2, 3, tcp4}, 1000), Piece{2, 3, tcp4}, nil},
		{"checksum only", sliceRecord(Piece{0, 1, alone}, 1200), Piece{0, 1, alone}, nil},
		{"middle, short", sliceRecord(Piece{1, 3, tcp4}, 999), Piece{}, ErrSlice},
		{"too long", sliceRecord(Piece{2, 3, tcp4}, 1001), Piece{}, ErrSlice},
		{"empty", sliceRecord(Piece{2, 3, tcp4}, 0), Piece{}, ErrSlice},
		{"index", sliceRecord(Piece{3, 3, tcp4}, 1000), Piece{}, ErrSlice},
		{"no slices", sliceRecord(Piece{0, 0, tcp4}, 1000), Piece{}, ErrSlice},
		{"two without segmentation", sliceRecord(Piece{0, 2, alone}, 100), Piece{}, ErrSlice},
		{"cut prefix", sliceRecord(Piece{1, 3, tcp4}, 1000)[:PrefixLen-1], Piece{}, ErrShort},
		{"cut header", sliceRecord(Piece{1, 3, tcp4}, 1000)[:PrefixLen+30], Piece{}, ErrSlice},
		{"reserved", change(3, 1), Piece{}, ErrSlice},
		{"reserved at the end", change(15, 1), Piece{}, ErrSlice},
		{"type", change(1, 7), Piece{}, ErrSlice},
		{"IPv6 type", change(1, segment.TCPv6), Piece{}, ErrSlice},
		{"no checksum wanted", change(2, 0), Piece{}, ErrSlice},
		{"other header length", change(9, 44), Piece{}, ErrSlice},
		{"IP version", change(PrefixLen, 0x55), Piece{}, ErrSlice},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			kind, body, err := Parse(tt.record)
			if kind != Slice || err != nil {
				t.Fatalf("parse: %v, %v", kind, err)
			}
			got, packet, err := ParsePiece(body)
			if !errors.Is(err, tt.err) {
				t.Fatalf("error %v, want %v", err, tt.err)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("piece (-want +got):\n%s", diff)
			}
			if err == nil && !bytes.Equal(packet, tt.record[PrefixLen:]) {
				t.Error("the packet is not what follows the prefix")
			}
		})
	}
}

func TestNextPacket(t *testing.T) {
	short4 := ipv4(20)
	binary.BigEndian.PutUint16(short4[2:], 19)
	tests := []struct {
		name string
		body []byte
		want []int // lengths
		err  error
	}{
		{"one", ipv4(20), []int{20}, nil},
		{"three", bytes.Join([][]byte{ipv4(20), ipv6(40), ipv4(500)}, nil), []int{20, 40, 500}, nil},
		{"nothing", nil, nil, nil},
		{"cut", ipv4(40)[:39], nil, ErrNotPacket},
		{"rest", append(ipv6(60), 0), []int{60}, ErrNotPacket},
		{"shorter than its header", short4, nil, ErrNotPacket},
		{"cut header", ipv6(40)[:39], nil, ErrNotPacket},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var got []int
			var err error
			for rest := tt.body; len(rest) > 0 && err == nil; {
				var p []byte
				if p, rest, err = NextPacket(rest); err == nil {
					got = append(got, len(p))
				}
			}
			if !errors.Is(err, tt.err) || !cmp.Equal(tt.want, got) {
				t.Errorf("%v, %v; want %v, %v", got, err, tt.want, tt.err)
			}
		})
	}
}

func FuzzPiece(f *testing.F) {
	f.Add(sliceRecord(Piece{1, 3, tcp4}, 1000)[1:])
	f.Add(sliceRecord(Piece{2, 3, tcp4}, 7)[1:])
	f.Fuzz(func(t *testing.T, body []byte) {
		s, packet, err := ParsePiece(body)
		if err != nil {
			return
		}
		again := make([]byte, PrefixLen)
		s.Put(again)
		if !bytes.Equal(append(again[1:], packet...), body) {
			t.Errorf("slice %x prints as %x", body, again)
		}
	})
}
