// Package demo shows the whole of Quietline on one machine: two sites in
// network namespaces, a simulated QKD link, two key managers, an encrypted
// line with real packets, and what happens when the fibre is cut.
//
// The main function is [Run]. It only starts the real daemons and watches
// them through their control sockets, as an operator would. It must run
// inside the namespaces that tunnel/lab makes; everything it creates vanishes
// with them.
package demo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/quietline/quietline/tunnel/lab"
)

// Options are the flags of the verb.
type Options struct {
	For      time.Duration // aimed length of the whole run; stages take what they need
	JSON     bool          // one JSON object per line instead of text
	Eve      float64       // fraction of pulses that eve intercepts and resends, 0 to 1
	Keep     bool          // stay until the context ends
	Out      io.Writer
	Terminal bool // Out is a terminal: redraw one screen
}

// The line of the demo rekeys fast, so that half a minute shows a life, and
// holds an epoch long enough that a busy machine does not block it.
const (
	preset    = "metro"
	epochLife = 2 * time.Second
	holdMax   = 6 * time.Second
	fileBytes = 32 << 20
)

// demo is one run. The stages own it in turn; the view reads only what it
// polls itself.
type demo struct {
	opt    Options
	dir    string
	a, b   *site
	begun  time.Time
	view   *view
	drawn  atomic.Int64 // keys drawn by the second applications
	report Report
	wan    *lab.Recorder
	tun    *lab.Recorder
	// samples are pieces of the file that went through the line.
	samples [][]byte
}

// stageError names the stage that failed and shows the logs that tell why.
type stageError struct {
	stage string
	logs  []string
	err   error
}

func (e *stageError) Error() string {
	s := fmt.Sprintf("stage %q: %v", e.stage, e.err)
	for _, l := range e.logs {
		s += "\n" + l
	}
	return s
}

func (e *stageError) Unwrap() error { return e.err }

// errStarved ends the run early and well: eve left no key.
var errStarved = errors.New("eve left no key")

// Run plays the demo and prints it. It returns nil when every stage showed
// what it should.
func Run(ctx context.Context, opt Options) error {
	dir, err := lab.Scratch()
	if err != nil {
		return err
	}
	d := &demo{opt: opt, dir: dir, begun: time.Now()}
	d.view = newView(opt, d.begun)
	defer d.stop()
	stages := []struct {
		name, title string
		run         func(context.Context) error
	}{
		{"sites", "two sites, their certificates and their network", d.sites},
		{"keys", "photons to keys", d.keys},
		{"line", "an encrypted line", d.line},
		{"traffic", "real packets through it", d.traffic},
		{"capture", "what an eavesdropper on the wide-area network saw", d.capture},
		{"cut", "the fibre is cut", d.cut},
		{"restore", "the fibre is mended", d.restore},
	}
	for _, s := range stages {
		d.view.stage(s.name, s.title)
		if err := s.run(ctx); errors.Is(err, errStarved) {
			break
		} else if err != nil {
			return d.failed(s.name, err)
		}
	}
	d.report.Seconds = time.Since(d.begun).Seconds()
	d.view.summary(&d.report)
	if opt.Keep {
		return d.keep(ctx)
	}
	return nil
}

// failed wraps an error with the tails of the daemons' logs.
func (d *demo) failed(stage string, err error) error {
	d.view.close()
	if errors.Is(err, context.Canceled) {
		return fmt.Errorf("stopped in stage %q", stage)
	}
	e := &stageError{stage: stage, err: err}
	for _, p := range d.daemons() {
		if text := p.tail(8); text != "" {
			e.logs = append(e.logs, "--- log of "+p.name+"\n"+text)
		}
	}
	return e
}

func (d *demo) daemons() []*daemon {
	var all []*daemon
	for _, s := range []*site{d.a, d.b} {
		if s == nil {
			continue
		}
		for _, p := range []*daemon{s.line, s.kme, s.sim} {
			if p != nil {
				all = append(all, p)
			}
		}
	}
	return all
}

func (d *demo) stop() {
	d.view.close()
	for _, p := range d.daemons() {
		p.stop()
	}
}

// sites makes the namespaces, folders, certificates and site files.
func (d *demo) sites(context.Context) (err error) {
	if d.a, d.b, err = newSites(d.dir); err != nil {
		return err
	}
	if err := enrol(d.a, d.b); err != nil {
		return err
	}
	if err := configure(d.a, d.b, d.opt); err != nil {
		return err
	}
	return configure(d.b, d.a, d.opt)
}

// keys starts the simulated device and the key manager of each site and waits
// until both hold keys.
func (d *demo) keys(ctx context.Context) error {
	if err := d.presetLines(); err != nil {
		return err
	}
	begun := time.Now()
	for _, s := range []*site{d.a, d.b} {
		var err error
		if s.sim, err = d.start(s, "sim", "sim-"+linkID+".sock"); err != nil {
			return err
		}
		if s.kme, err = d.start(s, "kme", "kme.sock"); err != nil {
			return err
		}
	}
	for _, p := range d.daemons() {
		if err := p.ready(ctx); err != nil {
			return err
		}
	}
	d.view.watch(ctx, d.a, d.b)
	return d.firstKeys(ctx, begun)
}

func (d *demo) start(s *site, verb, socket string) (*daemon, error) {
	return start(s.ns, s.dir, s.name+" "+verb, filepath.Join(s.path("state"), socket), verb, "--config", s.file)
}

// line starts both encryptors and waits for the first epoch with a QKD key.
func (d *demo) line(ctx context.Context) error {
	for _, s := range []*site{d.a, d.b} {
		var err error
		if s.line, err = d.start(s, "line", "line-"+lineID+".sock"); err != nil {
			return err
		}
	}
	for _, s := range []*site{d.a, d.b} {
		if err := s.line.ready(ctx); err != nil {
			return err
		}
	}
	return d.waitLevel(ctx, 15*time.Second, "QKD")
}

// record starts the captures: the outer network, and the inner device as
// positive control of the same search.
func (d *demo) record() (err error) {
	if d.wan, err = lab.Capture(d.a.ns, "wan", filepath.Join(d.dir, "wan.pcap")); err != nil {
		return err
	}
	d.tun, err = lab.Capture(d.a.ns, "ql0", filepath.Join(d.dir, "tun.pcap"))
	return err
}

// traffic moves a file, then numbered datagrams for latency and loss.
func (d *demo) traffic(ctx context.Context) (err error) {
	if err := d.record(); err != nil {
		return err
	}
	file := newRecords(fileBytes)
	d.report.File, err = sendFile(ctx, d.a.ns, d.b.ns, d.inner(d.b, 9000), file)
	if err != nil {
		return err
	}
	d.samples = file.samples
	d.view.line("file      %d MiB by TCP in %.2f s, %.0f Mbit/s, SHA-256 equal (%s…)",
		fileBytes>>20, d.report.File.Seconds, d.report.File.Mbps, d.report.File.SHA256[:12])
	d.report.Latency, err = ping(ctx, d.a.ns, d.b.ns, d.inner(d.a, 9001), d.inner(d.b, 9001), 200, 64, 5*time.Millisecond)
	if err != nil {
		return err
	}
	d.view.line("latency   %d round trips through the line, p50 %.2f ms, p99 %.2f ms",
		d.report.Latency.Received, d.report.Latency.P50Ms, d.report.Latency.P99Ms)
	return d.paced(ctx, d.inner(d.a, 9002), d.inner(d.b, 9002))
}

// inner is an address on the line's device.
func (d *demo) inner(s *site, port int) string {
	return fmt.Sprintf("%s:%d", s.tunInner.Addr(), port)
}

// paced sends large datagrams over at least two rekeyings and counts losses.
func (d *demo) paced(ctx context.Context, from, to string) (err error) {
	span := max(2*epochLife, d.opt.For-time.Since(d.begun)-reserve)
	const every = 2 * time.Millisecond
	d.report.UDP, err = ping(ctx, d.a.ns, d.b.ns, from, to, int(span/every), 1200, every)
	if err != nil {
		return err
	}
	d.view.line("UDP       %d datagrams of 1200 bytes there and back over %s and several rekeyings, %d lost",
		d.report.UDP.Sent, span.Round(time.Second), d.report.UDP.Lost())
	if d.report.UDP.Received == 0 {
		return errors.New("no UDP datagram came back")
	}
	d.linkNumbers(ctx)
	return nil
}

// reserve is the time that the stages after the traffic usually take.
const reserve = 19 * time.Second

// capture searches both recordings for pieces of the file.
func (d *demo) capture(context.Context) error {
	var outer, inner recordingReport
	var both errgroup.Group
	both.Go(func() (err error) { outer, err = d.search(d.wan, "wan.pcap"); return err })
	both.Go(func() (err error) { inner, err = d.search(d.tun, "tun.pcap"); return err })
	if err := both.Wait(); err != nil {
		return err
	}
	d.report.Capture = captureReport{Outer: outer, Inner: inner}
	n := len(d.samples)
	d.view.line("outside   %d packets on the wide-area network: %d of %d pieces of the file found", outer.Packets, outer.Found, n)
	d.view.line("control   %d packets on the inner device: the same search finds %d of %d", inner.Packets, inner.Found, n)
	switch {
	case outer.Found != 0:
		return fmt.Errorf("%d pieces of the file crossed the wide-area network in clear", outer.Found)
	case outer.Missed+inner.Missed != 0:
		return fmt.Errorf("the capture missed %d packets: it proves nothing", outer.Missed+inner.Missed)
	case inner.Found != n:
		return fmt.Errorf("the search finds %d of %d pieces where all must be: it proves nothing", inner.Found, n)
	}
	return nil
}

// search ends a recording, searches it and removes it.
func (d *demo) search(r *lab.Recorder, name string) (recordingReport, error) {
	if err := r.Stop(); err != nil {
		return recordingReport{}, err
	}
	path := filepath.Join(d.dir, name)
	defer os.Remove(path)
	found, err := lab.Search(path, d.samples)
	if err != nil {
		return recordingReport{}, err
	}
	return recordingReport{
		Packets: r.Packets(), Missed: r.Dropped(), Found: max(found.InPackets, found.InStreams),
	}, nil
}
