package peer

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/quietline/quietline/kms"
)

// TestUnreadableRecords: what the store cannot read of a link is void with the
// first commit, each with an alarm, the ledger balances, and an ID key that
// cannot be read is replaced. The rest of the link stays.
func TestUnreadableRecords(t *testing.T) {
	id := func(n uint64) kms.SegmentID { return kms.SegmentID{Link: "l", Generation: 1, Number: n} }
	const slot = 8 * SlotBytes
	lease := kms.Lease{Generation: 1, Floor: 5, IDKey: kms.Wrapped{Epoch: 3, Bytes: []byte{1}},
		Ledger: kms.Ledger{Ingested: 20 * slot, Delivered: 2 * slot, Stored: 18 * slot},
		Segments: []kms.Segment{
			{ID: id(1), State: kms.StateConfirmed, Slots: 8, SlotBytes: SlotBytes, Owner: "a"}},
		Unreadable: []kms.Segment{{ID: id(2)}, {ID: id(4)}}}
	m, err := New(Config{KME: "a", Links: []Link{{ID: "l", Peer: "b"}},
		Rand: simRand{newWorld(1, histories{}).rng}},
		Snapshot{Links: map[kms.LinkID]kms.Lease{"l": lease}})
	if err != nil {
		t.Fatal(err)
	}
	out := m.Step(time.Second, Boot{})
	var ops []kms.Op
	for _, c := range out.Changes {
		ops = append(ops, c.Op)
		if c.Op == kms.OpVoid && c.Segment == id(1) {
			t.Error("a segment that can be read is void")
		}
	}
	want := []kms.Op{kms.OpBoot, kms.OpVoid, kms.OpVoid, kms.OpLink, kms.OpTally}
	if diff := cmp.Diff(want, ops); diff != "" {
		t.Errorf("changes (-want +got)\n%s", diff)
	}
	if len(out.IDKeys["l"]) != IDKeySize {
		t.Error("no new ID key")
	}
	alarms := 0
	for _, e := range out.Events {
		if e.Alarm {
			alarms++
		}
	}
	if alarms != 3 {
		t.Errorf("%d alarms, want 3: %+v", alarms, out.Events)
	}
	l := m.links["l"].ledger
	if !l.Balanced() || l.Stored != 8*slot || l.Void != 10*slot {
		t.Errorf("ledger %+v", l)
	}
	if again := m.Step(2*time.Second, Tick{}); len(again.Changes) != 0 {
		t.Errorf("a second time: %+v", again.Changes)
	}
}
