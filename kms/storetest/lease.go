package storetest

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/kms"
	"github.com/quietline/quietline/kms/audit"
)

// fence: a writer that another has taken over from changes nothing any more,
// whatever it tries, and can get no newer fence without taking over itself.
func fence(t *testing.T, opener Opener) {
	s := opener(t, true)
	defer s.Close()
	old := lease(t, s)
	old.must(opened(1)...)
	old.must(ingest(2), confirm(2))
	late := lease(t, s)
	if late.fence <= old.fence {
		t.Errorf("fence went from %d to %d", old.fence, late.fence)
	}
	before := state(t, late)
	ofLink, err := s.Lease(t.Context(), link, -1)
	if err != nil || ofLink.Fence != 0 {
		t.Errorf("a link's lease has fence %d (%v), want none", ofLink.Fence, err)
	}
	tries := map[string][]kms.Change{
		"nothing": nil, "claim": {claim(1, 0, 1, kms.RoleInitiator, "a")},
		"grant": {grant(1, 12, 1, 256, "z", "y")}, "ingest": {ingest(3)}, "open": {open(2, session)},
		"void": {op(kms.OpVoid, 2)}, "close": {op(kms.OpClose, 1)},
		"boot": {{Op: kms.OpBoot, Incarnation: 9}}, "note": {{Op: kms.OpNote, Reason: "late"}},
		"turn":     {{Op: kms.OpTurn, Epoch: 9}},
		"remember": {{Op: kms.OpRemember, Memory: kms.Memory{Peer: "p"}}},
	}
	for name, changes := range tries {
		for _, f := range []kms.Fence{old.fence, ofLink.Fence, late.fence + 100} {
			if _, err := s.Commit(t.Context(), f, changes); !errors.Is(err, kms.ErrFenced) ||
				!kms.Refused(err) {
				t.Errorf("%s under fence %d, %d stands: %v, want ErrFenced", name, f, late.fence, err)
			}
		}
	}
	if diff := cmp.Diff(before, state(t, late)); diff != "" {
		t.Errorf("what was fenced off left traces (-before +after):\n%s", diff)
	}
	late.must(claim(1, 0, 1, kms.RoleInitiator, "a"))
	again := lease(t, s) // the first process takes over again
	again.must(claim(1, 1, 1, kms.RoleInitiator, "a"))
	if err := late.try(claim(1, 2, 1, kms.RoleInitiator, "a")); !errors.Is(err, kms.ErrFenced) {
		t.Errorf("claim of the one before: %v, want ErrFenced", err)
	}
}

// links: a link's lease shows that link's oldest segments, as many as asked
// for, and bounds nothing but what it shows.
func links(t *testing.T, opener Opener) {
	h := lease(t, opener(t, true))
	defer h.Close()
	name := func(l kms.LinkID, generation, number uint64) kms.Change {
		c := ingest(1)
		c.Segment = kms.SegmentID{Link: l, Generation: generation, Number: number}
		c.Meta.ID = c.Segment
		return c
	}
	var want []kms.SegmentID
	for _, g := range []uint64{1, 2, 256} {
		for _, n := range []uint64{1, 2, 255, 256, 1 << 40} {
			c := name(link, g, n)
			h.must(c)
			want = append(want, c.Segment)
		}
	}
	for _, other := range []kms.LinkID{link[:len(link)-1], link + "2", "z", "a"} {
		h.must(name(other, 7, 7))
	}
	for _, n := range []int{0, 1, 4, len(want), len(want) + 5, -1} {
		l, err := h.Lease(t.Context(), link, n)
		if err != nil {
			t.Fatal(err)
		}
		var got []kms.SegmentID
		for _, s := range l.Segments {
			got = append(got, s.ID)
		}
		shown := want[:min(uint(n), uint(len(want)))]
		if diff := cmp.Diff(shown, got); diff != "" && len(shown)+len(got) > 0 {
			t.Errorf("lease of %d segments (-want +got):\n%s", n, diff)
		}
		if l.Generation != 256 || l.Floor != 1<<40+1 || len(l.Unreadable) > 0 || !l.Until.IsZero() {
			t.Errorf("lease of %d segments: %+v", n, l)
		}
	}
	last := kms.Change{Op: kms.OpConfirm, Segment: want[len(want)-1]}
	if _, err := h.Lease(t.Context(), link, 1); err != nil {
		t.Fatal(err)
	}
	h.must(last) // though the lease before showed another one only
	l, err := h.Lease(t.Context(), "unheard-of", -1)
	if err != nil || len(l.Segments) > 0 || l.Floor != 0 {
		t.Errorf("a link of which nothing is stored: %+v, %v", l, err)
	}
}

// concurrent: goroutines claim the same slots at once, and others read. Each
// slot goes to one of them, and the log tells of each once.
func concurrent(t *testing.T, opener Opener) {
	h := lease(t, opener(t, true))
	defer h.Close()
	h.must(ingest(1), confirm(1), open(1, session), grant(1, 0, slots, 256, "a", "b"))
	var won [slots]atomic.Int32
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for i := range slots {
				switch err := h.try(claim(1, i, 1, kms.RoleInitiator, "a")); {
				case err == nil:
					won[i].Add(1)
				case !errors.Is(err, kms.ErrClaimed):
					t.Errorf("claim: %v", err)
				}
			}
		})
	}
	wg.Go(func() {
		for range 20 {
			if _, err := audit.Verify(h.Scan(t.Context(), 0)); err != nil {
				t.Errorf("Scan: %v", err)
			}
			if _, _, err := h.Load(t.Context(), id(1)); err != nil {
				t.Errorf("Load: %v", err)
			}
			if _, err := h.Lease(t.Context(), link, -1); err != nil {
				t.Errorf("Lease: %v", err)
			}
		}
	})
	wg.Wait()
	var told [slots]int32
	for rec, err := range h.Scan(t.Context(), 0) {
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range rec.Changes {
			for i := 0; c.Op == kms.OpClaim && i < c.Slots; i++ {
				told[c.First+i]++
			}
		}
	}
	for i := range won {
		if won[i].Load() != 1 || told[i] != 1 {
			t.Errorf("slot %d went to %d callers, the log tells of %d", i, won[i].Load(), told[i])
		}
	}
}

// longLog: a log of more records than one reads at a time is yielded whole, in
// order, from anywhere, and goes on where a reader begins again.
func longLog(t *testing.T, opener Opener) {
	h := lease(t, opener(t, true))
	const records = 1100
	for i := range records {
		h.must(kms.Change{Op: kms.OpNote, SAE: etsi014.SAEID(fmt.Sprint("sae-", i%7)), Count: uint64(i)})
	}
	check := func(from uint64) {
		t.Helper()
		at := from
		for rec, err := range h.Scan(t.Context(), from) {
			if err != nil {
				t.Fatal(err)
			}
			if at++; rec.Position.Length != at || rec.Changes[0].Count != at-1 ||
				rec.Changes[0].SAE != etsi014.SAEID(fmt.Sprint("sae-", (at-1)%7)) {
				t.Fatalf("record %d where %d should be: %+v", rec.Position.Length, at, rec.Changes)
			}
		}
		if at != max(from, records) {
			t.Errorf("scan from %d ended at %d", from, at)
		}
	}
	starts := []uint64{0, 1, 70, 1023, 1024, 1025, records - 1, records, records + 1}
	for _, from := range starts {
		check(from)
	}
	if err := h.Close(); err != nil {
		t.Fatal(err)
	}
	h = lease(t, opener(t, false))
	defer h.Close()
	for _, from := range starts {
		check(from)
	}
}
