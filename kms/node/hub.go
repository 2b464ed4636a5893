package node

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/kms/peer"
)

// Times of the peer channel.
const (
	dialTimeout = 5 * time.Second
	dialFirst   = 100 * time.Millisecond // pause before the next attempt, doubling
	dialMost    = 5 * time.Second
	// aliveFor is how long a connection that was heard from keeps a second one
	// of the same peer out: as long as the protocol waits for a BEAT.
	aliveFor = 5 * time.Second
	// queueMost messages may wait for a slow peer; then the connection ends and
	// the protocol repeats what is needed.
	queueMost = 8192
)

// hub keeps one connection to each peer: TLS 1.3, framed messages of a 4-byte
// length and the bytes.
type hub struct {
	log   *slog.Logger
	owner *owner
	tls   *tls.Config
	self  etsi014.KMEID

	mu    sync.Mutex
	addrs map[etsi014.KMEID]string // of all peers
	conns map[etsi014.KMEID]*conn
	told  map[etsi014.KMEID]string // last failure logged, so that each is one line
}

type conn struct {
	net.Conn
	peer etsi014.KMEID
	out  chan []byte

	mu    sync.Mutex
	heard time.Time
}

func newHub(cfg Config, log *slog.Logger, o *owner) (*hub, error) {
	h := &hub{log: log, owner: o, self: cfg.KME, addrs: map[etsi014.KMEID]string{},
		conns: map[etsi014.KMEID]*conn{}, told: map[etsi014.KMEID]string{}}
	for _, p := range cfg.Peers {
		h.addrs[p.ID] = p.Addr
	}
	if len(cfg.Peers) == 0 {
		return h, nil
	}
	var err error
	h.tls, err = cfg.TLS.config(cfg.KME)
	return h, err
}

func (h *hub) setAddr(id etsi014.KMEID, addr string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.addrs[id] = addr
}

// run dials and accepts until ctx ends; all connections are over then.
func (h *hub) run(ctx context.Context, l net.Listener) {
	var wg sync.WaitGroup
	defer wg.Wait()
	h.mu.Lock()
	for id := range h.addrs {
		if h.self < id {
			wg.Go(func() { h.dialLoop(ctx, id) })
		}
	}
	h.mu.Unlock()
	if l != nil {
		wg.Go(func() { h.acceptLoop(ctx, l, &wg) })
		stop := context.AfterFunc(ctx, func() { _ = l.Close() })
		defer stop()
	}
	<-ctx.Done()
}

func (h *hub) dialLoop(ctx context.Context, id etsi014.KMEID) {
	pause := dialFirst
	for ctx.Err() == nil {
		c, err := h.dial(ctx, id)
		if err != nil {
			h.failed(id, err)
			if !sleep(ctx, pause) {
				return
			}
			pause = min(2*pause, dialMost)
			continue
		}
		began := time.Now()
		h.serve(ctx, c, id)
		if time.Since(began) > dialMost {
			pause = dialFirst
		}
		if !sleep(ctx, pause) {
			return
		}
	}
}

func (h *hub) dial(ctx context.Context, id etsi014.KMEID) (net.Conn, error) {
	h.mu.Lock()
	addr := h.addrs[id]
	h.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	cfg := h.tls.Clone()
	cfg.VerifyConnection = verifier(cfg.RootCAs, h.self, func(got etsi014.KMEID) error {
		if got != id {
			return fmt.Errorf("peer at %s is KME %q, want %q", addr, got, id)
		}
		return nil
	})
	d := tls.Dialer{Config: cfg}
	return d.DialContext(ctx, "tcp", addr)
}

func (h *hub) acceptLoop(ctx context.Context, l net.Listener, wg *sync.WaitGroup) {
	for {
		raw, err := l.Accept()
		if err != nil {
			if ctx.Err() == nil && !errors.Is(err, net.ErrClosed) {
				h.log.Warn("peer cannot be accepted", "err", err)
				if sleep(ctx, dialFirst) {
					continue
				}
			}
			return
		}
		wg.Go(func() { h.welcome(ctx, raw) })
	}
}

// welcome checks who dialled.
func (h *hub) welcome(ctx context.Context, raw net.Conn) {
	cfg := h.tls.Clone()
	cfg.VerifyConnection = verifier(cfg.RootCAs, h.self, h.dialsUs)
	c := tls.Server(raw, cfg)
	hctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	if err := c.HandshakeContext(hctx); err != nil {
		_ = raw.Close()
		h.log.Warn("peer is turned away", "addr", raw.RemoteAddr().String(), "err", err)
		return
	}
	id, err := kmeOf(c.ConnectionState().PeerCertificates[0])
	if err != nil { // checked in the handshake
		_ = raw.Close()
		return
	}
	h.serve(ctx, c, id)
}

// dialsUs refuses whoever is not a peer that should dial us.
func (h *hub) dialsUs(id etsi014.KMEID) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if _, ok := h.addrs[id]; !ok {
		return fmt.Errorf("KME %q is no peer of ours", id)
	}
	if h.self < id {
		return fmt.Errorf("KME %q should not dial us: the one whose ID sorts first dials", id)
	}
	return nil
}

// failed logs why a peer cannot be reached, once until it changes.
func (h *hub) failed(id etsi014.KMEID, err error) {
	h.mu.Lock()
	same := h.told[id] == err.Error()
	h.told[id] = err.Error()
	h.mu.Unlock()
	if !same {
		h.log.Warn("peer cannot be reached", "peer_kme", id, "err", err)
	}
}

// serve carries messages of one connection until it or ctx ends.
func (h *hub) serve(ctx context.Context, raw net.Conn, id etsi014.KMEID) {
	c := &conn{Conn: raw, peer: id, out: make(chan []byte, queueMost), heard: time.Now()}
	defer c.Close()
	if !h.enter(c) {
		h.log.Warn("second connection of a live peer is refused", "peer_kme", id,
			"addr", raw.RemoteAddr().String(), "reason", "two KMEs with one KME ID, or a restart too quick")
		return
	}
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(ctx, func() { _ = c.Close() })
	defer stop()
	var wg sync.WaitGroup
	wg.Go(func() { c.write(ctx); cancel() })
	h.owner.put(ctx, peer.Connected{Peer: id})
	err := c.read(func(data []byte) {
		h.owner.put(ctx, peer.Received{Peer: id, Data: data})
	})
	cancel()
	wg.Wait()
	h.leave(c)
	h.owner.put(context.WithoutCancel(ctx), peer.Disconnected{Peer: id})
	h.failed(id, fmt.Errorf("connection ended: %w", err))
}

// enter makes c the peer's connection, unless another one lives.
func (h *hub) enter(c *conn) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if old := h.conns[c.peer]; old != nil && time.Since(old.lastHeard()) < aliveFor {
		return false
	} else if old != nil {
		_ = old.Close()
	}
	h.conns[c.peer] = c
	delete(h.told, c.peer)
	return true
}

func (h *hub) leave(c *conn) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.conns[c.peer] == c {
		delete(h.conns, c.peer)
	}
}

// send queues a message; without a connection it is dropped.
func (h *hub) send(m peer.Message) {
	h.mu.Lock()
	c := h.conns[m.To]
	h.mu.Unlock()
	if c == nil {
		return
	}
	select {
	case c.out <- m.Data:
	default:
		_ = c.Close()
	}
}

func (c *conn) lastHeard() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.heard
}

// write sends what is queued, together where more than one waits.
func (c *conn) write(ctx context.Context) {
	w := bufio.NewWriterSize(c.Conn, 1<<16)
	var length [4]byte
	for {
		var data []byte
		select {
		case data = <-c.out:
		case <-ctx.Done():
			return
		}
		binary.BigEndian.PutUint32(length[:], uint32(len(data)))
		_, err := w.Write(length[:])
		if err == nil {
			_, err = w.Write(data)
		}
		if err == nil && len(c.out) == 0 {
			err = w.Flush()
		}
		if err != nil {
			return
		}
	}
}

// read hands every message to take until the connection ends.
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
		take(data)
	}
}
