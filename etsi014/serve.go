package etsi014

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"
)

// Serve serves a door on l within bounds until s ends; it returns what
// [http.Server.Serve] does. It is called once for a server of [NewServer], with
// that server's TLS configuration, and takes the place of ServeTLS: it keeps
// handshakes of one address from the others, and answers with keys out of
// net/http's buffers, which are never wiped. Hooks that s has keep working;
// ConnState is given a connection with the methods of [tls.Conn].
func Serve(s *http.Server, l net.Listener, bounds Bounds) error {
	bounds = bounds.withDefaults()
	bind(s, bounds)
	cfg := s.TLSConfig.Clone()
	cfg.NextProtos = []string{"http/1.1"}
	return s.Serve(&secured{Listener: l, server: s, cfg: cfg,
		turns: turnstile{most: bounds.Handshakes}})
}

// secured is a listener of TLS connections that shake hands when they are
// served.
type secured struct {
	net.Listener
	server *http.Server
	cfg    *tls.Config
	turns  turnstile
}

func (l *secured) Accept() (net.Conn, error) {
	raw, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &conn{Conn: tls.Server(raw, l.cfg), listener: l, gone: make(chan struct{})}, nil
}

// conn is the server's end of a connection. It is no *tls.Conn in the eyes of
// net/http, which therefore asks for its ConnectionState where it would shake
// hands, and writes what a handler reads from elsewhere straight to ReadFrom.
type conn struct {
	*tls.Conn
	listener *secured

	shake  sync.Once
	state  tls.ConnectionState // after shake, if it went well
	failed bool                // after shake

	end  sync.Once
	gone chan struct{} // closed by Close and abort

	// Of the goroutine that serves, while it answers with keys.
	holds bool
	held  []byte // of the answer's head
}

// handshakeTime is what net/http gives a handshake of a NewServer: its
// ReadHeaderTimeout.
const handshakeTime = 5 * time.Second

// ConnectionState shakes hands the first time. Its zero value says that this
// failed; nothing is read then.
func (c *conn) ConnectionState() tls.ConnectionState {
	c.shake.Do(func() {
		if err := c.handshake(); err != nil {
			c.failed = true
			c.listener.server.ErrorLog.Printf("TLS handshake with %s: %v", c.RemoteAddr(),
				explain(err, nil))
			return
		}
		c.state = c.Conn.ConnectionState()
	})
	return c.state
}

var errNoTurn = errors.New("too many handshakes of this address are under way")

func (c *conn) handshake() error {
	ctx, cancel := context.WithTimeout(context.Background(), handshakeTime)
	defer cancel()
	from := source(c)
	if !c.listener.turns.enter(ctx, from, c.gone) {
		return errNoTurn
	}
	defer c.listener.turns.leave(from)
	end, _ := ctx.Deadline()
	if err := c.SetDeadline(end); err != nil {
		return err
	}
	err := c.Conn.HandshakeContext(ctx)
	if re := new(tls.RecordHeaderError); errors.As(err, re) && re.Conn != nil && looksLikeHTTP(re) {
		_, _ = io.WriteString(re.Conn, plainAnswer)
		_ = re.Conn.Close()
		return errors.New("the client speaks HTTP without TLS")
	}
	if err != nil {
		return err
	}
	return c.SetDeadline(time.Time{})
}

// plainAnswer tells a client that forgot the s of https.
const plainAnswer = "HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\n" +
	"Cache-Control: no-store\r\nContent-Length: 42\r\nConnection: close\r\n\r\n" +
	`{"message":"this port speaks HTTPS alone"}`

// looksLikeHTTP knows a method by its first bytes, as net/http does.
func looksLikeHTTP(e *tls.RecordHeaderError) bool {
	switch string(e.RecordHeader[:]) {
	case "GET /", "HEAD ", "POST ", "PUT /", "OPTIO", "DELET":
		return true
	}
	return false
}

// Read ends at once where the handshake failed: net/http would answer.
func (c *conn) Read(p []byte) (int, error) {
	if c.ConnectionState(); c.failed {
		return 0, io.EOF
	}
	return c.Conn.Read(p)
}

// Write sends, or holds an answer's head back for ReadFrom. What net/http says
// to a request that is no HTTP goes out as an Error.
func (c *conn) Write(p []byte) (int, error) {
	if c.holds {
		c.held = append(c.held, p...)
		return len(p), nil
	}
	if b := faultAnswer(p); b != nil {
		_, err := c.Conn.Write(b)
		return len(p), err
	}
	return c.Conn.Write(p)
}

// faultHead stands in what net/http itself answers, which it writes at once,
// between status line and text (Go 1.26, net/http.(*conn).serve). The door
// writes no such head.
const faultHead = "\r\nContent-Type: text/plain; charset=utf-8\r\nConnection: close\r\n\r\n"

// faultAnswer makes an Error of net/http's answer; nil if p is something else.
func faultAnswer(p []byte) []byte {
	line, text, ok := bytes.Cut(p, []byte(faultHead))
	if !ok || !bytes.HasPrefix(line, []byte("HTTP/1.1 ")) {
		return nil
	}
	a := errorAnswer(0, strings.TrimLeft(string(text), "0123456789 "), nil)
	return fmt.Appendf(nil, "%s\r\nContent-Type: application/json\r\nCache-Control: no-store\r\n"+
		"X-Content-Type-Options: nosniff\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s",
		line, len(a.body), a.body)
}

// ReadFrom sends what r has. Keys go in one piece with the head that was held.
func (c *conn) ReadFrom(r io.Reader) (int64, error) {
	k, ok := r.(*keyBody)
	if !ok {
		return io.Copy(struct{ io.Writer }{c}, r)
	}
	b := k.a.body
	c.holds = false
	if room := k.a.room; len(c.held) <= room {
		b = k.a.whole[room-len(c.held) : room+len(b)]
		copy(b, c.held)
	} else if _, err := c.Conn.Write(c.held); err != nil {
		return 0, err
	}
	thePrimer().prime(len(b))
	if _, err := c.Conn.Write(b); err != nil {
		return 0, err
	}
	k.sent = true
	return int64(len(k.a.body)), nil
}

// Close says goodbye; abort does not, for that could wait for a peer that does
// not read.
func (c *conn) Close() error {
	c.end.Do(func() { close(c.gone) })
	return c.Conn.Close()
}

func (c *conn) abort() {
	c.end.Do(func() { close(c.gone) })
	_ = c.NetConn().Close()
}

// keyBody is an answer with keys on its way past net/http: no byte of it is
// read into a buffer of others.
type keyBody struct {
	a    answer
	sent bool
}

var errCopied = errors.New("keys would be copied into a buffer that nobody wipes")

// Read refuses: only conn.ReadFrom sends keys.
func (*keyBody) Read([]byte) (int, error) { return 0, errCopied }
