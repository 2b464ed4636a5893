package peer

import (
	"context"
	"errors"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/kms"
	"github.com/quietline/quietline/kms/storetest"
)

// lone is a KME without peers on a store.
type lone struct {
	m      *Machine
	disk   *storetest.Memory
	fence  kms.Fence
	now    time.Duration
	ticket uint64
	fail   func(format string, args ...any)
}

// start begins a process on the disk.
func (l *lone) start() {
	ctx := context.Background()
	lease, err := l.disk.Lease(ctx, "", 0)
	if err != nil {
		l.fail("lease: %v", err)
	}
	pool, err := l.disk.Lease(ctx, kms.Loopback, -1)
	if err != nil {
		l.fail("lease: %v", err)
	}
	l.m, err = New(Config{KME: "a", Rand: simRand{newWorld(lease.Incarnation, histories{}).rng},
		SAEs: map[etsi014.SAEID]etsi014.KMEID{"a1": "a", "a2": "a", "a3": "a"}},
		Snapshot{KME: lease, Links: map[kms.LinkID]kms.Lease{kms.Loopback: pool}})
	if err != nil {
		l.fail("new: %v", err)
	}
	l.fence = lease.Fence
	l.step(Boot{})
}

// step commits what a step and the segments it asks for change, and returns
// the answers.
func (l *lone) step(in ...Input) (answers []Answer) {
	for len(in) > 0 {
		out := l.m.Step(l.now, in...)
		in = nil
		for _, seg := range out.Fill {
			in = append(in, Ingested{Segment: seg, Sealed: kms.Sealed{
				Key: kms.Wrapped{Epoch: 1, Bytes: []byte{1}}, Slots: loopZeros[:seg.Slots*SlotBytes]}})
		}
		for i := range out.Changes {
			if c := &out.Changes[i]; c.Op == kms.OpLink {
				c.IDKey = kms.Wrapped{Epoch: 1, Bytes: out.IDKeys[c.Segment.Link]}
			}
		}
		if _, err := l.disk.Commit(context.Background(), l.fence, out.Changes); err != nil {
			l.fail("commit: %v", err)
		}
		if len(out.Messages) > 0 {
			l.fail("messages to nobody: %+v", out.Messages)
		}
		answers = append(answers, out.Answers...)
	}
	p := l.m.loop
	if !p.ledger.Balanced() || p.slots > loopMost || p.asked != 0 {
		l.fail("pool of %d slots, %d asked, ledger %+v", p.slots, p.asked, p.ledger)
	}
	return answers
}

func (l *lone) draw(n, sizeBits int, from etsi014.SAEID, to ...etsi014.SAEID) ([]KeyRef, error) {
	l.ticket++
	a := l.step(Draw{Ticket: l.ticket, Initiator: from, Targets: to, Number: n, SizeBits: sizeBits})
	if len(a) != 1 {
		l.fail("%d answers to a draw", len(a))
	}
	return a[0].Keys, a[0].Err
}

// TestLoopbackIsBounded: what nobody fetches fills the pool, then draws are
// refused with the reason, the stock told is nought, and when the keys have
// expired there is room again.
func TestLoopbackIsBounded(t *testing.T) {
	l := &lone{disk: storetest.NewMemory("a"), now: time.Second, fail: t.Fatalf}
	l.start()
	shape := kms.Shape{Initiator: "a1", Targets: []etsi014.SAEID{"a2"}, SizeBits: 256}
	if st, err := l.m.Stock(shape); err != nil || st.Keys != loopMost || !st.Loopback {
		t.Errorf("stock of the empty pool: %+v, %v", st, err)
	}
	drawn := 0
	for {
		keys, err := l.draw(16, 1<<20, "a1", "a2")
		if err == nil {
			drawn += len(keys)
			continue
		}
		var e *etsi014.Error
		if !errors.As(err, &e) || e.Kind != etsi014.ErrEmpty || e.RetryAfter == 0 ||
			e.MissingBits != 16<<20 || len(e.Details) != 1 {
			t.Errorf("a full pool answers %v, %+v", err, e)
		}
		break
	}
	if drawn != loopMost/loopLong {
		t.Errorf("%d keys of %d slots drawn, want %d", drawn, loopLong, loopMost/loopLong)
	}
	if st, err := l.m.Stock(shape); err != nil || st.Keys != 0 {
		t.Errorf("stock of the full pool: %+v, %v", st, err)
	}
	l.now += 602 * time.Second
	l.step(Tick{})
	if keys, err := l.draw(16, 1<<20, "a1", "a2"); err != nil || len(keys) != 16 {
		t.Errorf("after the retention: %d keys, %v", len(keys), err)
	}
}

// loneKey is a key that was drawn and who has still to fetch it.
type loneKey struct {
	ref  KeyRef
	from etsi014.SAEID
	to   map[etsi014.SAEID]bool // fetched
	at   time.Duration
}

// TestLoopbackProperties: whatever is drawn and fetched in whatever order,
// across restarts, each role gets each key once, no key_ID comes twice, and
// what is in time is there.
func TestLoopbackProperties(t *testing.T) {
	names := []etsi014.SAEID{"a1", "a2", "a3"}
	rapid.Check(t, func(rt *rapid.T) {
		l := &lone{disk: storetest.NewMemory("a"), now: time.Second, fail: rt.Fatalf}
		l.start()
		var keys []*loneKey
		ids := map[etsi014.KeyID]bool{}
		rt.Repeat(map[string]func(*rapid.T){
			"draw": func(rt *rapid.T) {
				who := rapid.Permutation(names).Draw(rt, "who")
				to := who[1 : 2+rapid.IntRange(0, 1).Draw(rt, "more")]
				size := 8 * rapid.IntRange(1, 2000).Draw(rt, "bytes")
				got, err := l.draw(rapid.IntRange(1, 9).Draw(rt, "number"), size, who[0], to...)
				if err != nil {
					rt.Fatalf("draw: %v", err)
				}
				for _, ref := range got {
					if ids[ref.ID] {
						rt.Fatalf("key_ID %s came twice", ref.ID)
					}
					ids[ref.ID] = true
					k := &loneKey{ref: ref, from: who[0], at: l.now, to: map[etsi014.SAEID]bool{}}
					for _, s := range to {
						k.to[s] = false
					}
					keys = append(keys, k)
				}
			},
			"fetch": func(rt *rapid.T) {
				if len(keys) == 0 {
					rt.Skip("no keys")
				}
				k := rapid.SampledFrom(keys).Draw(rt, "key")
				who := rapid.SampledFrom(names).Draw(rt, "target")
				l.ticket++
				a := l.step(Fetch{Ticket: l.ticket, Target: who, Initiator: k.from,
					IDs: []etsi014.KeyID{k.ref.ID}})[0]
				done, entitled := k.to[who]
				inTime := l.now < k.at+600*time.Second
				switch {
				case a.Err == nil && (!entitled || done || a.Keys[0] != k.ref):
					rt.Fatalf("%s got %+v, drawn %+v", who, a.Keys, k)
				case a.Err != nil && entitled && !done && inTime:
					rt.Fatalf("%s is refused: %v", who, a.Err)
				case a.Err == nil:
					k.to[who] = true
				}
			},
			"wait": func(rt *rapid.T) {
				l.now += time.Duration(rapid.IntRange(1, 400).Draw(rt, "seconds")) * time.Second
				l.step(Tick{})
			},
			"restart": func(*rapid.T) {
				l.start()
				keys = nil
			},
		})
	})
}
