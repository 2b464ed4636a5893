package node

import (
	"errors"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"
)

// Bounds on those who have dialled us and not shown yet who they are: a
// handshake takes a round trip or two, a thousand peers do not come at once,
// and each place costs a file and some 50 kB.
const (
	lobbyMost    = 64
	lobbyAddress = 8 // from one IPv4 address or IPv6 /64
	// refusalsMost lines a minute tell of those who were turned away.
	refusalsMost = 8
)

// lobby holds connections in handshake. When there is no place, the one that
// has waited longest leaves: a peer is through in a moment, and who only
// occupies places is who waits.
type lobby struct {
	mu      sync.Mutex
	waiting []visitor // oldest first
}

type visitor struct {
	raw  net.Conn
	from netip.Prefix
}

// admit takes a connection in; leave must follow.
func (l *lobby) admit(raw net.Conn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	v := visitor{raw, networkOf(raw.RemoteAddr())}
	same := 0
	for _, w := range l.waiting {
		if w.from == v.from {
			same++
		}
	}
	switch {
	case same >= lobbyAddress:
		l.oust(func(w visitor) bool { return w.from == v.from })
	case len(l.waiting) >= lobbyMost:
		l.oust(func(visitor) bool { return true })
	}
	l.waiting = append(l.waiting, v)
}

// oust closes the oldest of some; its handshake fails.
func (l *lobby) oust(who func(visitor) bool) {
	i := slices.IndexFunc(l.waiting, who)
	_ = l.waiting[i].raw.Close()
	l.waiting = slices.Delete(l.waiting, i, i+1)
}

// errOusted ends the handshake of who waited longest.
var errOusted = errors.New("too many callers that do not say who they are")

// leave tells whether the connection still had its place.
func (l *lobby) leave(raw net.Conn) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	before := len(l.waiting)
	l.waiting = slices.DeleteFunc(l.waiting, func(v visitor) bool { return v.raw == raw })
	return len(l.waiting) < before
}

// networkOf is what counts as one address.
func networkOf(a net.Addr) netip.Prefix {
	tcp, ok := a.(*net.TCPAddr)
	if !ok {
		return netip.Prefix{}
	}
	ip := tcp.AddrPort().Addr().Unmap()
	bits := ip.BitLen()
	if ip.Is6() {
		bits = 64
	}
	p, _ := ip.Prefix(bits) // of an address it made: it cannot fail
	return p
}

// refusals keeps strangers from filling the log.
type refusals struct {
	mu     sync.Mutex
	began  time.Time
	said   map[string]bool
	unsaid int
}

// say tells whether a refusal is worth a line, and how many before it were not.
func (r *refusals) say(text string, now time.Time) (yes bool, unsaid int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.said == nil || now.Sub(r.began) >= time.Minute {
		r.began, r.said = now, map[string]bool{}
	}
	if r.said[text] || len(r.said) >= refusalsMost {
		r.unsaid++
		return false, 0
	}
	r.said[text] = true
	unsaid, r.unsaid = r.unsaid, 0
	return true, unsaid
}
