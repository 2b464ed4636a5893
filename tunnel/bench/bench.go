// Package bench measures a line beside the other tunnels of this machine: two
// namespaces joined by a cable, in them one contender after the other, and
// iperf3 through each. [Run] does it all and returns a [Report].
//
// The contenders take turns within every round, and a ratio compares figures of
// one round only: what else the machine does falls on all of them alike.
// Absolute figures of a shared machine mean little.
//
// A caller must keep in mind that the ends of a contender, iperf3's client and
// its server share the processors of one machine, so a figure is that of the
// tunnel with its load. Run works only inside a lab (package lab), and starts
// this program again for each end of our own: that process calls [End].
package bench

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"time"

	"github.com/quietline/quietline/tunnel/lab"
)

// Options of [Run].
type Options struct {
	// Rounds is how often each contender is measured, 1 to 1000.
	Rounds int
	// Time is how long each of the three transfers of a round lasts; whole
	// seconds, 1 to 3600.
	Time time.Duration
	// MTU of the cable, 1360 to 9216 bytes; 0 = 1500.
	MTU int
	// PlainCable takes segmentation from the cable, so that every packet travels
	// by itself, and switches GRO on, as on a common network card.
	PlainCable bool
	// Loss is how many packets in 100,000 the cable loses, each way and at
	// random; 0 to 50,000. No packet travels joined with others then. It needs
	// nft.
	Loss int
	// Only names the contenders to measure; empty = all that are here.
	Only []string
	// Self is the command that runs this program so that it calls [End].
	Self []string
	// Progress is told each outcome; nil = nobody. Of figures and err one is
	// nil.
	Progress func(round int, name string, figures Figures, err error)
}

const (
	defaultMTU = 1500 // Ethernet
	minMTU     = 1360 // what leaves the peers' interfaces 1280, RFC 8200 section 5
	maxMTU     = 9216 // what switches call jumbo
	// Loss is so many packets in lossOf, at most half.
	lossOf, maxLoss = 100_000, 50_000
)

// Run measures. It returns what it has when ctx ends, with the error of ctx.
// The fault of one contender is in the report and ends nothing.
func Run(ctx context.Context, opt Options) (*Report, error) {
	if opt.MTU == 0 {
		opt.MTU = defaultMTU
	}
	list, err := opt.check(contenders())
	if err != nil {
		return nil, err
	}
	dir, err := lab.Scratch()
	if err != nil {
		return nil, err
	}
	rep := newReport(opt, list)
	for round := range opt.Rounds {
		for i := range list {
			// Another one begins each round, so that nobody always follows the
			// one that heats the machine most.
			at := (round + i) % len(list)
			if list[at].start == nil {
				continue
			}
			f, err := measure(ctx, &opt, &list[at], dir)
			if ctx.Err() != nil {
				rep.finish()
				return rep, ctx.Err()
			}
			rep.note(round, at, f, err)
			if opt.Progress != nil {
				opt.Progress(round, list[at].name, f, err)
			}
		}
	}
	rep.finish()
	return rep, nil
}

// Check tells what Run would refuse; it does not ask for a lab.
func (opt Options) Check() error {
	if opt.MTU == 0 {
		opt.MTU = defaultMTU
	}
	_, err := opt.check(contenders())
	return err
}

// check refuses options that make no sense, and returns whom they ask for.
func (opt *Options) check(all []contender) ([]contender, error) {
	switch {
	case opt.Rounds < 1 || opt.Rounds > 1000:
		return nil, fmt.Errorf("%w: %d rounds are not 1 to 1000", ErrOptions, opt.Rounds)
	case opt.Time < time.Second || opt.Time > time.Hour || opt.Time%time.Second != 0:
		return nil, fmt.Errorf("%w: %s is not 1 to 3600 whole seconds", ErrOptions, opt.Time)
	case opt.MTU < minMTU || opt.MTU > maxMTU:
		return nil, fmt.Errorf("%w: MTU %d is not %d to %d", ErrOptions, opt.MTU, minMTU, maxMTU)
	case opt.Loss < 0 || opt.Loss > maxLoss:
		return nil, fmt.Errorf("%w: a loss of %d in %d is not 0 to %d", ErrOptions, opt.Loss,
			lossOf, maxLoss)
	case len(opt.Self) == 0:
		return nil, fmt.Errorf("%w: no command for our own ends", ErrOptions)
	}
	list, err := choose(all, opt.Only)
	if err != nil {
		return nil, err
	}
	if _, err := exec.LookPath("iperf3"); err != nil {
		return nil, fmt.Errorf("%w: iperf3: apt-get install iperf3", ErrNeeds)
	}
	if _, err := exec.LookPath("nft"); err != nil && opt.Loss > 0 {
		return nil, fmt.Errorf("%w: nft: apt-get install nftables", ErrNeeds)
	}
	return list, nil
}

// choose keeps the contenders that are asked for. Who is asked for by name must
// be here.
func choose(all []contender, only []string) ([]contender, error) {
	if len(only) == 0 {
		return all, nil
	}
	var list []contender
	for _, name := range only {
		i := slices.IndexFunc(all, func(c contender) bool { return c.name == name })
		if i < 0 {
			var names []string
			for _, c := range all {
				names = append(names, c.name)
			}
			return nil, fmt.Errorf("%w: no contender %q; there are %s", ErrOptions, name,
				strings.Join(names, ", "))
		}
		if all[i].start == nil {
			return nil, fmt.Errorf("%w: %s: %s", ErrNeeds, name, all[i].install)
		}
		list = append(list, all[i])
	}
	return list, nil
}

// Of the idle measurement: so many probes, so far apart.
const (
	idlePings = 500
	idleGap   = 2 * time.Millisecond
	loadGap   = 10 * time.Millisecond
	// loadLead lets a transfer come up to speed before it counts as load.
	loadLead = 300 * time.Millisecond
	// upWithin is what a contender may take from its start to the first
	// answer: the slowest handshake here retries after 5 s.
	upWithin = 20 * time.Second
)

// measure brings a contender up between two fresh namespaces, measures it once
// and takes it down.
func measure(ctx context.Context, opt *Options, c *contender, dir string) (f Figures, err error) {
	p, err := newPair(opt, dir)
	if err != nil {
		return nil, err
	}
	defer func() {
		p.close()
		if err != nil {
			err = p.explain(err)
		}
	}()
	if err := c.start(p); err != nil {
		return nil, fmt.Errorf("start: %w", err)
	}
	if err := p.await(ctx, upWithin); err != nil {
		return nil, err
	}
	if err := p.serve(); err != nil {
		return nil, err
	}
	f = Figures{}
	idle, err := p.ping(idleGap, func(n int) bool { return n < idlePings && ctx.Err() == nil })
	if err != nil {
		return nil, err
	}
	idle.into(f, PingIdle50, PingIdle99)
	steps := []func(context.Context, Figures) error{p.oneStream, p.fourStreams, p.flood}
	if c.streams {
		steps = steps[:2]
	}
	for _, step := range steps {
		if err := errors.Join(step(ctx, f), ctx.Err()); err != nil {
			return nil, err
		}
	}
	return f, nil
}

// oneStream measures a TCP stream: throughput, what the processors paid for it,
// and what a ping feels meanwhile.
func (p *pair) oneStream(ctx context.Context, f Figures) error {
	type outcome struct {
		t   transfer
		err error
	}
	before := p.cpu()
	done := make(chan outcome, 1)
	go func() {
		t, err := p.iperf(ctx, "-t", p.seconds())
		done <- outcome{t, err}
	}()
	var out *outcome
	finished := func() bool {
		select {
		case o := <-done:
			out = &o
		default:
		}
		return out != nil
	}
	time.Sleep(loadLead)
	loaded, perr := p.ping(loadGap, func(int) bool { return !finished() })
	if out == nil {
		o := <-done
		out = &o
	}
	spent := p.cpu() - before
	if err := errors.Join(out.err, perr); err != nil {
		return fmt.Errorf("one TCP stream: %w", err)
	}
	f[TCP1], f[Retransmits1] = out.t.bits/1e9, out.t.retransmits
	if len(p.tunnels) > 0 {
		f[CPUPerGB] = spent.Seconds() / (out.t.bytes / 1e9)
	}
	loaded.into(f, PingLoad50, PingLoad99)
	return nil
}

func (p *pair) fourStreams(ctx context.Context, f Figures) error {
	t, err := p.iperf(ctx, "-t", p.seconds(), "-P", "4")
	if err != nil {
		return fmt.Errorf("four TCP streams: %w", err)
	}
	f[TCP4], f[Retransmits4] = t.bits/1e9, t.retransmits
	return nil
}

// flood sends 64-byte datagrams as fast as the sender can and counts what
// arrives.
func (p *pair) flood(ctx context.Context, f Figures) error {
	t, err := p.iperf(ctx, "-t", p.seconds(), "-u", "-b", "0", "-l", "64")
	if err != nil {
		return fmt.Errorf("flood of small datagrams: %w", err)
	}
	f[UDP64] = t.packets
	return nil
}
