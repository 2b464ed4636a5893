package kms

import (
	"context"
	"errors"
	"math"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/quietline/quietline/etsi014"
)

// tank is a pool of 256-bit slots that grants as kms/peer does: what is granted
// to one initiator no other can draw, and grants ahead of demand are at most a
// quarter of all.
type tank struct {
	mu      sync.Mutex
	room    int                   // slots granted to nobody
	ready   map[etsi014.SAEID]int // granted ahead, not drawn
	drawn   map[etsi014.SAEID]int // keys
	refused map[string]int
	hold    time.Duration // how long a draw waits for its grant
	fail    error         // of the next draws, after they were drawn
}

func newTank(slots int) *tank {
	return &tank{room: slots, ready: map[etsi014.SAEID]int{}, drawn: map[etsi014.SAEID]int{},
		refused: map[string]int{}}
}

func (k *tank) Draw(ctx context.Context, s Shape, n int) ([]etsi014.Key, error) {
	time.Sleep(k.hold)
	k.mu.Lock()
	defer k.mu.Unlock()
	need := n * KeySlots(s.SizeBits, slotBytes)
	if need > k.room+k.ready[s.Initiator] {
		return nil, &etsi014.Error{Kind: etsi014.ErrEmpty, RetryAfter: time.Second}
	}
	ready := min(need, k.ready[s.Initiator])
	k.ready[s.Initiator] -= ready
	k.room -= need - ready
	k.drawn[s.Initiator] += n
	all := 0
	for _, r := range k.ready {
		all += r
	}
	if ahead := (k.room+all)/4 - all; ahead > 0 {
		k.ready[s.Initiator] += ahead
		k.room -= ahead
	}
	if k.fail != nil {
		return nil, k.fail
	}
	return make([]etsi014.Key, n), nil
}

func (k *tank) Fetch(_ context.Context, _, _ etsi014.SAEID, ids []etsi014.KeyID) (
	[]etsi014.Key, error) {
	return make([]etsi014.Key, len(ids)), nil
}

func (k *tank) Stock(_ context.Context, s Shape) (Stock, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return Stock{Keys: (k.room + k.ready[s.Initiator]) / KeySlots(s.SizeBits, slotBytes)}, nil
}

func (k *tank) Reread(etsi014.SAEID, int) {}
func (k *tank) Refused(_ etsi014.SAEID, reason string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.refused[reason]++
}

func withAllowances(t *testing.T, pool Pool, a map[etsi014.SAEID]Allowance) *KME {
	t.Helper()
	k, err := NewKME("here", map[etsi014.SAEID]etsi014.KMEID{"line": "here", "hungry": "here",
		"greedy": "here", "far": "there", "else": "elsewhere"}, Limits{Allowances: a}, pool)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func drawKeys(ctx context.Context, k *KME, who etsi014.SAEID, n, bits int) error {
	_, err := k.Keys(ctx, etsi014.Caller{SAE: who}, ask{Targets: to{"far"}, Number: n, SizeBits: bits})
	return err
}

// wantRefusal checks the 503 of an allowance: its kind, cause and waiting time.
func wantRefusal(t *testing.T, err, kind, cause error, wait time.Duration) {
	t.Helper()
	e := new(etsi014.Error)
	if !errors.As(err, &e) || !errors.Is(e.Kind, kind) || !errors.Is(err, cause) ||
		(e.RetryAfter-wait).Abs() > time.Microsecond || e.Message == "" {
		t.Fatalf("answer: %v (%+v), want %v for %v, again in %v", err, e, kind, cause, wait)
	}
}

func TestCallRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		pool := newTank(1000)
		k := withAllowances(t, pool, map[etsi014.SAEID]Allowance{"hungry": {Calls: 4}})
		who := etsi014.Caller{SAE: "hungry"}
		for _, call := range []func() error{
			func() error { _, err := k.Status(t.Context(), who, "far"); return err },
			func() error { return drawKeys(t.Context(), k, "hungry", 1, 256) },
			func() error {
				_, err := k.KeysByID(t.Context(), who,
					etsi014.IDRequest{Initiator: "far", IDs: make([]etsi014.KeyID, 1)})
				return err
			},
		} {
			for i := range 4 {
				if err := call(); err != nil {
					t.Fatalf("call %d: %v", i, err)
				}
			}
			wantRefusal(t, call(), etsi014.ErrDown, ErrRate, time.Second/4)
			time.Sleep(time.Second / 4)
			if err := call(); err != nil {
				t.Errorf("after the wait: %v", err)
			}
			if err := drawKeys(t.Context(), k, "line", 1, 256); err != nil {
				t.Errorf("another SAE: %v", err)
			}
			time.Sleep(time.Hour) // fills the bucket, and no more than that
		}
		if diff := cmp.Diff(map[string]int{"rate": 3}, pool.refused); diff != "" {
			t.Errorf("counted as refused (-want +got):\n%s", diff)
		}
	})
}

// TestBadCallsCount: who sends nonsense uses up its rate too.
func TestBadCallsCount(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := withAllowances(t, newTank(10), map[etsi014.SAEID]Allowance{"hungry": {Calls: 1}})
		if err := drawKeys(t.Context(), k, "hungry", -1, 256); !errors.Is(err, etsi014.ErrRequest) {
			t.Fatalf("first: %v", err)
		}
		wantRefusal(t, drawKeys(t.Context(), k, "hungry", 1, 256), etsi014.ErrDown, ErrRate, time.Second)
	})
}

func TestKeyRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := withAllowances(t, newTank(1000), map[etsi014.SAEID]Allowance{"hungry": {Keys: 5}})
		if err := drawKeys(t.Context(), k, "hungry", 20, 256); err != nil {
			t.Fatalf("more than a second's worth from a full bucket: %v", err)
		}
		err := drawKeys(t.Context(), k, "hungry", 1, 256)
		wantRefusal(t, err, etsi014.ErrEmpty, ErrRate, 3200*time.Millisecond) // 15 owed and 1 at 5/s
		time.Sleep(3200 * time.Millisecond)
		if err := drawKeys(t.Context(), k, "hungry", 1, 256); err != nil {
			t.Errorf("after the wait: %v", err)
		}
	})
}

// TestEmptyDrawCostsNothing: keys that were not to be had are not counted, keys
// of an answer that was lost are.
func TestEmptyDrawCostsNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		pool := newTank(10)
		k := withAllowances(t, pool, map[etsi014.SAEID]Allowance{"hungry": {Keys: 5, Share: 1}})
		for range 3 {
			err := drawKeys(t.Context(), k, "hungry", 11, 256)
			if !errors.Is(err, etsi014.ErrEmpty) || errors.Is(err, ErrRate) {
				t.Fatalf("empty pool: %v", err)
			}
		}
		pool.fail = &etsi014.Error{Kind: etsi014.ErrDown, Cause: context.Canceled}
		if err := drawKeys(t.Context(), k, "hungry", 5, 256); !errors.Is(err, context.Canceled) {
			t.Fatalf("lost answer: %v", err)
		}
		pool.fail = nil
		err := drawKeys(t.Context(), k, "hungry", 1, 256)
		wantRefusal(t, err, etsi014.ErrEmpty, ErrRate, time.Second/5)
	})
}

func TestShare(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		pool := newTank(100)
		k := withAllowances(t, pool, map[etsi014.SAEID]Allowance{
			"hungry": {Share: 0.25, Window: 10 * time.Second}})
		eat := func() (n int) {
			for drawKeys(t.Context(), k, "hungry", 1, 256) == nil {
				pool.mu.Lock()
				pool.room += pool.ready["hungry"] // the figures are plainer without
				pool.ready["hungry"] = 0
				pool.mu.Unlock()
				n++
			}
			return n
		}
		if n := eat(); n != 25 {
			t.Errorf("%d keys of 100 drawn in the first window, want 25", n)
		}
		time.Sleep(4 * time.Second)
		wantRefusal(t, drawKeys(t.Context(), k, "hungry", 1, 256), etsi014.ErrEmpty, ErrQuota,
			6*time.Second)
		pool.room += 40 // 140 came in this window, 25 are drawn
		if n := eat(); n != 10 {
			t.Errorf("%d keys drawn of 40 new ones, want 10", n)
		}
		time.Sleep(6 * time.Second)
		if n := eat(); n != 26 {
			t.Errorf("%d keys of 105 drawn in the second window, want 26", n)
		}
		if err := drawKeys(t.Context(), k, "line", 79, 256); err != nil {
			t.Errorf("an SAE without a share: %v", err)
		}
	})
}

// TestShareOfLargeKeys: a share is of slots, whatever the keys' size.
func TestShareOfLargeKeys(t *testing.T) {
	k := withAllowances(t, newTank(128), map[etsi014.SAEID]Allowance{"hungry": {Share: 0.25}})
	if err := drawKeys(t.Context(), k, "hungry", 2, 4096); err != nil {
		t.Fatalf("a quarter: %v", err)
	}
	if err := drawKeys(t.Context(), k, "hungry", 1, 64); !errors.Is(err, ErrQuota) {
		t.Errorf("more than a quarter: %v", err)
	}
}

// TestHungryLeavesTheLine: whatever two hungry clients ask for at once, and
// with all that is granted to them ahead, the line gets its reserve.
func TestHungryLeavesTheLine(t *testing.T) {
	const reserve = 40
	for seed := range uint64(50) {
		synctest.Test(t, func(t *testing.T) {
			r := rand.New(rand.NewPCG(seed, 1))
			pool := newTank(reserve + r.IntN(1000))
			pool.hold = time.Millisecond
			k := withAllowances(t, pool, map[etsi014.SAEID]Allowance{"line": {Reserve: reserve}})
			start := pool.room
			var wg sync.WaitGroup
			for c := range 8 {
				who := []etsi014.SAEID{"hungry", "greedy"}[c%2]
				n, bits := 1+r.IntN(128), 64*(1+r.IntN(64))
				wg.Go(func() {
					for ; n > 0; n /= 2 {
						for drawKeys(t.Context(), k, who, n, bits) == nil {
						}
					}
				})
			}
			wg.Wait()
			if start > 2*reserve && pool.drawn["hungry"]+pool.drawn["greedy"] == 0 {
				t.Errorf("seed %d: of %d keys the hungry got none", seed, start)
			}
			if pool.refused["reserve"] == 0 {
				t.Errorf("seed %d: no refusal is counted: %v", seed, pool.refused)
			}
			for i := range reserve {
				if err := drawKeys(t.Context(), k, "line", 1, 256); err != nil {
					t.Fatalf("seed %d: of %d keys, key %d of the line's reserve: %v", seed, start, i, err)
				}
			}
		})
	}
}

// TestWithoutReserveTheLineStarves: the test above is not vacuous.
func TestWithoutReserveTheLineStarves(t *testing.T) {
	k := withAllowances(t, newTank(100), nil)
	for n := 64; n > 0; n /= 2 {
		for drawKeys(t.Context(), k, "hungry", n, 256) == nil {
		}
	}
	if err := drawKeys(t.Context(), k, "line", 1, 256); !errors.Is(err, etsi014.ErrEmpty) {
		t.Errorf("line: %v", err)
	}
}

// TestStatusLeavesTheReserveOut: what others keep cannot be drawn, so it is not
// told.
func TestStatusLeavesTheReserveOut(t *testing.T) {
	k := withAllowances(t, newTank(100), map[etsi014.SAEID]Allowance{"line": {Reserve: 30},
		"greedy": {Reserve: 300}})
	for who, want := range map[etsi014.SAEID]int{"hungry": 0, "line": 0, "greedy": 45} {
		got, err := k.Status(t.Context(), etsi014.Caller{SAE: who}, "far")
		if err != nil || got.StoredKeys != want {
			t.Errorf("%s: %d keys, %v; want %d", who, got.StoredKeys, err, want)
		}
		err = drawKeys(t.Context(), k, who, want+1, 256)
		if !errors.Is(err, ErrReserve) {
			t.Errorf("%s: one more than told: %v", who, err)
		}
		if want > 0 {
			if err := drawKeys(t.Context(), k, who, want, 256); err != nil {
				t.Errorf("%s: as many as told: %v", who, err)
			}
		}
	}
}

func TestAllowancesAreChecked(t *testing.T) {
	for name, a := range map[string]Allowance{
		"calls": {Calls: -1}, "calls NaN": {Calls: math.NaN()}, "calls without end": {Calls: math.Inf(1)},
		"keys": {Keys: -1}, "keys NaN": {Keys: math.NaN()}, "keys without end": {Keys: math.Inf(1)},
		"share": {Share: -0.1}, "all and more": {Share: 1.1}, "share NaN": {Share: math.NaN()},
		"window": {Window: -1}, "long window": {Window: 25 * time.Hour},
		"reserve": {Reserve: -1}, "large reserve": {Reserve: 1<<20 + 1},
		"reread": {Reread: -1}, "long reread": {Reread: time.Minute + 1},
	} {
		if (Limits{Allowances: map[etsi014.SAEID]Allowance{"a": a}}).Validate() == nil {
			t.Errorf("%s: %+v passes", name, a)
		}
	}
	for _, a := range []Allowance{{},
		{Calls: 0.1, Keys: 1e6, Share: 1, Window: time.Hour, Reserve: 1}} {
		if err := a.Validate(); err != nil {
			t.Errorf("%+v: %v", a, err)
		}
	}
	for _, sae := range []etsi014.SAEID{"there", "nobody"} {
		_, err := NewKME("here", map[etsi014.SAEID]etsi014.KMEID{"there": "there"},
			Limits{Allowances: map[etsi014.SAEID]Allowance{sae: {Calls: 1}}}, newTank(0))
		if err == nil {
			t.Errorf("%s may have an allowance of a KME that does not serve it", sae)
		}
	}
}
