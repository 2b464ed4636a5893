package kms

import (
	"context"
	"errors"
	"slices"
	"sync/atomic"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/quietline/quietline/etsi014"
)

type (
	ask = etsi014.KeyRequest
	to  = []etsi014.SAEID
)

// recorder is a pool that notes what it was asked.
type recorder struct {
	shape   Shape
	n       int
	pair    [2]etsi014.SAEID // initiator and target of a fetch
	fetched []etsi014.KeyID
	refused map[string]int
	reread  atomic.Int64
	err     error
}

func (r *recorder) Draw(_ context.Context, s Shape, n int) ([]etsi014.Key, error) {
	r.shape, r.n = s, n
	return make([]etsi014.Key, n), r.err
}

func (r *recorder) Fetch(_ context.Context, i, t etsi014.SAEID, ids []etsi014.KeyID) (
	[]etsi014.Key, error) {
	r.pair, r.fetched = [2]etsi014.SAEID{i, t}, ids
	return make([]etsi014.Key, len(ids)), r.err
}

func (r *recorder) Stock(_ context.Context, s Shape) (Stock, error) {
	return Stock{Keys: 500, Simulated: true, Loopback: slices.Equal(s.Targets, to{"a2"})}, r.err
}

func (r *recorder) Reread(_ etsi014.SAEID, n int)          { r.reread.Add(int64(n)) }
func (r *recorder) Refused(_ etsi014.SAEID, reason string) { r.refused[reason]++ }

func newTestKME(t *testing.T) (*KME, *recorder) {
	t.Helper()
	r := &recorder{refused: map[string]int{}}
	k, err := NewKME("here", map[etsi014.SAEID]etsi014.KMEID{"a": "here", "a2": "here", "b": "there",
		"c": "there", "d": "there", "e": "there", "f": "there", "g": "there"}, Limits{}, r)
	if err != nil {
		t.Fatal(err)
	}
	return k, r
}

func TestKeysAsksThePool(t *testing.T) {
	const bad = "bad request"
	for name, c := range map[string]struct {
		who    etsi014.SAEID
		req    etsi014.KeyRequest
		bits   int
		n      int
		want   error
		reason string
	}{
		"defaults":       {"a", ask{Targets: to{"b"}}, 256, 1, nil, ""},
		"number, size":   {"a", ask{Targets: to{"b"}, Number: 128, SizeBits: 4096}, 4096, 128, nil, ""},
		"smallest":       {"a", ask{Targets: to{"b"}, SizeBits: 64}, 64, 1, nil, ""},
		"many targets":   {"a", ask{Targets: to{"b", "c", "d", "e", "f"}}, 256, 1, nil, ""},
		"one local":      {"a", ask{Targets: to{"a2", "b"}}, 256, 1, nil, ""},
		"too many":       {"a", ask{Targets: to{"b"}, Number: 129}, 0, 0, etsi014.ErrRequest, bad},
		"negative":       {"a", ask{Targets: to{"b"}, Number: -1}, 0, 0, etsi014.ErrRequest, bad},
		"odd size":       {"a", ask{Targets: to{"b"}, SizeBits: 257}, 0, 0, etsi014.ErrSize, bad},
		"too small":      {"a", ask{Targets: to{"b"}, SizeBits: 56}, 0, 0, etsi014.ErrRequest, bad},
		"too large":      {"a", ask{Targets: to{"b"}, SizeBits: 4104}, 0, 0, etsi014.ErrRequest, bad},
		"no target":      {"a", ask{}, 0, 0, etsi014.ErrRequest, bad},
		"target twice":   {"a", ask{Targets: to{"b", "b"}}, 0, 0, etsi014.ErrRequest, bad},
		"itself":         {"a", ask{Targets: to{"a"}}, 0, 0, etsi014.ErrRequest, bad},
		"unknown target": {"a", ask{Targets: to{"x"}}, 0, 0, etsi014.ErrRequest, bad},
		"six targets": {"a", ask{Targets: to{"b", "c", "d", "e", "f", "g"}}, 0, 0,
			etsi014.ErrRequest, bad},
		"mandatory": {"a", ask{Targets: to{"b"}, Mandatory: []etsi014.Extension{{"x": 1}}}, 0, 0,
			etsi014.ErrMandatory, bad},
		"another KME's": {"b", ask{Targets: to{"a"}}, 0, 0, etsi014.ErrDenied, "denied"},
		"a stranger":    {"x", ask{Targets: to{"a"}}, 0, 0, etsi014.ErrDenied, "denied"},
	} {
		k, pool := newTestKME(t)
		got, err := k.Keys(t.Context(), etsi014.Caller{SAE: c.who}, c.req)
		if !errors.Is(err, c.want) || len(got.Keys) != c.n {
			t.Errorf("%s: %d keys, %v; want %v", name, len(got.Keys), err, c.want)
		}
		if want := (Shape{c.who, c.req.Targets, c.bits}); c.n > 0 && !cmp.Equal(pool.shape, want) {
			t.Errorf("%s: the pool was asked for %+v, want %+v", name, pool.shape, want)
		}
		if c.reason == "" != (len(pool.refused) == 0) || c.reason != "" && pool.refused[c.reason] != 1 {
			t.Errorf("%s: counted as refused: %v, want %q", name, pool.refused, c.reason)
		}
	}
}

func TestKeysByIDAsksThePool(t *testing.T) {
	ids := make([]etsi014.KeyID, 129)
	for i := range ids {
		ids[i][0] = byte(i)
	}
	for name, c := range map[string]struct {
		who, from etsi014.SAEID
		ids       []etsi014.KeyID
		pool      error
		want      error
		reason    string
	}{
		"one":            {"a", "b", ids[:1], nil, nil, ""},
		"as many as may": {"a", "b", ids[:128], nil, nil, ""},
		"from beside":    {"a", "a2", ids[:1], nil, nil, ""}, // of a key for several targets
		"none":           {"a", "b", nil, nil, etsi014.ErrRequest, "bad request"},
		"too many":       {"a", "b", ids, nil, etsi014.ErrRequest, "bad request"},
		"from nobody": {"a", "x", ids[:1], etsi014.ErrUnknownKey, etsi014.ErrUnknownKey,
			"unknown key"},
		"from itself":   {"a", "a", ids[:1], nil, etsi014.ErrRequest, "bad request"},
		"another KME's": {"b", "a", ids[:1], nil, etsi014.ErrDenied, "denied"},
		"a stranger":    {"x", "b", ids[:1], nil, etsi014.ErrDenied, "denied"},
		"not there": {"a", "b", ids[:1], etsi014.ErrUnknownKey, etsi014.ErrUnknownKey,
			"unknown key"},
		"somebody else's": {"a", "b", ids[:1], etsi014.ErrDenied, etsi014.ErrDenied, "denied"},
		"pool is down":    {"a", "b", ids[:1], etsi014.ErrDown, etsi014.ErrDown, ""},
	} {
		k, pool := newTestKME(t)
		pool.err = c.pool
		got, err := k.KeysByID(t.Context(), etsi014.Caller{SAE: c.who},
			etsi014.IDRequest{Initiator: c.from, IDs: c.ids})
		if !errors.Is(err, c.want) || c.want == nil && len(got.Keys) != len(c.ids) {
			t.Errorf("%s: %d keys, %v; want %v", name, len(got.Keys), err, c.want)
		}
		asked := c.want == nil || c.pool != nil
		if asked && (pool.pair != [2]etsi014.SAEID{c.from, c.who} || !cmp.Equal(pool.fetched, c.ids)) ||
			!asked && pool.fetched != nil {
			t.Errorf("%s: the pool was asked for %d IDs of %v", name, len(pool.fetched), pool.pair)
		}
		want := map[string]int{}
		if c.reason != "" {
			want[c.reason] = 1
		}
		if diff := cmp.Diff(want, pool.refused); diff != "" {
			t.Errorf("%s: counted as refused (-want +got):\n%s", name, diff)
		}
	}
}

func TestStatusRefuses(t *testing.T) {
	for name, c := range map[string]struct {
		who, peer etsi014.SAEID
		pool      error
		want      error
		reason    string
	}{
		"itself":        {"a", "a", nil, etsi014.ErrRequest, "bad request"},
		"unknown":       {"a", "x", nil, etsi014.ErrRequest, "bad request"},
		"another KME's": {"b", "a", nil, etsi014.ErrDenied, "denied"},
		"no link":       {"a", "b", etsi014.ErrRequest, etsi014.ErrRequest, "bad request"},
		"down":          {"a", "b", etsi014.ErrDown, etsi014.ErrDown, ""},
	} {
		k, pool := newTestKME(t)
		pool.err = c.pool
		if _, err := k.Status(t.Context(), etsi014.Caller{SAE: c.who}, c.peer); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
		if c.reason == "" != (len(pool.refused) == 0) || c.reason != "" && pool.refused[c.reason] != 1 {
			t.Errorf("%s: counted as refused: %v, want %q", name, pool.refused, c.reason)
		}
	}
}

// TestSameKME: two SAEs of one site are served like any others, and the status
// says where such keys come from.
func TestSameKME(t *testing.T) {
	k, pool := newTestKME(t)
	keys, err := k.Keys(t.Context(), etsi014.Caller{SAE: "a"}, ask{Targets: to{"a2"}, Number: 2})
	if err != nil || len(keys.Keys) != 2 || !slices.Equal(pool.shape.Targets, to{"a2"}) {
		t.Errorf("Keys: %v, asked for %+v", err, pool.shape)
	}
	st, err := k.Status(t.Context(), etsi014.Caller{SAE: "a"}, "a2")
	want := map[string]any{"quietline_simulated": true, "quietline_loopback": true}
	if diff := cmp.Diff(want, st.Extension); err != nil || diff != "" || st.TargetKME != "here" {
		t.Errorf("Status: %+v, %v (-want +got)\n%s", st, err, diff)
	}
}

// TestStatusNumbers: the limits that are set are the limits that are told, and
// more in stock than one request may draw is told too.
func TestStatusNumbers(t *testing.T) {
	r := &recorder{refused: map[string]int{}}
	k, err := NewKME("here", map[etsi014.SAEID]etsi014.KMEID{"a": "here", "b": "there"},
		Limits{KeySizeBits: 512, MinKeySizeBits: 128, MaxKeySizeBits: 1024, MaxKeys: 1000,
			MaxTargets: 2}, r)
	if err != nil {
		t.Fatal(err)
	}
	got, err := k.Status(t.Context(), etsi014.Caller{SAE: "a"}, "b")
	want := etsi014.Status{SourceKME: "here", TargetKME: "there", Initiator: "a", Target: "b",
		KeySizeBits: 512, StoredKeys: 500, MaxKeys: 1000, MaxKeysPerRequest: 1000,
		MaxKeySizeBits: 1024, MinKeySizeBits: 128, MaxTargets: 2,
		Extension: map[string]any{"quietline_simulated": true}}
	if diff := cmp.Diff(want, got); err != nil || diff != "" {
		t.Errorf("Status: %v (-want +got):\n%s", err, diff)
	}
}

func TestNewKMERefusesLimits(t *testing.T) {
	if _, err := NewKME("here", nil, Limits{MaxKeys: -1}, nil); err == nil {
		t.Error("a KME with no keys per request is made")
	}
}

// TestShortageIsNoRefusal: an empty pool is not the caller's fault.
func TestShortageIsNoRefusal(t *testing.T) {
	k, pool := newTestKME(t)
	pool.err = &etsi014.Error{Kind: etsi014.ErrEmpty}
	if _, err := k.Keys(t.Context(), etsi014.Caller{SAE: "a"},
		ask{Targets: to{"b"}}); !errors.Is(err, etsi014.ErrEmpty) {
		t.Errorf("Keys: %v", err)
	}
	if len(pool.refused) != 0 {
		t.Errorf("counted as refused: %v", pool.refused)
	}
}

func TestStatus(t *testing.T) {
	k, _ := newTestKME(t)
	got, err := k.Status(t.Context(), etsi014.Caller{SAE: "a"}, "b")
	want := etsi014.Status{SourceKME: "here", TargetKME: "there", Initiator: "a", Target: "b",
		KeySizeBits: 256, StoredKeys: 500, MaxKeys: 500, MaxKeysPerRequest: 128,
		MaxKeySizeBits: 4096, MinKeySizeBits: 64, MaxTargets: 4,
		Extension: map[string]any{"quietline_simulated": true}}
	if diff := cmp.Diff(want, got); err != nil || diff != "" {
		t.Errorf("Status: %v (-want +got):\n%s", err, diff)
	}
}

// TestStates: the only steps are those of the life cycle.
func TestStates(t *testing.T) {
	legal := map[[2]State]bool{
		{StateNew, StateConfirmed}: true, {StateConfirmed, StateOpen}: true,
		{StateOpen, StateClosed}: true, {StateClosed, StateFinished}: true,
		{StateNew, StateVoid}: true, {StateConfirmed, StateVoid}: true, {StateOpen, StateVoid}: true,
	}
	for from := State(0); from <= StateVoid+1; from++ {
		for to := State(0); to <= StateVoid+1; to++ {
			if from.May(to) != legal[[2]State{from, to}] {
				t.Errorf("from %s to %s: %v", from, to, from.May(to))
			}
		}
	}
}

func TestLimitsAreChecked(t *testing.T) {
	for name, l := range map[string]Limits{
		"odd size":           {KeySizeBits: 255},
		"smallest above all": {MinKeySizeBits: 512},
		"largest below all":  {MaxKeySizeBits: 128},
		"too large":          {MaxKeySizeBits: 1<<20 + 8},
		"no keys":            {MaxKeys: -1},
		"too many targets":   {MaxTargets: 16},
	} {
		if l.Validate() == nil {
			t.Errorf("%s: %+v passes", name, l)
		}
	}
	if err := (Limits{}).Validate(); err != nil {
		t.Errorf("defaults: %v", err)
	}
}
