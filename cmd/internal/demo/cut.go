package demo

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/quietline/quietline/etsi014"
)

// cut darkens the fibre, lets a second application at each site draw the stock
// empty, and waits for the line to block.
func (d *demo) cut(ctx context.Context) error {
	if err := d.fibre(ctx, false); err != nil {
		return err
	}
	begun := time.Now()
	d.view.line("fibre cut; %s and %s draw what is in stock", d.a.recordsSAE(), d.b.recordsSAE())
	drained := make(chan error, 1)
	stop, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() { drained <- d.drain(stop) }()
	err := d.waitStarved(ctx)
	cancel()
	if derr := <-drained; derr != nil {
		return derr
	}
	if err != nil {
		return err
	}
	d.report.Cut.BlockedSeconds = time.Since(begun).Seconds()
	d.report.Cut.Reason = d.reason(ctx)
	d.view.line("line blocked after %.1f s: %s", d.report.Cut.BlockedSeconds, d.report.Cut.Reason)
	return d.nothingPasses(ctx)
}

// waitStarved waits until the stock is gone and both ends of the line are
// blocked.
func (d *demo) waitStarved(ctx context.Context) error {
	err := poll(ctx, 40*time.Second, func() error {
		for _, s := range []*site{d.a, d.b} {
			if n := drawable(ctx, s); n > 0 {
				return fmt.Errorf("%s still holds %d keys", s.kmeID(), n)
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	return d.waitLevel(ctx, 20*time.Second, "BLOCKED")
}

// reason is why the line is blocked. The end that starts the rekeying knows
// more than the one that waits for it, and says more.
func (d *demo) reason(ctx context.Context) string {
	longest := ""
	for _, s := range []*site{d.a, d.b} {
		if l := status(ctx, s.line).Line; l != nil && len(l.Reason) > len(longest) {
			longest = l.Reason
		}
	}
	return longest
}

func (d *demo) fibre(ctx context.Context, up bool) error {
	// Either end can darken the fibre; alice's is where the pulses leave.
	if err := d.a.sim.client.Fibre(ctx, up); err != nil {
		return fmt.Errorf("switch fibre: %w", err)
	}
	return nil
}

// drain draws keys at both sites until the context ends. Each key manager
// owns half of the stock, so one site alone could not empty it.
func (d *demo) drain(ctx context.Context) error {
	var drawing sync.WaitGroup
	defer drawing.Wait()
	for i, s := range []*site{d.a, d.b} {
		peer := [2]*site{d.b, d.a}[i]
		c, err := s.application(s.recordsSAE())
		if err != nil {
			return err
		}
		drawing.Go(func() {
			defer c.Close()
			d.drawAll(ctx, c, peer.recordsSAE())
		})
	}
	return nil
}

// Each application draws so many keys so often, that the stock can be seen to
// fall.
const (
	drawMost  = 128
	drawEvery = 50 * time.Millisecond
)

// drawAll draws keys for a peer, ever fewer when fewer are left.
func (d *demo) drawAll(ctx context.Context, c *etsi014.Client, peer string) {
	number := drawMost
	for ctx.Err() == nil {
		keys, err := c.Keys(ctx, etsi014.KeyRequest{Targets: []etsi014.SAEID{etsi014.SAEID(peer)}, Number: number})
		switch {
		case err == nil:
			d.drawn.Add(int64(len(keys.Keys)))
			keys.Clear()
			number = min(2*number, drawMost)
		case number > 1:
			number /= 2
			continue
		}
		select {
		case <-ctx.Done():
		case <-time.After(drawEvery):
		}
	}
}

// nothingPasses sends datagrams into the blocked line; none may come out.
func (d *demo) nothingPasses(ctx context.Context) error {
	p, err := ping(ctx, d.a.ns, d.b.ns, d.inner(d.a, 9003), d.inner(d.b, 9003), 100, 64, 5*time.Millisecond)
	if err != nil {
		return err
	}
	d.report.Cut.Drawn = int(d.drawn.Load())
	d.report.Cut.LeakedPackets = p.Received
	d.view.line("%d datagrams sent into the blocked line, %d came through", p.Sent, p.Received)
	if p.Received != 0 {
		return errors.New("a blocked line let packets through")
	}
	return nil
}

// restore mends the fibre and waits until packets flow again.
func (d *demo) restore(ctx context.Context) error {
	begun := time.Now()
	if err := d.fibre(ctx, true); err != nil {
		return err
	}
	if err := d.waitLevel(ctx, 40*time.Second, "QKD"); err != nil {
		return err
	}
	d.report.Restore = time.Since(begun).Seconds()
	p, err := ping(ctx, d.a.ns, d.b.ns, d.inner(d.a, 9004), d.inner(d.b, 9004), 100, 64, 5*time.Millisecond)
	if err != nil {
		return err
	}
	d.view.line("line up again after %.1f s; %d of %d datagrams came through", d.report.Restore, p.Received, p.Sent)
	if p.Received == 0 {
		return errors.New("the line says it is up and carries nothing")
	}
	return d.lastNumbers(ctx)
}

// lastNumbers fills what only the end can tell.
func (d *demo) lastNumbers(ctx context.Context) error {
	if sim := status(ctx, d.b.sim).Sim; sim != nil {
		d.report.AuthBitsUsed = int64(sim.AuthUsed)
	}
	last := d.view.latest()
	d.report.Stored, d.report.Delivered = last.Stored, last.Delivered
	if l := status(ctx, d.a.line).Line; l != nil {
		d.report.Rekeys = l.Rekeys
	}
	d.report.Verdict = "the line held: nothing in clear, blocked without keys, up again with them"
	return nil
}
