package simulator

import (
	"context"
	"errors"
	"math"
	"sync"
	"time"

	"github.com/quietline/quietline/hw"
	"github.com/quietline/quietline/hw/distill"
	"github.com/quietline/quietline/simulator/optics"
)

// Stats is a snapshot of an end, for metrics and status.
type Stats struct {
	Role       distill.Role
	Status     hw.Status // as it would be reported now
	Generation uint64    // of the present or last session
	Sessions   uint64    // begun since New
	Eve        float64   // alice: fraction of pulses intercepted
	// SetQBER is the error ratio that the link's settings lead to, eve left
	// out.
	SetQBER float64
	Slots   uint64 // alice: pulses sent since New
	Pulses  uint64 // alice: of these, pulses of which a photon arrived
	// Clicks of bob's receiver in the present generation.
	Clicks optics.Clicks
	// Session is the present session's, zero between two save for AuthLeft,
	// which is -1 before the first. Total adds up all sessions since New.
	Session                 distill.Stats
	Total                   Totals
	SpoolBlocks, SpoolBytes int // finished and not yet fetched
}

// Totals of an end since New.
type Totals struct {
	SiftedBits, SecretBits, LeakBits uint64
	Blocks, Aborted                  uint64
	AuthUsed, AuthAdded              uint64 // bits of authentication key
}

func (t Totals) add(s distill.Stats) Totals {
	return Totals{
		SiftedBits: t.SiftedBits + s.SiftedBits,
		SecretBits: t.SecretBits + s.SecretBits,
		LeakBits:   t.LeakBits + s.LeakBits,
		Blocks:     t.Blocks + s.Blocks,
		Aborted:    t.Aborted + s.Aborted,
		AuthUsed:   t.AuthUsed + s.AuthUsed,
		AuthAdded:  t.AuthAdded + s.AuthAdded,
	}
}

// Stats returns a snapshot.
func (e *End) Stats() Stats {
	status := e.Status()
	e.mu.Lock()
	s := e.stats
	s.Total = s.Total.add(s.Session)
	e.mu.Unlock()
	s.Status = status
	s.Eve = math.Float64frombits(e.eve.Load())
	s.SetQBER = e.cfg.Preset.Link.Expect(0).Error
	s.SpoolBlocks, s.SpoolBytes = e.spool.size()
	return s
}

// Status is the end's state now, as Events reports it each second.
func (e *End) Status() hw.Status {
	reason := e.reason()
	e.mu.Lock()
	defer e.mu.Unlock()
	st := hw.Status{Reason: reason, QBER: math.NaN(), AuthBits: e.stats.Session.AuthLeft,
		Simulated: true}
	last := e.stats.Session.Last
	switch {
	case last.Key.M[0]+last.Key.M[1] > 0:
		st.QBER = last.Key.QBER()
	case last.Test.N[0]+last.Test.N[1] > 0: // stopped before the key basis was compared
		st.QBER = last.Test.QBER()
	}
	if st.Reason == "" && last.Outcome != "" && last.Outcome != outcomeSecret {
		st.Reason = last.Outcome
	}
	st.Up = st.Reason == ""
	st.SiftedBPS, st.SecretBPS = e.rates.now()
	return st
}

// outcomeSecret is distill.Report.Outcome of a block that gave key.
const outcomeSecret = "secret"

// reason says what keeps this end from distilling; "" is nothing.
func (e *End) reason() string {
	s := e.session.Load()
	switch {
	case e.spool.full():
		return "block spool is full"
	case e.fibre.reason() != "":
		return e.fibre.reason()
	case s == nil || s.generation.Load() == 0:
		return e.stopped()
	case e.cfg.Role == distill.Alice && e.fibre.peerFull.Load():
		return "peer's block spool is full"
	case e.cfg.Role == distill.Bob && e.fibre.idle.Load():
		return "peer sends no pulses"
	}
	return ""
}

// stopped says why there is no session.
func (e *End) stopped() string {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.lastEnd != "" {
		return e.lastEnd
	}
	return "classical channel is down"
}

// stop notes why a session ended, where that is more than a lost connection.
func (e *End) stop(err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.lastEnd = ""
	for _, known := range []error{distill.ErrAuthentication, distill.ErrAuthEmpty,
		distill.ErrRolledBack, distill.ErrMismatch, distill.ErrStalled, distill.ErrProtocol,
		ErrGeneration, ErrSlot, ErrBacklog} {
		if errors.Is(err, known) {
			e.lastEnd = known.Error()
		}
	}
}

// beginSession and endSession bracket the steps of one machine.
func (e *End) beginSession() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.stats.Sessions++
}

func (e *End) endSession() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.stats.Total = e.stats.Total.add(e.stats.Session)
	e.stats.Session = distill.Stats{AuthLeft: e.stats.Session.AuthLeft}
}

func (e *End) publish(s distill.Stats) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.stats.Session = s
	if s.Generation != 0 {
		e.stats.Generation = s.Generation
	}
}

func (e *End) countSent(slots uint64, pulses int) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.stats.Slots += slots
	e.stats.Pulses += uint64(pulses)
}

func (e *End) countClicks(c optics.Clicks) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.stats.Clicks = c
}

// alarm reports and logs an alarm.
func (e *End) alarm(a hw.Event) {
	if a.At.IsZero() {
		a.At = e.cfg.Now()
	}
	e.cfg.Log.Warn("alarm", "reason", a.Alarm, "err", a.Detail)
	e.events.alarm(a)
}

// runReports makes a status report each second until ctx ends.
func (e *End) runReports(ctx context.Context) {
	ticker := time.NewTicker(time.Second)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		e.mu.Lock()
		t := e.stats.Total.add(e.stats.Session)
		e.rates.add(sample{e.cfg.Now(), t.SiftedBits, t.SecretBits})
		e.mu.Unlock()
		st := e.Status()
		e.events.report(hw.Event{At: e.cfg.Now(), Status: &st})
	}
}

// rateSamples spans the last seconds over which rates are told: a few blocks
// of the demo's preset.
const rateSamples = 11

// rates turns totals, sampled each second, into rates.
type rates struct{ samples []sample }

type sample struct {
	at             time.Time
	sifted, secret uint64
}

func (r *rates) add(s sample) {
	r.samples = append(r.samples, s)
	if len(r.samples) > rateSamples {
		r.samples = r.samples[1:]
	}
}

// now returns sifted and secret bits per second.
func (r *rates) now() (sifted, secret float64) {
	if len(r.samples) < 2 {
		return 0, 0
	}
	a, b := r.samples[0], r.samples[len(r.samples)-1]
	d := b.at.Sub(a.at).Seconds()
	if d <= 0 {
		return 0, 0
	}
	return float64(b.sifted-a.sifted) / d, float64(b.secret-a.secret) / d
}

// maxAlarms bounds the alarms that wait for a reader.
const maxAlarms = 64

// events holds the alarms nobody has read and the newest report. Safe for
// concurrent use.
type events struct {
	mu     sync.Mutex
	alarms []hw.Event
	status *hw.Event
	more   chan struct{} // closed and renewed at each new event
}

func newEvents() *events { return &events{more: make(chan struct{})} }

func (q *events) alarm(a hw.Event) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.alarms) == maxAlarms {
		q.alarms = q.alarms[1:]
	}
	q.alarms = append(q.alarms, a)
	q.wake()
}

func (q *events) report(e hw.Event) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.status = &e
	q.wake()
}

func (q *events) wake() {
	close(q.more)
	q.more = make(chan struct{})
}

// next waits for an event; alarms come first.
func (q *events) next(ctx context.Context) (hw.Event, error) {
	for {
		q.mu.Lock()
		more := q.more
		if len(q.alarms) > 0 {
			a := q.alarms[0]
			q.alarms = q.alarms[1:]
			q.mu.Unlock()
			return a, nil
		}
		if q.status != nil {
			s := *q.status
			q.status = nil
			q.mu.Unlock()
			return s, nil
		}
		q.mu.Unlock()
		select {
		case <-more:
		case <-ctx.Done():
			return hw.Event{}, ctx.Err()
		}
	}
}
