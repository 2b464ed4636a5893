package wire

import (
	"encoding/binary"
	"fmt"

	"github.com/quietline/quietline/tunnel"
	"github.com/quietline/quietline/tunnel/segment"
)

// Piece says which slice of which super-frame a record holds. Its super-frame
// is named by the counter of its first slice, which is the record's counter
// less Index: the slices of one super-frame are sealed in a row on one queue.
type Piece struct {
	Index int // from 0
	Count int // slices of the super-frame
	GSO   tunnel.GSO
}

// Put writes the prefix of a SLICE record to the first PrefixLen bytes of b.
func (s Piece) Put(b []byte) {
	_ = b[PrefixLen-1]
	b[0] = byte(Slice)
	b[1] = s.GSO.Type
	b[2] = s.GSO.Flags
	b[3] = 0
	binary.BigEndian.PutUint16(b[4:], uint16(s.Index))
	binary.BigEndian.PutUint16(b[6:], uint16(s.Count))
	binary.BigEndian.PutUint16(b[8:], s.GSO.HeaderLen)
	binary.BigEndian.PutUint16(b[10:], s.GSO.Size)
	binary.BigEndian.PutUint16(b[12:], s.GSO.CsumStart)
	b[14] = byte(s.GSO.CsumOffset)
	b[15] = 0
}

// ParsePiece splits the body of a SLICE record, as [Parse] returns it, into
// what it says of itself and the packet: the headers of the super-frame,
// GSO.HeaderLen bytes, and the slice.
func ParsePiece(body []byte) (Piece, []byte, error) {
	if len(body) <= PrefixLen-1 {
		return Piece{}, nil, ErrShort
	}
	b := body[:PrefixLen-1] // the kind stands before
	s := Piece{
		Index: int(binary.BigEndian.Uint16(b[3:])),
		Count: int(binary.BigEndian.Uint16(b[5:])),
		GSO: tunnel.GSO{Type: b[0], Flags: b[1],
			HeaderLen:  binary.BigEndian.Uint16(b[7:]),
			Size:       binary.BigEndian.Uint16(b[9:]),
			CsumStart:  binary.BigEndian.Uint16(b[11:]),
			CsumOffset: uint16(b[13]),
		},
	}
	packet := body[PrefixLen-1:]
	if b[2] != 0 || b[14] != 0 || s.Index >= s.Count {
		return Piece{}, nil, fmt.Errorf("%w: slice %d of %d", ErrSlice, s.Index, s.Count)
	}
	checked, err := segment.Check(tunnel.Frame{Data: packet, GSO: s.GSO})
	if err != nil {
		return Piece{}, nil, fmt.Errorf("%w: %w", ErrSlice, err)
	}
	slice := len(packet) - int(s.GSO.HeaderLen)
	switch {
	case checked != s.GSO:
	case s.GSO.Type == segment.None && s.Count == 1:
		return s, packet, nil
	case s.GSO.Type == segment.None:
	case slice == int(s.GSO.Size), s.Index == s.Count-1 && slice < int(s.GSO.Size):
		return s, packet, nil
	}
	return Piece{}, nil, fmt.Errorf("%w: slice %d of %d has %d bytes",
		ErrSlice, s.Index, s.Count, slice)
}

// NextPacket splits the first packet off the body of a PACK record: the
// packets stand in a row, each as long as its own length field says.
func NextPacket(body []byte) (packet, rest []byte, err error) {
	n := packetLen(body)
	if n == 0 || n > len(body) {
		return nil, nil, ErrNotPacket
	}
	return body[:n:n], body[n:], nil
}

// packetLen is the length that an IP packet says it has; 0 if p holds no
// header of one.
func packetLen(p []byte) int {
	if len(p) == 0 {
		return 0
	}
	switch p[0] >> 4 {
	case 4:
		if len(p) < ipv4HeaderLen {
			return 0
		}
		n := int(binary.BigEndian.Uint16(p[2:]))
		if n < ipv4HeaderLen {
			return 0
		}
		return n
	case 6:
		if len(p) < ipv6HeaderLen {
			return 0
		}
		return ipv6HeaderLen + int(binary.BigEndian.Uint16(p[4:]))
	}
	return 0
}
