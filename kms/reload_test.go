package kms

import (
	"bytes"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/quietline/quietline/etsi014"
)

// TestReload: whom a KME serves, and how, changes as a whole or not at all.
func TestReload(t *testing.T) {
	k, _ := newTestKME(t)
	draw := func(who, target etsi014.SAEID, n int) error {
		c, err := k.Keys(t.Context(), etsi014.Caller{SAE: who}, ask{Targets: to{target}, Number: n})
		c.Clear()
		return err
	}
	before := map[etsi014.SAEID]etsi014.KMEID{"a": "here", "b": "there"}
	after := map[etsi014.SAEID]etsi014.KMEID{"a": "here", "new": "here", "far": "there"}
	foreign := Limits{Allowances: map[etsi014.SAEID]Allowance{"far": {Calls: 1}}}
	for _, tc := range []struct {
		name                      string
		saes                      map[etsi014.SAEID]etsi014.KMEID
		limits                    Limits
		ok                        bool
		toB, toFar, fromNew, nine error
	}{
		{"as at first", before, Limits{}, true, nil, etsi014.ErrRequest, etsi014.ErrDenied, nil},
		{"limits that cannot be", after, Limits{MaxKeys: -1}, false, nil, etsi014.ErrRequest,
			etsi014.ErrDenied, nil},
		{"allowance of a stranger", after, foreign, false, nil, etsi014.ErrRequest,
			etsi014.ErrDenied, nil},
		{"others", after, Limits{MaxKeys: 8}, true, etsi014.ErrRequest, nil, nil, etsi014.ErrRequest},
		{"and back", before, Limits{}, true, nil, etsi014.ErrRequest, etsi014.ErrDenied, nil},
	} {
		if err := k.Reload(tc.saes, tc.limits); (err == nil) != tc.ok {
			t.Errorf("%s: %v", tc.name, err)
		}
		far := etsi014.SAEID("far")
		if tc.toB == nil {
			far = "b"
		}
		for what, got := range map[string][2]error{
			"a for b":     {draw("a", "b", 1), tc.toB},
			"a for far":   {draw("a", "far", 1), tc.toFar},
			"new for far": {draw("new", far, 1), tc.fromNew},
			"nine keys":   {draw("a", far, 9), tc.nine},
		} {
			if !errors.Is(got[0], got[1]) {
				t.Errorf("%s: %s: %v, want %v", tc.name, what, got[0], got[1])
			}
		}
	}
}

// TestReloadForgivesNothing: what an SAE has taken counts after a reload, and
// what it takes is not given twice.
func TestReloadForgivesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		allow := func(calls, share float64) Limits {
			return Limits{Allowances: map[etsi014.SAEID]Allowance{"line": {Calls: calls, Share: share}}}
		}
		saes := map[etsi014.SAEID]etsi014.KMEID{"line": "here", "far": "there"}
		k, err := NewKME("here", saes, allow(4, 0.5), newTank(100))
		if err != nil {
			t.Fatal(err)
		}
		draw := func(n int) error {
			c, err := k.Keys(t.Context(), etsi014.Caller{SAE: "line"}, ask{Targets: to{"far"}, Number: n})
			c.Clear()
			return err
		}
		for i, tc := range []struct {
			limits Limits
			n      int
			want   error
		}{
			{allow(4, 0.5), 40, nil},
			{allow(4, 0.5), 40, ErrQuota},
			{allow(2, 1), 40, nil},
			{allow(2, 1), 1, nil}, // the fourth call of this second
			{allow(2, 1), 1, ErrRate},
			{Limits{}, 1, nil},
		} {
			if err := k.Reload(saes, tc.limits); err != nil {
				t.Fatal(err)
			}
			if err := draw(tc.n); !errors.Is(err, tc.want) {
				t.Errorf("draw %d: %v, want %v", i, err, tc.want)
			}
		}
	})
}

// TestReloadWipesWindows: keys stay on a shelf whose window stays.
func TestReloadWipesWindows(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k, _ := rereadKME(t, time.Second)
		saes := map[etsi014.SAEID]etsi014.KMEID{"line": "here", "far": "there"}
		window := func(d time.Duration) Limits {
			return Limits{Allowances: map[etsi014.SAEID]Allowance{"line": {Reread: d}}}
		}
		if err := fetchIDs(t.Context(), k, "line", 1, 5); err != nil {
			t.Fatal(err)
		}
		held := k.terms.Load().shelves["line"].held[etsi014.KeyID{5}].bits.Expose()
		for _, tc := range []struct {
			limits Limits
			kept   bool
			again  error
		}{
			{window(time.Second), true, nil},
			{window(2 * time.Second), false, etsi014.ErrUnknownKey},
			{Limits{}, false, etsi014.ErrUnknownKey},
		} {
			if err := k.Reload(saes, tc.limits); err != nil {
				t.Fatal(err)
			}
			if kept := !bytes.Equal(held, make([]byte, 32)); kept != tc.kept {
				t.Errorf("%+v: kept %v, want %v", tc.limits, kept, tc.kept)
			}
			if err := fetchIDs(t.Context(), k, "line", 1, 5); !errors.Is(err, tc.again) {
				t.Errorf("%+v: %v, want %v", tc.limits, err, tc.again)
			}
		}
		time.Sleep(2 * time.Second) // timers end
	})
}

// TestReloadWhileServing is for the race detector: reloads among requests of
// all kinds, none of which fails.
func TestReloadWhileServing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k, _ := rereadKME(t, time.Second)
		saes := map[etsi014.SAEID]etsi014.KMEID{"line": "here", "far": "there"}
		var done sync.WaitGroup
		for worker := range byte(4) {
			done.Go(func() {
				for i := range byte(50) {
					_, errS := k.Status(t.Context(), etsi014.Caller{SAE: "line"}, "far")
					if err := errors.Join(errS, fetchIDs(t.Context(), k, "line", 1, 50*worker+i)); err != nil {
						t.Errorf("worker %d, request %d: %v", worker, i, err)
					}
				}
			})
		}
		for i := range 50 {
			limits := Limits{Allowances: map[etsi014.SAEID]Allowance{"line": {
				Reread: time.Second, Reserve: i, Calls: 1e6 + float64(i)}}}
			if err := k.Reload(saes, limits); err != nil {
				t.Error(err)
			}
		}
		done.Wait()
		time.Sleep(time.Second) // timers end
	})
}
