package peer

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"time"
)

// bound is how many slots of a KME's own stock stand in grants that nobody has
// drawn, and how many there are.
func (m *Machine) bound() (undrawn, stock int) {
	for _, l := range m.ordered[0].links {
		stock += l.mineSlots
		for _, s := range l.open {
			stock += s.left
			for _, g := range s.grants {
				undrawn += (g.keys - g.drawn) * g.per
			}
		}
	}
	return undrawn, stock
}

// idleHistory is a line of 1 kbit/s with 1,000 pairs of which few draw.
type idleHistory struct {
	name   string
	active int           // pairs that draw all the time
	every  time.Duration // each of them, on average
	rest   time.Duration // each of the others, on average
	burst  int           // calls that those make then, one a second
}

// TestIdleStock: with 1,000 configured pairs on a link of 1 kbit/s less than a
// quarter of a KME's stock is bound in grants that nobody has drawn, at every
// second of an hour, whether the demand is below what the link yields or
// above it. Seconds with fewer than idleLeast keys in stock do not count: what
// one pair holds is a quarter of them.
func TestIdleStock(t *testing.T) {
	for _, h := range []idleHistory{
		{"a tenth of the supply", 20, 100 * time.Second, 4 * time.Hour, 1},
		{"most of the supply", 50, 40 * time.Second, time.Hour, 1},
		{"more than the supply", 100, 20 * time.Second, time.Hour, 1},
		{"bursts of pairs that fall idle", 10, 20 * time.Second, time.Hour, 6},
		{"everybody now and then", 0, 0, 10 * time.Minute, 1},
	} {
		t.Run(h.name, h.test)
	}
}

const idleLeast = 16

func (h idleHistory) test(t *testing.T) {
	const pairs, slots = 1000, 64
	blockEvery := (Reserved + slots*SlotBytes) * 8 * time.Second / 1000
	c := newCouple(t, pairs, 20*time.Millisecond)
	rng := rand.New(rand.NewPCG(1, 2))
	chance := func(every time.Duration) bool {
		return every > 0 && rng.Float64() < time.Second.Seconds()/every.Seconds()
	}
	left := make([]int, pairs) // calls of a burst to come
	worst, at, drawn, asked, sum, seconds := 0.0, "", 0, 0, 0.0, 0
	for next, end := c.now, c.now+time.Hour; c.now < end; {
		if c.now >= next {
			next += blockEvery
			c.ingest(t, slots)
		}
		for i := range pairs {
			switch {
			case left[i] > 0:
				left[i]--
			case i < h.active && chance(h.every):
			case i >= h.active && chance(h.rest):
				left[i] = h.burst - 1
			default:
				continue
			}
			asked++
			c.feed(0, c.draw(i, 1))
		}
		c.run(time.Second)
		drawn += len(c.keys)
		c.keys = c.keys[:0]
		if undrawn, stock := c.m[0].bound(); stock >= idleLeast {
			share := float64(undrawn) / float64(stock)
			sum += share
			seconds++
			if share > worst {
				worst, at = share, fmt.Sprintf("%v: %d of %d", c.now, undrawn, stock)
			}
		}
	}
	t.Logf("%d of %d keys drawn, at most %.1f %% bound (%s), %.1f %% on average in %d s", drawn,
		asked, 100*worst, at, 100*sum/float64(max(seconds, 1)), seconds)
	if worst >= 0.25 {
		t.Errorf("%.0f %% of the stock were bound in undrawn grants at %s", 100*worst, at)
	}
	if drawn == 0 {
		t.Error("nothing was drawn")
	}
}
