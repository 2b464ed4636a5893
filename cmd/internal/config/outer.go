package config

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// Outer is how a line's own packets look and behave on the network between the
// sites.
type Outer struct {
	// dscp is the class that outer packets show: none, copy (that of the inner
	// packet, which tells whoever watches what kind of traffic goes by) or a
	// number, 0 to 63. Default none.
	DSCP string `yaml:"dscp,omitempty"`
	// ecn is keep (congestion marks cross the line in both directions) or hide
	// (the network does not see that it could mark). Default keep.
	ECN string `yaml:"ecn,omitempty"`
	// path_mtu is probe (the two ends find out how large packets pass) or kernel
	// (what ICMP says is believed, and nothing else). Default probe.
	PathMTU string `yaml:"path_mtu,omitempty"`
	// without are offloads of the socket not to use: gso (bursts go out in one
	// call) and gro (they come in so). Default none; what a kernel refuses is
	// left out anyway.
	Without []string `yaml:"without,omitempty"`
}

// Words of a line's offloads.
var (
	outerOffloads = []string{"gso", "gro"}
	tunOffloads   = []string{"tso", "uso", "checksum"}
)

// maxQueues of a TUN device; package tun has the same.
const maxQueues = 16

// Class is what dscp says: copied, or the value to show.
func (o Outer) Class() (copied bool, value uint8) {
	switch o.DSCP {
	case "", "none":
		return false, 0
	case "copy":
		return true, 0
	}
	n, _ := strconv.ParseUint(o.DSCP, 10, 8) // has been checked
	return false, uint8(n)
}

// oneOuter checks what concerns the packets of a line on both sides.
func (d *decoder) oneOuter(key string, l *Line) {
	const maxDSCP = 63 // six bits, RFC 2474
	o, at := l.Outer, key+".outer"
	if n, err := strconv.ParseUint(o.DSCP, 10, 8); !slices.Contains(
		[]string{"", "none", "copy"}, o.DSCP) && (err != nil || n > maxDSCP) {
		d.fault(at+".dscp", "%q is not none, copy or a number of 0 to 63", o.DSCP)
	}
	d.oneOf(at+".ecn", o.ECN, "keep", "hide")
	d.oneOf(at+".path_mtu", o.PathMTU, "probe", "kernel")
	for i, w := range o.Without {
		d.oneOf(fmt.Sprintf("%s.without[%d]", at, i), w, outerOffloads...)
	}
	for i, w := range l.TUN.Without {
		d.oneOf(fmt.Sprintf("%s.tun.without[%d]", key, i), w, tunOffloads...)
	}
	if q := l.TUN.Queues; q < 0 || q > maxQueues {
		d.fault(key+".tun.queues", "%d is outside 1 to %d", q, maxQueues)
	}
}

// oneOf refuses a word that is none of these; empty is the default.
func (d *decoder) oneOf(key, word string, words ...string) {
	if word != "" && !slices.Contains(words, word) {
		d.fault(key, "%q is not %s", word, strings.Join(words, " or "))
	}
}
