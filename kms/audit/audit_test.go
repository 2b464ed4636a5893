package audit

import (
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/kms"
)

var seg = kms.SegmentID{Link: "l", Generation: 2, Number: 9}

// everyChange has each logged Op once, with all its fields set.
var everyChange = []kms.Change{
	{Op: kms.OpBoot, Incarnation: 3, Reason: "start"},
	{Op: kms.OpLink, Segment: kms.SegmentID{Link: "l"}},
	{Op: kms.OpIngest, Segment: seg, Meta: kms.Segment{ID: seg, State: kms.StateNew,
		BlockBytes: 1 << 15, SlotBytes: 32, Slots: 1022, Owner: "tokyo", Simulated: true}},
	{Op: kms.OpConfirm, Segment: seg},
	{Op: kms.OpGive, Segment: seg, Owner: "kochi"},
	{Op: kms.OpOpen, Segment: seg, Session: kms.Session{1}},
	{Op: kms.OpGrant, Segment: seg, Session: kms.Session{1}, Grant: kms.Grant{First: 1, Slots: 4,
		SizeBits: 512, Initiator: "a", Targets: []etsi014.SAEID{"b", "c"}}},
	{Op: kms.OpClaim, Segment: seg, Session: kms.Session{1}, First: 1, Slots: 2,
		Role: kms.RoleInitiator, SAE: "a"},
	{Op: kms.OpExpire, Segment: seg, Session: kms.Session{1}, First: 1, Slots: 2, Role: 1, SAE: "c"},
	{Op: kms.OpClose, Segment: seg},
	{Op: kms.OpFinish, Segment: seg},
	{Op: kms.OpVoid, Segment: seg, Reason: "restart"},
	{Op: kms.OpTurn, Epoch: 5},
	{Op: kms.OpNote, Memory: kms.Memory{Peer: "kochi"}, SAE: "a", Reason: "refused", Count: 7},
}

type book map[Commitment]etsi014.SAEID

func (b book) names(n etsi014.SAEID) (Commitment, error) {
	c := Commit(Salt{7}, n)
	b[c] = n
	return c, nil
}

func (b book) reveal(c Commitment) (etsi014.SAEID, bool) { n, ok := b[c]; return n, ok }

func TestEveryChangeComesBack(t *testing.T) {
	names := book{}
	unlogged := []kms.Change{{Op: kms.OpRemember}, {Op: kms.OpTally}, {Op: kms.OpReseal},
		{Op: kms.OpRewrap}}
	at := time.Date(2026, 11, 21, 1, 2, 3, 4, time.UTC)
	entry, next, err := Append(kms.Position{Length: 4, Hash: [32]byte{1}}, at,
		append(unlogged, everyChange...), names.names)
	if err != nil {
		t.Fatal(err)
	}
	rec, err := Parse(kms.Position{Length: 4, Hash: [32]byte{1}}, entry, names.reveal)
	if err != nil {
		t.Fatal(err)
	}
	want := kms.Record{Position: next, At: at, Changes: everyChange}
	if diff := cmp.Diff(want, rec); diff != "" {
		t.Errorf("record changed on the way (-want +got):\n%s", diff)
	}
	if hash, ok := HashOf(entry); !ok || hash != next.Hash {
		t.Errorf("HashOf = %x, %v", hash, ok)
	}
}

func TestForgottenNameStillVerifies(t *testing.T) {
	names := book{}
	entry, _, err := Append(kms.Position{}, time.Now(), everyChange, names.names)
	if err != nil {
		t.Fatal(err)
	}
	clear(names)
	rec, err := Parse(kms.Position{}, entry, names.reveal)
	if err != nil {
		t.Fatal(err)
	}
	if rec.Changes[6].Grant.Initiator != "" {
		t.Errorf("a forgotten name came back: %q", rec.Changes[6].Grant.Initiator)
	}
}

func TestEveryFlippedBitIsFound(t *testing.T) {
	names := book{}
	entry, _, err := Append(kms.Position{}, time.Unix(1, 0), everyChange, names.names)
	if err != nil {
		t.Fatal(err)
	}
	for bit := range 8 * len(entry) {
		entry[bit/8] ^= 1 << (bit % 8)
		if _, err := Parse(kms.Position{}, entry, names.reveal); !errors.Is(err, kms.ErrCorrupt) {
			t.Fatalf("bit %d flipped: Parse = %v, want ErrCorrupt", bit, err)
		}
		entry[bit/8] ^= 1 << (bit % 8)
	}
}

func TestOrderIsChained(t *testing.T) {
	names := book{}
	var at kms.Position
	var entries [][]byte
	var before []kms.Position
	for i := range 4 {
		note := []kms.Change{{Op: kms.OpNote, Reason: fmt.Sprint(i)}}
		before = append(before, at)
		e, next, err := Append(at, time.Unix(int64(i), 0), note, names.names)
		if err != nil {
			t.Fatal(err)
		}
		entries, at = append(entries, e), next
	}
	for i := range entries {
		for j := range before {
			_, err := Parse(before[j], entries[i], nil)
			if (err == nil) != (i == j) {
				t.Errorf("entry %d after position %d: %v", i, before[j].Length, err)
			}
		}
	}
}

func TestUnknownOpIsRefused(t *testing.T) {
	_, _, err := Append(kms.Position{}, time.Now(), []kms.Change{{Op: 200}}, book{}.names)
	if !errors.Is(err, kms.ErrChange) {
		t.Errorf("Append = %v, want ErrChange", err)
	}
}

func FuzzParse(f *testing.F) {
	names := book{}
	entry, _, err := Append(kms.Position{}, time.Unix(1, 0), everyChange, names.names)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(entry[:len(entry)-hashSize])
	f.Fuzz(func(t *testing.T, body []byte) {
		sum := link([32]byte{}, 1, body) // a good hash, so that the fields are read
		_, _ = Parse(kms.Position{}, append(body[:len(body):len(body)], sum[:]...), names.reveal)
	})
}

// TestAdjoiningClaimsAreOne: what an entry tells of slots is what was claimed,
// slot by slot and in order for each SAE, in as few changes as adjoin.
func TestAdjoiningClaimsAreOne(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		type slot struct {
			op      kms.Op
			segment uint64
			role    int
			sae     etsi014.SAEID
			number  int
		}
		list := func(changes []kms.Change) (slots []slot) {
			for _, c := range changes {
				for i := range c.Slots {
					slots = append(slots, slot{c.Op, c.Segment.Number, c.Role, c.SAE, c.First + i})
				}
			}
			return slots
		}
		var changes []kms.Change
		next := 0
		for range rapid.IntRange(0, 20).Draw(t, "changes") {
			c := kms.Change{Op: rapid.SampledFrom([]kms.Op{kms.OpClaim, kms.OpClaim, kms.OpClaim,
				kms.OpExpire, kms.OpTally}).Draw(t, "op"), Segment: kms.SegmentID{Link: "l"}}
			if c.Op != kms.OpTally {
				c.Segment.Number = rapid.Uint64Range(0, 1).Draw(t, "segment")
				c.SAE = rapid.SampledFrom([]etsi014.SAEID{"a", "b"}).Draw(t, "sae")
				c.Role = rapid.IntRange(-1, 0).Draw(t, "role")
				c.First = next + rapid.IntRange(0, 1).Draw(t, "gap")
				c.Slots = rapid.IntRange(1, 3).Draw(t, "slots")
				next = c.First + c.Slots
			}
			changes = append(changes, c)
		}
		before := slices.Clone(changes)
		names := map[Commitment]etsi014.SAEID{Commit(Salt{}, "a"): "a", Commit(Salt{}, "b"): "b"}
		entry, pos, err := Append(kms.Position{}, time.Unix(1, 0), changes,
			func(n etsi014.SAEID) (Commitment, error) { return Commit(Salt{}, n), nil })
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(before, changes); diff != "" {
			t.Fatalf("the caller's changes were changed:\n%s", diff)
		}
		rec, err := Parse(kms.Position{}, entry, func(c Commitment) (etsi014.SAEID, bool) {
			n, ok := names[c]
			return n, ok
		})
		if err != nil || rec.Position != pos {
			t.Fatalf("Parse: %v", err)
		}
		var logged []kms.Change
		for _, c := range changes {
			if Logged(c.Op) {
				logged = append(logged, c)
			}
		}
		if diff := cmp.Diff(list(logged), list(rec.Changes), cmp.AllowUnexported(slot{})); diff != "" {
			t.Fatalf("slots differ (-claimed +told):\n%s", diff)
		}
		for i := 1; i < len(rec.Changes); i++ {
			if adjoins(&rec.Changes[i-1], &rec.Changes[i]) {
				t.Fatalf("changes %d and %d adjoin", i-1, i)
			}
		}
	})
}
