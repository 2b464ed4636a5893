package node

import (
	"errors"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/kms"
	"github.com/quietline/quietline/kms/audit"
)

// alone is one KME without peer or link, and three SAEs.
func alone(t *testing.T) *site {
	t.Helper()
	s, _ := newPair(t, 4096)
	s.cfg.Peers, s.cfg.Links = nil, nil
	s.cfg.SAEs = []SAE{{"one", "kme-a"}, {"two", "kme-a"}, {"three", "kme-a"}}
	return s
}

func (s *site) draws(t *testing.T, from etsi014.SAEID, n, sizeBits int,
	to ...etsi014.SAEID) ([]etsi014.Key, etsi014.IDRequest) {
	t.Helper()
	got, err := s.KME().Keys(t.Context(), etsi014.Caller{SAE: from},
		etsi014.KeyRequest{Targets: to, Number: n, SizeBits: sizeBits})
	if err != nil {
		t.Fatalf("Keys of %s to %v: %v", from, to, err)
	}
	if len(got.Keys) != n {
		t.Fatalf("%d keys, want %d", len(got.Keys), n)
	}
	req := etsi014.IDRequest{Initiator: from}
	for _, k := range got.Keys {
		req.IDs = append(req.IDs, k.ID)
	}
	return got.Keys, req
}

// fetches checks that a target gets the same keys, once.
func (s *site) fetches(t *testing.T, target etsi014.SAEID, req etsi014.IDRequest,
	want []etsi014.Key) {
	t.Helper()
	who := etsi014.Caller{SAE: target}
	got, err := s.KME().KeysByID(t.Context(), who, req)
	if err != nil {
		t.Fatalf("KeysByID of %s: %v", target, err)
	}
	for i, k := range got.Keys {
		if k.ID != want[i].ID || string(k.Bits.Expose()) != string(want[i].Bits.Expose()) {
			t.Fatalf("key %d differs between initiator and %s", i, target)
		}
	}
	if _, err := s.KME().KeysByID(t.Context(), who, req); !errors.Is(err, etsi014.ErrUnknownKey) {
		t.Fatalf("second fetch of %s: %v, want ErrUnknownKey", target, err)
	}
}

// TestLoopback: SAEs of one KME get keys from its own pool, each role once,
// without any link; status and audit log name the source; a restart ends what
// was not fetched, and no key or key_ID comes twice.
func TestLoopback(t *testing.T) {
	s := alone(t)
	s.cfg.EpochTurn = 20 * time.Millisecond // under the load of the test
	s.start(t)
	s.stored(t, "one", "two", 1000)
	st, err := s.KME().Status(t.Context(), etsi014.Caller{SAE: "one"}, "two")
	want := map[string]any{"quietline_simulated": true, "quietline_loopback": true}
	if diff := cmp.Diff(want, st.Extension); err != nil || diff != "" || st.SourceKME != "kme-a" ||
		st.TargetKME != "kme-a" {
		t.Fatalf("Status: %+v, %v (-want +got)\n%s", st, err, diff)
	}
	if n := len(s.Stats().Links); n != 0 {
		t.Errorf("the unused pool is listed among %d links", n)
	}
	seen := map[string]bool{}
	note := func(keys []etsi014.Key) {
		t.Helper()
		for _, k := range keys {
			if seen[k.ID.String()] || seen[string(k.Bits.Expose())] {
				t.Fatal("key or key_ID came twice")
			}
			seen[k.ID.String()], seen[string(k.Bits.Expose())] = true, true
		}
	}
	for range 2 {
		pair, ids := s.draws(t, "one", 5, 256, "two")
		both, bothIDs := s.draws(t, "two", 3, 1000, "one", "three")
		much, muchIDs := s.draws(t, "one", 128, 4096, "three")
		lost, lostIDs := s.draws(t, "one", 1, 256, "two")
		for _, keys := range [][]etsi014.Key{pair, both, much, lost} {
			note(keys)
		}
		for who, want := range map[etsi014.SAEID]error{"three": etsi014.ErrDenied,
			"one": etsi014.ErrRequest, "stranger": etsi014.ErrDenied} {
			if _, err := s.KME().KeysByID(t.Context(), etsi014.Caller{SAE: who},
				ids); !errors.Is(err, want) {
				t.Errorf("%s fetches what is two's: %v, want %v", who, err, want)
			}
		}
		s.fetches(t, "two", ids, pair)
		s.fetches(t, "one", bothIDs, both)
		s.fetches(t, "three", bothIDs, both)
		s.fetches(t, "three", muchIDs, much)
		s.stop(t)
		s.start(t)
		if _, err := s.KME().KeysByID(t.Context(), etsi014.Caller{SAE: "two"},
			lostIDs); !errors.Is(err, etsi014.ErrUnknownKey) {
			t.Errorf("fetch across a restart: %v, want ErrUnknownKey", err)
		}
	}
	s.draws(t, "one", 1, 256, "two")
	l := s.Stats().Links[0]
	if l.ID != kms.Loopback || !l.Ledger.Balanced() || l.Ledger.Delivered == 0 || l.Ledger.Tag != 0 {
		t.Errorf("the pool in Stats: %+v", l)
	}
	slots := map[string]int{}
	for rec, err := range s.Audit(t.Context(), 0) {
		if err != nil {
			t.Fatal(err)
		}
		for _, l := range audit.Lines(rec) {
			if l.Slots > 0 && l.SAE != "" && l.Link == kms.Loopback {
				slots[l.Action+" "+string(l.SAE)] += l.Slots
			}
		}
	}
	told := map[string]int{
		"deliver to initiator one": 2*(5+128*16+1) + 1, "deliver to initiator two": 2 * 3 * 4,
		"deliver to target two": 2 * 5, "deliver to target one": 2 * 3 * 4,
		"deliver to target three": 2 * (3*4 + 128*16),
	}
	for what, n := range told {
		if slots[what] != n {
			t.Errorf("the audit log tells of %d slots: %s, want %d", slots[what], what, n)
		}
	}
}

// TestLoopbackWhileThePeerIsAway: the pool needs no link.
func TestLoopbackWhileThePeerIsAway(t *testing.T) {
	a, _ := newPair(t, 4096)
	a.start(t)
	keys, ids := a.draws(t, "sae-a", 2, 256, "sae-a2")
	a.fetches(t, "sae-a2", ids, keys)
	if _, err := a.KME().Keys(t.Context(), etsi014.Caller{SAE: "sae-a"}, etsi014.KeyRequest{
		Targets: []etsi014.SAEID{"sae-b"}}); !errors.Is(err, etsi014.ErrEmpty) {
		t.Errorf("keys for the other site while it is away: %v", err)
	}
}

// TestTargetsAtBothSites: one key for SAEs of both KMEs comes from the link;
// each KME answers its own, once.
func TestTargetsAtBothSites(t *testing.T) {
	a, b := newPair(t, 4096)
	startPair(t, a, b)
	a.driver.allow(5)
	b.driver.allow(5)
	a.stored(t, "sae-a", "sae-b", 100)
	keys, ids := a.draws(t, "sae-a", 4, 256, "sae-a2", "sae-b", "sae-b2")
	a.fetches(t, "sae-a2", ids, keys)
	b.fetches(t, "sae-b2", ids, keys)
	b.fetches(t, "sae-b", ids, keys)
	for _, s := range []*site{a, b} {
		if st := s.Stats(); len(st.Links) != 1 || !st.Links[0].Ledger.Balanced() {
			t.Errorf("%s: links %+v", s.cfg.KME, st.Links)
		}
	}
}

// TestTwoOtherKMEs: a key that would need two links is refused with the reason.
func TestTwoOtherKMEs(t *testing.T) {
	a, _ := newPair(t, 4096)
	other := newStream(2, 1, 4096)
	a.cfg.Peers = append(a.cfg.Peers, Peer{ID: "kme-c", Addr: "127.0.0.1:1"})
	a.cfg.Links = append(a.cfg.Links, Link{ID: "second", Peer: "kme-c", Driver: other})
	a.cfg.SAEs = append(a.cfg.SAEs, SAE{"sae-c", "kme-c"})
	a.start(t)
	_, err := a.KME().Keys(t.Context(), etsi014.Caller{SAE: "sae-a"},
		etsi014.KeyRequest{Targets: []etsi014.SAEID{"sae-b", "sae-c"}})
	if !errors.Is(err, etsi014.ErrRequest) || err.Error() != "slave SAEs at two other KMEs: a key "+
		"comes from the link with one of them, and the other KME has no copy of it; ask for each "+
		"KME by itself" {
		t.Errorf("keys for two other KMEs: %v", err)
	}
}

// TestLoopbackIsNoLink: the name is kept.
func TestLoopbackIsNoLink(t *testing.T) {
	a, _ := newPair(t, 4096)
	a.cfg.Links[0].ID = kms.Loopback
	if err := a.cfg.Validate(); err == nil {
		t.Error("a link may be called loopback")
	}
}
