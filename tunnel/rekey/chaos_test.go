package rekey

import (
	"fmt"
	"math"
	"os"
	"strconv"
	"testing"
	"time"

	"github.com/quietline/quietline/tunnel"
)

// recovery is the stated time: after the faults stop, both ends send with the
// same epoch within it. It is the longest chain of waits that one lost
// datagram can leave behind: a repeat of M1 (10 s + 25 %), an unconfirmed
// epoch (abandonAfter), a probe of the key manager and one M3 phase.
const recovery = resendMax*5/4 + abandonAfter + 10*time.Second + choiceLife

// chaos runs one seed: a minute and more of faults, then quiet.
// bend plants a bug into the end it is given.
func chaos(seed uint64, logf func(string, ...any), bend func(*end)) error {
	w := newWorld(seed)
	if logf != nil {
		w.log = logf
	}
	r := w.rng
	policy := PQCOnly + Policy(r.IntN(int(OTPStrict-PQCOnly)+1))
	life := []time.Duration{time.Second, 3 * time.Second, 20 * time.Second, 120 * time.Second}[r.IntN(4)]
	hold := []time.Duration{0, 2 * life, 60*time.Second + life}[r.IntN(3)]
	chain := r.IntN(20)
	w.net = network{loss: r.Float64() * 0.3, dup: r.Float64() * 0.2,
		delay: time.Duration(r.IntN(50)) * time.Millisecond,
		vary:  time.Duration(1+r.IntN(100)) * time.Millisecond}
	w.log("policy %v life %v hold %v net %+v", policy, life, hold, w.net)
	w.toy = seed%16 != 0
	w.bent = bend
	w.start(policy, func(_ int, c *Config) { c.EpochLife, c.HoldMax, c.MaxChain = life, hold, chain })
	w.traffic(time.Duration(20+r.IntN(400)) * time.Millisecond)
	for range 12 {
		w.mishap()
		w.run(time.Duration(r.IntN(20_000)) * time.Millisecond)
	}
	w.heal()
	w.log("%8.3f healed", w.now.Sub(epochZero).Seconds())
	if !w.until(recovery, w.up) && w.fault == nil {
		return fmt.Errorf("not up %v after the faults stopped: %+v %+v", recovery,
			w.ends[0].m.State(), w.ends[1].m.State())
	}
	return w.quiet(life)
}

// quiet checks that a healthy line keeps its line: rekeys come, nothing is lost.
func (w *world) quiet(life time.Duration) error {
	// What was on the way when the faults stopped may still end badly.
	w.run(3*life + recovery)
	if w.fault != nil {
		return w.fault
	}
	var lost, ups [2]int
	for i, e := range w.ends {
		lost[i], ups[i] = e.lost, e.ups
		if e.blocked {
			return fmt.Errorf("end %d is blocked on a healthy line: %+v", i, e.m.State())
		}
	}
	w.run(5*life + 20*time.Second)
	for i, e := range w.ends {
		if e.lost != lost[i] {
			return fmt.Errorf("end %d lost %d records on a healthy line", i, e.lost-lost[i])
		}
		if e.ups-ups[i] < 4 {
			return fmt.Errorf("end %d rekeyed %d times in five lives: %+v", i, e.ups-ups[i], e.m.State())
		}
	}
	return w.fault
}

// traffic makes both ends seal records for ever.
func (w *world) traffic(gap time.Duration) {
	for _, e := range w.ends {
		var tick func()
		tick = func() {
			if e.send != nil && !e.mute {
				e.record()
			}
			w.at(gap, tick)
		}
		w.at(gap, tick)
	}
}

// mishap is one fault, or the end of some.
func (w *world) mishap() {
	r := w.rng
	e := w.ends[r.IntN(2)]
	st := &w.kme.state[e.id]
	what := r.IntN(13)
	w.log("%8.3f mishap %d at end %d", w.now.Sub(epochZero).Seconds(), what, e.id)
	switch what {
	case 0:
		e.boot()
	case 1:
		w.net.cut[e.id] = !w.net.cut[e.id]
	case 2:
		w.net.cut = [2]bool{true, true}
	case 3, 4:
		w.net.cut = [2]bool{}
	case 5:
		st.err = []error{tunnel.ErrKeyEmpty, tunnel.ErrKeyDown, tunnel.ErrKeyDenied}[r.IntN(3)]
	case 6:
		*st = kmeState{}
	case 7:
		st.delay = time.Duration(r.IntN(6000)) * time.Millisecond
	case 8:
		st.mute = !st.mute
	case 9:
		st.loseNew = r.Float64()
	case 10:
		st.wrong = r.Float64()
	case 12:
		for i := range e.recv {
			e.gone[i] = true
		}
		e.step(Input{Restored: true})
	case 11:
		e.step(Input{Rekey: true})
	}
}

func (w *world) heal() {
	w.net.cut = [2]bool{}
	w.net.loss, w.net.dup = 0, 0
	w.net.vary = 0
	w.kme.state = [2]kmeState{}
}

// TestChaos tries seeds. QUIETLINE_SEED=n plays one and prints what happens;
// QUIETLINE_LONG=1 tries 10^5, or QUIETLINE_SEEDS of them.
func TestChaos(t *testing.T) {
	number := func(name string, or uint64) uint64 {
		n, err := strconv.ParseUint(os.Getenv(name), 10, 64)
		if err != nil {
			return or
		}
		return n
	}
	if seed := number("QUIETLINE_SEED", math.MaxUint64); seed != math.MaxUint64 {
		if err := chaos(seed, t.Logf, nil); err != nil {
			t.Fatal(err)
		}
		return
	}
	n := uint64(150)
	if os.Getenv("QUIETLINE_LONG") == "1" {
		n = number("QUIETLINE_SEEDS", 100_000)
	}
	for seed := range n {
		if err := chaos(seed, nil, nil); err != nil {
			t.Errorf("QUIETLINE_SEED=%d: %v", seed, err)
		}
		if (seed+1)%5000 == 0 {
			t.Logf("%d seeds", seed+1)
		}
	}
	t.Logf("%d seeds", n)
}
