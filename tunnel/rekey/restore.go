package rekey

import (
	"io"
	"time"
)

// jumpMax is how far wall and monotonic clock may part between two Steps
// without suspicion: far above what time synchronisation corrects in one step
// once it runs, far below the age of any snapshot worth restoring.
const jumpMax = 2 * time.Second

// clockJump is how far the wall clock moved against the monotonic clock. It is
// zero for times without a monotonic reading.
func clockJump(last, now time.Time) time.Duration {
	if last.IsZero() {
		return 0
	}
	return (now.Round(0).Sub(last.Round(0)) - now.Sub(last)).Abs()
}

// restart drops every key that a second copy of this memory may hold, so that
// no nonce can come twice, and begins as after a start (handshake.md 4.8). The
// chain secret stays: it never encrypts and goes only into schedules with
// fresh secrets; so do the key_IDs seen.
func (m *Machine) restart(why string) {
	m.event("alarm", Blocked, why)
	m.out.Void = true
	if m.init != nil {
		m.drop(why)
	}
	for i := range m.pending {
		m.dropPending(i)
	}
	clear(m.replies)
	for _, e := range [...]**held{&m.old, &m.cur, &m.next} {
		if *e != nil {
			m.retire(e)
		}
	}
	m.ageStock()
	m.env.pieces = [buffers]assembly{}
	m.idle, m.notBefore, m.wanted = m.now, m.now, false
	m.block(why)
	// The peer shall see a new life. Without randomness nothing starts anyway.
	_, _ = io.ReadFull(m.cfg.Rand, m.boot[:])
}
