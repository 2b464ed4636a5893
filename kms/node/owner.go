package node

import (
	"context"
	"log/slog"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/kms"
	"github.com/quietline/quietline/kms/keyring"
	"github.com/quietline/quietline/kms/peer"
)

const (
	// batchMost bounds the inputs that share one commit, so that the first of
	// them does not wait for ever.
	batchMost = 512
	// remarkEvery is how often counts of refused calls and of keys given again
	// go to the audit log.
	remarkEvery = time.Minute
	// remarkKinds bounds those counts, whatever strangers call themselves.
	remarkKinds = 1024
	// turnEvery is how often the epoch turns unless configured (rule 11), and
	// turnKeys the deliveries after which it turns sooner.
	turnEvery  = time.Minute
	turnKeys   = 1 << 16
	alarmsMost = 32
)

// owner is the goroutine that owns machine and store: it steps a batch of
// inputs, makes all their changes durable in one commit, and only then lets
// messages and answers go. It implements kms.Pool.
type owner struct {
	machine *peer.Machine
	store   kms.Store
	fence   kms.Fence
	ring    *keyring.Ring
	log     *slog.Logger
	send    func(peer.Message)
	began   time.Time

	in     chan request
	done   chan struct{} // closed when run has ended
	ticket atomic.Uint64
	drawn  atomic.Uint64
	taken  atomic.Uint64
	denied atomic.Uint64

	// Owned by run.
	replies map[uint64]chan<- reply
	openers map[kms.SegmentID]*keyring.Opener
	own     []peer.Input                  // for the next batch
	spare   []peer.Input                  // empty, takes the place of own
	answers []reply                       // of the batch before: its memory
	wrapped map[kms.SegmentID]kms.Wrapped // data keys of live segments, as far as known
	claims  int                           // keys answered since the last turn

	turns    int               // tried, whole or missed
	settling []chan<- struct{} // to be closed after the next commit

	turnEvery time.Duration
	turned    time.Time // when the last turn was whole
	overdue   bool      // the alarm about missed turns was raised

	mu       sync.Mutex // guards the rest
	state    error      // why nothing is served; nil while run runs
	unerased error      // why nothing is delivered though it runs; see missed
	remarks  map[remark]uint64
	alarms   []string
	last     kms.Stats // after the end
}

type remark struct {
	sae    etsi014.SAEID
	reason string
}

func newOwner(m *peer.Machine, s kms.Store, fence kms.Fence, ring *keyring.Ring,
	log *slog.Logger) *owner {
	return &owner{
		machine: m, store: s, fence: fence, ring: ring, log: log, began: time.Now(),
		in: make(chan request, batchMost), done: make(chan struct{}),
		replies: map[uint64]chan<- reply{}, openers: map[kms.SegmentID]*keyring.Opener{},
		wrapped: map[kms.SegmentID]kms.Wrapped{}, turnEvery: turnEvery, turned: time.Now(),
		remarks: map[remark]uint64{}, state: errNotRunning,
	}
}

// run owns the machine until ctx ends or a commit fails.
func (o *owner) run(ctx context.Context) (err error) {
	defer func() {
		o.mu.Lock()
		o.last = o.machine.Stats()
		if o.state = errNotRunning; err != nil {
			o.state = err
		}
		o.mu.Unlock()
		close(o.done)
	}()
	// A commit is not cut short by a shutdown: half a commit would be a failed
	// write.
	work := context.WithoutCancel(ctx)
	o.own = []peer.Input{peer.Boot{}}
	c := clocks{time.NewTimer(0), time.NewTicker(remarkEvery), time.NewTicker(o.turnEvery)}
	defer c.stop()
	for first, ended := true, false; !ended; first = false {
		if ended = o.next(ctx, &c); ended {
			o.noteRemarks()
		}
		if err == nil && o.claims >= turnKeys {
			o.claims = 0
			err = o.turn(work)
		}
		if err != nil {
			o.log.Error("KME stops", "err", err)
			return err
		}
		o.drain()
		at, err := o.batch(work)
		if err != nil {
			o.log.Error("KME stops", "err", err)
			return err
		}
		c.wake.Reset(max(0, at-time.Since(o.began)))
		if first {
			o.mu.Lock()
			o.state = nil
			o.mu.Unlock()
		}
	}
	return nil
}

// clocks are what the owner does by time.
type clocks struct {
	wake          *time.Timer // the machine's next
	remarks, turn *time.Ticker
}

func (c *clocks) stop() {
	c.wake.Stop()
	c.remarks.Stop()
	c.turn.Stop()
}

// next waits for something to do, and looks what time it is also when there is
// always something to do. It tells that ctx has ended.
func (o *owner) next(ctx context.Context, c *clocks) (ended bool) {
	busy := closed
	if len(o.own) == 0 {
		busy = nil
	}
	select {
	case <-ctx.Done():
		return true
	case <-c.wake.C:
		o.own = append(o.own, peer.Tick{})
	case <-c.remarks.C:
		o.noteRemarks()
	case <-c.turn.C:
		o.claims = turnKeys
	case req := <-o.in:
		o.accept(req)
	case <-busy:
	}
	return false
}

// closed never keeps anybody waiting.
var closed = func() chan struct{} { c := make(chan struct{}); close(c); return c }()

// drain takes what else waits, so that it shares the commit.
func (o *owner) drain() {
	runtime.Gosched() // whoever is about to ask comes along
	for len(o.own) < batchMost {
		select {
		case req := <-o.in:
			o.accept(req)
		default:
			return
		}
	}
}

func (o *owner) accept(req request) {
	if req.ask != nil {
		req.ask(o.machine)
		close(req.asked)
		return
	}
	if req.asked != nil {
		o.settling = append(o.settling, req.asked)
		return
	}
	if req.reply != nil {
		o.replies[req.ticket] = req.reply
	}
	o.own = append(o.own, req.input)
}

// batch steps all inputs, commits once, then releases. It returns when the
// machine wants to be woken.
func (o *owner) batch(ctx context.Context) (wake time.Duration, err error) {
	inputs := o.own
	o.own = o.spare
	now := max(time.Since(o.began), 1)
	all := o.machine.Step(now, inputs...)
	if err := o.wrapKeys(&all, o.ring.Epoch()); err != nil {
		return 0, err
	}
	for fill := all.Fill; len(fill) > 0; {
		filled, err := o.fill(fill)
		if err != nil {
			return 0, err
		}
		out := o.machine.Step(now, filled...)
		if err := o.wrapKeys(&out, o.ring.Epoch()); err != nil {
			return 0, err
		}
		join(&all, &out) // into the commit of the draws that wait for them
		fill = out.Fill
	}
	replies, err := o.prepare(ctx, all.Answers)
	if err != nil {
		return 0, err
	}
	if len(all.Changes) > 0 {
		pos, err := o.store.Commit(ctx, o.fence, all.Changes)
		if err != nil {
			return 0, err
		}
		o.own = append(o.own, peer.Durable{Position: pos})
	}
	o.release(ctx, all, replies)
	clear(replies) // their keys are the callers'
	clear(inputs)
	o.spare = inputs[:0]
	for _, c := range o.settling {
		close(c)
	}
	o.settling = nil
	return all.Wake, nil
}

// join adds what another step wants to a commit.
func join(all, out *peer.Output) {
	all.Changes = append(all.Changes, out.Changes...)
	all.Messages = append(all.Messages, out.Messages...)
	all.Answers = append(all.Answers, out.Answers...)
	all.Lookups = append(all.Lookups, out.Lookups...)
	all.Events = append(all.Events, out.Events...)
	all.Wake = out.Wake
}

// release lets go what had to wait for the commit.
func (o *owner) release(ctx context.Context, out peer.Output, replies []reply) {
	for i, a := range out.Answers {
		if c := o.replies[a.Ticket]; c != nil {
			delete(o.replies, a.Ticket)
			c <- replies[i] // has room for one
			o.claims += len(a.Keys)
		}
	}
	for _, m := range out.Messages {
		o.send(m)
	}
	for i := range out.Changes {
		switch c := &out.Changes[i]; c.Op {
		case kms.OpClose, kms.OpVoid:
			delete(o.openers, c.Segment)
			delete(o.wrapped, c.Segment)
		case kms.OpIngest:
			o.wrapped[c.Segment] = c.Sealed.Key
		case kms.OpRewrap:
			o.wrapped[c.Segment] = c.Key
		case kms.OpReseal:
			o.wrapped[c.Segment] = c.Sealed.Key
			delete(o.openers, c.Segment)
		}
	}
	for _, e := range out.Events {
		o.report(e)
	}
	for _, l := range out.Lookups {
		o.own = append(o.own, o.look(ctx, l))
	}
}

// look reads the log's hash at a length.
func (o *owner) look(ctx context.Context, l peer.Lookup) peer.Input {
	in := peer.Looked{Peer: l.Peer, Length: l.Length}
	for rec, err := range o.store.Scan(ctx, l.Length-1) {
		if err != nil {
			o.log.Error("audit log cannot be read", "err", err)
			break
		}
		in.Hash, in.Found = rec.Position.Hash, rec.Position.Length == l.Length
		break
	}
	return in
}

// report logs an event and keeps it if it is an alarm, with what to do about
// it. It may be called from any goroutine.
func (o *owner) report(e peer.Event) {
	if a := advise(e); a != "" && e.Reason != "" {
		e.Reason += "; " + a
	} else if a != "" {
		e.Reason = a
	}
	attrs := []any{}
	add := func(key, value string) {
		if value != "" {
			attrs = append(attrs, key, value)
		}
	}
	add("peer_kme", string(e.Peer))
	add("link", string(e.Link))
	if e.Segment != (kms.SegmentID{}) {
		add("segment", e.Segment.String())
	}
	add("reason", e.Reason)
	if !e.Alarm {
		o.log.Info(e.Text, attrs...)
		return
	}
	o.log.Warn(e.Text, attrs...)
	text := e.Text
	for _, s := range []string{string(e.Peer), string(e.Link), e.Reason} {
		if s != "" {
			text += ": " + s
		}
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.alarms = append(o.alarms, text); len(o.alarms) > alarmsMost {
		o.alarms = slices.Delete(o.alarms, 0, len(o.alarms)-alarmsMost)
	}
}
