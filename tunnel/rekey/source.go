package rekey

import (
	"errors"
	"time"

	"github.com/quietline/quietline/tunnel"
)

// sourceState is what an end knows of its own key manager.
type sourceState uint8

const (
	sourceUnknown sourceState = iota
	sourceGood
	sourceEmpty
	sourceDown
	sourceDenied
)

var sourceNames = [...]string{"unknown", "good", "has no key", "does not answer", "denies this line"}

func (s sourceState) String() string { return sourceNames[s] }

func sourceOf(err error) sourceState {
	switch {
	case err == nil:
		return sourceGood
	case errors.Is(err, tunnel.ErrKeyEmpty):
		return sourceEmpty
	case errors.Is(err, tunnel.ErrKeyDenied):
		return sourceDenied
	}
	return sourceDown
}

// source is our view of our key manager. While it is bad it is probed, so that
// neither end burns keys of a healthy one in handshakes that cannot end well.
type source struct {
	state   sourceState
	since   time.Time
	probeAt time.Time // never = no need
}

// asker is what a request was made for.
type asker struct {
	init    *initiation
	pending *pending
}

func (m *Machine) ask(r *KeyRequest, who asker) {
	m.lastAsk++
	r.ID, r.SizeBits, r.Budget = m.lastAsk, m.cfg.KeyBits, m.cfg.KeyBudget
	m.asked[r.ID] = who
	m.requests = append(m.requests, r)
}

// answered gives an answer to who asked, or wipes it when nobody waits.
func (m *Machine) answered(a *KeyAnswer) {
	who, ok := m.asked[a.ID]
	delete(m.asked, a.ID)
	switch {
	case !ok:
		a.clear()
	case who.init != nil && who.init == m.init && m.init.request == a.ID:
		m.drawn(a)
	case who.pending != nil && m.pending[who.pending.index] == who.pending &&
		who.pending.request == a.ID:
		m.collected(who.pending, a)
	case who.init == nil && who.pending == nil:
		m.setSource(sourceOf(a.Err))
		a.clear()
	case who.init != nil: // the handshake has ended meanwhile
		m.stats.KeysDrawn += uint64(len(a.Keys))
		m.stats.KeysLost += uint64(len(a.Keys))
		a.clear()
	default:
		m.stats.KeysMissed += uint64(len(a.Keys))
		a.clear()
	}
}

// setSource notes the state; a bad one starts probing, a good one ends it and
// lets a handshake start at once.
func (m *Machine) setSource(s sourceState) {
	if s != m.source.state {
		m.source.since = m.now
		if s >= sourceEmpty {
			m.alarm("key manager " + s.String())
		}
	}
	was := m.source.state
	m.source.state = s
	m.source.probeAt = never
	if s >= sourceEmpty {
		m.source.probeAt = m.now.Add(m.cfg.ProbeEvery)
		return
	}
	if was >= sourceEmpty {
		m.notBefore = m.now
		if m.cur != nil && m.cur.level < QKD {
			m.wanted = true // the epoch gets better as soon as it can
		}
		for bad := sourceEmpty; bad <= sourceDenied; bad++ {
			delete(m.alarms, "key manager "+bad.String())
		}
	}
}

func (m *Machine) tickSource() {
	if m.source.probeAt == never || m.source.probeAt.After(m.now) {
		return
	}
	// An answer that never came is asked for again.
	m.source.probeAt = m.now.Add(m.cfg.ProbeEvery)
	m.ask(&KeyRequest{}, asker{})
}

// mayDraw tells whether a handshake of ours has a chance: none is started
// while our key manager has no key and the policy needs one.
func (m *Machine) mayDraw() bool {
	c := &m.chains[0]
	if c.rk.Len() == 0 {
		c = nil
	}
	return m.source.state < sourceEmpty || m.allowed(c)
}

// canCollect tells whether asking for keys by key_ID has a chance.
func (s sourceState) canCollect() bool { return s != sourceDown && s != sourceDenied }
