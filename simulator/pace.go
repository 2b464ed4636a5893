package simulator

import "time"

// tick is how often alice's end sends what the fibre carries.
const tick = 20 * time.Millisecond

// maxLag bounds how much time one window makes up for. A machine that cannot
// keep up loses pulses instead of queueing them.
const maxLag = 100 * time.Millisecond

// maxWindowPulses is about how many pulses a window may carry: a tenth of
// maxFrame's bytes, so that no fluctuation reaches it.
const maxWindowPulses = 1 << 18

// pacer turns time into slots at the clock rate.
type pacer struct {
	hz    float64
	limit float64 // slots a window
	last  time.Time
	rest  float64 // fraction of a slot that is due
}

// newPacer paces a clock of hz of which a slot carries pulses with
// probability gain.
func newPacer(hz, gain float64) *pacer {
	limit := hz * maxLag.Seconds()
	if gain > 0 {
		limit = min(limit, maxWindowPulses/gain)
	}
	return &pacer{hz: hz, limit: limit + 1} // one for the fraction left over
}

// due returns the slots that passed since the last call, at most the limit;
// what is above it is lost.
func (p *pacer) due(now time.Time) uint64 {
	if p.last.IsZero() {
		p.last = now
		return 0
	}
	slots := p.rest + p.hz*max(now.Sub(p.last).Seconds(), 0)
	p.last = now
	if slots > p.limit {
		slots = p.limit
	}
	n := uint64(slots)
	p.rest = slots - float64(n)
	return n
}

// idle says that no pulses are sent up to now.
func (p *pacer) idle(now time.Time) { p.last, p.rest = now, 0 }
