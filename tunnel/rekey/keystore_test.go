package rekey

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"time"

	"github.com/quietline/quietline/secret"
	"github.com/quietline/quietline/tunnel"
)

// keyStore plays both key managers of a QKD link.
type keyStore struct {
	next  uint64
	keys  map[tunnel.KeyID][]byte // drawn, not yet collected
	drawn map[tunnel.KeyID]bool
	state [2]kmeState
}

type kmeState struct {
	err     error         // every call fails with it
	delay   time.Duration // of the answer
	mute    bool          // no answer ever (the engine answers after the budget)
	loseNew float64       // share of drawn keys that the other end never gets
	wrong   float64       // share of collected keys with other bytes
}

// request is the caller's key source.
func (e *end) request(r KeyRequest) {
	w := e.w
	st := w.kme.state[e.id]
	life := e.life
	delay := st.delay
	if st.mute {
		delay = r.Budget
	}
	w.at(delay, func() {
		a := w.kme.answer(w, e.id, r)
		if st.mute {
			(&KeyAnswer{Keys: a.Keys}).clear()
			a = KeyAnswer{ID: r.ID, Err: tunnel.ErrKeyDown}
		}
		if e.keys != nil {
			e.keys(a.Keys)
		}
		if e.life == life {
			e.step(Input{Keys: &a})
		}
	})
}

func (k *keyStore) answer(w *world, id int, r KeyRequest) KeyAnswer {
	st := k.state[id]
	a := KeyAnswer{ID: r.ID, Err: st.err}
	if a.Err != nil {
		return a
	}
	for range r.New {
		k.next++
		var kid tunnel.KeyID
		binary.BigEndian.PutUint64(kid[8:], k.next)
		bits := make([]byte, r.SizeBits/8)
		_, _ = rngReader{w.rng}.Read(bits)
		k.drawn[kid] = true
		if w.rng.Float64() >= st.loseNew {
			k.keys[kid] = bytes.Clone(bits)
		}
		a.Keys = append(a.Keys, tunnel.Key{ID: kid, Bits: secret.Own(bits)})
	}
	for _, kid := range r.IDs {
		bits, ok := k.keys[kid]
		if !ok {
			return KeyAnswer{ID: r.ID, Err: fmt.Errorf("collect: %w", tunnel.ErrKeyUnknown)}
		}
		delete(k.keys, kid)
		bits = bytes.Clone(bits)
		if w.rng.Float64() < st.wrong {
			bits[0] ^= 1
		}
		a.Keys = append(a.Keys, tunnel.Key{ID: kid, Bits: secret.Own(bits)})
	}
	return a
}
