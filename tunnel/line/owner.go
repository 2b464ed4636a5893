package line

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/quietline/quietline/tunnel"
	"github.com/quietline/quietline/tunnel/pad"
	"github.com/quietline/quietline/tunnel/rekey"
)

// owner owns the rekey machine until ctx ends.
type owner struct {
	*Line
	ctx     context.Context
	ready   map[uint32]*prepared // installed epochs by receive index
	wake    time.Time            // the machine's
	record  []byte               // scratch: a datagram of the control queue
	body    []byte               // scratch: its record
	told    told
	pad     padOwner
	sent    uint64    // datagrams at the last tick
	quiet   time.Time // since when nothing has been sent
	alive   bool
	pending int // calls to the key manager under way
	partner partner
	answer  Endpoint // who sent the handshake datagram in hand; zero = as always

	widest int  // MTU of the device at the start
	narrow bool // the path takes less than the device can say
	search search
}

// prepared is an epoch that can be sent in.
type prepared struct {
	*sending
	keys int
	made time.Time
}

// tickEvery is how often volume, silence and the peer's life are looked at.
// Volume needs it most: 2^36 bytes, where a rekey starts, are 55 s at 10 Gbit/s.
const tickEvery = time.Second

// controlLen is room for a record of the control queue, bytes.
const controlLen = 2048

// maxCalls bounds the calls to the key manager under way.
const maxCalls = 8

// owner is the goroutine of the machine.
func (l *Line) owner(ctx context.Context) {
	o := &owner{Line: l, ctx: ctx, ready: map[uint32]*prepared{},
		record: make([]byte, 0, controlLen), body: make([]byte, 0, controlLen), quiet: time.Now(),
		widest: l.cfg.Device.Caps().MTU}
	timer := time.NewTimer(0)
	defer timer.Stop()
	tick := time.NewTicker(min(tickEvery, l.cfg.Keepalive))
	defer tick.Stop()
	o.step(rekey.Input{})
	for {
		o.publish()
		o.tell()
		wake := o.wake
		if w := o.pad.wake; !w.IsZero() && (wake.IsZero() || w.Before(wake)) {
			wake = w
		}
		if wake.IsZero() {
			timer.Stop()
		} else {
			timer.Reset(time.Until(wake))
		}
		select {
		case <-ctx.Done():
			return
		case <-l.inbox.ready:
			o.read(l.inbox.take())
		case <-timer.C:
			o.step(rekey.Input{})
			o.padStep(pad.Input{})
		case <-tick.C:
			o.tick()
		}
	}
}

// read hands mail to the machine, one thing a step.
func (o *owner) read(m mail) {
	for _, index := range m.heard {
		o.step(rekey.Input{Heard: index})
	}
	for _, a := range m.answers {
		o.pending--
		o.step(rekey.Input{Keys: a})
	}
	for _, a := range m.pads {
		o.pad.running--
		o.padStep(pad.Input{Answer: a})
	}
	if m.stray {
		o.padStep(pad.Input{Stray: true})
	}
	for _, body := range m.controls {
		o.hear(body)
	}
	for i, d := range m.datagrams {
		o.answer = d.from
		o.step(rekey.Input{Datagram: d.data, Load: len(m.datagrams)-i > loadDatagrams})
		o.answer = Endpoint{}
	}
	if m.restored {
		o.step(rekey.Input{Restored: true})
	}
	if m.rekey {
		o.step(rekey.Input{Rekey: true})
	}
}

// tick fits the device to the path, reports the volume and keeps the line from falling silent.
func (o *owner) tick() {
	o.fitPath()
	o.step(rekey.Input{})
	o.padStep(pad.Input{})
	now := time.Now()
	s := o.Stats()
	if s.Sent.Datagrams != o.sent {
		o.sent, o.quiet = s.Sent.Datagrams, now
	}
	if now.Sub(o.quiet) >= o.cfg.Keepalive {
		o.quiet = now
		o.keepalive()
	}
	if s.PeerAlive != o.alive {
		o.alive = s.PeerAlive
		if o.alive {
			o.log.Info("peer is there")
		} else {
			o.log.Warn("peer is silent", "since", s.LastHeard)
		}
	}
}

// step runs the machine once and does what it says, in its order.
func (o *owner) step(in rekey.Input) {
	if s := o.sending.Load(); s != nil {
		in.Sent = s.total()
	}
	out := o.cfg.Machine.Step(time.Now(), in)
	if out.Install != nil {
		if err := o.install(out.Install); err != nil {
			// Without its keys the epoch carries nothing; the machine will
			// find that the peer is not heard in it and agree another.
			o.log.Error("epoch is lost", "epoch", out.Install.Number, "err", err)
		}
	}
	if out.Send != 0 {
		o.send(out.Send)
	}
	if out.Confirm {
		o.confirm()
	}
	for _, index := range out.Retire {
		o.retire(index)
	}
	if out.Stop {
		o.sending.Store(nil)
	}
	if out.Void {
		o.padStep(pad.Input{Void: true})
	}
	if out.Send != 0 {
		o.padStep(pad.Input{}) // it may begin now
	}
	for _, d := range out.Datagrams {
		if err := o.handshake(d); err != nil && !closed(err) {
			o.own.drop(unsent) // the machine repeats what is not answered
		}
	}
	if out.Request != nil {
		o.noteAnswer()
		o.request(out.Request)
	}
	for _, e := range out.Events {
		if o.cfg.Pad == nil || e.Kind != "level" { // a line with pad has levels of its own
			o.event(e)
		}
	}
	o.wake = out.Wake
}

// install accepts records of e from now on and prepares to send in it.
func (o *owner) install(e *rekey.Epoch) error {
	defer e.SendKey.Clear()
	defer e.SendIV.Clear()
	s, err := newSending(o.cfg.Cipher, e, len(o.seals))
	if err != nil {
		e.RecvKey.Clear()
		e.RecvIV.Clear()
		return err
	}
	o.ready[e.RecvIndex] = &prepared{s, len(e.KeyIDs), e.Made}
	table := o.receiving.Load()
	o.receiving.Store(table.with(newReceiving(o.cfg.Cipher, e)))
	return nil
}

// send seals with an installed epoch from now on.
func (o *owner) send(index uint32) {
	p := o.ready[index]
	if p == nil {
		o.log.Error("no such epoch to send in", "index", index)
		o.sending.Store(nil)
		return
	}
	o.sending.Store(p.sending)
	o.mu.Lock()
	defer o.mu.Unlock()
	o.snapshot.epochKeys = p.keys
	if p.keys > 0 {
		o.snapshot.lastKey = time.Now()
	}
}

func (o *owner) retire(index uint32) {
	if s := o.sending.Load(); s != nil && s.index == index {
		o.sending.Store(nil)
	}
	table := o.receiving.Load()
	if r := table.find(index); r != nil {
		o.receiving.Store(table.without(index))
		r.clear()
	}
	delete(o.ready, index)
}

// request answers a key request beside the owner.
func (o *owner) request(req *rekey.KeyRequest) {
	if o.pending >= maxCalls {
		err := fmt.Errorf("%w: %d calls are under way", tunnel.ErrKeyDown, o.pending)
		o.pending++
		o.inbox.put(func(m *mail) {
			m.answers = append(m.answers, &rekey.KeyAnswer{ID: req.ID, Err: err})
		})
		return
	}
	o.pending++
	o.calls.Go(func() {
		keys, err := o.fetch(o.ctx, req)
		o.inbox.put(func(m *mail) {
			m.answers = append(m.answers, &rekey.KeyAnswer{ID: req.ID, Keys: keys, Err: err})
		})
	})
}

// fetch asks the key manager. Its error wraps one of tunnel.ErrKey….
func (l *Line) fetch(ctx context.Context, req *rekey.KeyRequest) ([]tunnel.Key, error) {
	ctx, cancel := context.WithTimeout(ctx, req.Budget)
	defer cancel()
	keys, err := l.ask(ctx, req)
	l.mu.Lock()
	defer l.mu.Unlock()
	stats := &l.snapshot.keys
	if err == nil && req.New > 0 {
		stats.Drawn += uint64(len(keys))
	} else if err == nil {
		stats.Collected += uint64(len(keys))
	}
	if err == nil {
		return keys, nil
	}
	if stats.Failures == nil {
		stats.Failures = map[string]uint64{}
	}
	for _, k := range keys {
		k.Bits.Clear()
	}
	for _, f := range failures {
		if errors.Is(err, f.err) {
			stats.Failures[f.name]++
			return nil, err
		}
	}
	stats.Failures["down"]++
	return nil, fmt.Errorf("%w: %w", tunnel.ErrKeyDown, err)
}

var failures = []struct {
	err  error
	name string
}{
	{tunnel.ErrKeyEmpty, "empty"}, {tunnel.ErrKeyUnknown, "unknown"},
	{tunnel.ErrKeyDenied, "denied"}, {tunnel.ErrKeyDown, "down"},
}

// ask makes the one call that req stands for.
func (l *Line) ask(ctx context.Context, req *rekey.KeyRequest) ([]tunnel.Key, error) {
	source := l.cfg.Keys
	switch {
	case source == nil:
		return nil, fmt.Errorf("%w: the line has none", tunnel.ErrKeyDown)
	case req.New > 0:
		return source.New(ctx, tunnel.UseEpoch, req.New, req.SizeBits)
	case len(req.IDs) > 0:
		return source.ByID(ctx, tunnel.UseEpoch, req.IDs)
	}
	stock, err := source.Status(ctx, tunnel.UseEpoch)
	if err == nil && stock.Keys == 0 {
		err = tunnel.ErrKeyEmpty
	}
	return nil, err
}

// event logs what the machine wants people to see.
func (o *owner) event(e rekey.Event) {
	if e.Kind != "alarm" {
		o.log.Info(e.Kind, "level", e.Level.String(), "reason", e.Reason)
		return
	}
	o.log.Warn(e.Kind, "level", e.Level.String(), "reason", e.Reason)
	o.mu.Lock()
	defer o.mu.Unlock()
	o.snapshot.alarms++
	o.snapshot.lastAlarm = e.Reason
}

// publish makes the machine's state known to Stats.
func (o *owner) publish() {
	state, stats := o.cfg.Machine.State(), o.cfg.Machine.Stats()
	o.padLevel(&state)
	var ps *pad.State
	if o.cfg.Pad != nil {
		s := o.cfg.Pad.Machine.State()
		ps = &s
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	o.snapshot.State, o.snapshot.handshakes, o.snapshot.pad = state, stats, ps
}
