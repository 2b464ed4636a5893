package line

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/quietline/quietline/tunnel"
	"github.com/quietline/quietline/tunnel/pad"
	"github.com/quietline/quietline/tunnel/rekey"
	"github.com/quietline/quietline/tunnel/wire"
)

// padOwner is the owner's part of the one-time pad.
type padOwner struct {
	wake    time.Time
	queue   []pad.Request // wait for their turn
	running int
	demoted uint64    // packets, as last seen
	since   time.Time // when the last one was demoted
	shown   shown
}

// shown is the level of the line with its pad.
type shown struct {
	level rekey.Level
	since time.Time
	why   string
}

// maxPadCalls bounds the calls for pad under way: a block has many parts, and
// the calls for epoch keys shall not wait behind them.
const maxPadCalls = 4

// calm is how long no packet must have gone without pad before the line is
// shown at OTP again.
const calm = 10 * time.Second

// hide puts a record under one-time pad if its class wants that, and tells
// whether it may go out.
func (o *outbound) hide(record []byte, packets uint64) ([]byte, bool) {
	c, p := o.class, o.line.cfg.Pad
	if !c.Pad {
		c.plain.Add(packets)
		return record, true
	}
	var err error
	o.padded, err = p.Machine.Out().Seal(o.padded[:0], record, o.largest, c.Urgent, o.now)
	switch {
	case err == nil:
		c.padded.Add(packets)
		return o.padded, true
	case p.Strict:
		c.refused.Add(packets)
		o.worker.drops[noPad].Add(packets)
		o.reject(record)
		return nil, false
	}
	c.demoted.Add(packets)
	return record, true
}

// unhide takes a PAD record apart.
func (in *inbound) unhide(h wire.Header, record []byte) {
	p := in.line.cfg.Pad
	if p == nil {
		in.worker.drop(badRecord)
		return
	}
	var err error
	in.padded, err = p.Machine.In().Open(in.padded[:0], record)
	if err != nil {
		in.worker.drop(padReason(err))
		if errors.Is(err, pad.ErrBlock) {
			in.line.inbox.put(func(m *mail) { m.stray = true })
		}
		return
	}
	kind, body, err := wire.Parse(in.padded)
	if err != nil || kind == wire.Pad || kind == wire.Control {
		in.worker.drop(badRecord)
		return
	}
	in.payload(h, kind, body)
	clear(in.padded)
}

func padReason(err error) reason {
	switch {
	case errors.Is(err, pad.ErrUsed):
		return replayed
	case errors.Is(err, pad.ErrForged):
		return forged
	case errors.Is(err, pad.ErrBlock):
		return padBlock
	}
	return badRecord
}

// padStep runs the pad's machine once and does what it says.
func (o *owner) padStep(in pad.Input) {
	p := o.cfg.Pad
	if p == nil {
		return
	}
	in.Live = o.sending.Load() != nil && o.cfg.Machine.State().Pad
	out := p.Machine.Step(time.Now(), in)
	for _, body := range out.Send {
		o.seal(append(append(o.body[:0], byte(wire.Control)), body...))
	}
	o.pad.queue = append(o.pad.queue, out.Requests...)
	for _, e := range out.Events {
		kind := "pad"
		if e.Alarm {
			kind = "alarm"
		}
		o.event(rekey.Event{Kind: kind, Level: o.pad.shown.level, Reason: e.Reason})
	}
	o.pad.wake = out.Wake
	o.padCalls()
}

// padCalls begins the calls whose turn it is.
func (o *owner) padCalls() {
	for len(o.pad.queue) > 0 && o.pad.running < maxPadCalls {
		req := o.pad.queue[0]
		o.pad.queue = o.pad.queue[1:]
		o.pad.running++
		o.calls.Go(func() {
			a := o.fetchPad(o.ctx, &req)
			o.inbox.put(func(m *mail) { m.pads = append(m.pads, a) })
		})
	}
}

// fetchPad asks the key manager as the pad's SAE.
func (l *Line) fetchPad(ctx context.Context, req *pad.Request) *pad.Answer {
	ctx, cancel := context.WithTimeout(ctx, req.Budget)
	defer cancel()
	a := &pad.Answer{ID: req.ID}
	source := l.cfg.Keys
	switch {
	case source == nil:
		a.Err = fmt.Errorf("%w: the line has none", tunnel.ErrKeyDown)
	case req.New > 0:
		a.Keys, a.Err = source.New(ctx, tunnel.UsePad, req.New, req.SizeBits)
	case len(req.IDs) > 0:
		a.Keys, a.Err = source.ByID(ctx, tunnel.UsePad, req.IDs)
	default:
		a.Stock, a.Err = source.Status(ctx, tunnel.UsePad)
	}
	if a.Err != nil && !isKeyError(a.Err) {
		a.Err = fmt.Errorf("%w: %w", tunnel.ErrKeyDown, a.Err)
	}
	return a
}

func isKeyError(err error) bool {
	for _, f := range failures {
		if errors.Is(err, f.err) {
			return true
		}
	}
	return false
}

// padLevel changes what the machine says of the line into what the line with
// its pad rests on.
func (o *owner) padLevel(s *rekey.State) {
	p := o.cfg.Pad
	if p == nil {
		return
	}
	ps := p.Machine.State()
	level, why := s.Level, s.Why
	switch {
	case level == rekey.Blocked:
	case !s.Pad:
		why += "; no pad: the peer's policy is " + s.PeerPolicy
	case ps.Up && !o.demoting() && !o.starved(ps.Mark):
		level, why = rekey.OTP, "payload under one-time pad"
		if ps.Why != "" {
			why += "; " + ps.Why
		}
	case p.Strict:
		level, why = rekey.Blocked, ps.Why
	case ps.Up:
		why += "; some payload goes without pad: " + ps.Why
	default:
		why += "; " + ps.Why
	}
	if s.Pad && ps.Why != "" {
		s.Alarms = append(s.Alarms, ps.Why)
	}
	o.show(level, why)
	s.Level, s.Why, s.Since = level, why, o.pad.shown.since
}

// starved tells whether pad is left for urgent traffic only, and there is none.
func (o *owner) starved(m pad.Mark) bool {
	return m <= pad.Critical && !slices.ContainsFunc(o.classes, func(c *class) bool { return c.Urgent })
}

// show notes the level of the line with its pad, and tells of a change.
func (o *owner) show(level rekey.Level, why string) {
	was := o.pad.shown
	o.pad.shown.why = why
	if level == was.level && !was.since.IsZero() {
		return
	}
	o.pad.shown = shown{level, time.Now(), why}
	o.event(rekey.Event{Kind: "level", Level: level, Reason: why})
	if level < was.level {
		o.event(rekey.Event{Kind: "alarm", Level: level,
			Reason: fmt.Sprintf("level fell from %v to %v: %s", was.level, level, why)})
	}
}

// demoting tells whether packets that want pad went without it lately.
func (o *owner) demoting() bool {
	var n uint64
	for _, c := range o.classes {
		n += c.demoted.Load() + c.refused.Load()
	}
	if n != o.pad.demoted {
		o.pad.demoted, o.pad.since = n, time.Now()
	}
	return !o.pad.since.IsZero() && time.Since(o.pad.since) < calm && !o.cfg.Pad.Strict
}

// PadStats is the one-time pad in Stats.
type PadStats struct {
	pad.State
	Classes []ClassStats // the last is what no other fits
	// SecondsLeft is how long the pad for sending lasts at the rate of the last
	// half minute; negative = for ever.
	SecondsLeft float64
}

// padStats returns them; nil = the line has no pad. State is the owner's.
func (l *Line) padStats(s *pad.State) *PadStats {
	if s == nil {
		return nil
	}
	ps := &PadStats{State: *s, SecondsLeft: -1}
	if s.Out > s.In {
		ps.SecondsLeft = float64(s.Left) / (s.Out - s.In)
	}
	for _, c := range l.classes {
		ps.Classes = append(ps.Classes, ClassStats{c.Name, c.padded.Load(), c.plain.Load(),
			c.demoted.Load(), c.refused.Load()})
	}
	return ps
}
