package identity

import (
	"crypto/sha256"
	"crypto/tls"
	"net"
	"net/http"
	"testing"
	"time"
)

// The cache of verdicts is bounded, and a verdict ends with its chain.
func TestVerdicts(t *testing.T) {
	s := &state{known: make(map[[sha256.Size]byte]verdict)}
	now := time.Now()
	for i := range maxKnown + 10 {
		s.remember([sha256.Size]byte{byte(i), byte(i >> 8)}, verdict{until: now.Add(time.Hour)})
	}
	if len(s.known) > maxKnown || len(s.known) == 0 {
		t.Errorf("%d verdicts are kept", len(s.known))
	}
	last := [sha256.Size]byte{31: 1}
	s.remember(last, verdict{until: now})
	if _, ok := s.recall(last, now.Add(-time.Second)); !ok {
		t.Error("a good verdict was forgotten")
	}
	if _, ok := s.recall(last, now); ok {
		t.Error("a verdict outlives its chain")
	}
}

// A connection that ends leaves the set that a reload looks through, and hooks
// that were there before keep working.
func TestGuardForgets(t *testing.T) {
	var l Live
	var before []http.ConnState
	server := &http.Server{ConnState: func(_ net.Conn, s http.ConnState) {
		before = append(before, s)
	}}
	l.Guard(server)
	plain, other := net.Pipe()
	defer plain.Close()
	defer other.Close()
	for _, end := range []http.ConnState{http.StateClosed, http.StateHijacked} {
		c := tls.Server(plain, &tls.Config{})
		for _, s := range []http.ConnState{http.StateNew, http.StateActive, http.StateIdle} {
			server.ConnState(c, s)
		}
		if len(l.guarded.conns) != 1 {
			t.Errorf("%d connections are guarded", len(l.guarded.conns))
		}
		server.ConnState(c, end)
		if len(l.guarded.conns) != 0 {
			t.Errorf("%v: %d connections are guarded", end, len(l.guarded.conns))
		}
	}
	server.ConnState(plain, http.StateActive)
	if len(l.guarded.conns) != 0 || len(before) != 9 {
		t.Errorf("%d guarded, %d calls", len(l.guarded.conns), len(before))
	}
}
