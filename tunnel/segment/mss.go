package segment

import "encoding/binary"

// Of TCP, RFC 9293 sections 3.1 and 3.2, and of the places of fields in IP.
const (
	protocolTCP = 6
	flagSYN     = 2
	optionEnd   = 0
	optionNone  = 1
	optionMSS   = 2
	mssLen      = 4
	leastMSS    = 88 // below it Linux takes none: TCP_MIN_MSS of net/tcp.h
)

// ClampMSS lowers the maximum segment size that a TCP SYN offers to what fits
// an MTU without options (RFC 6691), and tells whether it did: so two hosts that
// never hear of the narrow path between them still send what passes. It never
// raises one. open says that the checksum is still to be made (NeedsChecksum);
// else it is mended. Anything but a SYN with the option is left alone, broken
// packets too. p need not have been checked.
func ClampMSS(p []byte, mtu int, open bool) bool {
	start := tcpStart(p)
	if start == 0 {
		return false
	}
	most := mtu - tcpLen - ipv4Len // options of one packet say nothing of the next
	if p[0]>>4 == 6 {
		most = mtu - tcpLen - ipv6Len
	}
	t := p[start:]
	at := findMSS(t)
	if at == 0 || most < leastMSS {
		return false
	}
	old := binary.BigEndian.Uint16(t[at:])
	if int(old) <= most {
		return false
	}
	binary.BigEndian.PutUint16(t[at:], uint16(most))
	if !open {
		mend(t, at, old, uint16(most))
	}
	return true
}

// tcpStart is where the TCP header of a SYN begins; 0 if p has none. A header
// behind IPv6 extension headers is not looked for.
func tcpStart(p []byte) int {
	if len(p) < ipv4Len+tcpLen {
		return 0
	}
	start := 0
	switch p[0] >> 4 {
	case 4:
		fragment := binary.BigEndian.Uint16(p[6:]) & 0x1fff
		if start = int(p[0]&15) * 4; p[9] != protocolTCP || fragment != 0 || start < ipv4Len {
			return 0
		}
	case 6:
		if start = ipv6Len; p[6] != protocolTCP {
			return 0
		}
	default:
		return 0
	}
	if start+tcpLen > len(p) || p[start+13]&flagSYN == 0 {
		return 0
	}
	return start
}

// findMSS is where the value of the option stands in a TCP header; 0 if it has
// none.
func findMSS(t []byte) int {
	end := int(t[12]>>4) * 4
	if end > len(t) {
		return 0
	}
	for at := tcpLen; at < end; {
		switch {
		case t[at] == optionEnd:
			return 0
		case t[at] == optionNone:
			at++
			continue
		case at+1 >= end || t[at+1] < 2:
			return 0
		case t[at] == optionMSS:
			if t[at+1] != mssLen || at+mssLen > end {
				return 0
			}
			return at + 2
		}
		at += int(t[at+1])
	}
	return 0
}

// mend makes a finished checksum right after 16 bits at a place have changed
// (RFC 1624 equation 3). At an odd place the two bytes lie in two words, which
// is as if both values were turned round.
func mend(t []byte, at int, old, now uint16) {
	if at%2 != 0 {
		old, now = old<<8|old>>8, now<<8|now>>8
	}
	sum := uint32(^binary.BigEndian.Uint16(t[tcpChecksum:])) + uint32(^old) + uint32(now)
	sum = sum>>16 + sum&0xffff
	binary.BigEndian.PutUint16(t[tcpChecksum:], ^uint16(sum+sum>>16))
}
