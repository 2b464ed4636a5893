package node

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/kms/peer"
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

func (h *hub) acceptLoop(ctx context.Context, l net.Listener, wg *sync.WaitGroup) {
	for {
		raw, err := l.Accept()
		if err != nil {
			if ctx.Err() == nil && !errors.Is(err, net.ErrClosed) {
				h.log.Warn("peer cannot be accepted", "err", err)
				if sleep(ctx, dialFirst) {
					continue
				}
			}
			return
		}
		h.lobby.admit(raw)
		wg.Go(func() {
			c, how, err := h.welcome(ctx, raw)
			if err != nil {
				partFrom(raw)
			}
			switch stayed := h.lobby.leave(raw); {
			case err == nil:
				h.host(ctx, c, how)
			case !stayed:
				h.turnedAway(raw.RemoteAddr(), errOusted)
			case ctx.Err() == nil:
				h.turnedAway(raw.RemoteAddr(), err)
			}
		})
	}
}

// partFrom closes a connection so that the other end can read why: closing it
// with bytes unread would take the alert back.
func partFrom(raw net.Conn) {
	if t, ok := raw.(*net.TCPConn); ok && t.CloseWrite() == nil {
		_ = raw.SetReadDeadline(time.Now().Add(partMost))
		_, _ = io.CopyN(io.Discard, raw, peer.MaxMessage)
	}
	_ = raw.Close()
}

// welcome finds out who dialled and what it wants.
func (h *hub) welcome(ctx context.Context, raw net.Conn) (*conn, what, error) {
	end := time.Now().Add(dialTimeout)
	ctx, cancel := context.WithDeadline(ctx, end)
	defer cancel()
	t := h.trust.Load()
	if t == nil {
		return nil, 0, fmt.Errorf("%w: we have no peers", ErrIdentity)
	}
	var id etsi014.KMEID
	cfg := t.config()
	cfg.VerifyConnection = func(cs tls.ConnectionState) (err error) {
		id, err = t.verify(cs.PeerCertificates, x509.ExtKeyUsageClientAuth, time.Now())
		if err == nil && h.peers[id].dials {
			err = fmt.Errorf("%w: KME %q should not dial us: the one whose ID sorts first dials",
				ErrIdentity, id)
		}
		return err
	}
	tc := tls.Server(raw, cfg)
	if err := tc.HandshakeContext(ctx); err != nil {
		h.missed(id, raw.RemoteAddr(), err)
		return nil, 0, blame(err, t)
	}
	c := newConn(tc, x509.ExtKeyUsageClientAuth, t)
	c.peer = id
	_ = c.SetDeadline(end)
	stop := context.AfterFunc(ctx, func() { _ = raw.Close() })
	defer stop()
	g, err := c.greeted()
	if err != nil {
		return nil, 0, fmt.Errorf("hear KME %q: %w", id, blame(err, t))
	}
	c.life = g.life
	if !stop() {
		return nil, 0, ctx.Err()
	}
	return c, g.what, c.SetDeadline(time.Time{})
}

// host carries a connection that dialled us, if it may stand.
func (h *hub) host(ctx context.Context, c *conn, how what) {
	ch := h.peers[c.peer]
	if err := h.enter(ctx, ch, c, how); err != nil {
		h.turnedAway(c.RemoteAddr(), err)
		_ = c.SetDeadline(time.Now().Add(dialTimeout))
		_ = c.greet(greeting{what: refused, life: h.life, reason: err.Error()})
		_ = c.Close()
		return
	}
	h.serve(ctx, ch, c)
}

// missed notes that somebody who calls itself a peer that should be here was
// turned away: most often it is that peer.
func (h *hub) missed(id etsi014.KMEID, from net.Addr, err error) {
	ch := h.peers[id]
	if ch == nil {
		return
	}
	ch.mu.Lock()
	defer ch.mu.Unlock()
	if !ch.dials && ch.conn == nil {
		ch.told = fmt.Sprintf("a caller from %s was turned away: %v", from, err)
	}
}

// turnedAway logs a refused caller, within bounds.
func (h *hub) turnedAway(from net.Addr, err error) {
	if yes, unsaid := h.away.say(err.Error(), time.Now()); yes {
		h.log.Warn("peer is turned away", "addr", from.String(), "err", err, "more", unsaid)
	}
}
