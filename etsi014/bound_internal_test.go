package etsi014

import "net"

type from struct {
	net.Conn
	at net.Addr
}

func (f from) RemoteAddr() net.Addr { return f.at }

// SameSource tells whether connections of two addresses count together.
func SameSource(a, b string) bool {
	of := func(s string) from { return from{at: &net.TCPAddr{IP: net.ParseIP(s)}} }
	return source(of(a)) == source(of(b))
}
