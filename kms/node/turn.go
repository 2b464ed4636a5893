package node

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/kms"
	"github.com/quietline/quietline/kms/keyring"
	"github.com/quietline/quietline/kms/peer"
)

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
// stands. A turn that the epoch file does not let happen is missed, and tried
// again; an error stops the KME.
func (o *owner) turn(ctx context.Context) error {
	if len(o.own) > 0 {
		at := o.own
		o.own = nil
		defer func() { o.own = append(o.own, at...) }()
	}
	next, err := o.ring.Next()
	if err != nil {
		o.missed(err)
		return nil
	}
	out := o.machine.Step(max(time.Since(o.began), 1), peer.Turn{Epoch: next})
	if err := o.wrapKeys(&out, next); err != nil {
		return err
	}
	if err := o.sealAll(ctx, &out, next); err != nil {
		return err
	}
	replies, err := o.prepare(ctx, out.Answers) // of calls that time has ended
	if err != nil {
		return err
	}
	pos, err := o.store.Commit(ctx, o.fence, out.Changes)
	if err != nil {
		return err
	}
	crossed := o.ring.Crossed()
	if err := o.ring.Finish(next); err != nil {
		o.missed(err)
	} else {
		o.erased(crossed)
	}
	o.own = append(o.own, peer.Durable{Position: pos})
	o.release(ctx, out, replies)
	return nil
}

// sealAll fills in what a Turn left open. A segment that cannot be read is
// given up in the same commit, for a turn leaves nothing in the epoch before.
func (o *owner) sealAll(ctx context.Context, out *peer.Output, epoch uint64) error {
	changes := make([]kms.Change, 0, len(out.Changes))
	var spoiled []kms.SegmentID
	for i := range out.Changes {
		c := &out.Changes[i]
		if err := o.sealAnew(ctx, c, out.Gone, epoch); unreadable(err) {
			o.log.Error("segment cannot be sealed anew", "segment", c.Segment, "err", err)
			spoiled = append(spoiled, c.Segment)
			continue
		} else if err != nil {
			return err
		}
		changes = append(changes, *c)
	}
	for _, id := range spoiled {
		void := o.machine.Step(max(time.Since(o.began), 1), peer.Spoiled{Segment: id})
		changes = append(changes, void.Changes...)
		out.Messages = append(out.Messages, void.Messages...)
		out.Answers = append(out.Answers, void.Answers...)
		out.Lookups = append(out.Lookups, void.Lookups...)
		out.Events = append(out.Events, void.Events...)
	}
	if len(spoiled) > 0 { // the store checks at the turn that nothing is left behind
		turns := slices.IndexFunc(changes, func(c kms.Change) bool { return c.Op == kms.OpTurn })
		changes = append(slices.Delete(changes, turns, turns+1),
			kms.Change{Op: kms.OpTurn, Epoch: epoch})
	}
	out.Changes = changes
	return nil
}

// unreadable tells whether a segment's stored bytes are at fault, and not the
// store as a whole.
func unreadable(err error) bool {
	return errors.Is(err, kms.ErrCorrupt) || errors.Is(err, kms.ErrNoSegment)
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
		if sealed, _, err = o.store.Load(ctx, c.Segment); err != nil {
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
// destroy the segment of the last of them. Keys that cannot be read are claimed
// and lost: the caller is told, and their segment is given up next.
func (o *owner) prepare(ctx context.Context, answers []peer.Answer) ([]reply, error) {
	keys := 0
	for i := range answers {
		keys += len(answers[i].Keys)
	}
	openers := make([]*keyring.Opener, keys) // of all callers, each has its part
	replies := o.answers[:0]
	for i := range answers {
		a := &answers[i]
		n := len(a.Keys)
		replies = append(replies, reply{keys: a.Keys, err: a.Err, openers: openers[:n:n]})
		openers = openers[n:]
		for j, k := range a.Keys {
			op, err := o.opener(ctx, k)
			if unreadable(err) {
				o.log.Error("key cannot be read", "segment", k.Segment, "err", err)
				o.own = append(o.own, peer.Spoiled{Segment: k.Segment})
				replies[i] = reply{err: lost(err)}
				break
			} else if err != nil {
				return nil, err
			}
			replies[i].openers[j] = op
		}
	}
	o.answers = replies
	return replies, nil
}

// lost answers a caller whose keys cannot be read. It may ask for others.
func lost(err error) error {
	return &etsi014.Error{Kind: etsi014.ErrDown, Cause: err, RetryAfter: time.Second}
}

func (o *owner) opener(ctx context.Context, k peer.KeyRef) (*keyring.Opener, error) {
	if op := o.openers[k.Segment]; op != nil {
		return op, nil
	}
	sealed, _, err := o.store.Load(ctx, k.Segment)
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
