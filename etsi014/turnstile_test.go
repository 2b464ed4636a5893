package etsi014

import (
	"context"
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

var (
	here  = netip.MustParsePrefix("192.0.2.1/32")
	there = netip.MustParsePrefix("192.0.2.2/32")
)

// TestTurnstile: of one address so many are let through at a time, in the order
// they came; another address does not wait.
func TestTurnstile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		turns := turnstile{most: 2}
		var mu sync.Mutex
		var order []int
		for i := range 6 {
			go func() {
				if !turns.enter(t.Context(), here, nil) {
					t.Error("not let through")
				}
				mu.Lock()
				order = append(order, i)
				mu.Unlock()
				time.Sleep(time.Second)
				turns.leave(here)
			}()
			synctest.Wait()
		}
		if !turns.enter(t.Context(), there, nil) {
			t.Error("another address waits")
		}
		turns.leave(there)
		for _, want := range []int{2, 4, 6} {
			mu.Lock()
			if len(order) != want {
				t.Errorf("%d are through, want %d", len(order), want)
			}
			mu.Unlock()
			time.Sleep(time.Second)
			synctest.Wait()
		}
		for i, got := range order {
			if got/2 != i/2 { // two at a time
				t.Errorf("order %v", order)
				break
			}
		}
		if len(turns.lane) != 0 {
			t.Errorf("%d lanes are left", len(turns.lane))
		}
	})
}

// TestTurnstileGivesUp: who goes away while waiting takes no turn with him.
func TestTurnstileGivesUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		turns := turnstile{most: 1}
		turns.enter(t.Context(), here, nil)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		gone := make(chan struct{})
		results := make(chan bool, 2)
		go func() { results <- turns.enter(ctx, here, nil) }()
		go func() { results <- turns.enter(t.Context(), here, gone) }()
		synctest.Wait()
		close(gone)
		for range 2 {
			if <-results {
				t.Error("let through beyond the bound")
			}
		}
		turns.leave(here)
		if !turns.enter(t.Context(), here, nil) {
			t.Error("the turn was lost")
		}
		turns.leave(here)
		if len(turns.lane) != 0 {
			t.Errorf("%d lanes are left", len(turns.lane))
		}
	})
}
