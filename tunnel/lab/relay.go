package lab

import (
	"net"
	"net/netip"
)

// Relay stands between two UDP endpoints with weather in both directions: each
// end sends to the relay's address as if it were the other end. Datagrams of
// strangers are dropped.
type Relay struct {
	conn net.PacketConn
	a, b netip.AddrPort
	ab   *Path
	ba   *Path
	done chan struct{}
}

// NewRelay relays between a and b over conn, which it owns from now on.
func NewRelay(conn net.PacketConn, a, b netip.AddrPort, w Weather) *Relay {
	r := &Relay{conn: conn, a: unmap(a), b: unmap(b), done: make(chan struct{})}
	r.ab = NewPath(w, r.to(b))
	w.Seed++
	r.ba = NewPath(w, r.to(a))
	go r.run()
	return r
}

// to sends to one end. An error is a loss, as on any network.
func (r *Relay) to(end netip.AddrPort) func([]byte) {
	addr := net.UDPAddrFromAddrPort(end)
	return func(b []byte) { _, _ = r.conn.WriteTo(b, addr) }
}

func (r *Relay) run() {
	defer close(r.done)
	buf := make([]byte, 1<<16)
	for {
		n, from, err := r.conn.ReadFrom(buf)
		if err != nil {
			return
		}
		switch unmap(from.(*net.UDPAddr).AddrPort()) {
		case r.a:
			r.ab.Send(buf[:n])
		case r.b:
			r.ba.Send(buf[:n])
		}
	}
}

// SetWeather changes the weather in both directions.
func (r *Relay) SetWeather(w Weather) {
	r.ab.SetWeather(w)
	r.ba.SetWeather(w)
}

// Counts returns what has become of the datagrams from a and from b.
func (r *Relay) Counts() (fromA, fromB PathCounts) { return r.ab.Counts(), r.ba.Counts() }

// Close ends the relay.
func (r *Relay) Close() error {
	err := r.conn.Close()
	<-r.done
	r.ab.Close()
	r.ba.Close()
	return err
}

// unmap makes IPv4 addresses equal whichever socket they come from.
func unmap(a netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
}
