package etsi014

import (
	"sync"
	"time"
)

// inflight counts the requests of each SAE that are being answered, so that a
// hungry one cannot take the door, and the memory of bodies and answers, from
// the others.
type inflight struct {
	most int
	mu   sync.Mutex // guards n
	n    map[SAEID]int
}

// errBusy is answered where an SAE asks too much at once.
var errBusy = &Error{
	Kind: ErrDown, Message: "too many requests of this SAE at once", RetryAfter: time.Second,
}

func (f *inflight) enter(sae SAEID) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.n[sae] >= f.most {
		return false
	}
	f.n[sae]++
	return true
}

func (f *inflight) leave(sae SAEID) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.n[sae]--; f.n[sae] == 0 {
		delete(f.n, sae)
	}
}
