// Package storetest is the suite that every kms.Store passes, and [Memory],
// the plainest store there is.
//
// A store's test calls [Run] with a function that opens a store. What a store
// makes of a failing disk is for its own tests, for each has its own calls;
// [Failing] shows callers both forms of a failed commit.
package storetest

import (
	"bytes"
	"context"
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/kms"
)

// Self is the KME whose store the suite opens.
const Self etsi014.KMEID = "kme-self"

// Opener opens a store of Self. With the same test it opens the same one
// again after Close, unless fresh.
type Opener func(t *testing.T, fresh bool) kms.Store

const (
	slots     = 16
	slotBytes = 32
	link      = kms.LinkID("tokyo-kochi")
)

var (
	session = kms.Session{1}
	other   = kms.Session{2}
)

// Run is the suite.
func Run(t *testing.T, opener Opener) {
	for name, f := range map[string]func(*testing.T, Opener){
		"refusals":           refusals,
		"a refusal is whole": refusalIsWhole,
		"life cycle":         lifeCycle,
		"transitions":        transitions,
		"reopen":             reopen,
		"fence":              fence,
		"links":              links,
		"concurrent":         concurrent,
		"long log":           longLog,
		"log":                auditLog,
		"canceled":           canceled,
		"neighbours":         neighbours,
		"epochs":             epochs,
		"as memory":          asMemory,
	} {
		t.Run(name, func(t *testing.T) { f(t, opener) })
	}
}

type handle struct {
	kms.Store
	t     *testing.T
	fence kms.Fence
}

func lease(t *testing.T, s kms.Store) *handle {
	t.Helper()
	l, err := s.Lease(t.Context(), "", 0)
	if err != nil {
		t.Fatalf("Lease: %v", err)
	}
	return &handle{s, t, l.Fence}
}

func (h *handle) try(changes ...kms.Change) error {
	_, err := h.Commit(h.t.Context(), h.fence, changes)
	return err
}

func (h *handle) must(changes ...kms.Change) {
	h.t.Helper()
	if err := h.try(changes...); err != nil {
		h.t.Fatalf("Commit: %v", err)
	}
}

// refusals: each breaks one rule and nothing else.
func refusals(t *testing.T, opener Opener) {
	h := lease(t, opener(t, true))
	defer h.Close()
	h.must(opened(1)...)
	h.must(claim(1, 0, 2, kms.RoleInitiator, "a"), claim(1, 0, 1, 0, "b"), claim(1, 1, 1, 1, "c"))
	h.must(ingest(2), confirm(2), kms.Change{Op: kms.OpGive, Segment: id(2), Owner: "kme-other"},
		open(2, session), grant(2, 0, 8, 256, "a", "b"))
	short := ingest(9)
	short.Sealed.Slots = short.Sealed.Slots[:slots*slotBytes-slots]
	misnamed := ingest(9)
	misnamed.Meta.ID.Number = 8
	cases := []struct {
		name   string
		want   error
		change kms.Change
	}{
		{"draw twice", kms.ErrClaimed, claim(1, 1, 1, kms.RoleInitiator, "a")},
		{"draw over the edge of a claim", kms.ErrClaimed, claim(1, 1, 3, kms.RoleInitiator, "a")},
		{"fetch twice", kms.ErrClaimed, claim(1, 0, 1, 0, "b")},
		{"fetch by the other target twice", kms.ErrClaimed, claim(1, 1, 1, 1, "c")},
		{"fetch by a target in another's place", kms.ErrGrant, claim(1, 2, 1, 0, "c")},
		{"fetch by a stranger", kms.ErrGrant, claim(1, 2, 1, 0, "x")},
		{"fetch in a place that is not", kms.ErrGrant, claim(1, 2, 1, 2, "b")},
		{"draw by a target", kms.ErrGrant, claim(1, 2, 1, kms.RoleInitiator, "b")},
		{"draw from the peer's segment", kms.ErrGrant, claim(2, 0, 1, kms.RoleInitiator, "a")},
		{"draw outside every grant", kms.ErrGrant, claim(1, 12, 1, kms.RoleInitiator, "a")},
		{"draw across two grants", kms.ErrGrant, claim(1, 7, 2, kms.RoleInitiator, "a")},
		{"half a key", kms.ErrGrant, claim(1, 8, 1, kms.RoleInitiator, "c")},
		{"off the keys' edges", kms.ErrGrant, claim(1, 9, 2, kms.RoleInitiator, "c")},
		{"no slots", kms.ErrGrant, claim(1, 2, 0, kms.RoleInitiator, "a")},
		{"negative slot", kms.ErrGrant, claim(1, -1, 1, kms.RoleInitiator, "a")},
		{"beyond the segment", kms.ErrGrant, claim(1, 15, 2, kms.RoleInitiator, "a")},
		{"expiry of a drawn key in the initiator's role", kms.ErrGrant, kms.Change{Op: kms.OpExpire,
			Segment: id(1), Session: session, First: 2, Slots: 1, Role: kms.RoleInitiator, SAE: "a"}},
		{"overlapping grant", kms.ErrGrant, grant(1, 11, 2, 256, "a", "b")},
		{"same grant again", kms.ErrGrant, grant(1, 0, 8, 256, "a", "b", "c")},
		{"grant beyond the end", kms.ErrGrant, grant(1, 12, 5, 256, "a", "b")},
		{"grant of half a key", kms.ErrGrant, grant(1, 12, 3, 512, "a", "b")},
		{"grant to nobody", kms.ErrGrant, grant(1, 12, 1, 256, "a")},
		{"grant of nothing", kms.ErrGrant, grant(1, 12, 0, 256, "a", "b")},
		{"grant without a size", kms.ErrGrant, grant(1, 12, 1, 0, "a", "b")},
		{"grant in another session", kms.ErrSession, kms.Change{Op: kms.OpGrant, Segment: id(1),
			Session: other, Grant: grant(1, 12, 1, 256, "a", "b").Grant}},
		{"draw in another session", kms.ErrSession, kms.Change{Op: kms.OpClaim, Segment: id(1),
			Session: other, First: 2, Slots: 1, Role: kms.RoleInitiator, SAE: "a"}},
		{"segment not here", kms.ErrNoSegment, confirm(7)},
		{"block number again", kms.ErrSeen, ingest(1)},
		{"slots too short", kms.ErrChange, short},
		{"segment under another name", kms.ErrChange, misnamed},
		{"incarnation zero", kms.ErrChange, kms.Change{Op: kms.OpBoot}},
		{"unbalanced ledger", kms.ErrChange, kms.Change{Op: kms.OpTally,
			Segment: kms.SegmentID{Link: link}, Ledger: kms.Ledger{Ingested: 1}}},
		{"link without a name", kms.ErrChange, kms.Change{Op: kms.OpTally}},
		{"no op", kms.ErrChange, kms.Change{Segment: id(1)}},
		{"unknown op", kms.ErrChange, op(200, 1)},
	}
	for _, c := range cases {
		err := h.try(c.change)
		if !errors.Is(err, c.want) || !kms.Refused(err) {
			t.Errorf("%s: %v, want the refusal %v", c.name, err, c.want)
		}
	}
	// After all that, what is right still goes.
	h.must(claim(1, 2, 1, kms.RoleInitiator, "a"), claim(1, 8, 2, kms.RoleInitiator, "c"))
}

// refusalIsWhole: the good changes beside a bad one are not stored either.
func refusalIsWhole(t *testing.T, opener Opener) {
	h := lease(t, opener(t, true))
	defer h.Close()
	h.must(opened(1)...)
	h.must(ingest(2))
	before := state(t, h)
	bad := claim(1, 12, 1, kms.RoleInitiator, "a")
	for name, good := range map[string]kms.Change{
		"claim":    claim(1, 0, 1, kms.RoleInitiator, "a"),
		"grant":    grant(1, 12, 1, 256, "z", "y"),
		"confirm":  confirm(2),
		"ingest":   ingest(3),
		"void":     op(kms.OpVoid, 2),
		"close":    op(kms.OpClose, 1),
		"boot":     {Op: kms.OpBoot, Incarnation: 9},
		"remember": {Op: kms.OpRemember, Memory: kms.Memory{Peer: "p", Incarnation: 4}},
		"id key":   {Op: kms.OpLink, Segment: kms.SegmentID{Link: link}, IDKey: kms.Wrapped{Epoch: 1}},
		"tally": {Op: kms.OpTally, Segment: kms.SegmentID{Link: link},
			Ledger: kms.Ledger{Ingested: 1, Stored: 1}},
	} {
		if err := h.try(good, bad); !kms.Refused(err) {
			t.Errorf("%s beside a bad change: %v, want a refusal", name, err)
		}
		if err := h.try(op(kms.OpVoid, 77), good); !errors.Is(err, kms.ErrNoSegment) {
			t.Errorf("%s behind a bad change: %v, want ErrNoSegment", name, err)
		}
		if diff := cmp.Diff(before, state(t, h)); diff != "" {
			t.Fatalf("%s beside a bad change left traces (-before +after):\n%s", name, diff)
		}
	}
}

// view is all that a store shows.
type view struct {
	KME     kms.Lease
	Link    kms.Lease
	Sealed  map[uint64]kms.Sealed
	Claims  map[uint64][]kms.Bitmap
	Records []kms.Record
}

func state(t *testing.T, h *handle) view {
	t.Helper()
	v := view{Sealed: map[uint64]kms.Sealed{}, Claims: map[uint64][]kms.Bitmap{}}
	var err error
	if v.KME, err = h.Lease(t.Context(), "", 0); err != nil {
		t.Fatal(err)
	}
	h.fence = v.KME.Fence
	v.KME.Fence = 0
	if v.Link, err = h.Lease(t.Context(), link, -1); err != nil {
		t.Fatal(err)
	}
	for _, s := range v.Link.Segments {
		sealed, claims, err := h.Load(t.Context(), s.ID)
		if s.State == kms.StateClosed {
			if !errors.Is(err, kms.ErrNoSegment) {
				t.Fatalf("Load of a closed segment: %v, want ErrNoSegment", err)
			}
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		v.Sealed[s.ID.Number], v.Claims[s.ID.Number] = sealed, claims
	}
	for rec, err := range h.Scan(t.Context(), 0) {
		if err != nil {
			t.Fatal(err)
		}
		v.Records = append(v.Records, rec)
	}
	return v
}

func lifeCycle(t *testing.T, opener Opener) {
	h := lease(t, opener(t, true))
	defer h.Close()
	h.must(opened(1)...)
	h.must(claim(1, 0, 3, kms.RoleInitiator, "a"), claim(1, 2, 1, 1, "c"))
	sealed, claims, err := h.Load(t.Context(), id(1))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(ingest(1).Sealed, sealed); diff != "" {
		t.Errorf("sealed slots changed (-want +got):\n%s", diff)
	}
	want := []kms.Bitmap{{0b111, 0}, nil, {0b100, 0}}
	if diff := cmp.Diff(want, claims, cmpopts.EquateEmpty()); diff != "" {
		t.Errorf("claims (-want +got):\n%s", diff)
	}
	h.must(op(kms.OpClose, 1))
	if _, _, err := h.Load(t.Context(), id(1)); !errors.Is(err, kms.ErrNoSegment) {
		t.Errorf("Load after close: %v, want ErrNoSegment", err)
	}
	if err := h.try(claim(1, 5, 1, kms.RoleInitiator, "a")); !errors.Is(err, kms.ErrState) {
		t.Errorf("draw after close: %v, want ErrState", err)
	}
	h.must(op(kms.OpFinish, 1))
	if err := h.try(ingest(1)); !errors.Is(err, kms.ErrSeen) {
		t.Errorf("a finished block again: %v, want ErrSeen", err)
	}
	h.must(ingest(5))
	if err := h.try(ingest(4)); !errors.Is(err, kms.ErrSeen) {
		t.Errorf("a block below the floor: %v, want ErrSeen", err)
	}
	next := ingest(1)
	next.Segment.Generation, next.Meta.ID.Generation = 2, 2
	h.must(next)
	l, err := h.Lease(t.Context(), link, 1)
	if err != nil || len(l.Segments) != 1 || l.Generation != 2 || l.Floor != 2 {
		t.Errorf("Lease of one segment: %+v, %v", l, err)
	}
}

// transitions tries every change of state from every state.
func transitions(t *testing.T, opener Opener) {
	path := map[kms.State][]kms.Change{
		kms.StateNew:       {ingest(1)},
		kms.StateConfirmed: {ingest(1), confirm(1)},
		kms.StateOpen:      {ingest(1), confirm(1), open(1, session)},
		kms.StateClosed:    {ingest(1), confirm(1), open(1, session), op(kms.OpClose, 1)},
	}
	to := map[kms.Op]kms.State{kms.OpConfirm: kms.StateConfirmed, kms.OpOpen: kms.StateOpen,
		kms.OpClose: kms.StateClosed, kms.OpFinish: kms.StateFinished, kms.OpVoid: kms.StateVoid}
	for from, changes := range path {
		for o, target := range to {
			h := lease(t, opener(t, true))
			h.must(changes...)
			c := op(o, 1)
			c.Session = session
			err := h.try(c)
			if legal := from.May(target); legal != (err == nil) || !legal && !errors.Is(err, kms.ErrState) {
				t.Errorf("from %s to %s: %v", from, target, err)
			}
			if err := h.try(kms.Change{Op: kms.OpGive, Segment: id(1), Owner: "x"}); (err == nil) !=
				(from == kms.StateConfirmed && !from.May(target)) && target != kms.StateConfirmed {
				t.Errorf("give after %s to %s: %v", from, target, err)
			}
			_ = h.Close()
		}
	}
}

func reopen(t *testing.T, opener Opener) {
	h := lease(t, opener(t, true))
	h.must(kms.Change{Op: kms.OpBoot, Incarnation: 5, Reason: "start"})
	h.must(opened(1)...)
	h.must(ingest(2), confirm(2))
	h.must(ingest(3), claim(1, 0, 1, kms.RoleInitiator, "a"))
	h.must(kms.Change{Op: kms.OpRemember, Memory: kms.Memory{Peer: "kme-peer", Incarnation: 7,
		Position: kms.Position{Length: 3, Hash: [32]byte{8}}}})
	h.must(kms.Change{Op: kms.OpLink, Segment: kms.SegmentID{Link: link},
		IDKey: kms.Wrapped{Epoch: 2, Bytes: []byte{1, 2}}})
	h.must(kms.Change{Op: kms.OpTally, Segment: kms.SegmentID{Link: link},
		Ledger: kms.Ledger{Ingested: 7, Stored: 3, Void: 4}})
	before := state(t, h)
	if err := h.Close(); err != nil {
		t.Fatal(err)
	}
	if err := h.try(confirm(3)); !errors.Is(err, kms.ErrStopped) {
		t.Errorf("Commit after Close: %v, want ErrStopped", err)
	}
	h = lease(t, opener(t, false))
	defer h.Close()
	if diff := cmp.Diff(before, state(t, h)); diff != "" {
		t.Errorf("reopened store differs (-before +after):\n%s", diff)
	}
	if before.KME.Incarnation != 5 || len(before.KME.Memories) != 1 || len(before.Link.Segments) != 3 ||
		before.Link.Ledger.Void != 4 || before.Link.IDKey.Epoch != 2 || before.Link.Floor != 4 {
		t.Errorf("store does not show what was committed: %+v", before)
	}
	if err := h.try(kms.Change{Op: kms.OpBoot, Incarnation: 5}); !errors.Is(err, kms.ErrChange) {
		t.Errorf("incarnation again: %v, want ErrChange", err)
	}
}

func auditLog(t *testing.T, opener Opener) {
	h := lease(t, opener(t, true))
	defer h.Close()
	var want [][]kms.Change
	var last kms.Position
	commit := func(changes ...kms.Change) {
		t.Helper()
		pos, err := h.Commit(t.Context(), h.fence, changes)
		if err != nil {
			t.Fatal(err)
		}
		if pos.Length != last.Length+1 || pos.Hash == last.Hash {
			t.Fatalf("position went from %d to %d", last.Length, pos.Length)
		}
		last = pos
		for i := range changes { // as far as the log tells
			changes[i].Sealed = kms.Sealed{}
			changes[i].Meta.Sent, changes[i].Meta.Expected = kms.Tag{}, kms.Tag{}
		}
		want = append(want, changes)
	}
	commit(opened(1)...)
	commit(claim(1, 0, 2, kms.RoleInitiator, "a"), claim(1, 0, 1, 1, "c"))
	commit(kms.Change{Op: kms.OpNote, SAE: "x", Reason: "refused", Count: 3})
	same, err := h.Commit(t.Context(), h.fence, []kms.Change{
		{Op: kms.OpRemember, Memory: kms.Memory{Peer: "p"}}})
	if err != nil || same != last {
		t.Errorf("what a peer showed moved the log to %d: %v", same.Length, err)
	}
	for from := range uint64(5) {
		i := from
		for rec, err := range h.Scan(t.Context(), from) {
			if err != nil {
				t.Fatal(err)
			}
			if i++; rec.Position.Length != i {
				t.Fatalf("record %d where %d should be", rec.Position.Length, i)
			}
			if diff := cmp.Diff(want[i-1], rec.Changes); diff != "" {
				t.Errorf("record %d (-want +got):\n%s", i, diff)
			}
			if i == 3 && rec.Position != last {
				t.Errorf("last record is at %v, the store says %v", rec.Position, last)
			}
		}
		if i != max(3, from) {
			t.Errorf("Scan from %d ended at %d", from, i)
		}
	}
}

func canceled(t *testing.T, opener Opener) {
	h := lease(t, opener(t, true))
	defer h.Close()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := h.Commit(ctx, h.fence, []kms.Change{ingest(1)}); !errors.Is(err, context.Canceled) {
		t.Errorf("Commit: %v", err)
	}
	if _, _, err := h.Load(ctx, id(1)); !errors.Is(err, context.Canceled) {
		t.Errorf("Load: %v", err)
	}
	if _, err := h.Lease(ctx, link, 1); !errors.Is(err, context.Canceled) {
		t.Errorf("Lease: %v", err)
	}
	h.must(ingest(1)) // nothing was stored, and the store did not stop
}

// neighbours claims every slot of two segments in the commit that destroys the
// one between them, whose grants fill pages of their own.
func neighbours(t *testing.T, opener Opener) {
	h := lease(t, opener(t, true))
	defer h.Close()
	long := etsi014.SAEID(bytes.Repeat([]byte("x"), 290))
	for n := uint64(1); n <= 3; n++ {
		h.must(ingest(n), confirm(n), open(n, session))
		for i := range slots {
			h.must(grant(n, i, 1, 256, "a", "b", long))
		}
	}
	all := []kms.Change{op(kms.OpVoid, 2)}
	for i := range slots {
		all = append(all, claim(1, i, 1, kms.RoleInitiator, "a"), claim(3, i, 1, 1, long))
	}
	h.must(all...)
}

func epochs(t *testing.T, opener Opener) {
	h := lease(t, opener(t, true))
	defer h.Close()
	linkKey := func(epoch uint64) kms.Change {
		return kms.Change{Op: kms.OpLink, Segment: kms.SegmentID{Link: link},
			IDKey: kms.Wrapped{Epoch: epoch, Bytes: []byte{5}}}
	}
	rewrap := func(n uint64) kms.Change {
		return kms.Change{Op: kms.OpRewrap, Segment: id(n),
			Key: kms.Wrapped{Epoch: 4, Bytes: []byte{byte(n), 4}}}
	}
	reseal := func(n uint64, size int) kms.Change {
		return kms.Change{Op: kms.OpReseal, Segment: id(n), Sealed: kms.Sealed{
			Key: kms.Wrapped{Epoch: 4, Bytes: []byte{7}}, Slots: make([]byte, size)}}
	}
	whole := len(ingest(1).Sealed.Slots)
	turn := kms.Change{Op: kms.OpTurn, Epoch: 4}
	h.must(opened(1)...)
	h.must(ingest(2), ingest(3), confirm(3), open(3, session), op(kms.OpClose, 3), linkKey(3))
	for name, c := range map[string]struct {
		changes []kms.Change
		want    error
	}{
		"a data key left behind": {[]kms.Change{linkKey(4), rewrap(1), turn}, kms.ErrChange},
		"an ID key left behind":  {[]kms.Change{rewrap(1), rewrap(2), turn}, kms.ErrChange},
		"a closed segment":       {[]kms.Change{rewrap(3)}, kms.ErrState},
		"no such segment":        {[]kms.Change{rewrap(9)}, kms.ErrNoSegment},
		"other slots":            {[]kms.Change{reseal(1, whole-48)}, kms.ErrChange},
	} {
		if err := h.try(c.changes...); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
	h.must(linkKey(4), reseal(1, whole), rewrap(2), turn)
	if err := h.try(ingest(5)); !errors.Is(err, kms.ErrChange) {
		t.Errorf("a block sealed in an earlier epoch: %v, want ErrChange", err)
	}
	if err := h.try(turn); !errors.Is(err, kms.ErrChange) {
		t.Errorf("the same epoch again: %v, want ErrChange", err)
	}
	v := state(t, h)
	if v.KME.Epoch != 4 || v.Link.IDKey.Epoch != 4 {
		t.Errorf("epoch %d, ID key in %d, want 4", v.KME.Epoch, v.Link.IDKey.Epoch)
	}
	if got := v.Sealed[1]; got.Key.Epoch != 4 || !bytes.Equal(got.Slots, make([]byte, whole)) {
		t.Errorf("resealed segment is as before: %+v", got.Key)
	}
	want := ingest(2).Sealed
	want.Key = kms.Wrapped{Epoch: 4, Bytes: []byte{2, 4}}
	if diff := cmp.Diff(want, v.Sealed[2]); diff != "" {
		t.Errorf("rewrapped segment (-want +got):\n%s", diff)
	}
	h.must(claim(1, 0, 1, kms.RoleInitiator, "a")) // claims and grants lived through it
}
