package kms

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/secret"
)

// Bounds of a re-read window.
const (
	rereadMost = time.Minute
	// rereadFetch is how long a fetch may go on after its caller hung up, so
	// that the caller finds the answer when it asks again: as long as the door
	// gives a call.
	rereadFetch = 5 * time.Second
	// rereadKeys bounds what is held for one SAE: eight requests of 128 keys.
	// The oldest beyond that are wiped before their time.
	rereadKeys = 1024
)

// shelf holds what one SAE has fetched, until its re-read window ends. It lives
// in memory alone: after a restart every key has had its one answer.
type shelf struct {
	window time.Duration
	turn   chan struct{} // one fetch at a time: a repeated one waits for the first

	mu    sync.Mutex
	held  map[etsi014.KeyID]*heldKey
	order []*heldKey // oldest first
	over  bool       // nothing is held any more
}

type heldKey struct {
	id        etsi014.KeyID
	initiator etsi014.SAEID
	cert      [32]byte
	bits      secret.Bytes
}

// reshelve makes the shelves of SAEs with a window, and keeps the old ones
// whose window is the same.
func reshelve(old map[etsi014.SAEID]*shelf, allowances map[etsi014.SAEID]Allowance,
) map[etsi014.SAEID]*shelf {
	shelves := map[etsi014.SAEID]*shelf{}
	for sae, a := range allowances {
		switch s := old[sae]; {
		case a.Reread == 0:
		case s != nil && s.window == a.Reread:
			shelves[sae] = s
		default:
			shelves[sae] = &shelf{window: a.Reread, turn: make(chan struct{}, 1),
				held: map[etsi014.KeyID]*heldKey{}}
		}
	}
	return shelves
}

// fetch takes keys from the pool, or once more what the same certificate took
// within its window. The caller clears them.
func (k *KME) fetch(ctx context.Context, t *terms, who etsi014.Caller, req etsi014.IDRequest) (
	[]etsi014.Key, error) {
	s := t.shelves[who.SAE]
	if s == nil || who.Cert == [32]byte{} {
		return k.pool.Fetch(ctx, req.Initiator, who.SAE, req.IDs)
	}
	select {
	case s.turn <- struct{}{}:
		defer func() { <-s.turn }()
	case <-ctx.Done():
		return nil, &etsi014.Error{Kind: etsi014.ErrDown, Cause: ctx.Err(), RetryAfter: time.Second}
	}
	keys, missing := s.again(who.Cert, req)
	again := len(keys) - len(missing)
	if len(missing) == 0 {
		k.pool.Reread(who.SAE, again)
		return keys, nil
	}
	long, cancel := context.WithTimeout(context.WithoutCancel(ctx), rereadFetch)
	defer cancel()
	fresh, err := k.pool.Fetch(long, req.Initiator, who.SAE, missing)
	if err == nil && len(fresh) != len(missing) {
		etsi014.Container{Keys: fresh}.Clear()
		err = fmt.Errorf("fetch keys: %d answered, %d asked: %w", len(fresh), len(missing), ErrChange)
	}
	if err != nil {
		etsi014.Container{Keys: keys}.Clear()
		return nil, err
	}
	if again > 0 {
		k.pool.Reread(who.SAE, again)
	}
	s.hold(who.Cert, req.Initiator, fresh)
	for i := range keys {
		if keys[i].Bits.Len() == 0 {
			keys[i], fresh = fresh[0], fresh[1:]
		}
	}
	return keys, nil
}

// again copies the keys that are held for that certificate into their places,
// and tells which are not. An ID named twice is nobody's: all go to the pool,
// which refuses it.
func (s *shelf) again(cert [32]byte, req etsi014.IDRequest) (keys []etsi014.Key,
	missing []etsi014.KeyID) {
	keys = make([]etsi014.Key, len(req.IDs))
	seen := make(map[etsi014.KeyID]bool, len(req.IDs))
	for _, id := range req.IDs {
		if seen[id] {
			return keys, req.IDs
		}
		seen[id] = true
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, id := range req.IDs {
		h := s.held[id]
		if h == nil || h.cert != cert || h.initiator != req.Initiator {
			missing = append(missing, id)
			continue
		}
		keys[i] = etsi014.Key{ID: id, Bits: secret.Copy(h.bits.Expose())}
	}
	return keys, missing
}

// hold keeps copies until the window ends.
func (s *shelf) hold(cert [32]byte, initiator etsi014.SAEID, keys []etsi014.Key) {
	batch := make([]*heldKey, len(keys))
	for i, k := range keys {
		batch[i] = &heldKey{k.ID, initiator, cert, secret.Copy(k.Bits.Expose())}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.over {
		for _, h := range batch {
			h.bits.Clear()
		}
		return
	}
	for _, h := range batch {
		s.held[h.id] = h
	}
	s.order = append(s.order, batch...)
	s.wipe(max(0, len(s.order)-rereadKeys))
	last := batch[len(batch)-1]
	time.AfterFunc(s.window, func() { s.until(last) })
}

// until wipes everything as old as h.
func (s *shelf) until(h *heldKey) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, o := range s.order {
		if o == h {
			s.wipe(i + 1)
			return
		}
	}
}

// wipe wipes the n oldest keys. The caller holds the lock.
func (s *shelf) wipe(n int) {
	for _, h := range s.order[:n] {
		h.bits.Clear()
		if s.held[h.id] == h {
			delete(s.held, h.id)
		}
	}
	s.order = append([]*heldKey(nil), s.order[n:]...)
}

// close wipes what is held, and holds nothing from now on.
func (s *shelf) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.over = true
	s.wipe(len(s.order))
}

// Forget wipes what is held for re-read windows, at the end of the KME.
func (k *KME) Forget() {
	for _, s := range k.terms.Load().shelves {
		s.close()
	}
}
