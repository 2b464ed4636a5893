package node

import (
	"errors"
	"testing"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/kms/audit"
)

// TestKeysArriveAtBothEnds draws at each site and fetches at the other.
func TestKeysArriveAtBothEnds(t *testing.T) {
	a, b := newPair(t, 4096)
	startPair(t, a, b)
	for _, s := range []*site{a, b} {
		s.driver.allow(9)
	}
	a.stored(t, "sae-a", "sae-b", 400)
	b.stored(t, "sae-b", "sae-a", 400)
	seen := map[string]bool{}
	for _, c := range []struct {
		from, to           *site
		initiator, target  etsi014.SAEID
		number, bits, more int
	}{
		{a, b, "sae-a", "sae-b", 1, 256, 0},
		{a, b, "sae-a", "sae-b", 100, 256, 0},
		{b, a, "sae-b", "sae-a2", 3, 1000, 0},
		{a, b, "sae-a2", "sae-b", 128, 128, 0},
		{b, a, "sae-b2", "sae-a", 2, 4096, 0},
	} {
		got, err := c.from.KME().Keys(t.Context(), etsi014.Caller{SAE: c.initiator},
			etsi014.KeyRequest{Targets: []etsi014.SAEID{c.target}, Number: c.number, SizeBits: c.bits})
		if err != nil {
			t.Fatalf("%+v: Keys: %v", c, err)
		}
		req := etsi014.IDRequest{Initiator: c.initiator}
		for _, k := range got.Keys {
			req.IDs = append(req.IDs, k.ID)
			if seen[string(k.Bits.Expose())] || seen[k.ID.String()] {
				t.Fatalf("key or key_ID came twice")
			}
			seen[string(k.Bits.Expose())], seen[k.ID.String()] = true, true
		}
		if len(got.Keys) != c.number {
			t.Fatalf("%d keys, want %d", len(got.Keys), c.number)
		}
		twin, err := c.to.KME().KeysByID(t.Context(), etsi014.Caller{SAE: c.target}, req)
		if err != nil {
			t.Fatalf("%+v: KeysByID: %v", c, err)
		}
		for i := range twin.Keys {
			if k := twin.Keys[i]; k.ID != got.Keys[i].ID || k.Bits.Len() != c.bits/8 ||
				string(k.Bits.Expose()) != string(got.Keys[i].Bits.Expose()) {
				t.Fatalf("key %d differs between the ends", i)
			}
		}
		if _, err := c.to.KME().KeysByID(t.Context(), etsi014.Caller{SAE: c.target},
			req); !errors.Is(err, etsi014.ErrUnknownKey) {
			t.Fatalf("second fetch: %v, want ErrUnknownKey", err)
		}
	}
}

// TestAuditTellsOfEveryDelivery: who got what stands in the log of each site.
func TestAuditTellsOfEveryDelivery(t *testing.T) {
	a, b := newPair(t, 4096)
	startPair(t, a, b)
	a.driver.allow(5)
	b.driver.allow(5)
	a.stored(t, "sae-a", "sae-b", 100)
	got, err := a.KME().Keys(t.Context(), etsi014.Caller{SAE: "sae-a"},
		etsi014.KeyRequest{Targets: []etsi014.SAEID{"sae-b"}, Number: 7})
	if err != nil {
		t.Fatal(err)
	}
	req := etsi014.IDRequest{Initiator: "sae-a"}
	for _, k := range got.Keys {
		req.IDs = append(req.IDs, k.ID)
	}
	if _, err := b.KME().KeysByID(t.Context(), etsi014.Caller{SAE: "sae-b"}, req); err != nil {
		t.Fatal(err)
	}
	for s, f := range map[*site]audit.Filter{
		a: {SAE: "sae-a", Action: "deliver to initiator"},
		b: {SAE: "sae-b", Action: "deliver to target"},
	} {
		slots := 0
		for rec, err := range s.Audit(t.Context(), 0) {
			if err != nil {
				t.Fatal(err)
			}
			for _, l := range audit.Lines(rec) {
				if f.Match(l) {
					slots += l.Slots
				}
			}
		}
		if slots != 7 {
			t.Errorf("%s: the log tells of %d keys to %s, want 7", s.cfg.KME, slots, f.SAE)
		}
		if at, err := audit.Verify(s.Audit(t.Context(), 0)); err != nil || at.Length < 5 {
			t.Errorf("%s: Verify: %d records, %v", s.cfg.KME, at.Length, err)
		}
	}
}

func TestWhoMayFetch(t *testing.T) {
	a, b := newPair(t, 4096)
	startPair(t, a, b)
	a.driver.allow(5)
	b.driver.allow(5)
	a.stored(t, "sae-a", "sae-b", 100)
	got, err := a.KME().Keys(t.Context(), etsi014.Caller{SAE: "sae-a"},
		etsi014.KeyRequest{Targets: []etsi014.SAEID{"sae-b"}, Number: 2})
	if err != nil {
		t.Fatal(err)
	}
	ids := []etsi014.KeyID{got.Keys[0].ID, got.Keys[1].ID}
	for name, c := range map[string]struct {
		who       etsi014.SAEID
		initiator etsi014.SAEID
		ids       []etsi014.KeyID
		want      error
	}{
		"another SAE of the target's KME": {"sae-b2", "sae-a", ids, etsi014.ErrDenied},
		"another initiator":               {"sae-b", "sae-a2", ids, etsi014.ErrDenied},
		"an SAE that is not served here":  {"sae-a", "sae-b", ids, etsi014.ErrDenied},
		"a stranger":                      {"nobody", "sae-a", ids, etsi014.ErrDenied},
		"an unknown ID among good ones": {"sae-b", "sae-a",
			[]etsi014.KeyID{ids[0], {1}}, etsi014.ErrUnknownKey},
		"an ID twice": {"sae-b", "sae-a", []etsi014.KeyID{ids[0], ids[0]}, etsi014.ErrUnknownKey},
		"no ID":       {"sae-b", "sae-a", nil, etsi014.ErrRequest},
	} {
		if _, err := b.KME().KeysByID(t.Context(), etsi014.Caller{SAE: c.who},
			etsi014.IDRequest{Initiator: c.initiator, IDs: c.ids}); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
	// None of that may have consumed the good ones.
	if _, err := b.KME().KeysByID(t.Context(), etsi014.Caller{SAE: "sae-b"},
		etsi014.IDRequest{Initiator: "sae-a", IDs: ids}); err != nil {
		t.Errorf("the target's own fetch: %v", err)
	}
}
