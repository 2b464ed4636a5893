package pad

import (
	"errors"
	"time"

	"github.com/quietline/quietline/secret"
	"github.com/quietline/quietline/tunnel"
)

// newBits returns memory for pad, locked against swapping where the system lets
// us: a limit on locked memory shall not stop the line.
func newBits(n int) secret.Bytes {
	if b, err := secret.NewLocked(n); err == nil {
		return b
	}
	return secret.New(n)
}

// plan begins blocks and asks for keys while there is less pad than there
// should be.
func (m *Machine) plan() {
	if m.now.Before(m.notBefore) {
		return
	}
	if m.keyLen == 0 {
		if !m.asks(func(a asker) bool { return a.status }) {
			m.ask(Request{}, asker{status: true})
		}
		return
	}
	coming, _, _ := m.out.level(m.meter.in)
	for _, d := range m.drafts {
		coming += m.cfg.BlockLen
		if !d.closed && d.request == 0 {
			m.drawPart(d)
		}
	}
	for len(m.drafts) < maxDrafts && coming+m.cfg.BlockLen <= m.cfg.Target {
		m.number++
		d := &draft{number: m.number, bits: newBits(m.cfg.BlockLen), began: m.now,
			keyLen: min(m.keyLen, m.cfg.BlockLen)}
		m.drafts = append(m.drafts, d)
		coming += m.cfg.BlockLen
		m.drawPart(d)
	}
}

func (m *Machine) asks(match func(asker) bool) bool {
	for _, a := range m.asked {
		if match(a) {
			return true
		}
	}
	return false
}

// drawPart asks for the next keys of a block.
func (m *Machine) drawPart(d *draft) {
	n := min((m.cfg.BlockLen-d.n)/d.keyLen, m.perCall)
	d.request = m.ask(Request{New: n, SizeBits: d.keyLen * 8}, asker{draft: d})
}

// answered gives an answer to who asked; keys that nobody waits for are wiped.
func (m *Machine) answered(a *Answer) {
	defer func() { wipe(a.Keys) }() // what nobody took
	who, ok := m.asked[a.ID]
	delete(m.asked, a.ID)
	switch {
	case !ok:
		m.stats.Lost += size(a.Keys)
	case who.status:
		m.learn(a)
	case who.draft != nil:
		m.drawn(who.draft, a)
	default:
		m.collected(who, a)
	}
}

// learn takes the sizes that the key source offers: keys as large as it has
// them, so that a block has few key_IDs.
func (m *Machine) learn(a *Answer) {
	if a.Err != nil {
		m.fail(a.Err)
		return
	}
	s := a.Stock
	m.simulated = m.simulated || s.Simulated
	bits := max(s.SizeBits, s.MaxBits)
	m.keyLen = max(1, min(bits/8, maxKeyLen, m.cfg.BlockLen))
	m.perCall = max(1, min(s.MaxKeys, maxIDs))
	if s.MaxKeys == 0 {
		m.perCall = maxIDs
	}
	m.well()
}

func (m *Machine) well() { m.trouble = "" }

// fail puts drawing off.
func (m *Machine) fail(err error) {
	what := "does not answer"
	switch {
	case errors.Is(err, tunnel.ErrKeyEmpty):
		what = "has no key"
	case errors.Is(err, tunnel.ErrKeyDenied):
		what = "denies the pad SAE"
	}
	if why := "key manager " + what; why != m.trouble {
		m.trouble = why
		m.event(true, "no new one-time pad: %s", why)
	}
	m.notBefore = m.now.Add(m.cfg.ProbeEvery)
}

// drawn puts keys into their block.
func (m *Machine) drawn(d *draft, a *Answer) {
	d.request = 0
	switch {
	case a.Err != nil:
		m.fail(a.Err)
		m.closeShort(d)
		return
	case !m.ids.fresh(a.Keys) || len(a.Keys) == 0 || d.n+int(size(a.Keys)) > d.bits.Len() || len(a.Keys) > maxIDs ||
		!all(a.Keys, d.keyLen):
		m.stats.Collision++
		m.stats.Lost += size(a.Keys)
		m.fail(tunnel.ErrKeyDown)
		return
	}
	m.well()
	m.stats.Drawn += size(a.Keys)
	m.meter.drawn += size(a.Keys)
	var ids []tunnel.KeyID
	for _, k := range a.Keys {
		d.n += copy(d.bits.Expose()[d.n:], k.Bits.Expose())
		ids = append(ids, k.ID)
	}
	d.parts = append(d.parts, ids)
	if d.bits.Len()-d.n < d.keyLen || len(d.parts) == maxParts {
		m.close(d)
		return
	}
	m.drawPart(d)
}

// closeShort takes a block as it is when keys come slowly.
func (m *Machine) closeShort(d *draft) {
	if d.n >= leastBlock && m.now.Sub(d.began) >= patience {
		m.close(d)
	}
}

// close announces a block.
func (m *Machine) close(d *draft) {
	if n := d.n &^ (unit - 1); n < d.bits.Len() {
		short := newBits(n)
		copy(short.Expose(), d.bits.Expose())
		d.bits.Clear()
		d.bits = short
	}
	d.closed, d.until = true, m.now.Add(draftLife)
	d.gap = resendFirst
	m.announce(d)
}

func (m *Machine) announce(d *draft) {
	for i, ids := range d.parts {
		m.send(message{kind: kindAnnounce, block: d.number, keyLen: uint16(d.keyLen),
			part: byte(i), parts: byte(len(d.parts)), ids: ids})
	}
	d.resendAt = m.now.Add(d.gap)
	d.gap = min(2*d.gap, resendMax)
}

// tickDrafts repeats announcements, and gives blocks up that nobody answers.
func (m *Machine) tickDrafts() {
	for _, d := range append([]*draft(nil), m.drafts...) {
		switch {
		case !d.closed || d.ready:
		case !d.until.After(m.now):
			m.event(false, "one-time pad lost: the peer did not answer for a block")
			m.remove(d)
		case !d.resendAt.After(m.now):
			m.announce(d)
		}
	}
	m.promote()
}

// promote takes ready blocks into use in the order of their numbers.
func (m *Machine) promote() {
	for len(m.drafts) > 0 && m.drafts[0].ready {
		d := m.drafts[0]
		m.drafts = m.drafts[1:]
		m.meter.ready += uint64(d.bits.Len() - rLen)
		m.stats.Blocks++
		m.out.add(&block{d.number, d.bits})
	}
}

// remove gives a block up.
func (m *Machine) remove(d *draft) {
	for i, e := range m.drafts {
		if e == d {
			m.drafts = append(m.drafts[:i:i], m.drafts[i+1:]...)
			m.lose(d)
			break
		}
	}
	m.promote()
}

// lose wipes a block that no record has used.
func (m *Machine) lose(d *draft) {
	m.stats.Lost += uint64(d.n)
	d.bits.Clear()
	delete(m.asked, d.request)
}

func size(keys []tunnel.Key) (n uint64) {
	for _, k := range keys {
		n += uint64(k.Bits.Len())
	}
	return n
}

func all(keys []tunnel.Key, n int) bool {
	for _, k := range keys {
		if k.Bits.Len() != n {
			return false
		}
	}
	return true
}

func wipe(keys []tunnel.Key) {
	for _, k := range keys {
		k.Bits.Clear()
	}
}

// meter measures how fast pad comes in and goes out.
type meter struct {
	since        time.Time
	drawn, ready uint64 // bytes since then
	used         uint64 // bytes ever, at since
	in, out      float64
}

// window is what rates are averaged over.
const window = 30 * time.Second

// measure looks at rates and marks.
func (m *Machine) measure() {
	left, mark, used := m.out.level(m.meter.in)
	t := &m.meter
	if t.since.IsZero() {
		t.since, t.used = m.now, used
	}
	if d := m.now.Sub(t.since); d >= time.Second {
		share := min(1, d.Seconds()/window.Seconds())
		t.in += share * (float64(t.ready)/d.Seconds() - t.in)
		t.out += share * (float64(used-t.used)/d.Seconds() - t.out)
		t.since, t.ready, t.used = m.now, 0, used
	}
	if mark < m.mark {
		m.event(true, "one-time pad is %s: %d bytes left", mark, left)
	} else if mark == Good && m.mark < Good {
		m.event(false, "one-time pad is good: %d bytes", left)
	}
	m.mark = mark
	if mark == Good {
		m.up = true
	} else if mark == Empty {
		m.up = false
	}
}
