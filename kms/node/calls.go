package node

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/kms"
	"github.com/quietline/quietline/kms/keyring"
	"github.com/quietline/quietline/kms/peer"
	"github.com/quietline/quietline/secret"
)

// request is one input, or a question to the machine.
type request struct {
	input  peer.Input
	ticket uint64
	reply  chan<- reply
	ask    func(*peer.Machine)
	asked  chan<- struct{} // closed after ask; without ask, after the commit with what came before
}

// reply answers a request: keys still sealed, opened by the caller.
type reply struct {
	keys    []peer.KeyRef
	openers []*keyring.Opener
	err     error
}

// replyChannels are of callers that were answered. One who left before takes
// the channel along: the answer may still come.
var replyChannels = sync.Pool{New: func() any { return make(chan reply, 1) }}

var errNotRunning = errors.New("KME is not running")

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
	c := replyChannels.Get().(chan reply)
	select {
	case o.in <- request{input: in, ticket: ticket, reply: c}:
	case <-o.done:
		return reply{}, o.down()
	case <-ctx.Done():
		return reply{}, ctx.Err()
	}
	select {
	case r := <-c:
		replyChannels.Put(c) // empty, and nobody knows it any more
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
	if o.state == nil {
		return o.unerased
	}
	return o.state
}

func (o *owner) down() error {
	return &etsi014.Error{Kind: etsi014.ErrDown, Cause: o.health()}
}

// Draw implements kms.Pool.
func (o *owner) Draw(ctx context.Context, s kms.Shape, n int) ([]etsi014.Key, error) {
	if err := o.mayDeliver(); err != nil {
		return nil, err
	}
	t := o.ticket.Add(1)
	r, err := o.call(ctx, t, peer.Draw{Ticket: t, Initiator: s.Initiator, Targets: s.Targets,
		Number: n, SizeBits: s.SizeBits})
	keys, err := o.unseal(r, err)
	o.drawn.Add(uint64(len(keys)))
	return keys, err
}

// Fetch implements kms.Pool.
func (o *owner) Fetch(ctx context.Context, initiator, target etsi014.SAEID,
	ids []etsi014.KeyID) ([]etsi014.Key, error) {
	if err := o.mayDeliver(); err != nil {
		return nil, err
	}
	t := o.ticket.Add(1)
	r, err := o.call(ctx, t, peer.Fetch{Ticket: t, Target: target, Initiator: initiator, IDs: ids})
	keys, err := o.unseal(r, err)
	o.taken.Add(uint64(len(keys)))
	return keys, err
}

// unseal opens the keys of one reply, in the caller's goroutine. A segment
// whose slots do not open is given up.
func (o *owner) unseal(r reply, err error) ([]etsi014.Key, error) {
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
	var open *keyring.Opened
	defer func() { open.Close() }()
	for i, k := range r.keys {
		if i == 0 || r.openers[i] != r.openers[i-1] {
			open.Close()
			open, err = r.openers[i].Open()
		}
		var bits secret.Bytes
		if err == nil {
			bits, err = open.Key(k.First, k.Slots, k.SizeBits)
		}
		if err != nil {
			c.Clear()
			o.put(context.Background(), peer.Spoiled{Segment: k.Segment})
			return nil, lost(err)
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

// settle waits until what was put before is durable.
func (o *owner) settle(ctx context.Context) error {
	settled := make(chan struct{})
	select {
	case o.in <- request{asked: settled}:
	case <-o.done:
		return o.down()
	case <-ctx.Done():
		return ctx.Err()
	}
	select {
	case <-settled:
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
	o.count(sae, "refused: "+reason, 1)
}

// Reread implements kms.Pool.
func (o *owner) Reread(sae etsi014.SAEID, keys int) {
	o.count(sae, kms.NoteReread, uint64(keys))
}

// count adds to what the audit log will tell of a caller, as counts of a minute.
func (o *owner) count(sae etsi014.SAEID, reason string, n uint64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	r := remark{sae, reason}
	if _, ok := o.remarks[r]; !ok && len(o.remarks) >= remarkKinds {
		r.sae = ""
	}
	o.remarks[r] += n
}

// noteRemarks puts the counts of a minute into the audit log.
func (o *owner) noteRemarks() {
	o.mu.Lock()
	defer o.mu.Unlock()
	for r, n := range o.remarks {
		o.own = append(o.own, peer.Noted{Change: kms.Change{Op: kms.OpNote, SAE: r.sae,
			Reason: r.reason, Count: n}})
	}
	clear(o.remarks)
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
