package etsi014_test

import (
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"testing"
	"time"

	"github.com/quietline/quietline/etsi014"
)

// bounded is a world whose connections are bounded.
func bounded(t *testing.T, b etsi014.Bounds) *world {
	t.Helper()
	w := newWorld(t, nil)
	h := w.server.Handler
	_ = w.server.Close()
	w.server = etsi014.NewServer(h, w.live.Server(), nil)
	w.addr = serveIn(t, w.server, b)
	return w
}

// connect opens TCP from an address of this machine and says nothing.
func connect(t *testing.T, w *world, from string) net.Conn {
	t.Helper()
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
	c, err := d.Dial("tcp", w.addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// ended waits for the server to close a connection.
func ended(t *testing.T, c net.Conn) {
	t.Helper()
	// Less than the 5 s after which a silent connection is closed anyway.
	if err := c.SetReadDeadline(time.Now().Add(4 * time.Second)); err != nil {
		t.Fatal(err)
	}
	_, err := io.Copy(io.Discard, c)
	if e, ok := err.(net.Error); ok && e.Timeout() {
		t.Error("the connection still lives")
	}
}

// A flood of handshakes that do not end takes the place of its own oldest, and
// not that of clients that are served.
func TestBoundOnNewcomers(t *testing.T) {
	w := bounded(t, etsi014.Bounds{Newcomers: 3})
	kept := w.client(t, "tokyo")
	if _, err := kept.Status(t.Context(), "kochi"); err != nil {
		t.Fatal(err)
	}
	early := connect(t, w, "127.0.0.1") // slow, and no part of the flood
	var silent []net.Conn
	for range 10 {
		silent = append(silent, connect(t, w, "127.0.0.2"))
	}
	for _, c := range silent[:8] {
		ended(t, c)
	}
	late := tls.Client(early, w.tls("tokyo"))
	if err := late.HandshakeContext(t.Context()); err != nil {
		t.Errorf("the flood of another address costs a slow client its place: %v", err)
	}
	for _, c := range []*etsi014.Client{kept, w.client(t, "osaka")} {
		if _, err := c.Status(t.Context(), "kochi"); err != nil {
			t.Error(err)
		}
	}
}

// Where all connections are held, a new client takes the place of the one that
// was idle longest, and that one comes again by a new connection.
func TestBoundOnHeld(t *testing.T) {
	w := bounded(t, etsi014.Bounds{Held: 3})
	var all []*etsi014.Client
	for range 6 {
		all = append(all, w.client(t, "tokyo"))
	}
	for range 2 {
		for i, c := range all {
			if _, err := c.Status(t.Context(), "kochi"); err != nil {
				t.Errorf("client %d: %v", i, err)
			}
		}
	}
	if n := len(w.observations(t)); n != 12 {
		t.Errorf("%d requests were answered", n)
	}
}

// Connections that are being served are not given up for a new one.
func TestBoundKeepsTheBusy(t *testing.T) {
	w := newWorld(t, nil)
	arrived, leave := make(chan struct{}), make(chan struct{})
	busy := etsi014.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, _ *http.Request) {
		arrived <- struct{}{}
		<-leave
	}), w.live.Server(), nil)
	seen := 0
	busy.ConnState = func(_ net.Conn, s http.ConnState) {
		if s == http.StateNew { // on the goroutine that accepts
			seen++
		}
	}
	w.addr = serveIn(t, busy, etsi014.Bounds{Held: 1})
	done := make(chan reply, 1)
	go func() { done <- w.send(t, "tokyo", "GET", "/", "") }()
	<-arrived
	for range 3 {
		ended(t, connect(t, w, "127.0.0.1"))
	}
	close(leave)
	if r := <-done; r.code != 200 {
		t.Errorf("the busy one got %d", r.code)
	}
	if err := busy.Shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
	if seen != 4 {
		t.Errorf("the hook that was there saw %d connections", seen)
	}
}

// IPv6 networks of one machine count as one address.
func TestBoundCountsNetworks(t *testing.T) {
	for _, tt := range []struct {
		a, b string
		same bool
	}{
		{"192.0.2.1", "192.0.2.1", true},
		{"192.0.2.1", "192.0.2.2", false},
		{"192.0.2.1", "::ffff:192.0.2.1", true},
		{"2001:db8::1", "2001:db8::2:3", true},
		{"2001:db8::1", "2001:db8:0:1::1", false},
	} {
		if got := etsi014.SameSource(tt.a, tt.b); got != tt.same {
			t.Errorf("%s and %s: %v", tt.a, tt.b, got)
		}
	}
}
