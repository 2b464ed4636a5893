package demo

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"strings"
	"sync"
	"time"
)

// sample is the state of both sites at one moment.
type sample struct {
	Event     string  `json:"event"` // "sample"
	Seconds   float64 `json:"t"`
	Stage     string  `json:"stage"`
	SiftedBPS float64 `json:"sifted_bit_per_s"`
	QBER      float64 `json:"qber"` // -1 = not known yet
	SecretBPS float64 `json:"secret_bit_per_s"`
	Stored    [2]int  `json:"keys_stored"` // drawable at tokyo and at kochi
	Delivered [2]int  `json:"keys_delivered"`
	Epoch     uint64  `json:"epoch"`
	EpochAge  float64 `json:"epoch_age_s"`
	Level     string  `json:"level"`
	Reason    string  `json:"reason,omitempty"`
	Mbps      float64 `json:"mbit_per_s"` // inner bits through the line, both directions
	Dropped   uint64  `json:"packets_dropped"`
}

// view prints a run: one screen redrawn on a terminal, plain lines elsewhere,
// JSON objects if asked. Safe for concurrent use.
type view struct {
	opt   Options
	begun time.Time

	mu     sync.Mutex // guards all below
	name   string     // of the present stage
	last   sample
	drawn  int // lines of the redrawn block, terminal only
	cancel context.CancelFunc
	done   chan struct{} // closed when the watcher ended
}

func newView(opt Options, begun time.Time) *view {
	if opt.Out == nil {
		opt.Out = io.Discard
	}
	return &view{opt: opt, begun: begun}
}

// watch polls both sites every half second until close.
func (v *view) watch(ctx context.Context, a, b *site) {
	ctx, v.cancel = context.WithCancel(ctx)
	v.done = make(chan struct{})
	go func() {
		defer close(v.done)
		tick := time.NewTicker(500 * time.Millisecond)
		defer tick.Stop()
		w := watcher{a: a, b: b}
		for n := 0; ; n++ {
			v.show(w.sample(ctx), n)
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
		}
	}()
}

// close ends the watcher; the view still prints lines after it.
func (v *view) close() {
	if v.cancel == nil {
		return
	}
	v.cancel()
	<-v.done
	v.cancel = nil
}

// stage announces the next one.
func (v *view) stage(name, title string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.name = name
	if v.opt.JSON {
		v.object(map[string]any{"event": "stage", "t": v.seconds(), "stage": name, "title": title})
		return
	}
	v.text(fmt.Sprintf("\n%5.1f s  %s", v.seconds(), strings.ToUpper(title)))
}

// line prints one fact.
func (v *view) line(format string, args ...any) {
	v.mu.Lock()
	defer v.mu.Unlock()
	text := fmt.Sprintf(format, args...)
	if v.opt.JSON {
		v.object(map[string]any{"event": "note", "t": v.seconds(), "stage": v.name, "text": text})
		return
	}
	v.text("         " + text)
}

// show prints a sample: every one on a terminal, one in four elsewhere.
func (v *view) show(s sample, n int) {
	v.mu.Lock()
	defer v.mu.Unlock()
	s.Event, s.Seconds, s.Stage = "sample", v.seconds(), v.name
	v.last = s
	switch {
	case v.opt.JSON:
		v.object(s)
	case v.opt.Terminal:
		v.redraw()
	case n%4 == 0:
		v.text("         " + s.oneLine())
	}
}

// latest returns the newest sample.
func (v *view) latest() sample {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.last
}

func (v *view) seconds() float64 {
	return math.Round(time.Since(v.begun).Seconds()*10) / 10
}

func (v *view) object(o any) {
	b, err := json.Marshal(o)
	if err != nil {
		b = fmt.Appendf(nil, `{"event":"error","text":%q}`, err.Error())
	}
	_, _ = fmt.Fprintf(v.opt.Out, "%s\n", b)
}

// text prints above the redrawn block.
func (v *view) text(s string) {
	v.erase()
	_, _ = fmt.Fprintln(v.opt.Out, s)
	if v.opt.Terminal && v.cancel != nil {
		v.redraw()
	}
}

func (v *view) erase() {
	if v.drawn > 0 {
		_, _ = fmt.Fprintf(v.opt.Out, "\x1b[%dA\x1b[J", v.drawn)
		v.drawn = 0
	}
}

// redraw paints the block of numbers at the foot of the screen.
func (v *view) redraw() {
	v.erase()
	lines := v.last.block()
	_, _ = fmt.Fprintln(v.opt.Out, strings.Join(lines, "\n"))
	v.drawn = len(lines)
}

func (s sample) oneLine() string {
	return fmt.Sprintf("sifted %s  QBER %s  secret %s  stored %d/%d  delivered %d/%d  epoch %s  line %s",
		rate(s.SiftedBPS), ratio(s.QBER), rate(s.SecretBPS), s.Stored[0], s.Stored[1],
		s.Delivered[0], s.Delivered[1], s.epoch(), rate(s.Mbps*1e6))
}

func (s sample) epoch() string {
	switch {
	case s.Level == "":
		return "–"
	case s.Epoch == 0:
		return s.Level
	}
	return fmt.Sprintf("%d %s %.1f s", s.Epoch, s.Level, s.EpochAge)
}

// block is the screen: what the link makes, what the sites hold, what the
// line does.
func (s sample) block() []string {
	status := s.epoch()
	if s.Reason != "" && s.Level == "BLOCKED" {
		status += ": " + s.Reason
	}
	return []string{
		"  ┌───────────────────────────────────────────── simulated photons ──",
		fmt.Sprintf("  │ link   sifted %-14s QBER %-9s secret %s", rate(s.SiftedBPS), ratio(s.QBER), rate(s.SecretBPS)),
		fmt.Sprintf("  │ keys   tokyo stored %-7d delivered %-7d", s.Stored[0], s.Delivered[0]),
		fmt.Sprintf("  │        kochi stored %-7d delivered %-7d", s.Stored[1], s.Delivered[1]),
		fmt.Sprintf("  │ line   epoch %s", status),
		fmt.Sprintf("  │        %s through, %d packets dropped", rate(s.Mbps*1e6), s.Dropped),
		"  └──────────────────────────────────────────────────────────────────",
	}
}

// rate prints bits per second.
func rate(bps float64) string {
	switch {
	case bps >= 1e9:
		return fmt.Sprintf("%.2f Gbit/s", bps/1e9)
	case bps >= 1e6:
		return fmt.Sprintf("%.1f Mbit/s", bps/1e6)
	case bps >= 1e3:
		return fmt.Sprintf("%.1f kbit/s", bps/1e3)
	}
	return fmt.Sprintf("%.0f bit/s", bps)
}

func ratio(q float64) string {
	if q < 0 || math.IsNaN(q) {
		return "–"
	}
	return fmt.Sprintf("%.2f %%", q*100)
}

// summary prints the report.
func (v *view) summary(r *Report) {
	v.close()
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.opt.JSON {
		v.object(struct {
			Event string `json:"event"`
			*Report
		}{"summary", r})
		return
	}
	v.erase()
	_, _ = fmt.Fprintf(v.opt.Out, "\nSUMMARY  %s\n", r.Verdict)
	for _, l := range r.lines() {
		_, _ = fmt.Fprintln(v.opt.Out, "  "+l)
	}
}

func (r *Report) lines() []string {
	l := []string{
		fmt.Sprintf("link      QBER %s (set %s), sifted %s, secret %s; simulated, no photon was sent",
			ratio(r.QBER), ratio(r.SetQBER), rate(r.SiftedBPS), rate(r.SecretBPS)),
		fmt.Sprintf("auth      %d pre-shared or recycled bits spent on authenticating the classical channel", r.AuthBitsUsed),
	}
	if r.FirstKeySeconds == 0 {
		return l
	}
	l = append(l, fmt.Sprintf("keys      first after %.1f s; delivered %d at tokyo, %d at kochi, each once",
		r.FirstKeySeconds, r.Delivered[0], r.Delivered[1]))
	if r.File.Bytes == 0 {
		return l
	}
	return append(l,
		fmt.Sprintf("file      %d MiB, %.0f Mbit/s, SHA-256 equal", r.File.Bytes>>20, r.File.Mbps),
		fmt.Sprintf("latency   p50 %.2f ms, p99 %.2f ms", r.Latency.P50Ms, r.Latency.P99Ms),
		fmt.Sprintf("UDP       %d of %d lost over the rekeyings, %d epochs in all", r.UDP.Lost(), r.UDP.Sent, r.Rekeys),
		fmt.Sprintf("capture   %d pieces of the file found in %d packets outside, %d in %d packets inside",
			r.Capture.Outer.Found, r.Capture.Outer.Packets, r.Capture.Inner.Found, r.Capture.Inner.Packets),
		fmt.Sprintf("cut       %d keys drawn by the second application, line blocked after %.1f s: %s",
			r.Cut.Drawn, r.Cut.BlockedSeconds, r.Cut.Reason),
		fmt.Sprintf("restore   line up again %.1f s after the fibre was mended", r.Restore),
		fmt.Sprintf("time      %.1f s", r.Seconds))
}
