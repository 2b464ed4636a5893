package etsi014

import (
	"container/list"
	"net"
	"net/http"
	"net/netip"
	"sync"
)

// Bounds limit the connections of one listener. A zero field means the
// default.
type Bounds struct {
	// Held is how many connections may be open; 16,384. When they are, a new
	// one takes the place of the one that has been idle longest, which costs
	// its client a handshake; if none is idle, the new one is closed.
	Held int
	// Newcomers is how many of them may be without their first request yet:
	// in the handshake, or silent; 512, a hundred thousand handshakes a second
	// at 5 ms each. When they are, the oldest of the address (IPv6: the /64
	// network) that has the most of them is closed, so that a flood costs its
	// own address and not the others.
	Newcomers int
	// Handshakes is how many of one address (IPv6: the /64 network) may be
	// under way; 8, as many as the door is measured with. Others of that address
	// wait for their turn, so that of a flood not more than these compete with
	// a client of another address.
	Handshakes int
}

func (b Bounds) withDefaults() Bounds {
	if b.Held <= 0 {
		b.Held = 16 << 10
	}
	if b.Newcomers <= 0 {
		b.Newcomers = 512
	}
	if b.Handshakes <= 0 {
		b.Handshakes = 8
	}
	return b
}

// bind makes a server keep to bounds. A ConnState hook that s has keeps
// working.
func bind(s *http.Server, bounds Bounds) {
	b := &bound{Bounds: bounds, at: make(map[net.Conn]place),
		from: make(map[netip.Prefix]int)}
	before := s.ConnState
	s.ConnState = func(c net.Conn, state http.ConnState) {
		if before != nil {
			before(c, state)
		}
		if victim := b.step(c, state); victim != nil {
			end(victim)
		}
	}
}

// bound sorts the connections of a server by what they are about.
type bound struct {
	Bounds
	mu   sync.Mutex // guards what follows
	at   map[net.Conn]place
	newb list.List            // before the first request, oldest first
	from map[netip.Prefix]int // how many of newb come from where
	idle list.List            // between two requests, longest first
}

// place is where a connection stands; a busy one is in no list.
type place struct {
	in *list.List
	e  *list.Element
}

// step notes a change of state and returns the connection to close, if any.
func (b *bound) step(c net.Conn, state http.ConnState) net.Conn {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch state {
	case http.StateNew:
		return b.enter(c)
	case http.StateActive:
		b.move(c, nil)
	case http.StateIdle:
		b.move(c, &b.idle)
	case http.StateClosed, http.StateHijacked:
		b.drop(c)
	}
	return nil
}

func (b *bound) enter(c net.Conn) (victim net.Conn) {
	full := len(b.at) >= b.Held
	switch {
	case b.newb.Len() >= b.Newcomers:
		victim = b.oldest()
	case full && b.idle.Len() > 0:
		victim = b.idle.Front().Value.(net.Conn)
	case full:
		return c
	}
	if victim != nil {
		b.drop(victim) // here and now: its StateClosed may be long in coming
	}
	b.at[c] = place{&b.newb, b.newb.PushBack(c)}
	b.from[source(c)]++
	return victim
}

// oldest newcomer of the address that has the most of them.
func (b *bound) oldest() net.Conn {
	most := 0
	for _, n := range b.from {
		most = max(most, n)
	}
	for e := b.newb.Front(); ; e = e.Next() { // ends: b.from counts b.newb
		if c := e.Value.(net.Conn); b.from[source(c)] == most {
			return c
		}
	}
}

// source is where a connection comes from: an IPv4 address, or the IPv6
// network of which one machine may have every address.
func source(c net.Conn) netip.Prefix {
	a, _ := c.RemoteAddr().(*net.TCPAddr)
	if a == nil {
		return netip.Prefix{}
	}
	ip := a.AddrPort().Addr().Unmap()
	bits := 32
	if ip.Is6() {
		bits = 64
	}
	p, _ := ip.Prefix(bits)
	return p
}

// move puts a known connection into another list; nil is none.
func (b *bound) move(c net.Conn, to *list.List) {
	p, known := b.at[c]
	if !known { // closed by enter meanwhile
		return
	}
	if p.in != nil {
		p.in.Remove(p.e)
	}
	if p.in == &b.newb {
		if from := source(c); b.from[from] > 1 {
			b.from[from]--
		} else {
			delete(b.from, from)
		}
	}
	p = place{in: to}
	if to != nil {
		p.e = to.PushBack(c)
	}
	b.at[c] = p
}

func (b *bound) drop(c net.Conn) {
	b.move(c, nil)
	delete(b.at, c)
}

// end closes below TLS: a close-notify could wait for a peer that does not
// read.
func end(c net.Conn) {
	if c, ok := c.(*conn); ok {
		c.abort()
		return
	}
	_ = c.Close()
}
