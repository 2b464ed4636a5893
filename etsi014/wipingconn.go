package etsi014

import "net"

// wiping is a connection that clears what it reads into before it waits for
// more. net/http and crypto/tls read into buffers of their own, decrypt in
// place and wipe nothing; whatever of such a buffer they offer for reading, they
// are done with ([io.Reader] allows a Read to use all of it), and they read on
// as soon as an answer has ended, to see whether the connection does. So the
// buffers of a kept connection hold no answer that was read.
type wiping struct{ net.Conn }

func (c wiping) Read(p []byte) (int, error) {
	clear(p)
	return c.Conn.Read(p)
}
