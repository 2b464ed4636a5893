package node

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/kms/peer"
)

// Times of the peer channel.
const (
	// dialTimeout bounds a connection attempt, and a caller's handshake.
	dialTimeout = 5 * time.Second
	dialFirst   = 100 * time.Millisecond // pause before the next attempt, doubling
	dialMost    = 5 * time.Second
	// aliveFor is how long a connection that was heard from keeps another life
	// of the same peer out: as long as the protocol waits for a BEAT.
	aliveFor = 5 * time.Second
	// sweepEvery is the time between two looks at the certificates of
	// connections that stand: one that has ended is cut after it at most.
	sweepEvery = 2 * time.Second
	// silentMost ends a connection on which nothing came: a KME that lives says
	// something every 8 s at least, and a path that has lost its state at a
	// firewall would keep both ends waiting for TCP, a quarter of an hour.
	silentMost = 25 * time.Second
	// partMost is how long a caller that was turned away may take to read why.
	partMost = time.Second
)

// hub keeps one channel to each peer; see greeting for what goes over it.
type hub struct {
	log   *slog.Logger
	owner *owner
	self  etsi014.KMEID
	life  life
	trust atomic.Pointer[trust] // nil without peers
	peers map[etsi014.KMEID]*channel
	lobby lobby
	away  refusals      // of callers that were turned away
	quiet time.Duration // silentMost, but for tests

	mu  sync.Mutex
	all map[*conn]struct{} // also those that were replaced and have not ended
}

// channel is what stands between us and one peer.
type channel struct {
	peer  etsi014.KMEID
	dials bool          // we dial it
	again chan struct{} // has room for one: dial though a connection stands

	// events keeps the order in which the machine is told of begin and end.
	events sync.Mutex

	mu   sync.Mutex // guards the rest
	addr string
	conn *conn
	told string // why there is no connection; each reason is one line in the log
}

func newHub(cfg Config, log *slog.Logger, o *owner) (*hub, error) {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	h := &hub{log: log, owner: o, self: cfg.KME, life: newLife(), quiet: silentMost, all: map[*conn]struct{}{},
		peers: map[etsi014.KMEID]*channel{}}
	for _, p := range cfg.Peers {
		h.peers[p.ID] = &channel{peer: p.ID, addr: p.Addr, dials: cfg.KME < p.ID,
			again: make(chan struct{}, 1)}
	}
	if cfg.alone() {
		return h, nil
	}
	t, err := loadTrust(&cfg, nil)
	if err != nil {
		return nil, err
	}
	h.trust.Store(t)
	return h, t.faults
}

func (h *hub) setAddr(id etsi014.KMEID, addr string) {
	if ch := h.peers[id]; ch != nil {
		ch.mu.Lock()
		defer ch.mu.Unlock()
		ch.addr = addr
	}
}

// reason is why there is no connection to a peer; empty if there is one.
func (h *hub) reason(id etsi014.KMEID) string {
	ch := h.peers[id]
	if ch == nil {
		return ""
	}
	ch.mu.Lock()
	defer ch.mu.Unlock()
	if ch.conn != nil {
		return ""
	}
	return ch.told
}

// renew puts t in force: connections that it forbids are cut, those that
// showed another certificate of ours are made anew.
func (h *hub) renew(t *trust) {
	old := h.trust.Swap(t)
	h.sweep()
	if old.cert.Leaf.Equal(t.cert.Leaf) {
		return
	}
	for _, ch := range h.peers {
		ch.remake()
	}
}

// sweep cuts connections whose certificate is no longer good, or that are dead.
func (h *hub) sweep() {
	t, now := h.trust.Load(), time.Now()
	h.mu.Lock()
	defer h.mu.Unlock()
	for c := range h.all {
		if _, err := t.verify(c.chain, c.usage, now); err != nil {
			h.log.Warn("peer is cut off", "peer_kme", c.peer, "err", err)
			c.cut(err)
		} else if now.Sub(c.lastHeard()) > h.quiet {
			c.cut(fmt.Errorf("nothing was heard for %v; the path between the two is broken", h.quiet))
		}
	}
}

// run dials and accepts until ctx ends; all connections are over then.
func (h *hub) run(ctx context.Context, l net.Listener) {
	var wg sync.WaitGroup
	defer wg.Wait()
	for _, ch := range h.peers {
		if ch.dials {
			wg.Go(func() { h.dialLoop(ctx, ch) })
		}
	}
	if l != nil {
		wg.Go(func() { h.acceptLoop(ctx, l, &wg) })
	}
	for len(h.peers) > 0 && sleep(ctx, sweepEvery) {
		h.sweep()
	}
	<-ctx.Done()
	if l != nil {
		_ = l.Close() // ends acceptLoop
	}
}

// remake has a connection that stands made anew.
func (ch *channel) remake() {
	if ch.dials {
		select {
		case ch.again <- struct{}{}:
		default: // it is said already
		}
		return
	}
	ch.mu.Lock()
	defer ch.mu.Unlock()
	if ch.conn != nil {
		ch.conn.push(frameDial)
	}
}

// dialLoop keeps a connection to a peer. A new one is made before the one that
// stands ends, when either certificate is renewed.
func (h *hub) dialLoop(ctx context.Context, ch *channel) {
	var wg sync.WaitGroup
	defer wg.Wait()
	var live *conn
	pause := dialFirst
	for ctx.Err() == nil {
		c, how, err := h.dial(ctx, ch, live != nil)
		if ctx.Err() != nil {
			if c != nil {
				_ = c.raw.Close()
			}
			return
		}
		if err != nil {
			if live != nil && !live.ended() {
				err = fmt.Errorf("connection cannot be made anew, the one that stands stays: %w", err)
			}
			h.failed(ch, err)
			if !sleep(ctx, pause) {
				return
			}
			if pause = min(2*pause, dialMost); live != nil && live.ended() {
				live = nil
			}
			continue
		}
		began := time.Now()
		_ = h.enter(ctx, ch, c, how) // one that we dialled is not refused
		wg.Go(func() { h.serve(ctx, ch, c) })
		live = c
		select {
		case <-ctx.Done():
			return
		case <-ch.again:
			pause = dialFirst // a peer that asks without end is dialled no faster
		case <-c.done:
			live = nil
			if time.Since(began) > dialMost {
				pause = dialFirst
			}
		}
		if !sleep(ctx, pause) {
			return
		}
	}
}

func (c *conn) ended() bool {
	select {
	case <-c.done:
		return true
	default:
		return false
	}
}

// dial connects to a peer and says hello. It returns how the peer takes the
// connection: anew, or instead of the one that stands.
func (h *hub) dial(ctx context.Context, ch *channel, stands bool) (*conn, what, error) {
	ch.mu.Lock()
	addr := ch.addr
	ch.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	t := h.trust.Load()
	cfg := t.config()
	cfg.VerifyConnection = func(cs tls.ConnectionState) error {
		id, err := t.verify(cs.PeerCertificates, x509.ExtKeyUsageServerAuth, time.Now())
		if err == nil && id != ch.peer {
			err = fmt.Errorf("%w: the peer at %s is KME %q, want %q; correct its address", ErrIdentity,
				addr, id, ch.peer)
		}
		return err
	}
	d := tls.Dialer{Config: cfg}
	raw, err := d.DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, 0, blame(err, t)
	}
	c := newConn(raw.(*tls.Conn), x509.ExtKeyUsageServerAuth, t)
	c.peer = ch.peer
	how, err := h.introduce(ctx, c, stands)
	if err != nil {
		_ = c.raw.Close()
		return nil, 0, blame(err, t)
	}
	return c, how, nil
}

// introduce exchanges greetings as the end that dials.
func (h *hub) introduce(ctx context.Context, c *conn, stands bool) (what, error) {
	end, _ := ctx.Deadline()
	_ = c.SetDeadline(end)
	stop := context.AfterFunc(ctx, func() { _ = c.raw.Close() })
	defer stop()
	mine := greeting{what: anew, life: h.life}
	if stands {
		mine.what = instead
	}
	if err := c.greet(mine); err != nil {
		return 0, err
	}
	theirs, err := c.greeted()
	if err != nil {
		return 0, err
	}
	if theirs.what == refused {
		return 0, fmt.Errorf("the other end refuses the connection: %q", theirs.reason)
	}
	if !stop() {
		return 0, ctx.Err()
	}
	c.life = theirs.life
	return theirs.what, c.SetDeadline(time.Time{})
}

// errTwice: the peer is there already.
var errTwice = errors.New("two KMEs with one KME ID, or a restart too quick")

// enter makes c the peer's connection, unless another one lives. One that
// dialled us is answered.
func (h *hub) enter(ctx context.Context, ch *channel, c *conn, how what) error {
	ch.events.Lock()
	defer ch.events.Unlock()
	ch.mu.Lock()
	old := ch.conn
	same := old != nil && old.life == c.life
	if old != nil && !same && !ch.dials && time.Since(old.lastHeard()) < aliveFor {
		ch.mu.Unlock()
		return fmt.Errorf("second connection of the live KME %q is refused: %w", ch.peer, errTwice)
	}
	if how != instead || !same {
		how = anew
	}
	if !ch.dials {
		c.push(greeting{what: how, life: h.life}.encode())
	}
	ch.conn, ch.told = c, ""
	ch.mu.Unlock()
	h.mu.Lock()
	h.all[c] = struct{}{}
	h.mu.Unlock()
	if h.trust.Load() != c.own { // changed since the handshake
		ch.remake()
	}
	switch {
	case how == instead: // the peer is there as before: the machine need not know
		old.retire()
		return nil
	case old != nil:
		old.cut(errReplaced)
	}
	h.owner.put(ctx, peer.Connected{Peer: ch.peer})
	return nil
}

// serve carries messages of one connection until it or ctx ends.
func (h *hub) serve(ctx context.Context, ch *channel, c *conn) {
	defer close(c.done)
	outer := ctx
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(ctx, func() { _ = c.raw.Close() })
	defer stop()
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := c.write(ctx); err != nil {
			cancel()
		}
	})
	err := c.read(func(data []byte) {
		if !bytes.Equal(data, frameDial) {
			h.owner.put(ctx, peer.Received{Peer: ch.peer, Data: data})
		} else if ch.dials {
			ch.remake()
		}
	})
	if errors.Is(err, errReplaced) { // we hear of it soon too: what we have to say goes out first
		select {
		case <-c.retired:
			wg.Wait()
		case <-ctx.Done():
		case <-time.After(retireMost):
		}
	}
	cancel()
	wg.Wait()
	_ = c.raw.Close()
	h.mu.Lock()
	delete(h.all, c)
	h.mu.Unlock()
	h.leave(outer, ch, c, err)
}

// leave tells the machine that its peer is gone, if no other connection took
// the place of this one.
func (h *hub) leave(ctx context.Context, ch *channel, c *conn, err error) {
	ch.events.Lock()
	defer ch.events.Unlock()
	ch.mu.Lock()
	last := ch.conn == c
	if last {
		ch.conn = nil
	}
	ch.mu.Unlock()
	if !last {
		return
	}
	h.owner.put(context.WithoutCancel(ctx), peer.Disconnected{Peer: ch.peer})
	if ctx.Err() == nil {
		h.failed(ch, c.cause(err))
	}
}

// failed notes why a peer is not there, and logs it once until it changes.
func (h *hub) failed(ch *channel, err error) {
	ch.mu.Lock()
	same := ch.told == err.Error()
	ch.told = err.Error()
	ch.mu.Unlock()
	if !same {
		h.log.Warn("peer cannot be reached", "peer_kme", ch.peer, "err", err)
	}
}

// send queues a message; without a connection it is dropped.
func (h *hub) send(m peer.Message) {
	ch := h.peers[m.To]
	if ch == nil {
		return
	}
	ch.mu.Lock()
	defer ch.mu.Unlock()
	if ch.conn != nil {
		ch.conn.push(m.Data)
	}
}
