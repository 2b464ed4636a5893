package lab

import (
	"encoding/binary"
	"net/netip"

	"golang.org/x/sys/unix"
)

// flow is one direction of a TCP connection.
type flow struct {
	from, to netip.AddrPort
}

// tcpSegment returns the flow, sequence number and payload of a TCP segment;
// ok is false for anything else.
func tcpSegment(p Packet) (fl flow, seq uint32, payload []byte, ok bool) {
	b := p.Data
	if !p.raw {
		if len(b) < 14 {
			return
		}
		kind := binary.BigEndian.Uint16(b[12:])
		if kind != unix.ETH_P_IP && kind != unix.ETH_P_IPV6 {
			return
		}
		b = b[14:]
	}
	from, to, b, ok := ipPayload(b, unix.IPPROTO_TCP)
	if !ok || len(b) < 20 {
		return fl, 0, nil, false
	}
	header := int(b[12]>>4) * 4
	if header < 20 || header > len(b) {
		return fl, 0, nil, false
	}
	fl.from = netip.AddrPortFrom(from, binary.BigEndian.Uint16(b[0:]))
	fl.to = netip.AddrPortFrom(to, binary.BigEndian.Uint16(b[2:]))
	return fl, binary.BigEndian.Uint32(b[4:]), b[header:], true
}

// ipPayload returns what an IP packet of the given protocol carries. Fragments
// and IPv6 extension headers are not followed.
func ipPayload(b []byte, protocol byte) (from, to netip.Addr, payload []byte, ok bool) {
	if len(b) == 0 {
		return
	}
	switch b[0] >> 4 {
	case 4:
		header := int(b[0]&15) * 4
		if header < 20 || len(b) < header || b[9] != protocol {
			return
		}
		from, _ = netip.AddrFromSlice(b[12:16])
		to, _ = netip.AddrFromSlice(b[16:20])
		end := int(binary.BigEndian.Uint16(b[2:]))
		if end == 0 { // a super-frame above 64 KiB says its length nowhere
			end = len(b)
		}
		if end < header || end > len(b) {
			return
		}
		return from, to, b[header:end], true
	case 6:
		if len(b) < 40 || b[6] != protocol {
			return
		}
		from, _ = netip.AddrFromSlice(b[8:24])
		to, _ = netip.AddrFromSlice(b[24:40])
		end := 40 + int(binary.BigEndian.Uint16(b[4:]))
		if end == 40 || end > len(b) {
			end = len(b)
		}
		return from, to, b[40:end], true
	}
	return
}
