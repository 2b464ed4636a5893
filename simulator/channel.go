package simulator

import (
	"context"
	"fmt"
	"net"
	"os"
	"strings"
	"time"
)

// Channel gives one connection to the peer after another. End uses one at a
// time: it asks for the next when the last one is closed.
type Channel interface {
	// Conn waits for a connection, which the caller closes.
	Conn(ctx context.Context) (net.Conn, error)
}

// dialTimeout bounds one attempt to connect.
const dialTimeout = 3 * time.Second

// network splits an address: "unix:/path" is a Unix socket, all else TCP.
func network(address string) (string, string) {
	if path, ok := strings.CutPrefix(address, "unix:"); ok {
		return "unix", path
	}
	return "tcp", address
}

// Dial returns a channel that connects to an address, "host:port" or
// "unix:/path". Nothing is sent before the first Conn.
func Dial(address string) Channel { return dialer(address) }

type dialer string

func (d dialer) Conn(ctx context.Context) (net.Conn, error) {
	n, a := network(string(d))
	conn, err := (&net.Dialer{Timeout: dialTimeout}).DialContext(ctx, n, a)
	if err != nil {
		return nil, fmt.Errorf("dial %s: %w", d, err)
	}
	return conn, nil
}

// Listener is the channel of the end that waits. Connections are served in the
// order they came; one whose dialler has gone ends at its first read.
type Listener struct{ l net.Listener }

// Listen opens an address, "host:port" or "unix:/path", at once. A Unix socket
// has mode 0600; a file that an earlier process left there is replaced.
func Listen(address string) (*Listener, error) {
	n, a := network(address)
	if n == "unix" {
		if info, err := os.Lstat(a); err == nil && info.Mode()&os.ModeSocket != 0 {
			if err := os.Remove(a); err != nil {
				return nil, fmt.Errorf("listen %s: %w", address, err)
			}
		}
	}
	l, err := net.Listen(n, a)
	if err != nil {
		return nil, fmt.Errorf("listen %s: %w", address, err)
	}
	if n == "unix" {
		if err := os.Chmod(a, 0o600); err != nil {
			_ = l.Close()
			return nil, fmt.Errorf("listen %s: %w", address, err)
		}
	}
	return &Listener{l}, nil
}

// Addr is where the listener listens.
func (l *Listener) Addr() net.Addr { return l.l.Addr() }

// Close ends the listener and a pending Conn.
func (l *Listener) Close() error { return l.l.Close() }

// Conn waits for the next connection.
func (l *Listener) Conn(ctx context.Context) (net.Conn, error) {
	type deadline interface{ SetDeadline(time.Time) error }
	d, _ := l.l.(deadline) // both kinds of listener have it
	done := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		_ = d.SetDeadline(time.Unix(1, 0))
		close(done)
	})
	defer func() {
		if !stop() {
			<-done // or it would spoil the next Conn
		}
		_ = d.SetDeadline(time.Time{})
	}()
	conn, err := l.l.Accept()
	if err != nil {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		return nil, fmt.Errorf("accept on %s: %w", l.l.Addr(), err)
	}
	return conn, nil
}
