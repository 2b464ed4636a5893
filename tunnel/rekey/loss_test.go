package rekey

import (
	"fmt"
	"testing"
	"time"

	"github.com/quietline/quietline/tunnel"
)

// TestEachMessageLost drops the first copies of one message, or of the first
// records, and of nothing else: one repeat brings the line up, with the same
// QKD key, in the time that the repeats take.
func TestEachMessageLost(t *testing.T) {
	for kind := byte(0); kind <= kindM4; kind++ { // 0 = data records
		for n := 1; n <= 3; n++ {
			t.Run(fmt.Sprintf("M%d, %d times", kind, n), func(t *testing.T) {
				w := newWorld(uint64(kind))
				left := map[*end]int{}
				w.drop = func(e *end, d []byte) bool {
					if d == nil && kind != 0 || d != nil && (d[0] != kind || d[3]>>4 != 0) || left[e] >= n {
						return false
					}
					left[e]++
					return true
				}
				w.start(QKDStrict, nil)
				within := []time.Duration{0, time.Second, 2 * time.Second, 5 * time.Second}[n]
				w.mustBeUp(t, within)
				w.run(20 * time.Second)
				w.ok(t)
				i := w.named("I").m.Stats()
				if i.KeysDrawn != 1 || i.KeysLost != 0 || i.Epochs != 1 {
					t.Errorf("%+v", i)
				}
			})
		}
	}
}

// TestSimultaneousStart: both ends start at the same moment, at any point of
// the round trip, from any state; one epoch comes of it and no key is lost.
func TestSimultaneousStart(t *testing.T) {
	for ms := -40; ms <= 40; ms += 5 {
		w := upLine(t, QKDStrict, nil)
		w.run(12 * time.Second)
		i, r := w.named("I"), w.named("R")
		first, second := i, r
		if ms < 0 {
			first, second = r, i
		}
		n := i.m.State().Epoch
		first.step(Input{Rekey: true})
		w.run(max(time.Duration(ms), time.Duration(-ms)) * time.Millisecond)
		second.step(Input{Rekey: true})
		w.run(11 * time.Second)
		w.ok(t)
		// An end whose operator asks while the other's epoch is just being
		// made may get one of its own afterwards.
		if got := i.m.State().Epoch - n; !w.up() || got < 1 || got > 2 {
			t.Errorf("%d ms apart: %d epochs", ms, got)
		}
		if lost := i.m.Stats().KeysLost + r.m.Stats().KeysLost; lost > 1 {
			t.Errorf("%d ms apart: %d keys lost", ms, lost)
		}
	}
}

// TestKeyManagerHangs: a key manager that never answers, at either end, holds
// up one handshake only; afterwards the line knows and probes.
func TestKeyManagerHangs(t *testing.T) {
	for _, who := range []string{"I", "R"} {
		for policy, want := range map[Policy]Level{QKDStrict: QKD, QKDPreferred: Chained} {
			w := upLine(t, policy, func(_ int, c *Config) { c.EpochLife = 20 * time.Second })
			w.traffic(100 * time.Millisecond)
			w.kme.state[w.named(who).id].mute = true
			w.run(40 * time.Second)
			w.ok(t)
			for _, e := range w.ends {
				s := e.m.State()
				if e.blocked || s.Level != want || e.lost != 0 {
					t.Errorf("%v, %s hangs: end %d: %+v, lost %d", policy, who, e.id, s, e.lost)
				}
			}
			if !w.named(who).alarmed("does not answer") {
				t.Errorf("%v, %s hangs: no alarm", policy, who)
			}
			w.kme.state = [2]kmeState{}
			w.run(70 * time.Second)
			w.ok(t)
			if s := w.named("I").m.State(); s.Level != QKD || s.Failure != "" || !w.up() {
				t.Errorf("%v, %s answers again: %+v", policy, who, s)
			}
		}
	}
}

// TestAnswerAfterTheDecision: the key manager's answer comes after the machine
// has gone on without it. The keys are wiped and nothing changes.
func TestAnswerAfterTheDecision(t *testing.T) {
	for _, who := range []string{"I", "R"} {
		w := upLine(t, QKDPreferred, nil)
		w.run(12 * time.Second)
		e := w.named(who)
		w.kme.state[e.id].delay = 5 * time.Second
		var raw [][]byte
		e.keys = func(ks []tunnel.Key) {
			for _, k := range ks {
				raw = append(raw, k.Bits.Expose())
			}
		}
		w.named("I").step(Input{Rekey: true})
		w.run(4 * time.Second)
		epoch, level := e.m.State().Epoch, e.send.Level
		if level != Chained || epoch != 2 {
			t.Fatalf("%s: epoch %d, %v", who, epoch, level)
		}
		w.run(4 * time.Second)
		w.ok(t)
		if len(raw) == 0 || !allZero(raw[0]) {
			t.Errorf("%s: the late keys are kept", who)
		}
		if e.m.State().Epoch != epoch || !w.up() {
			t.Errorf("%s: the late answer made epoch %d", who, e.m.State().Epoch)
		}
	}
}
