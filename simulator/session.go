package simulator

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/quietline/quietline/hw"
	"github.com/quietline/quietline/hw/distill"
	"github.com/quietline/quietline/simulator/optics"
)

// maxGenerationStep bounds how far the peer may be ahead. The first messages
// carry no tag, and without a bound one forged message could use up all
// generations for ever; with it that takes 2^32 connections.
const maxGenerationStep = 1 << 32

// maxBacklog bounds the bytes that wait to be sent on the classical channel.
const maxBacklog = 64 << 20

// maxBackoff bounds the pause between two sessions.
const maxBackoff = 2 * time.Second

// batch is what bob's receiver saw up to a slot.
type batch struct {
	clicks []distill.Detection
	slots  uint64
}

// session is one classical connection and its machine, as the fibre's
// goroutine sees it.
type session struct {
	generation atomic.Uint64 // 0 before both ends agreed
	sent       atomic.Uint64 // alice: slots below were sent
	batches    chan batch    // bob
	done       chan struct{} // closed when nobody reads batches any more
}

// deliver waits until the session takes b, and calls alive every heartbeat
// meanwhile. A session that has ended takes everything.
func (s *session) deliver(ctx context.Context, b batch, alive func() error) error {
	ticker := time.NewTicker(heartbeat)
	defer ticker.Stop()
	for {
		select {
		case s.batches <- b:
			return nil
		case <-s.done:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		case <-ticker.C:
			if err := alive(); err != nil {
				return err
			}
		}
	}
}

// runSessions runs one session after another until ctx ends. Its error is one
// of the state file.
func (e *End) runSessions(ctx context.Context) error {
	pause := retry
	for ctx.Err() == nil {
		conn, err := e.cfg.Classical.Conn(ctx)
		if err != nil {
			e.cfg.Log.Debug("classical channel is down", "err", err)
			sleep(ctx, retry)
			continue
		}
		began := time.Now()
		err = e.runSession(ctx, conn)
		if ctx.Err() != nil {
			break
		}
		if f, ok := errors.AsType[stateError](err); ok {
			return f.err
		}
		e.cfg.Log.Warn("session ended", "addr", conn.RemoteAddr().String(), "err", err)
		e.stop(err)
		if time.Since(began) > 10*maxBackoff {
			pause = retry
		}
		sleep(ctx, pause)
		pause = min(2*pause, maxBackoff)
	}
	return nil
}

// stateError marks the errors that end Run.
type stateError struct{ err error }

func (s stateError) Error() string { return s.err.Error() }

// distiller owns the machine of one session. Only runSession's goroutine uses
// it.
type distiller struct {
	end     *End
	machine *distill.Machine
	session *session
	offered uint64         // generation this end asked for
	source  *optics.Source // alice
	out     *outbox
	wake    *time.Timer
}

func (e *End) runSession(ctx context.Context, conn net.Conn) error {
	defer conn.Close()
	d, err := e.newDistiller(conn)
	if err != nil {
		return err
	}
	in := newInbox(conn)
	var wg sync.WaitGroup
	wg.Go(in.run)
	wg.Go(d.out.run)
	e.session.Store(d.session)
	e.beginSession()
	err = d.run(ctx, in)
	e.session.Store(nil)
	close(d.session.done)
	d.out.finish()
	if ctx.Err() == nil {
		d.out.wait(heartbeat) // the peer should hear why the machine died
	}
	_ = conn.Close()
	close(in.stop)
	wg.Wait()
	d.wake.Stop()
	e.endSession()
	return err
}

func (e *End) newDistiller(conn net.Conn) (*distiller, error) {
	offered := e.state.Generation + 1
	if err := e.state.raise(offered); err != nil {
		return nil, stateError{err}
	}
	cfg := e.cfg.Preset.distill()
	cfg.Role, cfg.Generation, cfg.Auth = e.cfg.Role, offered, e.cfg.Auth
	m, err := distill.New(cfg)
	if err != nil {
		return nil, fmt.Errorf("start distillation: %w", err)
	}
	d := &distiller{
		end: e, machine: m, offered: offered, out: newOutbox(conn),
		session: &session{batches: make(chan batch), done: make(chan struct{})},
		wake:    time.NewTimer(time.Hour),
	}
	d.wake.Stop()
	return d, nil
}

// run steps the machine until the connection breaks, the machine dies or ctx
// ends.
func (d *distiller) run(ctx context.Context, in *inbox) error {
	err := d.step(distill.Input{})
	for err == nil {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case err = <-in.failed:
		case err = <-d.out.failed:
		case m := <-in.messages:
			err = d.step(distill.Input{Message: m})
		case b := <-d.batches():
			err = d.step(distill.Input{Detections: b.clicks, Slots: b.slots})
		case <-d.wake.C:
			err = d.step(distill.Input{})
		}
	}
	return err
}

// batches is where the next detections come from. While the machine has a
// whole block of them waiting it is nil: bob gives alice no credit then, she
// sends nothing, and a slow machine has its processors for distilling.
func (d *distiller) batches() <-chan batch {
	if s := d.machine.Stats(); s.Pending > 0 && s.Pending >= s.BlockEvents {
		return nil
	}
	return d.session.batches
}

// step gives the machine one input, and then the preparations it asks for
// until it asks no more.
func (d *distiller) step(in distill.Input) error {
	for {
		out, err := d.machine.Step(d.end.cfg.Now(), in)
		if err == nil {
			err = d.agree()
		}
		d.handle(out, err)
		if err != nil {
			return fmt.Errorf("distil: %w", err)
		}
		if len(out.Prepared) == 0 {
			return nil
		}
		prepared, err := d.prepared(out.Prepared)
		if err != nil {
			return err
		}
		in = distill.Input{Preparations: prepared}
	}
}

// agree makes the session's generation durable, and known to the fibre, as
// soon as the machines have agreed on it.
func (d *distiller) agree() error {
	g := d.machine.Stats().Generation
	if g == 0 || d.session.generation.Load() != 0 {
		return nil
	}
	if g-d.offered > maxGenerationStep {
		return fmt.Errorf("%w: from %d to %d", ErrGeneration, d.offered, g)
	}
	if err := d.end.state.raise(g); err != nil {
		return stateError{err}
	}
	d.source = optics.NewSource(d.end.cfg.Preset.Link, d.end.seeds.Own, g)
	d.session.generation.Store(g)
	d.end.cfg.Log.Info("session began")
	return nil
}

// handle does what the machine asks for. After an error nothing is released.
func (d *distiller) handle(out distill.Output, err error) {
	for _, m := range out.Messages {
		d.out.put(m)
	}
	for _, b := range out.Blocks {
		if err != nil {
			b.Bits.Clear()
			continue
		}
		b.Simulated = true
		d.end.cfg.Log.Debug("block is finished", "bits", 8*b.Bits.Len(), "qber", b.QBER)
		d.end.spool.put(b)
	}
	for _, a := range out.Alarms {
		d.end.alarm(a)
	}
	if err != nil && len(out.Alarms) == 0 {
		d.end.alarm(hw.Event{Alarm: "distillation stopped", Detail: err.Error()})
	}
	if out.Wake > 0 {
		d.wake.Reset(out.Wake)
	}
	d.end.publish(d.machine.Stats())
}

// prepared looks up what was sent. Slots that were not sent yet are refused:
// whoever knew their basis before bob measures could choose his bits.
func (d *distiller) prepared(slots []uint64) ([]distill.Preparation, error) {
	sent := d.session.sent.Load()
	all := make([]distill.Preparation, len(slots))
	for i, slot := range slots {
		if slot >= sent {
			err := fmt.Errorf("%w: %d of %d", ErrSlot, slot, sent)
			d.end.alarm(hw.Event{Alarm: "distillation stopped", Detail: err.Error()})
			return nil, err
		}
		all[i] = d.source.At(slot)
	}
	return all, nil
}
