package rekey

import (
	"encoding/binary"
	"fmt"
	"io"
	"time"

	"github.com/quietline/quietline/secret"
	"github.com/quietline/quietline/tunnel"
)

type phase uint8

const (
	sentM1 phase = iota
	drawing
	sentM3
	// Of a responder:
	sentM2
	collecting
)

// initiation is a handshake of ours. There is at most one.
type initiation struct {
	index    uint32
	phase    phase
	t        *transcript // up to the last message, without QKD keys
	final    *transcript // with the QKD keys of the M3 sent; nil before
	eph      secret.Bytes
	peer     welcome
	peerIdx  uint32
	choice   choice
	refusing bool   // M3 only tells the peer that the policies do not fit
	why      string // no fresh QKD key goes in; "" = one does, or none is expected
	request  uint64

	began     time.Time
	until     time.Time // end of the phase
	datagrams [][]byte
	gap       time.Duration
	resendAt  time.Time
	sentAt    time.Time
	repeated  bool
	strange   bool // an M4 came that does not open
}

func (i *initiation) clear() {
	if i == nil {
		return
	}
	i.t.clear()
	i.final.clear()
	i.eph.Clear()
}

// committed tells whether the peer may already have accepted our M3, or a QKD
// key is being drawn for it.
func (i *initiation) committed() bool { return i != nil && i.phase != sentM1 }

// initiate sends M1.
func (m *Machine) initiate() error {
	index, err := m.freshIndex()
	if err != nil {
		return err
	}
	init := &initiation{index: index, began: m.now, until: m.now.Add(helloLife),
		eph: secret.New(seedSize)}
	init.t = newTranscript(m.name, m.cfg.Suite, m.cfg.LinkID, m.self, m.peer)
	o, err := m.makeM1(init)
	if err != nil {
		init.clear()
		return err
	}
	init.datagrams, err = m.send(message{kind: kindM1, payload: o.encode()})
	if err != nil {
		init.clear()
		return err
	}
	m.init = init
	m.handshakes++
	m.stats.Started++
	m.resendFrom(init)
	return nil
}

func (m *Machine) makeM1(init *initiation) (*opening, error) {
	o := &opening{index: init.index, random: make([]byte, randomSize)}
	if _, err := io.ReadFull(m.cfg.Rand, o.random); err != nil {
		return nil, fmt.Errorf("read random: %w", err)
	}
	if _, err := io.ReadFull(m.cfg.Rand, init.eph.Expose()); err != nil {
		return nil, fmt.Errorf("read random: %w", err)
	}
	var err error
	if o.first, err = m.kem.public(init.eph); err != nil {
		return nil, err
	}
	ct, ss, err := m.kem.encapsulate(m.cfg.Rand, m.peer)
	if err != nil {
		return nil, err
	}
	defer ss.Clear()
	o.second = ct
	o.bind(init.t)
	init.t.mixKey("psk", m.cfg.LinkSecret)
	init.t.mixKey("ss_R", ss)
	h := hello{intro: m.intro(0), chains: [2][16]byte{m.chains[0].id, m.chains[1].id}}
	o.box = init.t.seal("c1", h.encode())
	m.stats.KEMs += 2
	return o, nil
}

// intro is what we tell about ourselves.
func (m *Machine) intro(s sourceState) intro {
	p := intro{policy: m.cfg.Policy, floor: m.cfg.Policy.floor(), offer: m.cfg.Policy.offer(),
		source: s, boot: m.boot, counter: m.handshakes, epoch: m.newest()}
	if m.cur != nil && !m.spent {
		p.sending = m.cur.send
	}
	return p
}

// newest is the greatest epoch number this end knows of.
func (m *Machine) newest() uint64 {
	n := m.peerIntro.epoch
	for _, e := range [...]*held{m.cur, m.next} {
		if e != nil {
			n = max(n, e.number)
		}
	}
	return max(n, m.number)
}

func (m *Machine) resendFrom(init *initiation) {
	init.gap, init.sentAt = resendFirst, m.now
	init.resendAt = m.now.Add(m.jitter(init.gap))
}

func (m *Machine) tickInitiation() {
	init := m.init
	if !init.until.After(m.now) {
		switch {
		case init.phase == drawing:
			init.request = 0
			m.setSource(sourceDown)
			m.without("key manager did not answer in time")
		case init.strange:
			m.alarm("peer's confirmation does not open: the QKD keys of the sites differ")
			m.fail("peer's confirmation does not open", m.cfg.ProbeEvery)
		default:
			m.fail("peer does not answer", 0)
		}
		return
	}
	if init.resendAt != never && !init.resendAt.After(m.now) {
		m.resend()
		init.gap = min(2*init.gap, resendMax)
		init.resendAt = m.now.Add(m.jitter(init.gap))
	}
}

func (m *Machine) resend() {
	m.init.repeated, m.init.sentAt = true, m.now
	m.stats.Resent++
	m.repeat(m.init.datagrams)
}

// insist repeats our M1 when the peer's M1 shows that it is there. It may be a
// replay, so this happens at most once a second.
func (m *Machine) insist() {
	if m.scheduled && m.init != nil && m.init.phase == sentM1 &&
		m.now.Sub(m.init.sentAt) >= time.Second {
		m.resend()
	}
}

// takeM2 proves the responder: it opened our ciphertext and knows the link
// secret. Only now is a QKD key drawn.
func (m *Machine) takeM2(msg *message) error {
	init := m.init
	if init == nil || init.phase != sentM1 || msg.receiver != init.index {
		return errStray
	}
	_, ct := m.kem.sizes()
	var o opening
	if err := o.decode(msg.payload, ct, ct, welcomeSize); err != nil {
		return err
	}
	t := init.t.fork()
	w, err := m.openM2(t, init, &o)
	if err != nil {
		t.clear()
		return err
	}
	init.t.clear()
	init.t, init.peer, init.peerIdx = t, *w, o.index
	init.eph.Clear()
	if !init.repeated {
		m.rtt = min(m.now.Sub(init.began), resendMax)
	}
	init.resendAt, init.datagrams = never, nil
	m.learn(w.intro)
	if m.init == nil { // the peer uses an epoch that we had not heard it on
		return nil
	}
	m.decide()
	return nil
}

func (m *Machine) openM2(t *transcript, init *initiation, o *opening) (*welcome, error) {
	o.bind(t)
	m.stats.KEMs += 2
	for _, part := range []struct {
		label string
		seed  secret.Bytes
		ct    []byte
	}{{"ss_E", init.eph, o.first}, {"ss_I", m.cfg.StaticSeed, o.second}} {
		ss, err := m.kem.decapsulate(part.seed, part.ct)
		if err != nil {
			return nil, err
		}
		t.mixKey(part.label, ss)
		ss.Clear()
	}
	plain, err := t.open("c2", o.box)
	if err != nil {
		return nil, err
	}
	var w welcome
	if err := w.decode(plain); err != nil {
		return nil, err
	}
	if w.chain != [16]byte{} && m.chain(w.chain) == nil {
		return nil, fmt.Errorf("open c2: chain secret was not offered")
	}
	return &w, nil
}

// chain finds one of our chain secrets by its identifier.
func (m *Machine) chain(id [16]byte) *chain {
	for i := range m.chains {
		if c := &m.chains[i]; c.rk.Len() > 0 && c.id == id {
			return c
		}
	}
	return nil
}

// sendM3 commits to the choice. The keys stay the caller's to clear.
func (m *Machine) sendM3(keys []tunnel.Key) {
	init := m.init
	init.t.mixHash(binary.BigEndian.AppendUint32(nil, init.peerIdx))
	if init.choice.attempt == 1 {
		m.mixChain(init.t, m.chain(init.peer.chain))
		if init.peer.chain == [16]byte{} && m.chains[0].rk.Len() > 0 && !init.refusing {
			m.alarm("chain secret was lost by the peer")
		}
	}
	box := init.t.seal("c3", init.choice.encode())
	init.final.clear()
	init.final = init.t.fork()
	mixQKD(init.final, init.choice.mode, keys)
	var err error
	msg := message{kind: kindM3, receiver: init.peerIdx, payload: box}
	if init.datagrams, err = m.send(msg); err != nil {
		m.fail(err.Error(), m.cfg.ProbeEvery)
		return
	}
	init.strange = false
	init.phase, init.until = sentM3, m.now.Add(choiceLife)
	m.resendFrom(init)
}

// mixChain binds the chain secret, or that the chain starts anew.
func (m *Machine) mixChain(t *transcript, c *chain) {
	if c == nil {
		t.mixKey("rk reset", secret.Bytes{})
		return
	}
	t.mixKey("rk", c.rk)
}

// mixQKD binds the QKD keys in order, or that there is none and why.
func mixQKD(t *transcript, mode Level, keys []tunnel.Key) {
	if len(keys) == 0 {
		t.mixKey(fmt.Sprintf("noqkd %d", mode), secret.Bytes{})
	}
	for i, k := range keys {
		t.mixKey(fmt.Sprintf("qkd %d", i+1), k.Bits)
	}
}

// takeM4 opens the responder's key confirmation, or its sealed error.
func (m *Machine) takeM4(msg *message) error {
	init := m.init
	if init == nil || init.phase != sentM3 || msg.receiver != init.index {
		return errStray
	}
	index := binary.BigEndian.AppendUint32(nil, init.index)
	var v verdict
	good := init.final.fork()
	good.mixHash(index)
	if plain, err := good.open("c4", msg.payload); err == nil {
		if err := v.decode(plain); err != nil || v.status != accepted ||
			v.epoch != init.choice.epoch || init.refusing {
			good.clear()
			return errStray
		}
		m.finish(good)
		return nil
	}
	good.clear()
	bad := init.t.fork()
	bad.mixHash(index)
	plain, err := bad.open("c4 error", msg.payload)
	if err == nil {
		err = v.decode(plain)
	}
	if err != nil || v.status == accepted || v.epoch != init.choice.epoch {
		bad.clear()
		init.strange = true
		return errStray
	}
	init.t.clear()
	init.final.clear()
	init.t, init.final = bad, nil
	m.refused(v)
	return nil
}

// finish ends a good handshake of ours.
func (m *Machine) finish(t *transcript) {
	init := m.init
	m.took = m.now.Sub(init.began)
	m.lead = min(m.took, m.cfg.EpochLife/4)
	e, next := t.split(true)
	next = m.chain(init.peer.chain).heir(next, init.choice.mode, m.now)
	m.complete(e, init.choice, init.index, init.peerIdx)
	// M4 confirms the new chain secret; the peer may still offer the old one,
	// and then finds the new one beside it.
	for i := range m.chains {
		m.chains[i].rk.Clear()
	}
	m.chains = [2]chain{next}
	m.stats.KeysUsed += uint64(len(init.choice.ids))
	init.choice.ids = nil
	init.clear()
	m.init = nil
	m.installInitiator(e, init.why)
}

// complete fills what the transcript does not know.
func (m *Machine) complete(e *Epoch, c choice, recv, send uint32) {
	e.Number, e.RecvIndex, e.SendIndex = c.epoch, recv, send
	e.Level, e.KeyIDs, e.Made = c.mode, c.ids, m.now
	m.number = max(m.number, c.epoch)
	if e.Level == QKD {
		m.freshAt = m.now
	}
	m.failure = ""
	m.notBefore = m.now
	clear(m.alarms)
	m.stats.Completed++
}

// refused handles the peer's sealed error.
func (m *Machine) refused(v verdict) {
	init := m.init
	m.lose()
	switch v.status {
	case refusedUnknown, refusedReused:
		if init.choice.attempt < min(maxAttempts, init.peer.attempts) {
			init.choice.attempt++
			init.resendAt, init.datagrams = never, nil
			m.draw()
			return
		}
		m.again(v.status.String())
	case refusedDown:
		m.again(v.status.String())
	case refusedBusy:
		m.fail(v.status.String(), min(max(v.wait, 100*time.Millisecond), overlapMax))
	case refusedPolicy:
		m.alarm(mismatch(m.cfg.Policy, init.peer.policy))
		m.fail(v.status.String(), m.cfg.ProbeEvery)
	default:
		m.fail(v.status.String(), m.cfg.ProbeEvery)
	}
}

// again takes the next attempt without a QKD key, if the policy lets it.
func (m *Machine) again(reason string) {
	m.init.choice.attempt++
	m.without(reason)
}

// lose counts QKD keys that were drawn and will not be in an epoch.
func (m *Machine) lose() {
	if n := len(m.init.choice.ids); n > 0 {
		m.stats.KeysLost += uint64(n)
		m.event("key lost", m.level, fmt.Sprintf("%d drawn for an epoch that did not come", n))
		m.init.choice.ids = nil
	}
}

// fail ends our handshake; the next one starts after a pause at the earliest.
func (m *Machine) fail(reason string, pause time.Duration) {
	if m.failure != reason {
		m.event("rekey failed", m.level, reason)
	}
	m.failure = reason
	m.stats.Failed++
	m.notBefore = m.now.Add(pause)
	m.drop(reason)
}

// drop forgets our handshake without calling it a failure.
func (m *Machine) drop(string) {
	if m.init == nil {
		return
	}
	m.lose()
	m.init.clear()
	m.init = nil
}
