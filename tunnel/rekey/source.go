package rekey

import (
	"errors"
	"slices"
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

var sourceNames = [...]string{"unknown", "good", "has no key", "does not answer",
	"denies this line"}

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
	ahead   bool           // keys for a later epoch
	named   []tunnel.KeyID // keys of the peer for a later epoch
}

// stock is QKD keys drawn ahead for the next epochs (handshake.md 4.6), so
// that a slow key manager does not hold up a rekey. It exists only beside a
// live epoch, in which the peer has been proved.
type stock struct {
	sets    [][]tunnel.Key
	until   []time.Time // when each set is discarded
	waiting []uint64    // requests under way
	// foretold are keys that the peer drew ahead and named to us; we have
	// collected them already. There is one set at most.
	foretold []tunnel.Key
	expires  time.Time // of foretold
	// asked is the request under way for the keys told.
	told  []tunnel.KeyID
	asked uint64
}

const (
	stockLife = 10 * time.Minute // handshake.md 4.6
	stockMax  = 2                // sets of keys
)

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
	if m.stock.asked == a.ID {
		m.stock.told, m.stock.asked = nil, 0
	}
	switch {
	case !ok:
		a.clear()
	case m.init != nil && m.init.request == a.ID:
		m.unwait(a.ID)
		m.drawn(a)
	case who.ahead:
		m.unwait(a.ID)
		m.drawnAhead(a)
	case m.waits(a.ID) != nil:
		m.collected(m.waits(a.ID), a)
	case who.named != nil:
		m.foretell(who.named, a)
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

// waits finds the handshake of the peer's that waits for an answer.
func (m *Machine) waits(id uint64) *pending {
	for _, p := range m.pending {
		if p.phase == collecting && p.request == id {
			return p
		}
	}
	return nil
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

// ahead draws keys for the next epochs.
func (m *Machine) ahead() {
	for at := m.aheadAt(); at != never && !at.After(m.now); at = m.aheadAt() {
		m.ask(&KeyRequest{New: m.cfg.KeysPerEpoch}, asker{ahead: true})
		m.stock.waiting = append(m.stock.waiting, m.lastAsk)
	}
}

// aheadAt is when keys are to be drawn ahead, early enough for a key manager
// that takes its whole budget twice; never = not now. One set is enough,
// unless epochs are shorter than that.
func (m *Machine) aheadAt() time.Time {
	lead, sets := 2*m.cfg.KeyBudget, 1
	if m.cfg.EpochLife <= lead {
		sets = stockMax
	}
	live := m.scheduled && m.cur != nil && m.cur.heard && m.init == nil
	wanted := min(m.cfg.Policy.offer(), m.peerIntro.offer) >= QKD
	able := m.source.state < sourceEmpty && m.peerIntro.source.canCollect()
	if !live || !wanted || !able || len(m.stock.sets)+len(m.stock.waiting) >= sets {
		return never
	}
	return m.due.Add(-lead)
}

func (m *Machine) unwait(id uint64) {
	m.stock.waiting = slices.DeleteFunc(m.stock.waiting, func(w uint64) bool { return w == id })
}

// drawnAhead puts keys on stock.
func (m *Machine) drawnAhead(a *KeyAnswer) {
	m.stats.KeysDrawn += uint64(len(a.Keys))
	err := a.Err
	if err == nil {
		if err = m.checkKeys(a.Keys, nil); err != nil {
			m.alarm(err.Error())
		}
	}
	m.setSource(sourceOf(err))
	if err != nil || m.cur == nil {
		m.stats.KeysLost += uint64(len(a.Keys))
		a.clear()
		return
	}
	m.remember(idsOf(a.Keys))
	m.stock.sets = append(m.stock.sets, a.Keys)
	m.stock.until = append(m.stock.until, m.now.Add(stockLife))
}

// collectAhead asks for the keys that the peer has named for a later epoch.
func (m *Machine) collectAhead(ids []tunnel.KeyID) {
	if len(ids) > 0 && m.source.state.canCollect() {
		m.ask(&KeyRequest{IDs: ids}, asker{named: ids})
		m.stock.told, m.stock.asked = ids, m.lastAsk
	}
}

// foretell keeps such keys. A failure says nothing yet: the keys are asked for
// again when an M3 names them for its epoch.
func (m *Machine) foretell(ids []tunnel.KeyID, a *KeyAnswer) {
	if a.Err != nil || m.checkKeys(a.Keys, ids) != nil {
		a.clear()
		return
	}
	m.dropForetold()
	m.stock.foretold, m.stock.expires = a.Keys, m.now.Add(stockLife)
}

func (m *Machine) dropForetold() {
	m.stats.KeysMissed += uint64(len(m.stock.foretold))
	wipe(m.stock.foretold)
	m.stock.foretold = nil
}

// fromForetold takes the foretold keys if they are the ones named; nil = not.
func (m *Machine) fromForetold(ids []tunnel.KeyID) []tunnel.Key {
	keys := m.stock.foretold
	if len(keys) == 0 || m.checkKeys(keys, ids) != nil {
		return nil
	}
	m.stock.foretold = nil
	return keys
}

// fromStock takes the oldest set; nil = none.
func (m *Machine) fromStock() []tunnel.Key {
	if len(m.stock.sets) == 0 {
		return nil
	}
	keys := m.stock.sets[0]
	m.stock.sets, m.stock.until = m.stock.sets[1:], m.stock.until[1:]
	return keys
}

// ageStock discards sets that are too old, or all when there is no epoch.
func (m *Machine) ageStock() {
	for len(m.stock.sets) > 0 && (m.cur == nil || !m.stock.until[0].After(m.now)) {
		keys := m.fromStock()
		m.stats.KeysLost += uint64(len(keys))
		wipe(keys)
	}
	if len(m.stock.foretold) > 0 && (m.cur == nil || !m.stock.expires.After(m.now)) {
		m.dropForetold()
	}
}

// remember notes key_IDs as used.
func (m *Machine) remember(ids []tunnel.KeyID) {
	for _, id := range ids {
		if _, known := m.used[id]; !known {
			m.usedList = append(m.usedList, id)
			m.used[id] = m.now
		}
	}
}

func idsOf(keys []tunnel.Key) (ids []tunnel.KeyID) {
	for _, k := range keys {
		ids = append(ids, k.ID)
	}
	return ids
}

func wipe(keys []tunnel.Key) {
	for _, k := range keys {
		k.Bits.Clear()
	}
}
