package rekey

import (
	"fmt"
	"time"
)

// held is an epoch as the machine remembers it: without its keys, which the
// caller owns.
type held struct {
	recv, send uint32
	number     uint64
	level      Level
	made       time.Time
	heard      bool      // the peer was seen on it
	until      time.Time // as old epoch: when it goes; never = not before cur is heard
	reply      [32]byte  // as next epoch: the stored M4 that may be asked again
	why        string    // why there is no fresh QKD key in it
}

// line is the set of epochs, handshake.md 4.7. There are never more than two
// receive epochs: old and next do not exist together.
//
//	initiator, on M4:          cur becomes old, the new one is cur and sends
//	responder, on M3:          the new one is next: accepted, not sent with
//	responder, on first data:  cur becomes old, next is cur and sends
//	both:                      old goes when the peer was heard on cur and the
//	                           overlap has passed
type line struct {
	cur, old, next *held

	level Level
	since time.Time
	why   string
	began time.Time
	idle  time.Time // since when there is no sending epoch

	rising     int       // epochs in a row that are better than the level shown
	due        time.Time // when cur is to be replaced, by us
	spent      bool      // cur has sealed all the bytes it may
	confirmAt  time.Time
	confirmGap time.Duration
}

func (l *line) holds(index uint32) bool {
	for _, e := range [...]*held{l.cur, l.old, l.next} {
		if e != nil && e.recv == index {
			return true
		}
	}
	return false
}

func (l *line) wake(hold time.Duration) time.Time {
	w := l.confirmAt
	for _, e := range [...]*held{l.cur, l.old, l.next} {
		if e != nil {
			w = earliest(w, earliest(e.made.Add(hold), e.until))
		}
	}
	return w
}

// overlap is how long an old receive epoch is kept, DESIGN.md section 7.
func (m *Machine) overlap() time.Duration {
	return min(max(m.cfg.EpochLife/4, 2*m.rtt+m.cfg.Reorder), overlapMax)
}

// overdue is how long the other end waits for the scheduled initiator.
func (m *Machine) overdue() time.Duration {
	return min(max(m.cfg.EpochLife/8, 2*time.Second), 15*time.Second)
}

func hold(e *Epoch) *held {
	return &held{recv: e.RecvIndex, send: e.SendIndex, number: e.Number, level: e.Level,
		made: e.Made}
}

// installInitiator takes the new epoch into use both ways.
func (m *Machine) installInitiator(e *Epoch, why string) {
	m.out.Install = e
	h := hold(e)
	h.why = why
	m.takeOver(h)
}

// installResponder accepts the new epoch but does not send with it yet.
func (m *Machine) installResponder(e *Epoch, reply [32]byte, why string) {
	m.out.Install = e
	m.next = hold(e)
	m.next.reply, m.next.why = reply, why
}

// takeOver makes e the sending epoch and keeps the one before for receiving.
func (m *Machine) takeOver(e *held) {
	m.old, m.cur = m.cur, e
	if m.old != nil {
		m.old.until = never
	}
	m.spent = false
	m.wanted = false
	m.due = e.made.Add(m.cfg.EpochLife + m.overdue())
	if m.scheduled {
		m.due = e.made.Add(m.cfg.EpochLife - m.lead - m.random(m.cfg.EpochLife/24))
	}
	m.out.Send, m.out.Stop = e.recv, false
	m.stats.Epochs++
	m.event("rekey", e.level, fmt.Sprintf("epoch %d", e.number))
	m.show(e)
	m.confirmGap = 0
	m.confirm()
}

// show sets the level of the line by its sending epoch: down at once, up with
// the second better epoch in a row, so that a source that comes and goes does
// not make the page flicker.
func (m *Machine) show(e *held) {
	why := levelReason(e.level)
	if e.why != "" {
		why += ": " + e.why
		defer m.alarm(why)
	}
	if m.level == Blocked || e.level <= m.level {
		m.rising = 0
		m.setLevel(e.level, why)
		return
	}
	if m.rising++; m.rising == 2 {
		m.rising = 0
		m.setLevel(e.level, why)
	}
}

func levelReason(l Level) string {
	switch l {
	case QKD:
		return "fresh QKD key"
	case Chained:
		return "QKD from an earlier epoch"
	}
	return "no QKD in this epoch"
}

// confirm asks for an empty record and sets the next time. The initiator
// repeats until the responder is heard; the responder repeats as long as the
// epoch lives, because it cannot see whether it was heard.
func (m *Machine) confirm() {
	m.out.Confirm = true
	m.confirmGap = min(max(2*m.confirmGap, resendFirst), resendMax)
	m.confirmAt = m.now.Add(m.jitter(m.confirmGap))
}

// heard notes that the peer sends in the epoch of this receive index.
func (m *Machine) heard(index uint32) {
	switch {
	case m.next != nil && m.next.recv == index:
		e := m.next
		m.next = nil
		e.heard = true
		// The peer has both ends' proof now: the chain secret before is not
		// needed any more.
		m.chains[1].rk.Clear()
		m.chains[1] = chain{}
		if m.init != nil {
			m.drop("peer uses the new epoch")
		}
		m.takeOver(e)
	case m.cur != nil && m.cur.recv == index && !m.cur.heard:
		m.cur.heard = true
		m.confirmAt = never
	default:
		return
	}
	if m.old != nil {
		m.old.until = m.now.Add(m.overlap())
	}
}

// sent compares the volume of the sending epoch with its limits.
func (m *Machine) sent(bytes uint64) {
	if m.cur == nil || bytes < m.cfg.EpochBytes {
		return
	}
	m.wanted = true
	if bytes >= hardBytes && !m.spent {
		m.spent = true
		m.block("the epoch has sealed 2^38 bytes")
	}
}

// ageEpochs retires the old epoch at its time, and every epoch at HoldMax.
func (m *Machine) ageEpochs() {
	if m.old != nil && m.old.until != never && !m.old.until.After(m.now) {
		m.retire(&m.old)
	}
	for _, e := range [...]**held{&m.old, &m.cur, &m.next} {
		if *e == nil || (*e).made.Add(m.cfg.HoldMax).After(m.now) {
			continue
		}
		sending := *e == m.cur
		m.retire(e)
		if sending {
			m.idle = m.now
			m.confirmAt = never
			m.block(fmt.Sprintf("no new epoch within %v%s", m.cfg.HoldMax, m.cause()))
		}
	}
}

// cause is what is known to stand in the way of a new epoch.
func (m *Machine) cause() string {
	switch {
	case m.failure != "":
		return ": " + m.failure
	case m.source.state >= sourceEmpty:
		return ": key manager " + m.source.state.String()
	}
	return ""
}

func (m *Machine) block(why string) {
	m.out.Stop, m.out.Send, m.out.Confirm = true, 0, false
	m.confirmAt = never
	m.setLevel(Blocked, why)
}

func (m *Machine) retire(e **held) {
	m.out.Retire = append(m.out.Retire, (*e).recv)
	*e = nil
}

func (m *Machine) setLevel(l Level, why string) {
	m.why = why
	if m.level == l {
		return
	}
	fell := l < m.level
	m.level, m.since = l, m.now
	m.event("level", l, why)
	if fell && l == Blocked { // other levels alarm with their epoch
		m.alarm("line is blocked: " + why)
	}
}

// learn takes what a proven peer says about the epoch it sends with. The peer
// wrote it after its last handshake had ended, so a next epoch that it does
// not use now it will never use.
func (m *Machine) learn(p intro) {
	if m.peerIntro.boot != p.boot && m.peerIntro.boot != [16]byte{} {
		m.event("peer", m.level, "peer has restarted")
	}
	m.peerIntro = p
	if m.next != nil {
		if p.sending == m.next.recv {
			m.heard(m.next.recv)
		} else {
			m.retire(&m.next)
		}
	}
	if p.sending == 0 && m.old != nil {
		m.retire(&m.old) // the peer has nothing left to send in it
	}
}

// startAt is when a handshake of ours may begin; never = not before something
// else happens.
func (m *Machine) startAt() time.Time {
	if m.init != nil || m.old != nil || m.collecting() || !m.mayDraw() {
		return never
	}
	var at time.Time
	switch {
	case m.wanted:
		at = m.began
	case m.cur != nil:
		at = m.due
	case m.scheduled:
		at = m.idle
	default:
		at = m.idle.Add(bootGrace)
	}
	if !m.scheduled && len(m.pending) > 0 {
		at = m.yield(at)
	}
	if m.next != nil && at.Before(m.next.made.Add(abandonAfter)) {
		at = m.next.made.Add(abandonAfter)
	}
	if at.Before(m.notBefore) {
		at = m.notBefore
	}
	return at
}

// yield puts our start off while the scheduled initiator has a handshake under
// way, but not for longer than one of them lives: an M1 may be a replay.
func (m *Machine) yield(at time.Time) time.Time {
	latest := at
	for _, p := range m.pending {
		if p.until.After(latest) {
			latest = p.until
		}
	}
	if limit := at.Add(pendingLife); latest.After(limit) {
		return limit
	}
	return latest
}
