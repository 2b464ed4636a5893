package line

import (
	"encoding/binary"
	"time"

	"github.com/quietline/quietline/tunnel"
	"github.com/quietline/quietline/tunnel/wire"
)

// ICMP "administratively prohibited": RFC 792 with RFC 1812 section 5.2.7.1,
// and RFC 4443 section 3.1.
const (
	icmp4Unreachable, icmp4Prohibited = 3, 13
	icmp6Unreachable, icmp6Prohibited = 1, 1
	protoICMP                         = 1
	protoICMP6                        = 58
	icmpLen                           = 8
	icmpTTL                           = 64
	// rejectEvery bounds answers to one packet in so long: a host that hears
	// none tries again by itself.
	rejectEvery = 10 * time.Millisecond
)

// reject tells the host that a packet of the record was refused, so that a
// connection fails at once rather than by silence. It writes at most one
// answer each rejectEvery.
func (o *outbound) reject(record []byte) {
	if o.now.Sub(o.rejected) < rejectEvery {
		return
	}
	kind, body, err := wire.Parse(record)
	switch {
	case err != nil:
		return
	case kind == wire.Pack:
		body, _, err = wire.NextPacket(body)
	case kind == wire.Slice:
		_, body, err = wire.ParsePiece(body)
	}
	if err != nil {
		return
	}
	answer := prohibited(body)
	if answer == nil {
		return
	}
	o.rejected = o.now
	o.line.writes.Lock()
	defer o.line.writes.Unlock()
	_, _ = o.line.cfg.Device.Queues()[o.queue-1].WriteBatch([]tunnel.Frame{{Data: answer}})
}

// prohibited is the ICMP answer to a packet; nil if it must have none: ICMP
// errors, fragments but the first, and what has no host as its source
// (RFC 1122 section 3.2.2).
func prohibited(p []byte) []byte {
	switch p[0] >> 4 {
	case 4:
		head := int(p[0]&15) * 4
		if len(p) < head+8 || binary.BigEndian.Uint16(p[6:])&0x1fff != 0 || p[12] == 0 ||
			p[12] >= 224 || p[9] == protoICMP && p[head] != 8 {
			return nil
		}
		quote := p[:min(len(p), head+8)]
		b := make([]byte, 20+icmpLen, 20+icmpLen+len(quote))
		b = append(b, quote...)
		b[0], b[8], b[9] = 0x45, icmpTTL, protoICMP
		binary.BigEndian.PutUint16(b[2:], uint16(len(b)))
		copy(b[12:16], p[16:20]) // as if the far host said so
		copy(b[16:20], p[12:16])
		binary.BigEndian.PutUint16(b[10:], checksum(0, b[:20]))
		b[20], b[21] = icmp4Unreachable, icmp4Prohibited
		binary.BigEndian.PutUint16(b[22:], checksum(0, b[20:]))
		return b
	case 6:
		if len(p) < 48 || p[8] == 0xff || p[6] == protoICMP6 && p[40] < 128 {
			return nil
		}
		quote := p[:min(len(p), 1280-40-icmpLen)] // RFC 4443 section 2.4 (c)
		b := make([]byte, 40+icmpLen, 40+icmpLen+len(quote))
		b = append(b, quote...)
		b[0], b[6], b[7] = 0x60, protoICMP6, icmpTTL
		binary.BigEndian.PutUint16(b[4:], uint16(icmpLen+len(quote)))
		copy(b[8:24], p[24:40])
		copy(b[24:40], p[8:24])
		b[40], b[41] = icmp6Unreachable, icmp6Prohibited
		pseudo := sum(uint32(icmpLen+len(quote))+protoICMP6, b[8:40])
		binary.BigEndian.PutUint16(b[42:], checksum(pseudo, b[40:]))
		return b
	}
	return nil
}

// sum adds bytes to an Internet checksum under way (RFC 1071).
func sum(s uint32, b []byte) uint32 {
	for ; len(b) >= 2; b = b[2:] {
		s += uint32(binary.BigEndian.Uint16(b))
	}
	if len(b) == 1 {
		s += uint32(b[0]) << 8
	}
	return s
}

func checksum(s uint32, b []byte) uint16 {
	s = sum(s, b)
	for s>>16 != 0 {
		s = s&0xffff + s>>16
	}
	return ^uint16(s)
}
