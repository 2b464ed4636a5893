package node

import (
	"context"
	"fmt"
	"time"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/kms"
	"github.com/quietline/quietline/kms/peer"
	"github.com/quietline/quietline/secret"
)

// Missed turns of the epoch (rule 11), in intervals since the last whole one.
// One may be a disk's bad minute. From turnsAlarm on a person is called; at
// turnsStop nothing is delivered any more, so that a key that was delivered
// never stays readable for longer than one that was not may wait: with the
// default interval that is the default retention, 600 s.
const (
	turnsAlarm = 3
	turnsStop  = 10
)

// missed notes that the epoch did not turn, or that the key before could not be
// destroyed. The next turn tries again.
func (o *owner) missed(err error) {
	o.turns++
	o.log.Warn("epoch does not turn", "err", err)
	late := time.Since(o.turned)
	if late < turnsAlarm*o.turnEvery {
		return
	}
	if !o.overdue {
		o.overdue = true
		o.report(peer.Event{Alarm: true, Text: "epoch does not turn, delivered keys are not erased",
			Reason: err.Error()})
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if late >= turnsStop*o.turnEvery {
		o.unerased = fmt.Errorf("%w: the epoch has not turned for %v: %w", kms.ErrErasure,
			late.Round(time.Second), err)
	}
}

// erased notes a whole turn; crossed tells that it was the one that ended a
// change of the root key.
func (o *owner) erased(crossed bool) {
	o.turns++
	if crossed {
		o.log.Info("root key is changed; the one before opens nothing any more")
		o.own = append(o.own, peer.Noted{Change: kms.Change{Op: kms.OpNote, Count: 1,
			Reason: kms.NoteRootRotated}})
	}
	if o.overdue {
		o.log.Info("epoch turns again")
	}
	o.turned, o.overdue = time.Now(), false
	o.mu.Lock()
	defer o.mu.Unlock()
	o.unerased = nil
}

// mayDeliver refuses while delivered keys could not be erased.
func (o *owner) mayDeliver() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.unerased == nil {
		return nil
	}
	return &etsi014.Error{Kind: etsi014.ErrDown, Cause: o.unerased, RetryAfter: o.turnEvery}
}

// Note puts a note about this KME itself into the audit log: one of the reasons
// kms.Note..., and how many times. It returns once the note is durable, which
// takes Run.
func (n *Node) Note(ctx context.Context, reason string, count uint64) error {
	n.owner.put(ctx, peer.Noted{Change: kms.Change{Op: kms.OpNote, Reason: reason, Count: count}})
	if err := n.owner.settle(ctx); err != nil {
		return fmt.Errorf("note %q in audit log: %w", reason, err)
	}
	return nil
}

// AdmitRoot begins a change of the root key; see keyring.Ring.Admit. With
// replace it takes the place of one that was admitted and never used.
func (n *Node) AdmitRoot(ctx context.Context, next secret.Bytes, replace bool) error {
	if replace {
		if err := n.ring.Abandon(); err != nil {
			return err
		}
	}
	if err := n.ring.Admit(next); err != nil {
		return err
	}
	return n.Note(ctx, kms.NoteRootAdmitted, 1)
}

// AdoptRoot goes over to a root key that was admitted and turns the epoch, after
// which the one before opens nothing any more. With an error it tells whether
// next is in use all the same: the epoch turns later then.
func (n *Node) AdoptRoot(ctx context.Context, next secret.Bytes) (adopted bool, err error) {
	if _, err := n.ring.Adopt(next); err != nil {
		return false, err
	}
	if err := n.turn(ctx); err != nil {
		return true, fmt.Errorf("turn epoch: %w", err)
	}
	if n.ring.Crossed() {
		return true, fmt.Errorf("%w: the root key before still opens the epoch keys; the next turn tries "+
			"again", kms.ErrErasure)
	}
	return true, nil
}

// turn has the owner turn the epoch, and waits until that is done and durable.
func (n *Node) turn(ctx context.Context) error {
	o := n.owner
	var before, now int
	err := o.ask(ctx, func(*peer.Machine) { before, o.claims = o.turns, turnKeys })
	for now = before; err == nil && now == before; { // each question wakes the owner
		err = o.ask(ctx, func(*peer.Machine) { now = o.turns })
	}
	if err != nil {
		return err
	}
	return o.settle(ctx)
}
