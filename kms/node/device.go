package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"sync"
	"time"

	"github.com/quietline/quietline/hw"
	"github.com/quietline/quietline/kms"
	"github.com/quietline/quietline/kms/keyring"
	"github.com/quietline/quietline/kms/peer"
)

// Pauses before a device that failed is asked again.
const (
	deviceRetryFirst = 100 * time.Millisecond
	deviceRetryMost  = 10 * time.Second
	fullPause        = time.Second // before a full stock is tried again
)

// device is one link's driver and what it told last.
type device struct {
	link  Link
	self  *Config
	log   *slog.Logger
	owner *owner
	ring  *keyring.Ring

	last struct{ generation, seq uint64 } // read; ingest's own

	mu     sync.Mutex
	status hw.Status
}

func newDevice(n *Node, l Link) *device {
	return &device{link: l, self: &n.cfg, owner: n.owner, ring: n.owner.ring,
		log:    n.log.With("link", l.ID),
		status: hw.Status{Reason: "device has not told", QBER: math.NaN()}}
}

func (d *device) fill(st *kms.LinkStats) {
	d.mu.Lock()
	defer d.mu.Unlock()
	st.DeviceUp, st.DeviceReason = d.status.Up, d.status.Reason
	st.QBER, st.SecretBPS = d.status.QBER, d.status.SecretBPS
	st.Simulated = st.Simulated || d.status.Simulated || d.link.Driver.Describe().Simulated
}

func (d *device) down(reason string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.status.Up, d.status.Reason = false, reason
}

// ingest moves blocks from the driver to the store until ctx ends: a block is
// acknowledged to the device only after the commit.
func (d *device) ingest(ctx context.Context) {
	if d.link.Driver.Describe().Simulated && !d.self.Lab {
		d.refuseSimulated()
		return
	}
	pause := deviceRetryFirst
	for ctx.Err() == nil {
		var b hw.Block
		err := d.link.Driver.ReadBlock(ctx, &b)
		switch {
		case err == nil:
			pause = deviceRetryFirst
			if b.Simulated && !d.self.Lab {
				b.Bits.Clear()
				d.refuseSimulated()
				return
			}
			if err = d.take(ctx, &b); err == nil {
				continue
			}
		case errors.Is(err, hw.ErrClosed):
			return
		}
		if ctx.Err() != nil {
			return
		}
		d.log.Warn("device gives no block", "err", err)
		d.down(err.Error())
		if !sleep(ctx, pause) {
			return
		}
		pause = min(2*pause, deviceRetryMost)
	}
}

func (d *device) refuseSimulated() {
	d.log.Error("simulated blocks are refused", "reason",
		"no photon was sent; set lab: true if this is a laboratory")
	d.down("simulated blocks are refused without lab: true")
}

// take cuts, seals and stores one block, then acknowledges it.
func (d *device) take(ctx context.Context, b *hw.Block) error {
	defer b.Bits.Clear()
	d.follow(b)
	id := kms.SegmentID{Link: d.link.ID, Generation: b.Generation, Number: b.Seq}
	seg, slots, err := peer.Cut(id, d.self.KME, d.link.Peer, d.link.Weights, b.Simulated,
		b.Bits.Expose())
	if err != nil { // it will never be longer
		d.log.Warn("block is dropped", "err", err)
		return d.link.Driver.Ack(ctx, b.Generation, b.Seq)
	}
	sealed, err := d.ring.Seal(id, slots, seg.SlotBytes)
	if err != nil {
		return err
	}
	b.Bits.Clear()
	if err := d.awaitRoom(ctx, len(sealed.Slots)); err != nil {
		return err
	}
	for {
		t := d.owner.ticket.Add(1)
		r, err := d.owner.call(ctx, t, peer.Ingested{Ticket: t, Segment: seg, Sealed: sealed})
		if err == nil && !errors.Is(r.err, kms.ErrSeen) {
			err = r.err
		}
		if err == nil {
			break
		}
		if !errors.Is(err, kms.ErrFull) || !sleep(ctx, fullPause) {
			return err
		}
	}
	return d.link.Driver.Ack(ctx, b.Generation, b.Seq)
}

// follow tells of block numbers that never came. They are no danger, but the
// other end has them and half the link may be lost on the way.
func (d *device) follow(b *hw.Block) {
	last := d.last
	if d.last.generation, d.last.seq = b.Generation, b.Seq; last.generation == b.Generation &&
		last.seq > 0 && b.Seq > last.seq+1 {
		d.owner.report(peer.Event{Alarm: true, Text: skipped, Link: d.link.ID,
			Reason: fmt.Sprintf("%d came after %d of generation %d", b.Seq, last.seq, b.Generation)})
	}
}

// awaitRoom waits until the disk has room for a block beside what is kept for
// claims (rule 13). A block that the store refused would stop the KME.
func (d *device) awaitRoom(ctx context.Context, bytes int) error {
	store, ok := d.owner.store.(interface{ Room(bytes int) error })
	if !ok {
		return nil
	}
	err := store.Room(bytes)
	if !errors.Is(err, kms.ErrSpace) {
		return err
	}
	d.log.Error("blocks wait at the device", "err", err)
	d.mu.Lock()
	before := d.status
	d.mu.Unlock()
	d.down(err.Error())
	for errors.Is(err, kms.ErrSpace) {
		if !sleep(ctx, fullPause) {
			return ctx.Err()
		}
		err = store.Room(bytes)
	}
	d.mu.Lock()
	d.status = before
	d.mu.Unlock()
	return err
}

// watch keeps the device's last status and logs its alarms until ctx ends.
func (d *device) watch(ctx context.Context) {
	pause := deviceRetryFirst
	for ctx.Err() == nil {
		ev, err := d.link.Driver.Events(ctx)
		if err != nil {
			if errors.Is(err, hw.ErrClosed) || !sleep(ctx, pause) {
				return
			}
			pause = min(2*pause, deviceRetryMost)
			continue
		}
		pause = deviceRetryFirst
		if ev.Status != nil {
			d.mu.Lock()
			d.status = *ev.Status
			d.mu.Unlock()
		}
		if ev.Alarm != "" {
			d.log.Warn("device alarm", "reason", ev.Alarm+": "+ev.Detail)
		}
	}
}

// sleep waits; false if ctx ended first.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}
