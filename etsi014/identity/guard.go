package identity

import (
	"crypto/tls"
	"net"
	"net/http"
	"sync"
)

// guarded is the set of connections that a reload may end.
type guarded struct {
	mu    sync.Mutex // guards conns
	conns map[tlsConn]tls.ConnectionState
}

// tlsConn is a [tls.Conn], or what stands for one.
type tlsConn interface {
	ConnectionState() tls.ConnectionState
	NetConn() net.Conn
}

// Guard makes every Reload end those connections of s at once whose
// certificate is no longer good: revoked, denied, of an authority or an SAE
// that left. Without it they are answered 401 at their next request. Guard is
// called before s serves; a ConnState hook that s has keeps working.
func (l *Live) Guard(s *http.Server) {
	before := s.ConnState
	s.ConnState = func(c net.Conn, state http.ConnState) {
		if before != nil {
			before(c, state)
		}
		t, ok := c.(tlsConn)
		if !ok {
			return
		}
		switch state {
		case http.StateActive: // the first of them comes after the handshake
			l.guarded.add(t)
		case http.StateClosed, http.StateHijacked:
			l.guarded.drop(t)
		}
	}
}

func (g *guarded) add(c tlsConn) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.conns == nil {
		g.conns = make(map[tlsConn]tls.ConnectionState)
	}
	if _, known := g.conns[c]; !known {
		g.conns[c] = c.ConnectionState()
	}
}

func (g *guarded) drop(c tlsConn) {
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.conns, c)
}

// sweep ends what good refuses. The TCP connection is closed below TLS: a
// close-notify could wait for a peer that does not read.
func (g *guarded) sweep(good func(*tls.ConnectionState) bool) {
	g.mu.Lock()
	all := make(map[tlsConn]tls.ConnectionState, len(g.conns))
	for c, cs := range g.conns {
		all[c] = cs
	}
	g.mu.Unlock()
	for c, cs := range all {
		if !good(&cs) {
			_ = c.NetConn().Close()
		}
	}
}
