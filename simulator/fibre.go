package simulator

import (
	"context"
	"fmt"
	"math"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/quietline/quietline/hw/distill"
	"github.com/quietline/quietline/simulator/optics"
)

// maxUnanswered is how many windows alice sends ahead of bob's credits: with
// one a tick, 160 ms, more than the round trip of any fibre.
const maxUnanswered = 8

// retry is the pause between two attempts to connect.
const retry = 200 * time.Millisecond

// fibre is the state of one end's fibre connection.
type fibre struct {
	peerFull atomic.Bool // alice: bob takes no detections
	idle     atomic.Bool // bob: alice sends no pulses

	mu      sync.Mutex // guards what follows; never held across I/O
	cut     bool
	up      bool
	conn    net.Conn      // present connection, to be closed by a cut
	changed chan struct{} // closed and renewed when cut changes
}

func (f *fibre) setCut(cut bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.cut == cut {
		return
	}
	f.cut = cut
	close(f.changed)
	f.changed = make(chan struct{})
	if cut && f.conn != nil {
		_ = f.conn.Close()
	}
}

// whole waits until the fibre is not cut.
func (f *fibre) whole(ctx context.Context) error {
	for {
		f.mu.Lock()
		cut, changed := f.cut, f.changed
		f.mu.Unlock()
		if !cut {
			return ctx.Err()
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// hold makes conn the present connection, unless the fibre was cut meanwhile.
func (f *fibre) hold(conn net.Conn) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.cut {
		return false
	}
	f.conn = conn
	return true
}

func (f *fibre) setUp(up bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.up = up
	if !up {
		f.conn = nil
	}
}

// reason says why no light passes; "" when it does.
func (f *fibre) reason() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case f.cut:
		return "fibre is cut"
	case !f.up:
		return "no light on the fibre"
	}
	return ""
}

// runFibre keeps the fibre connected until ctx ends.
func (e *End) runFibre(ctx context.Context) {
	end := e.newTransmitter
	if e.cfg.Role == distill.Bob {
		end = e.newDetector
	}
	carry := end()
	for e.fibre.whole(ctx) == nil {
		conn, err := e.cfg.Fibre.Conn(ctx)
		if err == nil {
			err = e.carry(ctx, conn, carry)
		}
		if ctx.Err() != nil {
			return
		}
		e.cfg.Log.Debug("fibre is down", "err", err)
		sleep(ctx, retry)
	}
}

// carry greets the other end and uses one connection until it breaks.
func (e *End) carry(ctx context.Context, conn net.Conn, use func(context.Context, *framed) error,
) error {
	defer conn.Close()
	if !e.fibre.hold(conn) {
		return nil
	}
	defer e.fibre.setUp(false)
	defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
	f := newFramed(conn, maxFrame, fibreSilence)
	if err := e.greet(f); err != nil {
		return fmt.Errorf("greet over fibre: %w", err)
	}
	e.fibre.setUp(true)
	e.cfg.Log.Info("fibre is up", "addr", conn.RemoteAddr().String())
	return use(ctx, f)
}

func (e *End) greet(f *framed) error {
	if err := f.write(appendHello(nil, hello{e.cfg.Role, e.digest})); err != nil {
		return err
	}
	body, err := f.read(nil)
	if err != nil {
		return err
	}
	h, err := parseHello(body)
	switch {
	case err != nil:
		return err
	case h.role == e.cfg.Role:
		return fmt.Errorf("%w: both have the same role", ErrOtherLink)
	case h.link != e.digest:
		return ErrOtherLink
	}
	return nil
}

// newTransmitter returns alice's use of a connection. The light survives a
// broken connection: slots go on in the same generation.
func (e *End) newTransmitter() func(context.Context, *framed) error {
	t := &transmitter{end: e}
	return t.run
}

// transmitter is alice's side of the fibre, owned by runFibre's goroutine.
type transmitter struct {
	end        *End
	generation uint64
	light      *optics.Light
	slot       uint64 // next to be sent in this generation
	pulses     []optics.Pulse
	body       []byte
}

func (t *transmitter) run(ctx context.Context, f *framed) error {
	var taken atomic.Uint64
	broken := make(chan error, 1)
	go func() { broken <- t.readCredits(f, &taken) }()
	err := t.send(ctx, f, &taken, broken)
	_ = f.conn.Close()
	if err == nil {
		return <-broken // send ended because of it, or because of ctx
	}
	<-broken
	return err
}

// readCredits ends with the connection.
func (t *transmitter) readCredits(f *framed, taken *atomic.Uint64) error {
	var buf []byte
	for {
		body, err := f.read(buf)
		if err != nil {
			return fmt.Errorf("read credit: %w", err)
		}
		c, err := parseCredit(body)
		if err != nil {
			return err
		}
		taken.Store(c.windows)
		t.end.fibre.peerFull.Store(c.full)
		buf = body
	}
}

// send sends a window a tick. It returns nil when broken has something.
func (t *transmitter) send(ctx context.Context, f *framed, taken *atomic.Uint64,
	broken chan error) error {
	e := t.end
	pace := newPacer(e.cfg.Preset.Link.ClockHz, e.cfg.Preset.Link.Expect(0).Total)
	ticker := time.NewTicker(tick)
	defer ticker.Stop()
	for sent := uint64(0); ; {
		select {
		case err := <-broken:
			broken <- err
			return nil
		case <-ctx.Done():
			return ctx.Err()
		case <-ticker.C:
		}
		if sent-min(taken.Load(), sent) >= maxUnanswered {
			continue // bob is slow: the pacer drops what he cannot take
		}
		t.body = appendWindow(t.body[:0], t.window(pace))
		if err := f.write(t.body); err != nil {
			return fmt.Errorf("send window: %w", err)
		}
		sent++
	}
}

// window draws the pulses that are due, or says that none are sent.
func (t *transmitter) window(pace *pacer) optics.Window {
	e, now := t.end, t.end.cfg.Now()
	s := e.session.Load()
	if s == nil || s.generation.Load() == 0 || e.spool.full() || e.fibre.peerFull.Load() {
		pace.idle(now)
		return optics.Window{}
	}
	if g := s.generation.Load(); g != t.generation {
		link := e.cfg.Preset.Link
		source := optics.NewSource(link, e.seeds.Own, g)
		t.light = optics.NewLight(link, source, e.seeds.Physics, g)
		t.generation, t.slot = g, 0
	}
	t.light.SetEve(math.Float64frombits(e.eve.Load()))
	from := t.slot
	t.slot += pace.due(now)
	t.pulses = t.light.Until(t.pulses[:0], t.slot)
	s.sent.Store(t.slot)
	e.countSent(t.slot-from, len(t.pulses))
	return optics.Window{Generation: t.generation, From: from, To: t.slot, Pulses: t.pulses}
}

// newDetector returns bob's use of a connection.
func (e *End) newDetector() func(context.Context, *framed) error {
	d := &detector{end: e}
	return d.run
}

// detector is bob's side of the fibre, owned by runFibre's goroutine.
type detector struct {
	end        *End
	generation uint64
	receiver   *optics.Receiver
	pulses     []optics.Pulse
	clicks     int // of the last window: the capacity to begin with
}

func (d *detector) run(ctx context.Context, f *framed) error {
	var c credit
	var buf []byte
	alive := func() error {
		c.full = d.end.spool.full()
		if err := f.write(appendCredit(nil, c)); err != nil {
			return fmt.Errorf("send credit: %w", err)
		}
		return nil
	}
	for {
		body, err := f.read(buf)
		if err != nil {
			return fmt.Errorf("read window: %w", err)
		}
		w, err := parseWindow(body, d.pulses)
		if err != nil {
			return err
		}
		if err := d.detect(ctx, w, alive); err != nil {
			return err
		}
		buf, d.pulses = body, w.Pulses
		c.windows++
		if err := alive(); err != nil {
			return err
		}
	}
}

// detect hands a window's detections to the session of its generation, if
// there is one and it is not too full; alive is called while it is busy.
func (d *detector) detect(ctx context.Context, w optics.Window, alive func() error) error {
	e := d.end
	e.fibre.idle.Store(w.Generation == 0)
	s := e.session.Load()
	if s == nil || w.Generation == 0 || s.generation.Load() != w.Generation || e.spool.full() {
		return nil
	}
	if w.Generation != d.generation {
		d.receiver = optics.NewReceiver(e.cfg.Preset.Link, e.seeds.Own, e.seeds.Physics,
			w.Generation)
		d.generation = w.Generation
	}
	clicks := d.receiver.Detect(make([]distill.Detection, 0, d.clicks+d.clicks/8), w)
	d.clicks = len(clicks)
	e.countClicks(d.receiver.Clicks())
	return s.deliver(ctx, batch{clicks, w.To}, alive)
}

// sleep waits for d or the end of ctx.
func sleep(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}
