package line

import "encoding/binary"

// DSCP says what class the outer packets show (RFC 2983). The zero value shows
// none: a copied class tells whoever watches what kind of traffic goes by.
type DSCP struct {
	// Copy shows that of the inner packet.
	Copy bool
	// Value is shown without Copy; 0 to 63.
	Value uint8
}

// maxDSCP is the largest of six bits, RFC 2474 section 3.
const maxDSCP = 63

// Values of the ECN field, RFC 3168 section 5.
const (
	ecnMask = 3
	notECT  = 0
	ect1    = 1
	ect0    = 2
	ce      = 3
)

// tosOf is the type of service or the traffic class of an IP packet.
func tosOf(p []byte) uint8 {
	if p[0]>>4 == 6 {
		return p[0]<<4 | p[1]>>4
	}
	return p[1]
}

// outerTOS is what an outer packet shows for one with this inner TOS: the class
// as the policy says, and ECN copied, the normal mode of RFC 6040 section 4.1.
func (c *Config) outerTOS(inner uint8) uint8 {
	tos := c.DSCP.Value << 2
	if c.DSCP.Copy {
		tos = inner &^ ecnMask
	}
	if !c.NoECN {
		tos |= inner & ecnMask
	}
	return tos
}

// mergeECN gives an inner packet the ECN that results from that of the outer
// one (RFC 6040 section 4.2, figure 4). It is false if the packet must be
// dropped: the network has reported congestion, and its sender cannot hear it.
func mergeECN(p []byte, outer uint8) bool {
	inner := tosOf(p) & ecnMask
	switch outer & ecnMask {
	case ce:
		if inner == notECT {
			return false
		}
		setECN(p, ce)
	case ect1:
		if inner == ect0 {
			setECN(p, ect1)
		}
	}
	return true
}

// setECN changes the ECN of a packet and mends the IPv4 header checksum
// (RFC 1624 equation 3).
func setECN(p []byte, ecn uint8) {
	if p[0]>>4 == 6 {
		p[1] = p[1]&^(ecnMask<<4) | ecn<<4
		return
	}
	old := binary.BigEndian.Uint16(p)
	p[1] = p[1]&^ecnMask | ecn
	sum := uint32(^binary.BigEndian.Uint16(p[10:])) + uint32(^old) +
		uint32(binary.BigEndian.Uint16(p))
	sum = sum>>16 + sum&0xffff
	binary.BigEndian.PutUint16(p[10:], ^uint16(sum+sum>>16))
}
