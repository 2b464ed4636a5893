package tunneltest

import (
	"net"
	"net/netip"
	"sync"

	"github.com/quietline/quietline/tunnel/lab"
	"github.com/quietline/quietline/tunnel/line"
	"github.com/quietline/quietline/tunnel/wire"
)

// Net is the network between the two ends.
type Net struct {
	coalesce bool
	paths    [2]*lab.Path // by sending end

	mu   sync.Mutex // guards all below
	ends [2]*conn
	tap  func(from int, datagram []byte) []byte
}

func newNet(w lab.Weather, coalesce bool) *Net {
	n := &Net{coalesce: coalesce}
	for from := range 2 {
		n.paths[from] = lab.NewPath(w, func(d []byte) { n.arrive(1-from, d) })
		w.Seed++
	}
	return n
}

func (n *Net) close() {
	n.paths[0].Close()
	n.paths[1].Close()
}

// SetWeather changes the weather in both directions.
func (n *Net) SetWeather(w lab.Weather) {
	n.paths[0].SetWeather(w)
	n.paths[1].SetWeather(w)
}

// Counts returns what has become of tokyo's and of kochi's datagrams.
func (n *Net) Counts() (tokyo, kochi lab.PathCounts) {
	return n.paths[0].Counts(), n.paths[1].Counts()
}

// Tap lets f see every datagram sent, before the weather does; from is 0 for
// tokyo, 1 for kochi. What f returns travels in its place; nil is a loss. f
// may keep the slice.
func (n *Net) Tap(f func(from int, datagram []byte) []byte) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.tap = f
}

// Inject lets a datagram arrive at an end, 0 for tokyo, 1 for kochi, as if the
// other had sent it.
func (n *Net) Inject(to int, datagram []byte) { n.arrive(to, datagram) }

// open returns a new socket of an end; datagrams for the one before are lost.
func (n *Net) open(end int) line.Conn {
	c := &conn{net: n, end: end, in: make(chan []byte, 4096), closed: make(chan struct{})}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.ends[end] = c
	return c
}

func (n *Net) arrive(to int, d []byte) {
	n.mu.Lock()
	c := n.ends[to]
	n.mu.Unlock()
	select {
	case c.in <- d:
	default: // a socket buffer that is full
	}
}

func (n *Net) send(from int, d []byte) {
	n.mu.Lock()
	tap := n.tap
	n.mu.Unlock()
	if tap != nil {
		if d = tap(from, append([]byte(nil), d...)); d == nil {
			return
		}
	}
	n.paths[from].Send(d)
}

// conn is a socket of one end.
type conn struct {
	net    *Net
	end    int
	in     chan []byte
	next   []byte // read, but for the next burst
	once   sync.Once
	closed chan struct{}
}

// Read implements [line.Conn].
func (c *conn) Read(b *line.Burst, wait bool) error {
	first := c.next
	c.next = nil
	if first == nil && !wait {
		select {
		case first = <-c.in:
		default:
			b.Data, b.Size = b.Data[:0], 0
			return nil
		}
	}
	if first == nil {
		select {
		case <-c.closed:
			return net.ErrClosed
		case first = <-c.in:
		}
	}
	b.Data, b.Size = append(b.Data[:0], first...), len(first)
	for c.net.coalesce {
		select {
		case d := <-c.in:
			if len(d) > b.Size || len(b.Data)+len(d) > cap(b.Data) {
				c.next = d
				return nil
			}
			b.Data = append(b.Data, d...)
			if len(d) < b.Size {
				return nil
			}
		default:
			return nil
		}
	}
	return nil
}

// Write implements [line.Conn].
func (c *conn) Write(b line.Burst) error {
	select {
	case <-c.closed:
		return net.ErrClosed
	default:
	}
	for data := b.Data; len(data) > 0; {
		n := min(b.Size, len(data))
		c.net.send(c.end, data[:n])
		data = data[n:]
	}
	return nil
}

// Close implements [line.Conn].
func (c *conn) Close() error {
	c.once.Do(func() { close(c.closed) })
	return nil
}

// routedConn believes to know its path.
type routedConn struct {
	line.Conn
	mtu int
}

// PathMTU is what a kernel would say.
func (c *routedConn) PathMTU() (int, error) { return c.mtu, nil }

// InnerMTU is that of IPv4 outside.
func (c *routedConn) InnerMTU(path int) (int, error) {
	return wire.InnerMTU(path, netip.IPv4Unspecified())
}

// AllowFragments has nothing to do: the network in memory cuts nothing.
func (c *routedConn) AllowFragments(bool) error { return nil }
