package rekey

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/quietline/quietline/tunnel"
)

func TestParsePolicy(t *testing.T) {
	for name, want := range map[string]error{"pqc-only": nil, "qkd-strict": nil,
		"qkd-required": nil, "qkd-preferred": nil,
		"otp-strict": nil, "otp-preferred": nil,
		"": ErrPolicy, "QKD-strict": ErrPolicy, "none": ErrPolicy} {
		p, err := ParsePolicy(name)
		if !errors.Is(err, want) || err == nil && p.String() != name {
			t.Errorf("ParsePolicy(%q) = %v, %v", name, p, err)
		}
	}
}

// TestPoliciesMustFit: ends with unlike floors alarm both, draw no key and
// stay down; ends with the same floor come up at the level both can give.
func TestPoliciesMustFit(t *testing.T) {
	for a := PQCOnly; a <= OTPStrict; a++ {
		for b := PQCOnly; b <= OTPStrict; b++ {
			t.Run(fmt.Sprintf("%v and %v", a, b), func(t *testing.T) {
				w := newWorld(2)
				w.start(a, func(i int, c *Config) { c.Policy = []Policy{a, b}[i] })
				w.run(25 * time.Second)
				w.ok(t)
				for i, e := range w.ends {
					s, st := e.m.State(), e.m.Stats()
					if a.floor() == b.floor() {
						if want := min(a.offer(), b.offer(), QKD); !w.up() || s.Level != want {
							t.Errorf("end %d: %+v, want %v", i, s, want)
						}
						if s.Pad != (a.Pad() && b.Pad()) {
							t.Errorf("end %d: pad %v", i, s.Pad)
						}
						continue
					}
					if !e.alarmed("policies do not fit") || s.Level != Blocked || s.PeerPolicy == "" ||
						st.KeysDrawn != 0 || st.Completed != 0 || e.send != nil {
						t.Errorf("end %d: %+v, %+v, %v", i, s, st, e.events)
					}
				}
			})
		}
	}
}

// outage breaks the key managers of some ends.
func (w *world) outage(who string, err error) {
	for _, e := range w.ends {
		if who == "both" || e == w.named(who) {
			w.kme.state[e.id].err = err
		}
	}
}

// TestFallBack: when a key manager fails at either end, qkd-preferred goes on
// chained without a pause, says so at both ends, and is at QKD again with the
// second epoch after the repair.
func TestFallBack(t *testing.T) {
	for _, policy := range []Policy{QKDPreferred, QKDRequired} {
		for _, who := range []string{"I", "R", "both"} {
			for _, err := range []error{tunnel.ErrKeyEmpty, tunnel.ErrKeyDown, tunnel.ErrKeyDenied} {
				t.Run(fmt.Sprintf("%v %s %v", policy, who, err), func(t *testing.T) {
					w := upLine(t, policy, func(_ int, c *Config) { c.EpochLife = 20 * time.Second })
					w.traffic(200 * time.Millisecond)
					w.outage(who, err)
					w.run(70 * time.Second)
					w.ok(t)
					for _, e := range w.ends {
						s := e.m.State()
						if e.blocked || s.Epoch < 3 {
							t.Fatalf("end %d: %+v", e.id, s)
						}
						if who == "R" && errors.Is(err, tunnel.ErrKeyEmpty) {
							continue // an empty stock does not keep R from collecting; see below
						}
						if s.Level != Chained || s.Chained < 2 || s.Fresh.IsZero() ||
							!strings.Contains(s.Why, "key manager") || !e.alarmed("key manager") ||
							len(s.Alarms) == 0 {
							t.Errorf("end %d: %+v %v", e.id, s, e.events)
						}
					}
					w.kme.state = [2]kmeState{}
					w.run(45 * time.Second)
					w.ok(t)
					for _, e := range w.ends {
						if s := e.m.State(); s.Level != QKD || s.Chained != 0 || len(s.Alarms) != 0 {
							t.Errorf("end %d is not at QKD again: %+v", e.id, s)
						}
						if e.lost != 0 {
							t.Errorf("end %d lost %d records", e.id, e.lost)
						}
					}
				})
			}
		}
	}
}

// TestSilenceIsNoReasonToFallBack: with key managers well and the network
// dropping all handshakes, no policy with QKD makes an epoch without a key.
func TestSilenceIsNoReasonToFallBack(t *testing.T) {
	w := upLine(t, QKDPreferred, func(_ int, c *Config) { c.EpochLife = 20 * time.Second })
	w.net.loss = 0.6
	w.run(10 * time.Minute)
	w.ok(t)
	for _, e := range w.ends {
		if l := e.m.State().Level; e.run != 0 || l == Chained || l == PQC || e.m.Stats().Resent < 50 {
			t.Errorf("end %d fell back: %+v", e.id, e.m.State())
		}
	}
}

func TestChainLimit(t *testing.T) {
	w := upLine(t, QKDRequired, func(_ int, c *Config) {
		c.EpochLife, c.HoldMax, c.MaxChain = 10*time.Second, 60*time.Second, 4
	})
	w.outage("both", tunnel.ErrKeyEmpty)
	w.run(55 * time.Second)
	for _, e := range w.ends {
		if s := e.m.State(); s.Level != Chained || s.Chained != 4 {
			t.Fatalf("end %d: %+v", e.id, s)
		}
	}
	w.run(60 * time.Second)
	for _, e := range w.ends {
		if s := e.m.State(); s.Level != Blocked || !strings.Contains(s.Why, "has no key") {
			t.Fatalf("end %d is not blocked: %+v", e.id, s)
		}
	}
	w.outage("both", nil)
	w.mustBeUp(t, 15*time.Second)
	w.ok(t)
	if s := w.ends[0].m.State(); s.Level != QKD {
		t.Errorf("from blocked the level is that of the epoch at once: %+v", s)
	}
}

// TestChainAge: an hour after the last fresh key qkd-required chains no more,
// however few the epochs.
func TestChainAge(t *testing.T) {
	w := upLine(t, QKDRequired, func(_ int, c *Config) {
		c.EpochLife, c.HoldMax, c.MaxChain = 10*time.Minute, 11*time.Minute, 1000
	})
	w.outage("both", tunnel.ErrKeyDown)
	w.run(59 * time.Minute)
	if s := w.ends[0].m.State(); s.Level != Chained {
		t.Fatalf("not chained: %+v", s)
	}
	w.run(13 * time.Minute)
	for _, e := range w.ends {
		if s := e.m.State(); s.Level != Blocked {
			t.Errorf("end %d: %+v", e.id, s)
		}
	}
	w.ok(t)
}

// TestChainLost: with no QKD and the chain lost by a restart, qkd-preferred
// goes on at PQC and qkd-required stays down.
func TestChainLost(t *testing.T) {
	for _, who := range []string{"I", "R"} {
		for policy, want := range map[Policy]Level{QKDPreferred: PQC, QKDRequired: Blocked} {
			w := upLine(t, policy, nil)
			w.outage("both", tunnel.ErrKeyEmpty)
			e := w.named(who)
			e.boot()
			w.run(time.Minute)
			w.ok(t)
			if s := e.m.State(); s.Level != want {
				t.Errorf("%v, %s restarted: %+v", policy, who, s)
			}
			if want == PQC && !w.up() {
				t.Errorf("%v, %s restarted: line is not up", policy, who)
			}
			w.outage("both", nil)
			w.mustBeUp(t, 15*time.Second)
			w.run(3 * time.Minute)
			if s := e.m.State(); s.Level != QKD {
				t.Errorf("%v, %s restarted, keys are back: %+v", policy, who, s)
			}
		}
	}
}

func TestMaxDegraded(t *testing.T) {
	w := upLine(t, QKDPreferred, func(_ int, c *Config) {
		c.EpochLife, c.HoldMax, c.MaxDegraded = 10*time.Second, 30*time.Second, time.Minute
	})
	w.outage("both", tunnel.ErrKeyEmpty)
	w.run(55 * time.Second)
	if s := w.ends[0].m.State(); s.Level != Chained {
		t.Fatalf("%+v", s)
	}
	w.run(45 * time.Second)
	for _, e := range w.ends {
		if s := e.m.State(); s.Level != Blocked {
			t.Errorf("end %d: %+v", e.id, s)
		}
	}
	w.ok(t)
}

// TestLevelRisesSlowly: one good epoch after bad ones does not raise the level.
func TestLevelRisesSlowly(t *testing.T) {
	w := upLine(t, QKDPreferred, func(_ int, c *Config) { c.EpochLife = 20 * time.Second })
	w.outage("I", tunnel.ErrKeyEmpty)
	w.run(25 * time.Second)
	e := w.named("I")
	if e.m.State().Level != Chained {
		t.Fatalf("%+v", e.m.State())
	}
	w.outage("I", nil)
	good := func() bool { return e.send.Level == QKD }
	if !w.until(25*time.Second, good) || e.m.State().Level != Chained {
		t.Fatalf("after the first good epoch: %+v", e.m.State())
	}
	n := e.m.State().Epoch
	if !w.until(25*time.Second, func() bool { return e.m.State().Epoch > n }) || e.m.State().Level != QKD {
		t.Fatalf("after the second good epoch: %+v", e.m.State())
	}
	w.ok(t)
}
