// Package wire is the datagram format of a line, as a comment and as code.
//
// Every datagram begins with one byte that says what it is:
//
//	0x01 … 0x0f   handshake (package rekey knows the rest)
//	0x10          data: one record of an epoch
//	all others    refused
//
// A data datagram is a header, a sealed record and a tag. Integers are big
// endian. The whole header is associated data of the seal.
//
//	 0               1               2               3
//	+---------------+---------------+-------------------------------+
//	| type 0x10     | flags (0)     | queue                         |
//	+---------------+---------------+-------------------------------+
//	| receiver index: names the epoch, chosen by the receiver       |
//	+---------------------------------------------------------------+
//	| counter, from 0 per epoch, direction and queue (64 bits)      |
//	|                                                               |
//	+---------------------------------------------------------------+
//	| record: kind (1 byte), then what the kind says       (sealed) |
//	+---------------------------------------------------------------+
//	| tag (16 bytes)                                                |
//	+---------------------------------------------------------------+
//
// The flags are zero in this version and a receiver refuses others. Each queue
// of the sender has a key of its own, so that queues share no counter; queue 0
// carries what the line itself says, the TUN queues follow from 1.
//
// The kinds of record:
//
//	1 WHOLE    one IP packet, checksums finished
//	2 SLICE    a slice of a super-frame, or one packet whose checksum is
//	           still to be made: see below
//	3 PACK     several small packets in a row, each as long as its own length
//	           field says, checksums finished
//	4 PAD      one of the first three, under one-time pad: package pad
//	5 CONTROL  what one end of the line tells the other; empty = I am here,
//	           which is also the key confirmation of an epoch; else a type
//	           byte and what it says, below
//
// Type 1 of CONTROL is STATE, what the sender's line rests on and why:
//
//	+---------------+---------------+---------------+---------------+
//	| kind 5        | type 1        | level, 0 to 4 | 0             |
//	+---------------+---------------+---------------+---------------+
//	| reason: 0 to 200 bytes of UTF-8, printable                    |
//	+---------------------------------------------------------------+
//
// Types from 16 on are those of package pad.
//
// Levels: 0 BLOCKED, 1 PQC, 2 CHAINED, 3 QKD, 4 OTP. It is for people: no end
// changes what it does for it.
//
// A super-frame is what a kernel with segmentation offload hands over: up to
// 64 KiB that it would cut into segments later. The line cuts it, one slice of
// payload a record, so that a lost datagram costs one segment; the receiver
// joins what is in a row. Each record repeats the headers of the super-frame:
//
//	+---------------+---------------+---------------+---------------+
//	| kind 2        | GSO type      | GSO flags     | 0             |
//	+---------------+---------------+---------------+---------------+
//	| index of the slice, from 0    | count of slices               |
//	+-------------------------------+-------------------------------+
//	| header length                 | payload bytes per slice       |
//	+-------------------------------+---------------+---------------+
//	| checksum from                 | checksum at   | 0             |
//	+-------------------------------+---------------+---------------+
//	| IP and transport header of the super-frame, then the slice    |
//	+---------------------------------------------------------------+
//
// Type and flags are those of struct virtio_net_hdr. The counter of a record
// less its index names the super-frame.
package wire

import (
	"encoding/binary"
	"fmt"
	"net/netip"
)

// Sizes in bytes.
const (
	HeaderLen = 16 // header of a data datagram
	TagLen    = 16 // AES-256-GCM tag, NIST SP 800-38D
	// PrefixLen is the most that may stand in a record before the bytes of an
	// inner packet. The inner MTU leaves room for it, so that a slice of a full
	// super-frame fits the path as well as a whole packet does.
	PrefixLen = 16
	// MaxDatagram is the largest UDP payload over IPv4: 65,535 - 20 - 8.
	MaxDatagram = 65507
)

// Queues is how many sending queues a receiver accepts, so that a forged queue
// number cannot make it set up more than so many keys. It is far above the
// core count that one line can use.
const Queues = 64

// ControlQueue carries the line's own records.
const ControlQueue = 0

// TypeData is the first byte of a data datagram.
const TypeData = 0x10

// lastHandshake is the highest first byte of a handshake datagram.
const lastHandshake = 0x0f

// IsHandshake tells whether b goes to the rekey machine.
func IsHandshake(b []byte) bool { return len(b) > 0 && b[0] >= 1 && b[0] <= lastHandshake }

// Header is the clear part of a data datagram.
type Header struct {
	Queue   uint16
	Index   uint32 // receive index of the epoch
	Counter uint64
}

// Put writes the header to the first HeaderLen bytes of b.
func (h Header) Put(b []byte) {
	_ = b[HeaderLen-1]
	b[0] = TypeData
	b[1] = 0
	binary.BigEndian.PutUint16(b[2:], h.Queue)
	binary.BigEndian.PutUint32(b[4:], h.Index)
	binary.BigEndian.PutUint64(b[8:], h.Counter)
}

// ParseHeader reads the header of a data datagram that is long enough to hold
// a record: one byte of kind at least.
func ParseHeader(b []byte) (Header, error) {
	if len(b) < HeaderLen+1+TagLen {
		return Header{}, ErrShort
	}
	if b[0] != TypeData {
		return Header{}, ErrType
	}
	if b[1] != 0 {
		return Header{}, ErrFlags
	}
	h := Header{
		Queue:   binary.BigEndian.Uint16(b[2:]),
		Index:   binary.BigEndian.Uint32(b[4:]),
		Counter: binary.BigEndian.Uint64(b[8:]),
	}
	if h.Queue >= Queues {
		return Header{}, ErrQueue
	}
	return h, nil
}

// Kind says what a record holds.
type Kind uint8

// Kinds of record; the numbers are the wire's.
const (
	Whole   Kind = 1
	Slice   Kind = 2
	Pack    Kind = 3
	Pad     Kind = 4
	Control Kind = 5
)

// String returns the name of the format's table.
func (k Kind) String() string {
	switch k {
	case Whole:
		return "WHOLE"
	case Slice:
		return "SLICE"
	case Pack:
		return "PACK"
	case Pad:
		return "PAD"
	case Control:
		return "CONTROL"
	}
	return fmt.Sprintf("kind %d", uint8(k))
}

// Parse splits an opened record into its kind and its body, which points into
// b. The body of a Whole is an IP packet that is all there; that of a Control
// is empty or begins with its type, see [ParseState]; [ParsePiece] takes the body of a Slice, [NextPacket] that of a Pack.
func Parse(b []byte) (Kind, []byte, error) {
	if len(b) == 0 {
		return 0, nil, ErrShort
	}
	kind, body := Kind(b[0]), b[1:]
	switch kind {
	case Whole:
		if !IsPacket(body) {
			return kind, nil, ErrNotPacket
		}
		return kind, body, nil
	case Control:
		return kind, body, nil
	case Slice, Pack, Pad:
		return kind, body, nil
	}
	return kind, nil, ErrKind
}

// Header sizes of RFC 791, RFC 8200 and RFC 768.
const (
	ipv4HeaderLen = 20
	ipv6HeaderLen = 40
	udpHeaderLen  = 8
)

// IsPacket tells whether p is an IPv4 or IPv6 packet whose length field says
// what p holds, so that a TUN device will take it.
func IsPacket(p []byte) bool { return len(p) > 0 && packetLen(p) == len(p) }

// Room that a PAD record takes beside the record inside it: 12 bytes before
// the ciphertext, a tag of 16, 2 of length; and ciphertexts are multiples of 16
// bytes. Package pad has the record.
const (
	padOverhead = 12 + TagLen
	padLength   = 2
	padUnit     = 16
)

// PadMTU is the inner MTU of a line with one-time pad that would have the given
// one without: so that the largest bucket of pad fits the path.
func PadMTU(inner int) (int, error) {
	mtu := (inner+PrefixLen-padOverhead)/padUnit*padUnit - padLength - PrefixLen
	if mtu < minInnerMTU {
		return 0, fmt.Errorf("derive inner MTU with pad from %d: %w", inner, ErrMTU)
	}
	return mtu, nil
}

// minInnerMTU is the smallest inner MTU worth having: what every IPv4 host
// must be able to reassemble, RFC 791 section 3.1.
const minInnerMTU = 576

// InnerMTU is the MTU for the TUN device of a line whose datagrams to outer
// travel a path of pathMTU bytes. It depends on the outer address's family.
func InnerMTU(pathMTU int, outer netip.Addr) (int, error) {
	if pathMTU > 65535 {
		return 0, fmt.Errorf("derive inner MTU: path MTU %d is above 65535", pathMTU)
	}
	ip := ipv6HeaderLen
	if outer.Unmap().Is4() {
		ip = ipv4HeaderLen
	}
	mtu := pathMTU - ip - udpHeaderLen - HeaderLen - PrefixLen - TagLen
	if mtu < minInnerMTU {
		return 0, fmt.Errorf("derive inner MTU from %d: %w (%d bytes are left, %d are needed)",
			pathMTU, ErrMTU, mtu, minInnerMTU)
	}
	return mtu, nil
}
