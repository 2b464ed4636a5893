package demo

import (
	"context"
	"fmt"
	"time"

	"github.com/quietline/quietline/cmd/internal/control"
	"github.com/quietline/quietline/simulator"
)

// keyBits is the size of the keys that the demo counts.
const keyBits = 256

// watcher turns the daemons' status into samples. One goroutine owns it.
type watcher struct {
	a, b      *site
	lastBytes uint64
	lastAt    time.Time
}

// status asks a daemon; a missing or silent one is the zero status.
func status(ctx context.Context, d *daemon) control.Status {
	if d == nil {
		return control.Status{}
	}
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	s, err := d.client.Status(ctx)
	if err != nil {
		return control.Status{}
	}
	return s
}

// sample asks every daemon once.
func (w *watcher) sample(ctx context.Context) sample {
	s := sample{QBER: -1}
	for i, at := range []*site{w.a, w.b} {
		if k := status(ctx, at.kme).KME; k != nil {
			s.Stored[i] = stock(k)
			s.Delivered[i] = int(k.KeysDrawn + k.KeysFetched)
		}
	}
	if sim := status(ctx, w.b.sim).Sim; sim != nil {
		s.SiftedBPS, s.SecretBPS = known(sim.SiftedRate, 0), known(sim.SecretRate, 0)
		s.QBER = known(sim.QBER, -1)
	}
	if l := status(ctx, w.a.line).Line; l != nil {
		s.Level, s.Reason, s.Epoch, s.EpochAge = l.Level, l.Reason, l.Epoch, known(l.Age, 0)
		for _, n := range l.Drops {
			s.Dropped += n
		}
		s.Mbps = w.throughput(l.Sent.Bytes + l.Received.Bytes)
	}
	return s
}

// stock is the number of keys that a site's applications could draw now.
func stock(k *control.KME) int {
	bits := uint64(0)
	for _, l := range k.Links {
		bits += l.Drawable
	}
	return int(bits / keyBits)
}

// drawable is the stock of a site; 0 if its key manager does not answer.
func drawable(ctx context.Context, s *site) int {
	if k := status(ctx, s.kme).KME; k != nil {
		return stock(k)
	}
	return 0
}

func (w *watcher) throughput(total uint64) float64 {
	now := time.Now()
	took := now.Sub(w.lastAt).Seconds()
	delta := total - min(w.lastBytes, total)
	first := w.lastAt.IsZero()
	w.lastBytes, w.lastAt = total, now
	if first || took == 0 {
		return 0
	}
	return float64(delta) * 8 / 1e6 / took
}

func known(v *float64, otherwise float64) float64 {
	if v == nil {
		return otherwise
	}
	return *v
}

// presetLines says what is simulated and why these numbers.
func (d *demo) presetLines() error {
	p, err := simulator.PresetByName(preset)
	if err != nil {
		return err
	}
	f := p.Forecast()
	r := &d.report
	r.Preset, r.SetQBER, r.Eve, r.Simulated = preset, f.QBER, d.opt.Eve, true
	d.view.line("link      preset %s, simulated: %s", p.Name, p.Description)
	d.view.line("          set error %s; expected: sifted %s, secret %s", ratio(f.QBER), rate(f.SiftedBPS), rate(f.SecretBPS))
	d.view.line("          length of the key: Wiesemann et al., arXiv:2405.16578, one decoy, finite key")
	d.view.line("          block of %d sifted bits, %.1f s of photons: twice as many would give more key per", p.BlockBits, f.BlockSeconds)
	d.view.line("          second and the first one later; half as many pay too much for finite statistics")
	return nil
}

// firstKeys waits until both key managers hold drawable keys. With an
// eavesdropper the wait may end without any: that is what should be seen.
func (d *demo) firstKeys(ctx context.Context, begun time.Time) error {
	limit := 30 * time.Second
	if d.opt.Eve > 0 {
		limit = max(15*time.Second, d.opt.For-time.Since(d.begun))
	}
	err := poll(ctx, limit, func() error {
		for _, s := range []*site{d.a, d.b} {
			if drawable(ctx, s) == 0 {
				return fmt.Errorf("%s holds no drawable key", s.kmeID())
			}
		}
		return nil
	})
	d.linkNumbers(ctx)
	switch {
	case err == nil:
		d.report.FirstKeySeconds = time.Since(begun).Seconds()
		d.view.line("first keys at both sites after %.1f s", d.report.FirstKeySeconds)
		return nil
	case d.opt.Eve > 0 && ctx.Err() == nil:
		return d.starved(ctx)
	}
	return err
}

// linkNumbers takes the link's figures into the report.
func (d *demo) linkNumbers(ctx context.Context) {
	sim := status(ctx, d.b.sim).Sim
	if sim == nil {
		return
	}
	d.report.QBER = known(sim.QBER, -1)
	d.report.SiftedBPS, d.report.SecretBPS = known(sim.SiftedRate, 0), known(sim.SecretRate, 0)
	d.report.AuthBitsUsed = int64(sim.AuthUsed)
}

// starved closes a run in which eve disturbed too much for any key. It must
// have been her: everything runs, and the photons came with errors.
func (d *demo) starved(ctx context.Context) error {
	for _, s := range []*site{d.a, d.b} {
		sim := status(ctx, s.sim).Sim
		switch {
		case status(ctx, s.kme).KME == nil:
			return fmt.Errorf("%s does not answer", s.kme.name)
		case sim == nil:
			return fmt.Errorf("%s does not answer", s.sim.name)
		case sim.Blocks > 0:
			return fmt.Errorf("%s made %d blocks and %s has no key of them", s.sim.name, sim.Blocks, s.kmeID())
		}
	}
	if d.report.QBER <= d.report.SetQBER {
		return fmt.Errorf("no key, and the QBER of %s is not eve's doing", ratio(d.report.QBER))
	}
	d.view.line("eve intercepts %.0f %% of the pulses: QBER %s, no key was made at either site",
		d.opt.Eve*100, ratio(d.report.QBER))
	d.report.Verdict = "the eavesdropper was seen and got nothing: no key left the link"
	return errStarved
}

// waitLevel waits until both ends of the line stand at the level.
func (d *demo) waitLevel(ctx context.Context, limit time.Duration, level string) error {
	return poll(ctx, limit, func() error {
		for _, s := range []*site{d.a, d.b} {
			l := status(ctx, s.line).Line
			if l == nil {
				return fmt.Errorf("%s does not answer", s.line.name)
			}
			if l.Level != level {
				return fmt.Errorf("%s stands at %s: %s", s.line.name, l.Level, l.Reason)
			}
		}
		return nil
	})
}
