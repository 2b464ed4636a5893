package etsi014

import (
	"context"
	"net/netip"
	"slices"
	"sync"
)

// turnstile bounds how many handshakes of one address are under way: those
// beyond wait, first come first served, so that a flood waits for itself and a
// client of another address for nobody.
type turnstile struct {
	most int
	mu   sync.Mutex // guards lane
	lane map[netip.Prefix]*lane
}

type lane struct {
	under   int
	waiting []chan struct{} // closed when it is their turn
}

// enter waits for a turn; false if the connection was gone or ctx ended first.
func (t *turnstile) enter(ctx context.Context, from netip.Prefix, gone <-chan struct{}) bool {
	t.mu.Lock()
	l := t.lane[from]
	if l == nil {
		if t.lane == nil {
			t.lane = make(map[netip.Prefix]*lane)
		}
		l = new(lane)
		t.lane[from] = l
	}
	if l.under < t.most {
		l.under++
		t.mu.Unlock()
		return true
	}
	turn := make(chan struct{})
	l.waiting = append(l.waiting, turn)
	t.mu.Unlock()
	select {
	case <-turn:
		return true
	case <-gone:
	case <-ctx.Done():
	}
	t.mu.Lock()
	i := slices.Index(l.waiting, turn)
	if i >= 0 {
		l.waiting = slices.Delete(l.waiting, i, i+1)
	}
	t.mu.Unlock()
	if i < 0 { // the turn came meanwhile: it is the next one's
		t.leave(from)
	}
	return false
}

// leave gives a turn back.
func (t *turnstile) leave(from netip.Prefix) {
	t.mu.Lock()
	defer t.mu.Unlock()
	l := t.lane[from]
	if len(l.waiting) > 0 {
		close(l.waiting[0])
		l.waiting = slices.Delete(l.waiting, 0, 1)
		return
	}
	if l.under--; l.under == 0 {
		delete(t.lane, from)
	}
}
