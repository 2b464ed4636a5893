package tunneltest

import (
	"context"
	"crypto/rand"
	"fmt"
	"sync"
	"time"

	"github.com/quietline/quietline/secret"
	"github.com/quietline/quietline/tunnel"
)

// Stock is a key manager with two ends: distinct keys, each given once at
// either end, until they run out. Safe for concurrent use.
type Stock struct {
	ends [2]*end

	mu   sync.Mutex // guards all below and the ends' fields
	keys int
	pads int // keys for pad, of whatever size is asked for
}

// end is what one line sees.
type end struct {
	stock   *Stock
	waiting map[tunnel.KeyID]secret.Bytes // drawn by the other end, to be collected here
	fail    error
	delay   time.Duration
	calls   int
}

func newStock(n int) *Stock {
	s := &Stock{keys: n, pads: 1 << 30}
	for i := range s.ends {
		s.ends[i] = &end{stock: s, waiting: map[tunnel.KeyID]secret.Bytes{}}
	}
	return s
}

// Add puts n keys more into stock.
func (s *Stock) Add(n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.keys += n
}

// Pads sets how many keys for one-time pad may still be drawn.
func (s *Stock) Pads(n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.pads = n
}

// Left is the number of keys that can still be drawn.
func (s *Stock) Left() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.keys
}

// Fail makes every call of an end, 0 for tokyo, 1 for kochi, end with err; nil
// heals it.
func (s *Stock) Fail(end int, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ends[end].fail = err
}

// Slow makes every call of an end take so long.
func (s *Stock) Slow(end int, d time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ends[end].delay = d
}

// Calls is the number of calls of an end so far.
func (s *Stock) Calls(end int) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.ends[end].calls
}

// begin is what every call starts with.
func (e *end) begin(ctx context.Context) error {
	e.stock.mu.Lock()
	e.calls++
	delay, fail := e.delay, e.fail
	e.stock.mu.Unlock()
	if delay > 0 {
		select {
		case <-time.After(delay):
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", tunnel.ErrKeyDown, ctx.Err())
		}
	}
	return fail
}

// Status implements [tunnel.KeySource].
func (e *end) Status(ctx context.Context, _ tunnel.Use) (tunnel.Stock, error) {
	if err := e.begin(ctx); err != nil {
		return tunnel.Stock{}, err
	}
	return tunnel.Stock{Keys: e.stock.Left(), SizeBits: 256, MaxBits: 4096, MaxKeys: 128,
		Simulated: true, At: time.Now()}, nil
}

// New implements [tunnel.KeySource].
func (e *end) New(ctx context.Context, use tunnel.Use, n, sizeBits int) ([]tunnel.Key, error) {
	if err := e.begin(ctx); err != nil {
		return nil, err
	}
	s := e.stock
	s.mu.Lock()
	defer s.mu.Unlock()
	left := &s.keys
	if use == tunnel.UsePad {
		left = &s.pads
	}
	if *left < n {
		return nil, fmt.Errorf("draw %d keys: %w", n, tunnel.ErrKeyEmpty)
	}
	*left -= n
	other := s.ends[0]
	if other == e {
		other = s.ends[1]
	}
	var out []tunnel.Key
	for range n {
		k := tunnel.Key{Bits: secret.New(sizeBits / 8)}
		// crypto/rand never fails.
		_, _ = rand.Read(k.ID[:])
		_, _ = rand.Read(k.Bits.Expose())
		other.waiting[k.ID] = secret.Copy(k.Bits.Expose())
		out = append(out, k)
	}
	return out, nil
}

// ByID implements [tunnel.KeySource].
func (e *end) ByID(ctx context.Context, _ tunnel.Use, ids []tunnel.KeyID) ([]tunnel.Key, error) {
	if err := e.begin(ctx); err != nil {
		return nil, err
	}
	e.stock.mu.Lock()
	defer e.stock.mu.Unlock()
	for _, id := range ids {
		if _, ok := e.waiting[id]; !ok {
			return nil, fmt.Errorf("collect %d keys: %w", len(ids), tunnel.ErrKeyUnknown)
		}
	}
	var out []tunnel.Key
	for _, id := range ids {
		out = append(out, tunnel.Key{ID: id, Bits: e.waiting[id]})
		delete(e.waiting, id)
	}
	return out, nil
}
