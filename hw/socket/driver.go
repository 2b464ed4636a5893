package socket

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"path/filepath"
	"sync"
	"time"

	"github.com/quietline/quietline/hw"
	"github.com/quietline/quietline/secret"
)

const (
	// firstRetry and lastRetry bound the wait between attempts to connect,
	// which doubles: a device that restarts is back in seconds.
	firstRetry = 50 * time.Millisecond
	lastRetry  = 2 * time.Second
	// maxEvents is how many events wait for their reader; then the oldest go.
	maxEvents = 64
)

// ErrNotConnected: the device is not there at the moment; a temporary error.
var ErrNotConnected = errors.New("device is not connected")

// Driver is the key manager's side; see [hw.Driver] for its contract. It
// connects and reconnects by itself, so that ReadBlock waits for a device that
// is not there yet.
type Driver struct {
	path string
	log  *slog.Logger
	stop context.CancelFunc
	done chan struct{} // closed when run has ended

	inbox  chan hw.Block // at most one: the answer to the open credit
	events chan hw.Event
	wake   chan struct{} // refused has changed

	mu      sync.Mutex
	conn    *writer // nil while there is none
	info    hw.Info
	refused error
	reading bool // a ReadBlock waits
	credit  bool // the device owes a block on this connection
}

// Open makes a driver for an address unix:///path/of/socket and starts to
// connect. log may be nil.
func Open(address string, log *slog.Logger) (*Driver, error) {
	u, err := url.Parse(address)
	if err != nil {
		return nil, fmt.Errorf("open driver: %w", err)
	}
	if u.Scheme != "unix" || u.Host != "" || !filepath.IsAbs(u.Path) || u.RawQuery != "" {
		return nil, fmt.Errorf("open driver: address %q is not unix:///path/of/socket", address)
	}
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	ctx, stop := context.WithCancel(context.Background())
	d := &Driver{path: u.Path, log: log, stop: stop, done: make(chan struct{}),
		inbox: make(chan hw.Block, 1), events: make(chan hw.Event, maxEvents),
		wake: make(chan struct{}, 1)}
	go d.run(ctx)
	return d, nil
}

// Describe implements [hw.Driver]. Before the first connection it is zero.
func (d *Driver) Describe() hw.Info {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.info
}

// ReadBlock implements [hw.Driver]. If ctx ends first the credit stays open
// and its block goes to the next call.
func (d *Driver) ReadBlock(ctx context.Context, b *hw.Block) error {
	if err := d.want(true); err != nil {
		return err
	}
	defer func() { _ = d.want(false) }()
	for {
		select {
		case <-d.done:
			return hw.ErrClosed
		case <-ctx.Done():
			return ctx.Err()
		case <-d.wake:
			if err := d.refusal(); err != nil {
				return err
			}
		case *b = <-d.inbox:
			return nil
		}
	}
}

func (d *Driver) refusal() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.refused
}

// want says that a ReadBlock waits, or no longer, and asks for a block if none
// is under way or arrived.
func (d *Driver) want(reading bool) error {
	d.mu.Lock()
	d.reading = reading
	refused := d.refused
	ask := reading && d.conn != nil && !d.credit && len(d.inbox) == 0
	w := d.conn
	if ask {
		d.credit = true
	}
	d.mu.Unlock()
	if reading && refused != nil {
		return refused
	}
	if ask {
		// A failed write breaks the connection; the next one asks again.
		if err := w.write(finish(frame(kindCredit))); err != nil {
			_ = w.c.Close()
		}
	}
	return nil
}

// Ack implements [hw.Driver]. While there is no connection it returns
// ErrNotConnected; the block will come again.
func (d *Driver) Ack(ctx context.Context, generation, seq uint64) error {
	select {
	case <-d.done:
		return hw.ErrClosed
	default:
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	d.mu.Lock()
	w := d.conn
	d.mu.Unlock()
	if w == nil {
		return fmt.Errorf("acknowledge block: %w", ErrNotConnected)
	}
	if err := w.write(encodeAck(generation, seq)); err != nil {
		_ = w.c.Close()
		return fmt.Errorf("acknowledge block: %w", err)
	}
	return nil
}

// Events implements [hw.Driver].
func (d *Driver) Events(ctx context.Context) (hw.Event, error) {
	select {
	case <-d.done:
		return hw.Event{}, hw.ErrClosed
	case <-ctx.Done():
		return hw.Event{}, ctx.Err()
	case e := <-d.events:
		return e, nil
	}
}

// Close implements [hw.Driver].
func (d *Driver) Close() error {
	d.stop()
	<-d.done
	return nil
}

// run owns the connection: it connects, reads, and begins again until stopped.
func (d *Driver) run(ctx context.Context) {
	defer close(d.done)
	defer d.empty()
	wait := firstRetry
	for {
		err := d.session(ctx)
		if ctx.Err() != nil {
			return
		}
		var up upError
		if errors.As(err, &up) {
			wait = firstRetry
		}
		d.down(err)
		d.log.Debug("device connection ended", "addr", d.path, "err", err)
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
		wait = min(2*wait, lastRetry)
	}
}

// upError ends a session that had begun.
type upError struct{ error }

// down notes why there is no connection; a refusal ends waiting reads.
func (d *Driver) down(err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.refused = nil
	if errors.Is(err, hw.ErrRefused) {
		d.refused = fmt.Errorf("device %s: %w", d.path, err)
	}
	select {
	case d.wake <- struct{}{}:
	default:
	}
}

// empty clears a block that nobody has read.
func (d *Driver) empty() {
	select {
	case b := <-d.inbox:
		b.Bits.Clear()
	default:
	}
}

func (d *Driver) session(ctx context.Context) error {
	var dialer net.Dialer
	c, err := dialer.DialContext(ctx, "unix", d.path)
	if err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { _ = c.Close() })
	defer stop()
	defer c.Close()
	if err := checkPeer(c.(*net.UnixConn)); err != nil {
		return err
	}
	w := &writer{c: c}
	_ = c.SetReadDeadline(time.Now().Add(helloTimeout))
	if err := w.write(encodeHello()); err != nil {
		return err
	}
	if err := d.greeted(c); err != nil {
		return err
	}
	_ = c.SetReadDeadline(time.Time{})
	d.up(w)
	defer func() {
		d.mu.Lock()
		d.conn, d.credit = nil, false
		d.mu.Unlock()
	}()
	for {
		kind, body, err := readFrame(c)
		if err == nil {
			err = d.received(kind, body)
		}
		if err != nil {
			return upError{err}
		}
	}
}

func (d *Driver) greeted(c net.Conn) error {
	kind, body, err := readFrame(c)
	if err != nil {
		return err
	}
	switch kind {
	case kindRefuse:
		r := &reader{b: body}
		reason := r.string()
		if err := r.end(); err != nil {
			return err
		}
		return fmt.Errorf("%w: %q", hw.ErrRefused, reason)
	case kindInfo:
		info, err := decodeInfo(body)
		if err != nil {
			return err
		}
		d.mu.Lock()
		d.info = info
		d.mu.Unlock()
		return nil
	}
	return fmt.Errorf("%w: message kind %d for info", ErrProtocol, kind)
}

// up makes the connection known. A block of the connection before that nobody
// has read comes again, so it is dropped here; a waiting read asks anew.
func (d *Driver) up(w *writer) {
	d.mu.Lock()
	d.empty()
	d.conn, d.credit, d.refused = w, d.reading, nil
	ask := d.credit
	d.mu.Unlock()
	d.log.Info("device connected", "addr", d.path)
	if ask && w.write(finish(frame(kindCredit))) != nil {
		_ = w.c.Close()
	}
}

func (d *Driver) received(kind byte, body []byte) error {
	switch kind {
	case kindBlock:
		defer secret.Wipe(body)
		b, err := decodeBlock(body)
		if err != nil {
			return err
		}
		d.mu.Lock()
		defer d.mu.Unlock()
		if !d.credit {
			b.Bits.Clear()
			return fmt.Errorf("%w: block without credit", ErrProtocol)
		}
		d.credit = false
		d.inbox <- b // empty: it is filled once a credit
		return nil
	case kindEvent:
		e, err := decodeEvent(body)
		if err != nil {
			return err
		}
		for {
			select {
			case d.events <- e:
				return nil
			default:
			}
			select {
			case <-d.events:
			default:
			}
		}
	}
	return fmt.Errorf("%w: message kind %d", ErrProtocol, kind)
}
