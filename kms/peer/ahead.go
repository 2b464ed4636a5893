package peer

import (
	"math"
	"time"
)

// Bounds of what is granted ahead of demand (rule 6).
const (
	aheadMost = 4096             // keys a shape: two segments of the default size
	aheadFor  = time.Second      // of demand, or two round trips if they are longer
	aheadIdle = 60 * time.Second // a shape so long undrawn gets none
	// A shape with fewer calls a second gets none either: a round trip each
	// costs it nothing, and what it left undrawn would idle.
	aheadLeast = 0.25
	aheadLot   = 8 // keys wanted ready, from which on twice as many are granted
	// The part of the stock that is granted ahead, half of what rule 6 allows:
	// the stock may fall while a grant stands.
	aheadShare = 8
	// A GRANT ahead brings at least this part of what is ready: where the stock
	// bounds it, each draw would make room for another small one.
	aheadWorth = 4
	// Slots below which nothing is granted ahead from the last segment.
	aheadScarce = 256
	rateTime    = 10 * time.Second // over which demand is averaged

	demandEvery = 10 * time.Millisecond // between two looks at all shapes
)

// demand averages how many keys a second are asked for.
func (sh *shape) demand(now time.Duration, n int) {
	dt := (now - sh.drawAt).Seconds()
	fade := math.Exp(-dt / rateTime.Seconds())
	sh.rate = sh.rate*fade + float64(n)/rateTime.Seconds()
	sh.calls = sh.calls*fade + 1/rateTime.Seconds()
	sh.drawAt = now
}

// target is how many keys the shape should have granted and undrawn. It lags
// behind a demand that rises, as the rate does: with no more than two round
// trips' worth, four of five draws waited for a grant, and each such wait is a
// commit at both KMEs.
func (sh *shape) target(now, rtt time.Duration, least float64) int {
	if !sh.ahead || now >= sh.drawAt+aheadIdle || sh.calls < least {
		return 0
	}
	return min(max(1, int(math.Ceil(sh.rate*max(aheadFor, 2*rtt).Seconds()))), aheadMost)
}

// grantAhead keeps grants ready for a shape in demand; those of all shapes are
// at most an eighth of what we can draw.
func (m *Machine) grantAhead(r *remote, sh *shape) {
	target := sh.target(m.now, r.rtt, m.aheadLeast)
	have := sh.free + sh.coming - sh.wanted
	if !r.up() || have >= target {
		return
	}
	stock, spare := 0, 0
	for _, l := range r.links {
		spare += l.mineSlots
		for _, s := range l.open {
			stock += s.left
		}
	}
	stock += spare
	if spare == 0 && stock < aheadScarce { // what is left is for whoever comes
		return
	}
	lot := target - have
	if target >= aheadLot { // else what a pair leaves behind is more than what it gains
		lot += target
	}
	n := min(lot, aheadMost, (stock/aheadShare-r.ready)/sh.per)
	if n > 0 && aheadWorth*n >= have { // else wait until it is worth a message
		m.grantKeys(r, sh, n, true)
	}
}

// openAhead opens segments before the open ones are used up, so that what is
// in demand can be granted ahead, once somebody draws and the session is not
// fresh: a KME that restarts in a loop must not burn a segment each time.
func (m *Machine) openAhead(r *remote) {
	if m.now >= r.demandAt { // not at every draw: there may be a thousand shapes
		r.demandAt, r.drawn, r.demand = m.now+demandEvery, false, 0
		for _, sh := range r.shapes {
			r.drawn = r.drawn || m.now < sh.drawAt+aheadIdle && sh.drawAt > 0
			r.demand += sh.target(m.now, r.rtt, m.aheadLeast) * sh.per
		}
	}
	if !r.drawn || m.now < r.upSince+openAheadAge {
		return
	}
	for _, l := range r.links {
		room, size := 0, 0
		for _, s := range l.open {
			room += s.Slots - s.next
			size = max(size, s.Slots)
		}
		least := max(size/4, 1)
		if len(l.mine) > 1 { // grantAhead leaves what the last one has
			least = max(least, r.demand)
		}
		if l.idAgreed && len(l.mine) > 0 && room < least {
			m.openNext(l)
		}
	}
}
