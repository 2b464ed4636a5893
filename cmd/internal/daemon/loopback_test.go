package daemon

import (
	"bytes"
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/quietline/quietline/etsi014"
)

// TestOneSite: two SAEs of one site draw and collect at its own door; a third
// copy for the other site makes it a key of the link. Each SAE gets each key
// once, and the status says which source it is.
func TestOneSite(t *testing.T) {
	l := newLit(t, 2, 8192, nil)
	sae := l.client(t, "sae-kochi", l.kochiDoor)
	other := l.client(t, "other-kochi", l.kochiDoor)
	far := l.client(t, "sae-tokyo", l.tokyoDoor)
	st, err := sae.Status(t.Context(), "other-kochi")
	want := map[string]any{"quietline_simulated": true, "quietline_loopback": true}
	if diff := cmp.Diff(want, st.Extension); err != nil || diff != "" || st.StoredKeys == 0 ||
		st.SourceKME != "kme-kochi" || st.TargetKME != "kme-kochi" {
		t.Errorf("status of two SAEs of one site: %+v, %v (-want +got)\n%s", st, err, diff)
	}
	st, err = sae.Status(t.Context(), "sae-tokyo")
	if err != nil || st.Extension["quietline_loopback"] != nil {
		t.Errorf("status of two sites: %+v, %v", st, err)
	}
	type who struct {
		id etsi014.SAEID
		*etsi014.Client
	}
	for name, c := range map[string]struct {
		master etsi014.SAEID
		slaves []who
	}{
		"one site":   {"sae-kochi", []who{{"other-kochi", other}}},
		"both sites": {"sae-kochi", []who{{"other-kochi", other}, {"sae-tokyo", far}}},
	} {
		t.Run(name, func(t *testing.T) {
			req := etsi014.KeyRequest{Number: 3, SizeBits: 512}
			for _, s := range c.slaves {
				req.Targets = append(req.Targets, s.id)
			}
			drawn, err := sae.Keys(t.Context(), req)
			if err != nil {
				t.Fatal(err)
			}
			ids := etsi014.IDRequest{Initiator: c.master}
			for _, k := range drawn.Keys {
				ids.IDs = append(ids.IDs, k.ID)
			}
			if _, err := sae.KeysByID(t.Context(), etsi014.IDRequest{Initiator: "other-kochi",
				IDs: ids.IDs}); !errors.Is(err, etsi014.ErrDenied) {
				t.Errorf("the master collects too: %v, want %v", err, etsi014.ErrDenied)
			}
			for _, s := range c.slaves {
				got, err := s.KeysByID(t.Context(), ids)
				if err != nil {
					t.Fatalf("%s collects: %v", s.id, err)
				}
				for i, k := range got.Keys {
					if !bytes.Equal(k.Bits.Expose(), drawn.Keys[i].Bits.Expose()) {
						t.Errorf("key %d of %s differs", i, s.id)
					}
				}
				if _, err := s.KeysByID(t.Context(), ids); !errors.Is(err, etsi014.ErrUnknownKey) {
					t.Errorf("%s collects twice: %v, want %v", s.id, err, etsi014.ErrUnknownKey)
				}
			}
		})
	}
	k := kmeStatus(t, l.kochi)
	if n := len(k.Links); n != 2 || k.Links[1].ID != "loopback" || k.Links[1].Delivered != 3*512 ||
		k.Links[1].Simulated {
		t.Errorf("the key manager tells of %+v", k.Links)
	}
}
