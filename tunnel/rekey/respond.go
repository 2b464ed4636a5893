package rekey

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/quietline/quietline/tunnel"
)

// errStray is a message for which no handshake waits, or that does not open.
var errStray = errors.New("message belongs to no handshake")

// pending is a handshake of the peer's.
type pending struct {
	index, peerIdx uint32
	phase          phase
	t              *transcript // without QKD keys
	hello          hello
	chain          chain // a copy; empty = the chain starts anew
	choice         choice
	attempt        byte // of the last M3 taken
	m3             [32]byte
	request        uint64
	until          time.Time
}

func (p *pending) clear() {
	p.t.clear()
	p.chain.rk.Clear()
}

// reply is what a repeated message is answered with.
type reply struct {
	datagrams [][]byte
	until     time.Time
}

func (m *Machine) dropPending(index uint32) {
	if p := m.pending[index]; p != nil {
		p.clear()
		delete(m.pending, index)
	}
}

// collecting tells whether a proven peer's handshake waits for our key manager.
func (m *Machine) collecting() bool {
	for _, p := range m.pending {
		if p.phase == collecting {
			return true
		}
	}
	return false
}

// takeM1 answers M1. It changes nothing but the pending handshakes: a replayed
// M1 costs its KEM work and a slot.
func (m *Machine) takeM1(msg *message) error {
	public, ct := m.kem.sizes()
	var o opening
	if err := o.decode(msg.payload, public, ct, helloSize); err != nil {
		return err
	}
	if msg.receiver != 0 {
		return errStray
	}
	p := &pending{peerIdx: o.index, phase: sentM2, until: m.now.Add(pendingLife)}
	p.t = newTranscript(m.name, m.cfg.Suite, m.cfg.LinkID, m.peer, m.self)
	answer, err := m.answerM1(p, &o)
	if err != nil {
		p.clear()
		return err
	}
	if !m.makeRoom() {
		p.clear()
		return errStray
	}
	datagrams, err := m.send(message{kind: kindM2, receiver: p.peerIdx, payload: answer.encode()})
	if err != nil {
		p.clear()
		return err
	}
	m.pending[p.index] = p
	m.replies[msg.digest()] = reply{datagrams, m.now.Add(replyLife)}
	m.stats.Answered++
	m.insist()
	return nil
}

func (m *Machine) answerM1(p *pending, o *opening) (*opening, error) {
	o.bind(p.t)
	p.t.mixKey("psk", m.cfg.LinkSecret)
	m.stats.KEMs++
	ss, err := m.kem.decapsulate(m.cfg.StaticSeed, o.second)
	if err != nil {
		return nil, err
	}
	p.t.mixKey("ss_R", ss)
	ss.Clear()
	plain, err := p.t.open("c1", o.box)
	if err != nil {
		return nil, err
	}
	if err := p.hello.decode(plain); err != nil {
		return nil, err
	}
	if p.index, err = m.freshIndex(); err != nil {
		return nil, err
	}
	return m.makeM2(p, o.first)
}

func (m *Machine) makeM2(p *pending, ephemeral []byte) (*opening, error) {
	o := &opening{index: p.index, random: make([]byte, randomSize)}
	if _, err := io.ReadFull(m.cfg.Rand, o.random); err != nil {
		return nil, fmt.Errorf("read random: %w", err)
	}
	m.stats.KEMs += 2
	ctE, ssE, err := m.kem.encapsulate(m.cfg.Rand, ephemeral)
	if err != nil {
		return nil, err
	}
	defer ssE.Clear()
	ctI, ssI, err := m.kem.encapsulate(m.cfg.Rand, m.peer)
	if err != nil {
		return nil, err
	}
	defer ssI.Clear()
	o.first, o.second = ctE, ctI
	o.bind(p.t)
	p.t.mixKey("ss_E", ssE)
	p.t.mixKey("ss_I", ssI)
	m.handshakes++
	w := welcome{intro: m.intro(m.source.state), attempts: maxAttempts,
		busy: m.busy(p.hello.intro)}
	for _, id := range p.hello.chains {
		if c := m.chain(id); c != nil {
			w.chain = id
			p.chain = c.copy()
			break
		}
	}
	o.box = p.t.seal("c2", w.encode())
	return o, nil
}

// busy is how long the peer's handshake cannot end well: the scheduled
// initiator goes on with its own, or a third receive epoch is not possible.
func (m *Machine) busy(peer intro) time.Duration {
	if m.scheduled && m.init != nil {
		return time.Second
	}
	return m.full(peer)
}

// full is how long a third receive epoch is not possible; zero = it is.
func (m *Machine) full(peer intro) time.Duration {
	if m.old == nil || peer.sending == 0 {
		return 0
	}
	if m.old.until == never {
		return m.overlap()
	}
	return max(m.old.until.Sub(m.now), time.Millisecond)
}

// makeRoom drops the oldest handshake that has proved nothing yet, if there
// are as many as may be.
func (m *Machine) makeRoom() bool {
	if len(m.pending) < maxPending {
		return true
	}
	var oldest *pending
	for _, p := range m.pending {
		if p.phase == sentM2 && p.attempt == 0 && (oldest == nil || p.until.Before(oldest.until)) {
			oldest = p
		}
	}
	if oldest == nil {
		return false
	}
	m.dropPending(oldest.index)
	return true
}

// takeM3 proves the initiator. Only now are QKD keys collected.
func (m *Machine) takeM3(msg *message) error {
	p := m.pending[msg.receiver]
	if p == nil || p.phase != sentM2 {
		return errStray
	}
	t := p.t.fork()
	t.mixHash(binary.BigEndian.AppendUint32(nil, p.index))
	if p.attempt == 0 {
		m.mixChain(t, p.used())
	}
	plain, err := t.open("c3", msg.payload)
	var c choice
	if err == nil {
		err = c.decode(plain)
	}
	if err != nil || c.attempt != p.attempt+1 || c.attempt > maxAttempts && len(c.ids) > 0 {
		t.clear()
		return errStray
	}
	p.t.clear()
	p.t, p.choice, p.attempt, p.m3 = t, c, c.attempt, msg.digest()
	p.until = m.now.Add(pendingLife)
	m.learn(p.hello.intro)
	if s := m.unfit(p); s != accepted {
		v := verdict{status: s}
		if s == refusedBusy {
			v.wait = max(m.busy(p.hello.intro), 100*time.Millisecond)
		}
		m.refuse(p, v)
		return nil
	}
	m.accept(p)
	return nil
}

// unfit tells why an authentic M3 is refused.
func (m *Machine) unfit(p *pending) refusal {
	theirs := p.hello.intro
	switch {
	case theirs.floor != m.cfg.Policy.floor() || p.choice.mode == Blocked:
		m.alarm(mismatch(m.cfg.Policy, theirs.policy))
		return refusedPolicy
	case !m.agrees(p):
		m.alarm(fmt.Sprintf("peer asks for an epoch of level %v, which policy %v does not allow now",
			p.choice.mode, m.cfg.Policy))
		return refusedPolicy
	case m.collecting() || m.full(theirs) > 0 || m.scheduled && m.init.committed():
		return refusedBusy
	}
	for _, id := range p.choice.ids {
		if _, seen := m.used[id]; seen {
			m.alarm("peer names a QKD key that was used before")
			return refusedReused
		}
	}
	return accepted
}

// used is the chain secret of the handshake, nil if the chain starts anew.
func (p *pending) used() *chain {
	if p.chain.rk.Len() == 0 {
		return nil
	}
	return &p.chain
}

// agrees tells whether the peer's choice is one we would make in its place.
func (m *Machine) agrees(p *pending) bool {
	if p.choice.mode == QKD {
		return min(m.cfg.Policy.offer(), p.hello.offer) >= QKD
	}
	return p.choice.mode == p.used().level() && m.allowed(p.used())
}

// accept goes on with a fitting M3. A handshake of our own gives way to it.
func (m *Machine) accept(p *pending) {
	m.drop("the peer's handshake goes first")
	if p.attempt == 1 && p.chain.rk.Len() == 0 && m.chains[0].rk.Len() > 0 {
		m.alarm("chain secret was lost by the peer")
	}
	m.rtt = p.choice.rtt
	if len(p.choice.ids) == 0 {
		m.confirmM3(p, nil)
		return
	}
	m.remember(p.choice.ids)
	if keys := m.fromForetold(p.choice.ids); keys != nil {
		m.confirmM3(p, keys)
		wipe(keys)
		return
	}
	p.phase = collecting
	p.until = m.now.Add(m.cfg.KeyBudget + time.Second)
	if slices.Equal(m.stock.told, p.choice.ids) {
		p.request = m.stock.asked // under way since the epoch before
		return
	}
	m.ask(&KeyRequest{IDs: p.choice.ids}, asker{pending: p})
	p.request = m.lastAsk
}

// collected takes the answer of our key manager. The keys are wiped in any case.
func (m *Machine) collected(p *pending, a *KeyAnswer) {
	defer a.clear()
	p.request = 0
	p.phase = sentM2
	p.until = m.now.Add(pendingLife)
	err := a.Err
	if err == nil {
		if bad := m.checkKeys(a.Keys, p.choice.ids); bad != nil {
			m.alarm(bad.Error())
			err = errors.Join(tunnel.ErrKeyUnknown, bad)
		}
	}
	switch {
	case err == nil:
		m.setSource(sourceGood)
		m.confirmM3(p, a.Keys)
	case errors.Is(err, tunnel.ErrKeyUnknown) || errors.Is(err, tunnel.ErrKeyEmpty):
		m.stats.KeysMissed += uint64(len(p.choice.ids))
		m.event("key lost", m.level, "our key manager does not know the peer's key")
		m.refuse(p, verdict{status: refusedUnknown})
	default:
		m.stats.KeysMissed += uint64(len(p.choice.ids))
		m.setSource(sourceOf(err))
		m.refuse(p, verdict{status: refusedDown})
	}
}

// confirmM3 sends M4 and accepts records of the new epoch from here on.
func (m *Machine) confirmM3(p *pending, keys []tunnel.Key) {
	mixQKD(p.t, p.choice.mode, keys)
	v := verdict{status: accepted, epoch: p.choice.epoch}
	if !m.sendM4(p, p.t, "c4", v) {
		m.dropPending(p.index)
		return
	}
	e, next := p.t.split(false)
	next = p.used().heir(next, p.choice.mode, m.now)
	m.stats.KeysUsed += uint64(len(keys))
	m.complete(e, p.choice, p.index, p.peerIdx)
	// Until the initiator confirms the new chain secret, the one before is
	// kept: the initiator has just proved that it holds it.
	for i := range m.chains {
		m.chains[i].rk.Clear()
	}
	m.chains = [2]chain{next, p.chain.copy()}
	m.installResponder(e, p.m3, p.why(m))
	m.collectAhead(p.choice.ahead)
	m.dropPending(p.index)
}

// why tells the reason for an epoch without a fresh QKD key.
func (p *pending) why(m *Machine) string {
	switch {
	case p.choice.mode == QKD || m.cfg.Policy.offer() < QKD:
		return ""
	case p.hello.offer < QKD:
		return "the peer's policy is " + p.hello.policy.String()
	case p.choice.source >= sourceEmpty:
		return "peer's key manager " + p.choice.source.String()
	case m.source.state >= sourceEmpty:
		return "key manager " + m.source.state.String()
	}
	return "key managers do not know each other's keys"
}

// refuse sends a sealed error. The handshake stays open for another attempt
// where one can help.
func (m *Machine) refuse(p *pending, v verdict) {
	v.epoch = p.choice.epoch
	p.phase, p.request = sentM2, 0
	ok := m.sendM4(p, p.t, "c4 error", v)
	if !ok || !m.goesOn(p, v.status) {
		m.dropPending(p.index)
	}
}

// goesOn tells whether the initiator may answer our refusal: with other keys,
// or without any where the policy allows that.
func (m *Machine) goesOn(p *pending, s refusal) bool {
	key := s == refusedUnknown || s == refusedReused
	if m.cfg.Policy.floor() >= QKD {
		return key && p.attempt < maxAttempts
	}
	return (key || s == refusedDown) && p.attempt <= maxAttempts
}

func (m *Machine) sendM4(p *pending, t *transcript, label string, v verdict) bool {
	t.mixHash(binary.BigEndian.AppendUint32(nil, p.peerIdx))
	box := t.seal(label, v.encode())
	datagrams, err := m.send(message{kind: kindM4, receiver: p.peerIdx, payload: box})
	if err != nil {
		m.failure = err.Error()
		return false
	}
	m.replies[p.m3] = reply{datagrams, m.now.Add(replyLife)}
	return true
}
