package pad

import (
	"errors"
	"fmt"

	"github.com/quietline/quietline/tunnel"
)

// control takes a message of the peer's. What is malformed is dropped and
// counted: the peer is authentic, so it is a fault and no attack.
func (m *Machine) control(body []byte) {
	var msg message
	if err := msg.parse(body); err != nil {
		m.stats.Collision++
		return
	}
	m.meet(msg.boot)
	switch msg.kind {
	case kindAnnounce:
		m.told(&msg)
	case kindReady, kindRefuse:
		m.reply(&msg)
	}
}

// meet compares the peer's boot with the last one: a peer that has begun anew
// has lost what both held.
func (m *Machine) meet(b boot) {
	if b == m.peer {
		return
	}
	if m.peer != (boot{}) {
		m.event(false, "peer has begun anew: the one-time pad of both ends is void")
	}
	m.peer = b
	m.out.void()
	m.in.void()
	m.seen = 0
	for n := range m.arrivals {
		m.forget(n)
	}
	for _, d := range append([]*draft(nil), m.drafts...) {
		if d.ready {
			m.remove(d)
		}
	}
}

// reply takes the answer to an announcement of this life.
func (m *Machine) reply(msg *message) {
	if msg.of != m.boot {
		return
	}
	for _, d := range m.drafts {
		if d.number != msg.block || !d.closed || d.ready {
			continue
		}
		if msg.kind == kindReady {
			d.ready = true
			m.promote()
			return
		}
		m.event(false, "one-time pad lost: the peer refuses a block, reason %d", msg.reason)
		m.notBefore = m.now.Add(m.cfg.ProbeEvery)
		m.remove(d)
		return
	}
}

// told takes an announcement: a part of a block of the peer's.
func (m *Machine) told(msg *message) {
	answer := message{kind: kindReady, of: msg.boot, block: msg.block}
	newest, held := m.in.state()
	a := m.arrivals[msg.block]
	switch {
	case m.in.holds(msg.block):
		m.send(answer)
		return
	case msg.block <= newest:
		return // an old message
	case a == nil && held+len(m.arrivals) >= maxHeld,
		int(msg.parts)*len(msg.ids)*int(msg.keyLen) > maxBlock+maxKeyLen*maxIDs:
		answer.kind, answer.reason = kindRefuse, noPlace
		m.send(answer)
		return
	case a == nil:
		a = &arrival{parts: make([][]tunnel.Key, msg.parts), asked: make([]bool, msg.parts),
			keyLen: int(msg.keyLen)}
		m.arrivals[msg.block] = a
	case len(a.parts) != int(msg.parts) || a.keyLen != int(msg.keyLen):
		m.stats.Collision++
		return
	}
	a.until = m.now.Add(draftLife)
	if a.refused {
		answer.kind, answer.reason = kindRefuse, noKeys
		m.send(answer)
		return
	}
	if !a.asked[msg.part] {
		a.asked[msg.part] = true
		id := m.ask(Request{IDs: msg.ids}, asker{block: msg.block, part: int(msg.part), ids: msg.ids})
		a.requests = append(a.requests, id)
	}
}

// collected takes the keys of a part.
func (m *Machine) collected(who asker, ans *Answer) {
	a := m.arrivals[who.block]
	if a == nil {
		m.stats.Lost += size(ans.Keys)
		return
	}
	err := ans.Err
	if err == nil && (!sort(ans.Keys, who.ids) || !all(ans.Keys, a.keyLen) ||
		!m.ids.fresh(ans.Keys)) {
		m.stats.Collision++
		err = fmt.Errorf("%w: not the keys that were named", tunnel.ErrKeyUnknown)
	}
	if errors.Is(err, tunnel.ErrKeyDown) {
		a.asked[who.part] = false // the next announcement asks again
		m.fail(err)
		return
	}
	if err != nil {
		a.refused = true
		a.wipe()
		m.send(message{kind: kindRefuse, of: m.peer, block: who.block, reason: noKeys})
		return
	}
	a.parts[who.part], ans.Keys = ans.Keys, nil
	if a.got++; a.got == len(a.parts) {
		m.complete(who.block, a)
	}
}

// sort brings keys into the order of ids; false if they are not those.
func sort(keys []tunnel.Key, ids []tunnel.KeyID) bool {
	if len(keys) != len(ids) {
		return false
	}
	for i, id := range ids {
		for j := i; keys[i].ID != id; j++ {
			if j == len(keys) {
				return false
			}
			if keys[j].ID == id {
				keys[i], keys[j] = keys[j], keys[i]
			}
		}
	}
	return true
}

// idMemory remembers the key_IDs of the last keys, so that a key manager that
// gives a key twice, or a peer that names one twice, is found out: the same
// bytes would hide two records.
type idMemory struct{ now, before map[tunnel.KeyID]bool }

// remembered is how many key_IDs a generation holds: 32 MiB of pad and more.
const remembered = 1 << 16

// fresh notes keys; false if one of them has been seen.
func (i *idMemory) fresh(keys []tunnel.Key) bool {
	if i.now == nil || len(i.now) >= remembered {
		i.now, i.before = map[tunnel.KeyID]bool{}, i.now
	}
	ok := true
	for _, k := range keys {
		ok = ok && !i.now[k.ID] && !i.before[k.ID]
		i.now[k.ID] = true
	}
	return ok
}

// complete makes a block of the parts, and tells the peer.
func (m *Machine) complete(number uint32, a *arrival) {
	n := 0
	for _, part := range a.parts {
		n += int(size(part))
	}
	bits := newBits(n &^ (unit - 1))
	at := 0
	for _, part := range a.parts {
		for _, k := range part {
			at += copy(bits.Expose()[min(at, bits.Len()):], k.Bits.Expose())
		}
	}
	m.forget(number)
	if bits.Len() < rLen+unit || bits.Len() > maxBlock || !m.in.add(number, bits) {
		bits.Clear()
		m.send(message{kind: kindRefuse, of: m.peer, block: number, reason: noPlace})
		return
	}
	m.stats.Collected += uint64(n)
	m.send(message{kind: kindReady, of: m.peer, block: number})
}

// forget drops what has come of a block.
func (m *Machine) forget(number uint32) {
	a := m.arrivals[number]
	a.wipe()
	for _, id := range a.requests {
		delete(m.asked, id)
	}
	delete(m.arrivals, number)
}

func (a *arrival) wipe() {
	for i := range a.parts {
		wipe(a.parts[i])
		a.parts[i] = nil
	}
}

// State is a snapshot for status pages.
type State struct {
	// Up: there is pad for payload. It rises when the mark is good and falls
	// when it is empty.
	Up   bool
	Mark Mark
	Why  string // why pad is not good; "" = it is
	// Left is the pad ready for sending, Target what counts as full, bytes.
	Left, Target int
	// In and Out are bytes a second over the last half minute: blocks taken
	// into use, and used by records.
	In, Out float64
	Held    int // blocks of the peer's
	// Simulated: the key source has said so at least once.
	Simulated bool
	Stats
}

// State returns a snapshot as of the last Step.
func (m *Machine) State() State {
	left, mark, _ := m.out.level(m.meter.in)
	_, held := m.in.state()
	s := State{Up: m.up, Mark: mark, Left: left, Target: m.cfg.Target, In: m.meter.in,
		Out: m.meter.out, Held: held, Simulated: m.simulated, Stats: m.stats}
	m.out.mu.Lock()
	s.Sealed = m.out.count
	m.out.mu.Unlock()
	m.in.mu.Lock()
	s.Opened = m.in.count
	m.in.mu.Unlock()
	switch {
	case mark == Good:
	case m.trouble != "":
		s.Why = "one-time pad is " + mark.String() + ": " + m.trouble
	case m.peer == boot{}:
		s.Why = "one-time pad is " + mark.String() + ": the peer has not said hello"
	default:
		s.Why = "one-time pad is " + mark.String() + ": it is used faster than it comes, or has just begun"
	}
	return s
}
