package segment

import (
	"encoding/binary"

	"github.com/quietline/quietline/tunnel"
)

// maxRow is how many datagrams a row may have: UDP_MAX_SEGMENTS of linux/udp.h.
const maxRow = 64

// Row joins finished UDP packets that stand in a row in one flow into a
// super-frame, if a kernel would cut that into exactly these packets again. So
// many small datagrams reach the host in one call. The zero value is an empty
// row. One goroutine at a time.
type Row struct {
	data  []byte // headers of the first packet, then payload
	n     int
	start int  // of the UDP header; 0 = the first packet cannot be joined to
	size  int  // payload of each but the last
	ended bool // the last is shorter
}

// Len is the number of packets in the row.
func (r *Row) Len() int { return r.n }

// Reset empties the row.
func (r *Row) Reset() { r.data, r.n = r.data[:0], 0 }

// Add takes a copy of an IP packet. It is false if the packet
// does not continue the row; an empty row takes every packet.
func (r *Row) Add(p []byte) bool {
	start := udpStart(p)
	if r.n == 0 {
		r.data, r.n, r.start, r.ended = append(r.data[:0], p...), 1, start, false
		r.size = len(p) - start - udpLen
		return true
	}
	if r.start == 0 || start != r.start || r.ended || r.n == maxRow ||
		len(r.data)+len(p) > 65535 || !r.continues(p) {
		return false
	}
	payload := p[start+udpLen:]
	r.data = append(r.data, payload...)
	r.n++
	r.ended = len(payload) < r.size
	return true
}

// continues tells whether p has the headers that a kernel would give to the
// next segment.
func (r *Row) continues(p []byte) bool {
	first, t := r.data, r.start
	size := len(p) - t - udpLen
	if size == 0 || size > r.size || string(first[t:t+4]) != string(p[t:t+4]) { // ports
		return false
	}
	if p[0]>>4 == 6 {
		// All but the length, which follows from the payload.
		return string(first[:4]) == string(p[:4]) && string(first[6:t]) == string(p[6:t])
	}
	id := binary.BigEndian.Uint16(first[4:]) + uint16(r.n)
	return string(first[:2]) == string(p[:2]) && binary.BigEndian.Uint16(p[4:]) == id &&
		string(first[6:10]) == string(p[6:10]) && string(first[12:t]) == string(p[12:t])
}

// Frame is the row as one frame, valid until the row changes.
func (r *Row) Frame() tunnel.Frame {
	f := tunnel.Frame{Data: r.data}
	if r.n > 1 {
		f.GSO = tunnel.GSO{Type: UDP, Flags: NeedsChecksum, HeaderLen: uint16(r.start + udpLen),
			Size: uint16(r.size), CsumStart: uint16(r.start), CsumOffset: udpChecksum}
		Cut(&f, 0, true) // lengths and checksum of the whole
	}
	return f
}

// udpStart is where the UDP header of a packet begins whose lengths and
// checksums are all as a kernel would make them; 0 for any other packet.
// Extension headers and fragments are not joined.
func udpStart(p []byte) int {
	start := ipv6Len
	switch {
	case len(p) >= ipv6Len+udpLen && p[0]>>4 == 6 && p[6] == 17:
		if int(binary.BigEndian.Uint16(p[4:])) != len(p)-ipv6Len {
			return 0
		}
	case len(p) >= ipv4Len+udpLen && p[0]>>4 == 4 && p[9] == 17:
		start = int(p[0]&15) * 4
		if start < ipv4Len || len(p) < start+udpLen || p[6]&0x3f|p[7] != 0 ||
			int(binary.BigEndian.Uint16(p[2:])) != len(p) || fold(sum(p[:start], 0)) != 0xffff {
			return 0
		}
	default:
		return 0
	}
	t := p[start:]
	if int(binary.BigEndian.Uint16(t[4:])) != len(t) || t[6]|t[7] == 0 ||
		fold(sum(t, uint64(pseudo(p, start, 17)))) != 0xffff {
		return 0
	}
	return start
}
