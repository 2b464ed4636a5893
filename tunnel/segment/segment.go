// Package segment knows how a super-frame falls into packets: what a kernel
// with segmentation offload would put on the wire. A super-frame is an IP
// packet of TCP or UDP that is larger than the MTU, with a [tunnel.GSO] that
// says how large its segments are and that checksums are still to be made.
//
// The main functions: [Cut] makes a part of a super-frame a frame of its own,
// after a datagram was lost; [Split] makes packets with finished checksums,
// for a device without offload.
//
// A caller must keep in mind that frames come from a kernel or from an
// authenticated peer and have passed [Check]; the others assume that.
package segment

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/quietline/quietline/tunnel"
)

// Values of linux/virtio_net.h.
const (
	NeedsChecksum = 1 // VIRTIO_NET_HDR_F_NEEDS_CSUM
	None          = 0 // VIRTIO_NET_HDR_GSO_NONE
	TCPv4         = 1 // VIRTIO_NET_HDR_GSO_TCPV4
	TCPv6         = 4 // VIRTIO_NET_HDR_GSO_TCPV6
	UDP           = 5 // VIRTIO_NET_HDR_GSO_UDP_L4
	ECN           = 0x80
)

// MaxHeader is the most bytes of IP and transport header that a super-frame
// may have: 40 of IPv6, 60 of TCP, and room for IPv6 extension headers.
const MaxHeader = 256

// ErrFrame says that a frame is no super-frame that can be cut.
var ErrFrame = errors.New("not a super-frame of TCP or UDP")

// Header sizes of RFC 791, RFC 8200, RFC 9293 and RFC 768.
const (
	ipv4Len = 20
	ipv6Len = 40
	tcpLen  = 20
	udpLen  = 8
)

// Checksum fields of TCP and UDP, from the start of the transport header.
const (
	tcpChecksum = 16
	udpChecksum = 6
)

// Check tells whether a frame with an offload request is well formed, and
// returns the GSO with the true header length, which kernels leave open
// (drivers/net/tun.c sets it to the linear part of the buffer).
func Check(f tunnel.Frame) (tunnel.GSO, error) {
	g, p := f.GSO, f.Data
	kind := g.Type &^ ECN
	start := int(g.CsumStart)
	least := ipv4Len
	switch {
	case len(p) == 0:
		return g, ErrFrame
	case p[0]>>4 == 6:
		least = ipv6Len
	case p[0]>>4 != 4:
		return g, ErrFrame
	}
	if g.Flags&NeedsChecksum == 0 || start < least || start+udpLen > len(p) {
		return g, fmt.Errorf("%w: checksum from %d in %d bytes", ErrFrame, start, len(p))
	}
	g.Flags = NeedsChecksum // the others are a receiver's
	switch kind {
	case None:
		if g.Type != None || start+int(g.CsumOffset)+2 > len(p) {
			return g, fmt.Errorf("%w: type %#x, checksum at %d+%d of %d bytes", ErrFrame,
				g.Type, start, g.CsumOffset, len(p))
		}
		g.HeaderLen, g.Size = uint16(start), 0
		return g, nil
	case TCPv4, TCPv6:
		if start+tcpLen > len(p) || g.CsumOffset != tcpChecksum {
			return g, fmt.Errorf("%w: TCP header", ErrFrame)
		}
		offset := int(p[start+12]>>4) * 4
		if offset < tcpLen {
			return g, fmt.Errorf("%w: TCP header of %d bytes", ErrFrame, offset)
		}
		g.HeaderLen = uint16(start + offset)
	case UDP:
		if g.CsumOffset != udpChecksum {
			return g, fmt.Errorf("%w: UDP header", ErrFrame)
		}
		g.HeaderLen = uint16(start + udpLen)
	default:
		return g, fmt.Errorf("%w: type %#x", ErrFrame, g.Type)
	}
	want4 := kind == TCPv4 || kind == UDP && p[0]>>4 == 4
	switch {
	case want4 != (p[0]>>4 == 4):
		return g, fmt.Errorf("%w: type %#x of IP version %d", ErrFrame, g.Type, p[0]>>4)
	case want4 && int(p[0]&15)*4 != start:
		return g, fmt.Errorf("%w: IPv4 header of %d bytes", ErrFrame, int(p[0]&15)*4)
	case g.Size == 0 || int(g.HeaderLen) > min(len(p)-1, MaxHeader):
		return g, fmt.Errorf("%w: header %d, segment %d of %d bytes", ErrFrame,
			g.HeaderLen, g.Size, len(p))
	}
	return g, nil
}

// Count is the number of segments of a checked frame; 1 without segmentation.
func Count(f tunnel.Frame) int {
	if f.GSO.Type == None {
		return 1
	}
	payload := len(f.Data) - int(f.GSO.HeaderLen)
	return (payload + int(f.GSO.Size) - 1) / int(f.GSO.Size)
}

// Cut mends a frame that holds a part of a checked super-frame: the headers of
// the whole, and of its payload what begins with segment number first. last
// says that the part reaches to the end of the whole. Checksums stay to be
// made.
func Cut(f *tunnel.Frame, first int, last bool) {
	p, g := f.Data, &f.GSO
	t := p[g.CsumStart:]
	setLength(p, first)
	switch g.Type &^ ECN {
	case TCPv4, TCPv6:
		seq := binary.BigEndian.Uint32(t[4:])
		binary.BigEndian.PutUint32(t[4:], seq+uint32(first)*uint32(g.Size))
		if first > 0 {
			t[13] &^= 0x80 // CWR belongs to the first segment, RFC 3168 section 6.1.2
		}
		if !last {
			t[13] &^= 0x01 | 0x08 // FIN and PSH to the last
		}
		binary.BigEndian.PutUint16(t[tcpChecksum:], pseudo(p, int(g.CsumStart), 6))
	case UDP:
		binary.BigEndian.PutUint16(t[4:], uint16(len(t)))
		binary.BigEndian.PutUint16(t[udpChecksum:], pseudo(p, int(g.CsumStart), 17))
	}
	if len(p) <= int(g.HeaderLen)+int(g.Size) {
		g.Type, g.Size = None, 0
	}
}

// setLength sets the length of an IP packet, its number in a row of packets,
// and the IPv4 header checksum.
func setLength(p []byte, first int) {
	if p[0]>>4 == 6 {
		binary.BigEndian.PutUint16(p[4:], uint16(len(p)-ipv6Len))
		return
	}
	header := p[:int(p[0]&15)*4]
	binary.BigEndian.PutUint16(p[2:], uint16(len(p)))
	binary.BigEndian.PutUint16(p[4:], binary.BigEndian.Uint16(p[4:])+uint16(first))
	binary.BigEndian.PutUint16(p[10:], 0)
	binary.BigEndian.PutUint16(p[10:], ^fold(sum(header, 0)))
}

// Finish makes the checksum that a checked frame without segmentation still
// needs, in place.
func Finish(f *tunnel.Frame) {
	start, at := int(f.GSO.CsumStart), int(f.GSO.CsumStart+f.GSO.CsumOffset)
	c := ^fold(sum(f.Data[start:], 0))
	if c == 0 && f.GSO.CsumOffset == udpChecksum {
		c = 0xffff // zero says that there is no checksum, RFC 768
	}
	binary.BigEndian.PutUint16(f.Data[at:], c)
	f.GSO = tunnel.GSO{}
}

// Split calls emit with each packet of a checked frame in turn, checksums
// finished, built in buf, which must hold a packet. It stops at an error.
func Split(f tunnel.Frame, buf []byte, emit func(packet []byte) error) error {
	if f.GSO.Type == None {
		one := tunnel.Frame{Data: append(buf[:0], f.Data...), GSO: f.GSO}
		if f.GSO.Flags&NeedsChecksum != 0 {
			Finish(&one)
		}
		return emit(one.Data)
	}
	header, n := int(f.GSO.HeaderLen), Count(f)
	for i := range n {
		from := header + i*int(f.GSO.Size)
		to := min(from+int(f.GSO.Size), len(f.Data))
		one := tunnel.Frame{Data: append(append(buf[:0], f.Data[:header]...), f.Data[from:to]...),
			GSO: f.GSO}
		Cut(&one, i, i == n-1)
		Finish(&one)
		if err := emit(one.Data); err != nil {
			return err
		}
	}
	return nil
}

// pseudo is the pseudo-header sum that stands in the checksum field of a
// packet whose checksum is still to be made (RFC 9293 section 3.1, RFC 8200
// section 8.1).
func pseudo(p []byte, start int, protocol uint64) uint16 {
	addresses := p[12:20]
	if p[0]>>4 == 6 {
		addresses = p[8:40]
	}
	return fold(sum(addresses, protocol+uint64(len(p)-start)))
}

// sum adds 16-bit words, RFC 1071, in 32-bit steps.
func sum(b []byte, acc uint64) uint64 {
	for len(b) >= 8 {
		v := binary.BigEndian.Uint64(b)
		acc += v>>32 + v&0xffffffff
		b = b[8:]
	}
	for len(b) >= 2 {
		acc += uint64(binary.BigEndian.Uint16(b))
		b = b[2:]
	}
	if len(b) == 1 {
		acc += uint64(b[0]) << 8
	}
	return acc
}

// fold brings a sum to 16 bits.
func fold(acc uint64) uint16 {
	for acc > 0xffff {
		acc = acc>>16 + acc&0xffff
	}
	return uint16(acc)
}
