package rekey

import (
	"fmt"
	"time"

	"github.com/quietline/quietline/tunnel"
)

// decide chooses what the epoch shall rest on, once the responder is proved.
func (m *Machine) decide() {
	w := m.init.peer
	m.init.choice = choice{attempt: 1, epoch: max(m.newest(), w.epoch) + 1, rtt: m.rtt}
	switch {
	case w.floor != m.cfg.Policy.floor():
		m.alarm(mismatch(m.cfg.Policy, w.policy))
		m.init.refusing = true
		m.sendM3(nil)
	case w.busy > 0:
		m.fail(refusedBusy.String(), min(w.busy, overlapMax))
	case min(m.cfg.Policy.offer(), w.offer) < QKD:
		m.without("the peer's policy is " + w.policy.String())
	case !w.source.canCollect():
		m.without("peer's key manager " + w.source.String())
	case m.source.state >= sourceEmpty:
		m.without("key manager " + m.source.state.String())
	default:
		m.draw()
	}
}

// without goes on without a fresh QKD key if the policy lets it. It is called
// for a state of our own key manager or a word of the proven peer, never for
// silence on the network.
func (m *Machine) without(reason string) {
	c := m.chain(m.init.peer.chain)
	if !m.allowed(c) {
		m.fail(reason, m.cfg.ProbeEvery)
		return
	}
	m.init.choice.mode, m.init.choice.source = c.level(), m.source.state
	m.init.choice.ahead = nil
	if m.cfg.Policy.offer() >= QKD {
		m.init.why = reason
	}
	m.sendM3(nil)
}

// allowed tells whether our policy lets an epoch rest on the chain secret c
// (nil = none) without a fresh QKD key.
func (m *Machine) allowed(c *chain) bool {
	p := m.cfg.Policy
	switch {
	case p.offer() < QKD:
		return true
	case c.level() < p.floor():
		return false
	case p.floor() == Chained:
		return c.depth < m.cfg.MaxChain && m.now.Sub(c.fresh) < maxChainAge
	}
	return m.cfg.MaxDegraded == 0 || m.now.Sub(m.freshAt) < m.cfg.MaxDegraded
}

func mismatch(ours, theirs Policy) string {
	return fmt.Sprintf("policies do not fit: %s here, %s at the peer", ours, theirs)
}

func (m *Machine) draw() {
	if keys := m.fromStock(); keys != nil {
		m.commit(keys)
		wipe(keys)
		return
	}
	m.init.phase = drawing
	m.init.until = m.now.Add(m.cfg.KeyBudget + time.Second)
	if len(m.stock.waiting) > 0 {
		m.init.request = m.stock.waiting[0]
		return
	}
	m.ask(&KeyRequest{New: m.cfg.KeysPerEpoch}, asker{init: m.init})
	m.init.request = m.lastAsk
}

// drawn takes the keys into M3. They are wiped in any case.
func (m *Machine) drawn(a *KeyAnswer) {
	defer a.clear()
	m.init.request = 0
	m.stats.KeysDrawn += uint64(len(a.Keys))
	if a.Err != nil {
		m.setSource(sourceOf(a.Err))
		m.without("key manager " + m.source.state.String())
		return
	}
	if err := m.checkKeys(a.Keys, nil); err != nil {
		m.stats.KeysLost += uint64(len(a.Keys))
		m.setSource(sourceDown)
		m.alarm(err.Error())
		m.without(err.Error())
		return
	}
	m.setSource(sourceGood)
	m.remember(idsOf(a.Keys))
	m.commit(a.Keys)
}

// commit names the keys in M3. They stay the caller's to clear.
func (m *Machine) commit(keys []tunnel.Key) {
	c := &m.init.choice
	c.mode, c.source, c.ids = QKD, sourceGood, idsOf(keys)
	if len(m.stock.sets) > 0 && len(keys)+len(m.stock.sets[0]) <= maxKeys {
		c.ahead = idsOf(m.stock.sets[0])
	}
	m.sendM3(keys)
}

// checkKeys compares keys with what was asked for: drawn ones (want nil) must
// be new, collected ones must have the identifiers in their order.
func (m *Machine) checkKeys(keys []tunnel.Key, want []tunnel.KeyID) error {
	n := len(want)
	if want == nil {
		n = m.cfg.KeysPerEpoch
	}
	if len(keys) != n {
		return fmt.Errorf("key manager gave %d keys for %d", len(keys), n)
	}
	seen := map[tunnel.KeyID]bool{}
	for i, k := range keys {
		switch _, used := m.used[k.ID]; {
		case k.Bits.Len()*8 != m.cfg.KeyBits:
			return fmt.Errorf("key manager gave a key of %d bits for %d",
				k.Bits.Len()*8, m.cfg.KeyBits)
		case want != nil && k.ID != want[i]:
			return fmt.Errorf("key manager gave another key than asked for")
		case want == nil && used || seen[k.ID]:
			return fmt.Errorf("key manager gave a key twice")
		}
		seen[k.ID] = true
	}
	return nil
}
