package line

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"sync/atomic"

	"github.com/quietline/quietline/tunnel/pad"
)

// Pad is the one-time pad of a line.
type Pad struct {
	Machine *pad.Machine // the line clears it
	// Strict: payload that pad cannot hide is dropped, and refused when it
	// arrives. Otherwise it goes under the epoch's keys, and is counted.
	Strict bool
	// Classes sort packets; the first that fits counts. A packet that none
	// fits goes without pad if there are classes, and with pad if there are
	// none. Under Strict every packet goes with pad, and classes say only what
	// is urgent.
	Classes []Class
}

// Class is traffic that is treated alike. A field left empty fits everything.
type Class struct {
	Name string
	To   []netip.Prefix // destination of the packet
	// Ports of TCP or UDP, of either end: so that one class has both ways of a
	// connection. Later fragments of a packet show none and never fit.
	Ports []uint16
	DSCP  []uint8 // 0 to 63, RFC 2474
	Pad   bool    // hide it with pad
	// Urgent: it is admitted longest when pad runs low.
	Urgent bool
}

// check refuses classes that mean nothing.
func (p *Pad) check() error {
	if p.Machine == nil {
		return fmt.Errorf("%w: pad without its machine", ErrConfig)
	}
	for _, c := range p.Classes {
		if c.Name == "" || slices.ContainsFunc(c.DSCP, func(d uint8) bool { return d > 63 }) {
			return fmt.Errorf("%w: class %q", ErrConfig, c.Name)
		}
	}
	return nil
}

// class is a Class in use, with its counters.
type class struct {
	Class
	padded, plain, demoted, refused atomic.Uint64 // packets
}

// ClassStats counts the packets of a class that went out, or did not.
type ClassStats struct {
	Name string
	// Padded went under pad. Plain went under the epoch's keys as the class
	// says, Demoted because there was no pad. Refused were dropped for that.
	Padded, Plain, Demoted, Refused uint64
}

// classes makes them, the last being for what no other fits.
func (p *Pad) classes() (cs []*class) {
	for _, c := range p.Classes {
		c.Pad = c.Pad || p.Strict
		cs = append(cs, &class{Class: c})
	}
	rest := Class{Name: "other", Pad: p.Strict || len(p.Classes) == 0}
	return append(cs, &class{Class: rest})
}

// classify finds the class of a packet.
func (l *Line) classify(p []byte) *class {
	cs := l.classes
	last := cs[len(cs)-1]
	if len(cs) == 1 {
		return last
	}
	var f facts
	if !f.read(p) {
		return last
	}
	for _, c := range cs[:len(cs)-1] {
		if c.fits(&f) {
			return c
		}
	}
	return last
}

// facts are what of a packet classes look at.
type facts struct {
	to     netip.Addr
	dscp   uint8
	ports  [2]uint16
	ported bool
}

// Protocol numbers with ports in their first four bytes (IANA).
const (
	protoTCP = 6
	protoUDP = 17
)

// read takes them from an IP packet; false if it is none. Extension headers of
// IPv6 hide ports.
func (f *facts) read(p []byte) bool {
	var protocol byte
	var body []byte
	switch {
	case len(p) >= 20 && p[0]>>4 == 4:
		head := int(p[0]&15) * 4
		if head < 20 || len(p) < head {
			return false
		}
		f.to, f.dscp, protocol = netip.AddrFrom4([4]byte(p[16:])), p[1]>>2, p[9]
		if binary.BigEndian.Uint16(p[6:])&0x1fff == 0 { // the first fragment
			body = p[head:]
		}
	case len(p) >= 40 && p[0]>>4 == 6:
		f.to, protocol, body = netip.AddrFrom16([16]byte(p[24:])), p[6], p[40:]
		f.dscp = uint8(binary.BigEndian.Uint16(p) >> 6 & 63)
	default:
		return false
	}
	if (protocol == protoTCP || protocol == protoUDP) && len(body) >= 4 {
		f.ports = [2]uint16{binary.BigEndian.Uint16(body), binary.BigEndian.Uint16(body[2:])}
		f.ported = true
	}
	return true
}

func (c *class) fits(f *facts) bool {
	if len(c.To) > 0 && !slices.ContainsFunc(c.To, func(p netip.Prefix) bool {
		return p.Contains(f.to)
	}) {
		return false
	}
	if len(c.Ports) > 0 && !(f.ported && (slices.Contains(c.Ports, f.ports[0]) ||
		slices.Contains(c.Ports, f.ports[1]))) {
		return false
	}
	return len(c.DSCP) == 0 || slices.Contains(c.DSCP, f.dscp)
}
