package storetest

import (
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/kms"
)

// asMemory gives a store and a [Memory] the same random commits: they refuse
// the same ones, for the same reason, and hold the same in the end. Segments
// have up to hundreds of grants, so that records fill more than one page of
// any store.
func asMemory(t *testing.T, opener Opener) {
	rapid.Check(t, func(rt *rapid.T) {
		store := lease(t, opener(t, true))
		defer store.Close()
		model := lease(t, NewMemory(Self))
		var next uint64
		for range rapid.IntRange(1, 12).Draw(rt, "commits") {
			var changes []kms.Change
			for range rapid.IntRange(1, 10).Draw(rt, "changes") {
				changes = append(changes, anyChange(rt, &next)...)
			}
			want, got := model.try(changes...), store.try(changes...)
			if reason(want) != reason(got) {
				rt.Fatalf("%v: the store says %v, memory says %v", changes, got, want)
			}
		}
		a, b := state(t, model), state(t, store)
		for _, v := range []*view{&a, &b} { // salts and clocks are each store's own
			v.KME.Position, v.KME.Fence = kms.Position{Length: v.KME.Position.Length}, 0
			for i := range v.Records {
				v.Records[i] = kms.Record{Changes: v.Records[i].Changes}
			}
		}
		if diff := cmp.Diff(a, b); diff != "" {
			rt.Fatalf("stores differ (-memory +store):\n%s", diff)
		}
	})
}

// reason is the sentinel behind a refusal.
func reason(err error) error {
	for _, r := range []error{kms.ErrFenced, kms.ErrClaimed, kms.ErrState, kms.ErrSession,
		kms.ErrGrant, kms.ErrNoSegment, kms.ErrSeen, kms.ErrChange} {
		if errors.Is(err, r) {
			return r
		}
	}
	return err
}

// anyChange is a change, or a run of them, that often makes sense.
func anyChange(t *rapid.T, next *uint64) []kms.Change {
	n := *next
	if n > 1 {
		n = rapid.Uint64Range(max(1, *next-min(*next-1, 3)), *next).Draw(t, "segment")
	}
	role := rapid.IntRange(-1, 1).Draw(t, "role")
	first := rapid.IntRange(0, slots-1).Draw(t, "first")
	switch rapid.SampledFrom([]string{"new", "new", "many", "step", "grant", "claim", "claim",
		"claim", "expire", "void", "close", "finish", "give"}).Draw(t, "op") {
	case "new":
		*next++
		return opened(*next)
	case "many":
		*next++
		run := []kms.Change{ingest(*next), confirm(*next), open(*next, session)}
		long := etsi014.SAEID(rapid.StringN(200, 290, 290).Draw(t, "name"))
		for i := range slots {
			run = append(run, grant(*next, i, 1, 256, "a", "b", long))
		}
		return run
	case "step":
		*next++
		return []kms.Change{ingest(*next), confirm(*next)}
	case "grant":
		return []kms.Change{grant(n, first, rapid.IntRange(1, 4).Draw(t, "slots"), 256, "a", "b")}
	case "claim":
		sae := []etsi014.SAEID{"a", "b", "c"}[role+1]
		return []kms.Change{claim(n, first, rapid.IntRange(1, 3).Draw(t, "slots"), role, sae)}
	case "expire":
		c := claim(n, first, 1, role, []etsi014.SAEID{"a", "b", "c"}[role+1])
		c.Op = kms.OpExpire
		return []kms.Change{c}
	case "void":
		return []kms.Change{op(kms.OpVoid, n)}
	case "close":
		return []kms.Change{op(kms.OpClose, n)}
	case "finish":
		return []kms.Change{op(kms.OpFinish, n)}
	}
	return []kms.Change{{Op: kms.OpGive, Segment: id(n), Owner: "kme-other"}}
}
