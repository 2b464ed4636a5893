package node

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/kms/peer"
)

const (
	// queueMost bytes may wait for a slow peer; then the connection ends and the
	// protocol repeats what is needed. After a long absence the peer is offered
	// the whole stock at once: 65,536 segments of a link, 12 MB.
	queueMost = 64 << 20
	// retireMost is how long a connection that another has replaced may take to
	// hand over what is under way; half of what the protocol waits for a BEAT.
	retireMost = 2500 * time.Millisecond
	// reasonMost bounds the text of a refusal, bytes.
	reasonMost = 200
)

// conn is one connection of a peer.
type conn struct {
	net.Conn               // TLS
	raw      net.Conn      // below it: closing it waits for nobody
	more     chan struct{} // has room for one: out is no longer empty
	retired  chan struct{} // closed when another connection has taken its place
	done     chan struct{} // closed when serve has ended
	peer     etsi014.KMEID
	life     life // of the peer's process
	chain    []*x509.Certificate
	usage    x509.ExtKeyUsage
	own      *trust // that we showed a certificate of

	mu    sync.Mutex // guards the rest
	heard time.Time
	why   error    // we ended it; nil = we did not
	out   [][]byte // frames that wait, without their length
	bytes int      // of them
}

func newConn(c *tls.Conn, usage x509.ExtKeyUsage, own *trust) *conn {
	return &conn{Conn: c, raw: c.NetConn(), more: make(chan struct{}, 1), own: own,
		retired: make(chan struct{}), done: make(chan struct{}), usage: usage, heard: time.Now(),
		chain: c.ConnectionState().PeerCertificates}
}

// life is a number that a process draws at its start: connections of one life
// may replace one another, for they cannot be two KMEs with one KME ID.
type life [16]byte

func newLife() (l life) { _, _ = rand.Read(l[:]); return l }

// what is what a greeting says.
type what uint8

const (
	anew    what = 1 // begin
	instead what = 2 // go on in place of the connection that stands
	refused what = 3
)

// greeting is the first frame of each end of the channel between two key
// managers: TLS 1.3 with X25519MLKEM768, both ends with certificates, and in
// it frames of a length (4 bytes, big endian) and so many bytes. The KME whose
// ID sorts first dials and greets first; the frames after the greetings are
// messages of kms/peer, but for those of one byte:
//
//	1  from the end that was dialled: I have a new certificate, dial anew
//	2  another connection has taken the place of this one: nothing more comes
//
// A greeting is
//
//	version  1 byte    1
//	what     1 byte    1 = begin, 2 = go on in place of the connection that
//	                   stands, 3 = refused (only from the end that was dialled)
//	life     16 bytes  drawn at the start of the process
//	reason   text      of a refusal, at most 200 bytes
//
// A connection that stands is replaced only by one of the same life, or after
// 5 s of silence: two machines with one KME ID do not take turns. The old one
// still carries what was under way.
type greeting struct {
	what   what
	life   life
	reason string
}

const greetingVersion = 1

// Frames of one byte; see greeting.
var (
	frameDial = []byte{1}
	frameLast = []byte{2}
)

func (g greeting) encode() []byte {
	b := append([]byte{greetingVersion, byte(g.what)}, g.life[:]...)
	return append(b, g.reason[:min(len(g.reason), reasonMost)]...)
}

func parseGreeting(b []byte) (g greeting, err error) {
	switch {
	case len(b) < 2+len(g.life) || len(b) > 2+len(g.life)+reasonMost:
		return g, fmt.Errorf("read greeting: %d bytes", len(b))
	case b[0] != greetingVersion:
		return g, fmt.Errorf("read greeting: version %d, we have %d; run the same release at both "+
			"sites", b[0], greetingVersion)
	}
	g.what, g.life, g.reason = what(b[1]), life(b[2:]), string(b[2+len(g.life):])
	if g.what < anew || g.what > refused || g.reason != "" && g.what != refused {
		return g, fmt.Errorf("read greeting: it says %d", g.what)
	}
	return g, nil
}

// greet sends a greeting.
func (c *conn) greet(g greeting) error {
	b := g.encode()
	_, err := c.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(b))), b...))
	return err
}

// greeted takes the other end's.
func (c *conn) greeted() (greeting, error) {
	var length [4]byte
	if _, err := io.ReadFull(c, length[:]); err != nil {
		return greeting{}, err
	}
	n := binary.BigEndian.Uint32(length[:])
	if n > 2+16+reasonMost {
		return greeting{}, fmt.Errorf("read greeting: %d bytes", n)
	}
	b := make([]byte, n)
	if _, err := io.ReadFull(c, b); err != nil {
		return greeting{}, err
	}
	return parseGreeting(b)
}

// retire lets a connection end after what is queued: another has taken its
// place, to which nothing is queued here any more.
func (c *conn) retire() {
	_ = c.raw.SetDeadline(time.Now().Add(retireMost))
	close(c.retired)
}

// cut ends a connection at once.
func (c *conn) cut(why error) {
	c.mu.Lock()
	if c.why == nil {
		c.why = why
	}
	c.mu.Unlock()
	_ = c.raw.Close()
}

func (c *conn) lastHeard() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.heard
}

// cause is why a connection ended, as far as known.
func (c *conn) cause(err error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.why != nil {
		return c.why
	}
	return fmt.Errorf("connection ended: %w", blame(err, c.own))
}

// blame adds to an alert of the other end what it cannot say: which of our
// certificates it was. Of other errors it leaves out the ports, which would
// make each a reason of its own.
func blame(err error, own *trust) error {
	var op *net.OpError
	if !errors.As(err, &op) {
		return err
	}
	if op.Op != "remote error" { // what crypto/tls calls an alert
		return op.Err
	}
	return fmt.Errorf("the other end refuses our certificate: %w; ours, %s; its log says what it "+
		"was held against: it needs our root in its peer_ca, or ours is not for this KME ID", err,
		describe(own.cert.Leaf))
}

// push queues a frame; the holder of the channel's lock calls it, so that none
// comes after retire.
func (c *conn) push(data []byte) {
	c.mu.Lock()
	c.out = append(c.out, data)
	c.bytes += len(data)
	full := c.bytes > queueMost
	c.mu.Unlock()
	if full {
		c.cut(fmt.Errorf("more than %d bytes wait for a slow peer", queueMost))
		return
	}
	select {
	case c.more <- struct{}{}:
	default: // it is said already
	}
}

// take exchanges the queue for an empty one.
func (c *conn) take(empty [][]byte) [][]byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	out := c.out
	c.out, c.bytes = empty[:0], 0
	return out
}

// write sends what is queued, together where more than one waits, until ctx
// ends or, once retired, nothing is left.
func (c *conn) write(ctx context.Context) error {
	w := bufio.NewWriterSize(c.Conn, 1<<16)
	var length [4]byte
	var frames [][]byte
	for last := false; !last; {
		select {
		case <-c.more:
		case <-ctx.Done():
			return ctx.Err()
		case <-c.retired:
			last = true // nobody adds to the queue now
		}
		frames = c.take(frames)
		if last {
			frames = append(frames, frameLast)
		}
		for i, data := range frames {
			frames[i] = nil
			binary.BigEndian.PutUint32(length[:], uint32(len(data)))
			if _, err := w.Write(length[:]); err != nil {
				return err
			}
			if _, err := w.Write(data); err != nil {
				return err
			}
		}
		if err := w.Flush(); err != nil {
			return err
		}
	}
	return nil
}

// errReplaced ends a connection whose other end has said all on it.
var errReplaced = errors.New("another connection has taken its place")

// read hands every frame to take until the connection ends, or the other end
// says that nothing more comes.
func (c *conn) read(take func([]byte)) error {
	r := bufio.NewReaderSize(c.Conn, 1<<16)
	var length [4]byte
	for {
		if _, err := io.ReadFull(r, length[:]); err != nil {
			return err
		}
		n := binary.BigEndian.Uint32(length[:])
		if n > peer.MaxMessage {
			return fmt.Errorf("read message: %d bytes, at most %d are expected", n, peer.MaxMessage)
		}
		data := make([]byte, n)
		if _, err := io.ReadFull(r, data); err != nil {
			return err
		}
		c.mu.Lock()
		c.heard = time.Now()
		c.mu.Unlock()
		if bytes.Equal(data, frameLast) {
			return errReplaced
		}
		take(data)
	}
}
