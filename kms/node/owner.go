package node

import (
	"context"
	"errors"
	"log/slog"
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
	// refusalEvery is how often counts of refused calls go to the audit log.
	refusalEvery = time.Minute
	// refusalKinds bounds those counts, whatever strangers call themselves.
	refusalKinds = 1024
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
	wrapped map[kms.SegmentID]kms.Wrapped // data keys of live segments, as far as known
	claims  int                           // keys answered since the last turn

	turnEvery time.Duration

	mu       sync.Mutex // guards the rest
	state    error      // why nothing is served; nil while run runs
	refusals map[refusal]uint64
	alarms   []string
	last     kms.Stats // after the end
}

type refusal struct {
	sae    etsi014.SAEID
	reason string
}

// request is one input, or a question to the machine.
type request struct {
	input  peer.Input
	ticket uint64
	reply  chan<- reply
	ask    func(*peer.Machine)
	asked  chan<- struct{}
}

// reply answers a request: keys still sealed, opened by the caller.
type reply struct {
	keys    []peer.KeyRef
	openers []*keyring.Opener
	err     error
}

var errNotRunning = errors.New("KME is not running")

func newOwner(m *peer.Machine, s kms.Store, fence kms.Fence, ring *keyring.Ring,
	log *slog.Logger) *owner {
	return &owner{
		machine: m, store: s, fence: fence, ring: ring, log: log, began: time.Now(),
		in: make(chan request, batchMost), done: make(chan struct{}),
		replies: map[uint64]chan<- reply{}, openers: map[kms.SegmentID]*keyring.Opener{},
		wrapped: map[kms.SegmentID]kms.Wrapped{}, turnEvery: turnEvery,
		refusals: map[refusal]uint64{}, state: errNotRunning,
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
	o.own = []peer.Input{peer.Boot{}}
	wake := time.NewTimer(0)
	defer wake.Stop()
	refusals := time.NewTicker(refusalEvery)
	defer refusals.Stop()
	turn := time.NewTicker(o.turnEvery)
	defer turn.Stop()
	for first := true; ; first = false {
		if len(o.own) == 0 {
			select {
			case <-ctx.Done():
				return nil
			case req := <-o.in:
				o.accept(req)
			case <-wake.C:
				o.own = append(o.own, peer.Tick{})
			case <-refusals.C:
				o.noteRefusals()
			case <-turn.C:
				o.claims = turnKeys
			}
		}
		if err == nil && o.claims >= turnKeys {
			o.claims = 0
			err = o.turn(ctx)
		}
		if err != nil {
			o.log.Error("KME stops", "err", err)
			return err
		}
		o.drain()
		at, err := o.batch(ctx)
		if err != nil {
			o.log.Error("KME stops", "err", err)
			return err
		}
		wake.Reset(max(0, at-time.Since(o.began)))
		if first {
			o.mu.Lock()
			o.state = nil
			o.mu.Unlock()
		}
	}
}

// drain takes what else waits, so that it shares the commit.
func (o *owner) drain() {
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
	if req.reply != nil {
		o.replies[req.ticket] = req.reply
	}
	o.own = append(o.own, req.input)
}

// batch steps all inputs, commits once, then releases. It returns when the
// machine wants to be woken.
func (o *owner) batch(ctx context.Context) (wake time.Duration, err error) {
	inputs := o.own
	o.own = nil
	var all peer.Output
	now := max(time.Since(o.began), 1)
	for _, in := range inputs {
		out := o.machine.Step(now, in)
		if err := o.wrapKeys(&out, o.ring.Epoch()); err != nil {
			return 0, err
		}
		all.Changes = append(all.Changes, out.Changes...)
		all.Messages = append(all.Messages, out.Messages...)
		all.Answers = append(all.Answers, out.Answers...)
		all.Lookups = append(all.Lookups, out.Lookups...)
		all.Events = append(all.Events, out.Events...)
		all.Wake = out.Wake
	}
	replies, err := o.prepare(ctx, all.Answers)
	if err != nil {
		return 0, err
	}
	if len(all.Changes) > 0 {
		// The commit is not cut short by a caller or a shutdown: half a commit
		// would be a failed write.
		pos, err := o.store.Commit(context.WithoutCancel(ctx), o.fence, all.Changes)
		if err != nil {
			return 0, err
		}
		o.own = append(o.own, peer.Durable{Position: pos})
	}
	o.release(ctx, all, replies)
	return all.Wake, nil
}

// wrapKeys fills in what a step left to the key ring: new ID keys, and the data
// keys of new segments, which are in transit until now.
func (o *owner) wrapKeys(out *peer.Output, epoch uint64) (err error) {
	for i := range out.Changes {
		c := &out.Changes[i]
		switch c.Op {
		case kms.OpLink:
			name := keyring.IDKeyName(c.Segment.Link)
			var w kms.Wrapped
			if w, err = o.ring.Wrap(name, out.IDKeys[c.Segment.Link]); err == nil {
				c.IDKey, err = o.ring.Rewrap(name, w, epoch)
			}
		case kms.OpIngest:
			c.Sealed.Key, err = o.ring.Settle(keyring.Name(c.Segment), c.Sealed.Key)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// turn moves to the next epoch (rule 11): its key is written, then one commit
// names it with every key wrapped under it, then the key before is destroyed.
// It shares its commit with nothing else, so that what it loads is what
// stands.
func (o *owner) turn(ctx context.Context) error {
	if len(o.own) > 0 {
		at := o.own
		o.own = nil
		defer func() { o.own = append(o.own, at...) }()
	}
	next, err := o.ring.Next()
	if err != nil {
		return err
	}
	out := o.machine.Step(max(time.Since(o.began), 1), peer.Turn{Epoch: next})
	if err := o.wrapKeys(&out, next); err != nil {
		return err
	}
	for i := range out.Changes {
		if err := o.sealAnew(ctx, &out.Changes[i], out.Gone, next); err != nil {
			return err
		}
	}
	pos, err := o.store.Commit(context.WithoutCancel(ctx), o.fence, out.Changes)
	if err != nil {
		return err
	}
	if err := o.ring.Finish(next); err != nil {
		return err
	}
	o.own = append(o.own, peer.Durable{Position: pos})
	o.release(ctx, out, nil)
	return nil
}

// sealAnew fills in an OpRewrap or OpReseal.
func (o *owner) sealAnew(ctx context.Context, c *kms.Change, gone map[kms.SegmentID]kms.Bitmap,
	epoch uint64) error {
	if c.Op != kms.OpRewrap && c.Op != kms.OpReseal {
		return nil
	}
	key, known := o.wrapped[c.Segment]
	var sealed kms.Sealed
	var err error
	if c.Op == kms.OpReseal || !known {
		if sealed, _, err = o.store.Load(context.WithoutCancel(ctx), c.Segment); err != nil {
			return err
		}
		key = sealed.Key
	}
	if c.Op == kms.OpRewrap {
		c.Key, err = o.ring.Rewrap(keyring.Name(c.Segment), key, epoch)
		return err
	}
	c.Sealed, err = o.ring.Reseal(c.Segment, sealed, peer.SlotBytes, gone[c.Segment], epoch)
	return err
}

// prepare finds the openers of the answers' keys before the commit, which may
// destroy the segment of the last of them.
func (o *owner) prepare(ctx context.Context, answers []peer.Answer) ([]reply, error) {
	replies := make([]reply, len(answers))
	for i, a := range answers {
		replies[i] = reply{keys: a.Keys, err: a.Err, openers: make([]*keyring.Opener, len(a.Keys))}
		for j, k := range a.Keys {
			op, err := o.opener(ctx, k)
			if err != nil {
				return nil, err
			}
			replies[i].openers[j] = op
		}
	}
	return replies, nil
}

func (o *owner) opener(ctx context.Context, k peer.KeyRef) (*keyring.Opener, error) {
	if op := o.openers[k.Segment]; op != nil {
		return op, nil
	}
	sealed, _, err := o.store.Load(context.WithoutCancel(ctx), k.Segment)
	if err != nil {
		return nil, err
	}
	op, err := o.ring.Opener(k.Segment, sealed, k.SlotBytes)
	if err != nil {
		return nil, err
	}
	o.openers[k.Segment] = op
	return op, nil
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

func (o *owner) report(e peer.Event) {
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

// put hands an input to the machine; it waits while the KME is busy.
func (o *owner) put(ctx context.Context, in peer.Input) {
	select {
	case o.in <- request{input: in}:
	case <-o.done:
	case <-ctx.Done():
	}
}

// call hands an input to the machine and waits for its answer. When ctx ends a
// waiting Draw is canceled; if its keys were claimed before, they are lost.
func (o *owner) call(ctx context.Context, ticket uint64, in peer.Input) (reply, error) {
	c := make(chan reply, 1)
	select {
	case o.in <- request{input: in, ticket: ticket, reply: c}:
	case <-o.done:
		return reply{}, o.down()
	case <-ctx.Done():
		return reply{}, ctx.Err()
	}
	select {
	case r := <-c:
		return r, nil
	case <-ctx.Done():
		if _, ok := in.(peer.Draw); ok {
			o.put(context.WithoutCancel(ctx), peer.Cancel{Ticket: ticket})
		}
		return reply{}, ctx.Err()
	case <-o.done:
	}
	select {
	case r := <-c: // released just before the end
		return r, nil
	default:
		return reply{}, o.down()
	}
}

func (o *owner) health() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.state
}

func (o *owner) down() error {
	return &etsi014.Error{Kind: etsi014.ErrDown, Cause: o.health()}
}

// Draw implements kms.Pool.
func (o *owner) Draw(ctx context.Context, s kms.Shape, n int) ([]etsi014.Key, error) {
	t := o.ticket.Add(1)
	r, err := o.call(ctx, t, peer.Draw{Ticket: t, Initiator: s.Initiator, Targets: s.Targets,
		Number: n, SizeBits: s.SizeBits})
	keys, err := unseal(r, err)
	o.drawn.Add(uint64(len(keys)))
	return keys, err
}

// Fetch implements kms.Pool.
func (o *owner) Fetch(ctx context.Context, initiator, target etsi014.SAEID,
	ids []etsi014.KeyID) ([]etsi014.Key, error) {
	t := o.ticket.Add(1)
	r, err := o.call(ctx, t, peer.Fetch{Ticket: t, Target: target, Initiator: initiator, IDs: ids})
	keys, err := unseal(r, err)
	o.taken.Add(uint64(len(keys)))
	return keys, err
}

// unseal opens the keys of one reply, in the caller's goroutine.
func unseal(r reply, err error) ([]etsi014.Key, error) {
	if err == nil {
		err = r.err
	}
	if err != nil {
		if errors.Is(err, peer.ErrCanceled) || errors.Is(err, context.Canceled) ||
			errors.Is(err, context.DeadlineExceeded) {
			err = &etsi014.Error{Kind: etsi014.ErrDown, Cause: err, RetryAfter: time.Second}
		}
		return nil, err
	}
	c := etsi014.Container{Keys: make([]etsi014.Key, 0, len(r.keys))}
	for i, k := range r.keys {
		bits, err := r.openers[i].Key(k.First, k.Slots, k.SizeBits)
		if err != nil {
			c.Clear()
			return nil, &etsi014.Error{Kind: etsi014.ErrDown, Cause: err}
		}
		c.Keys = append(c.Keys, etsi014.Key{ID: k.ID, Bits: bits})
	}
	return c.Keys, nil
}

// ask puts a question to the machine in its own goroutine.
func (o *owner) ask(ctx context.Context, question func(*peer.Machine)) error {
	asked := make(chan struct{})
	select {
	case o.in <- request{ask: question, asked: asked}:
	case <-o.done:
		return o.down()
	case <-ctx.Done():
		return ctx.Err()
	}
	select {
	case <-asked:
		return nil
	case <-o.done:
		return o.down()
	}
}

// Stock implements kms.Pool.
func (o *owner) Stock(ctx context.Context, s kms.Shape) (stock kms.Stock, err error) {
	if aerr := o.ask(ctx, func(m *peer.Machine) { stock, err = m.Stock(s) }); aerr != nil {
		return kms.Stock{}, aerr
	}
	return stock, err
}

// Refused implements kms.Pool.
func (o *owner) Refused(sae etsi014.SAEID, reason string) {
	o.denied.Add(1)
	o.mu.Lock()
	defer o.mu.Unlock()
	r := refusal{sae, reason}
	if _, ok := o.refusals[r]; !ok && len(o.refusals) >= refusalKinds {
		r.sae = ""
	}
	o.refusals[r]++
}

// noteRefusals puts the counts of a minute into the audit log.
func (o *owner) noteRefusals() {
	o.mu.Lock()
	defer o.mu.Unlock()
	for r, n := range o.refusals {
		o.own = append(o.own, peer.Noted{Change: kms.Change{Op: kms.OpNote, SAE: r.sae,
			Reason: "refused: " + r.reason, Count: n}})
	}
	clear(o.refusals)
	if len(o.own) == 0 {
		o.own = append(o.own, peer.Tick{})
	}
}

func (o *owner) stats() kms.Stats {
	var st kms.Stats
	if err := o.ask(context.Background(), func(m *peer.Machine) { st = m.Stats() }); err != nil {
		o.mu.Lock()
		st = o.last
		o.mu.Unlock()
	}
	st.KeysDrawn, st.KeysFetched, st.Refused = o.drawn.Load(), o.taken.Load(), o.denied.Load()
	o.mu.Lock()
	defer o.mu.Unlock()
	st.Alarms = slices.Clone(o.alarms)
	return st
}
