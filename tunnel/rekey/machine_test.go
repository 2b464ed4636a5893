package rekey

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/quietline/quietline/secret"
	"github.com/quietline/quietline/tunnel"
)

// upLine is a world whose line is up.
func upLine(t *testing.T, p Policy, tweak func(int, *Config)) *world {
	t.Helper()
	w := newWorld(7)
	w.log = t.Logf
	w.start(p, tweak)
	w.mustBeUp(t, time.Second)
	return w
}

func (w *world) mustBeUp(t *testing.T, within time.Duration) {
	t.Helper()
	if !w.until(within, w.up) {
		t.Fatalf("line is not up after %v: %+v, %+v, fault %v", within, w.ends[0].m.State(),
			w.ends[1].m.State(), w.fault)
	}
}

func (w *world) ok(t *testing.T) {
	t.Helper()
	if w.fault != nil {
		t.Fatal(w.fault)
	}
}

func TestLineComesUpAndRekeys(t *testing.T) {
	for _, p := range []Policy{PQCOnly, QKDStrict} {
		t.Run(p.String(), func(t *testing.T) {
			w := upLine(t, p, nil)
			if d := w.now.Sub(epochZero); d > 60*time.Millisecond {
				t.Errorf("up after %v: more than two and a half round trips of 20 ms", d)
			}
			w.traffic(50 * time.Millisecond)
			w.run(10 * time.Minute)
			w.ok(t)
			for _, e := range w.ends {
				if got := e.m.Stats().Epochs; got != 6 {
					t.Errorf("end %d made %d epochs in ten minutes, want 6", e.id, got)
				}
				if e.lost != 0 || e.opened < 11_000 {
					t.Errorf("end %d opened %d records and lost %d", e.id, e.opened, e.lost)
				}
			}
		})
	}
}

// TestSecondEpochs rekeys every second a thousand times under traffic that the
// network reorders: not one record is lost.
func TestSecondEpochs(t *testing.T) {
	w := newWorld(3)
	w.toy = true
	w.net.vary = 40 * time.Millisecond
	w.start(QKDStrict, func(_ int, c *Config) { c.EpochLife = time.Second })
	w.mustBeUp(t, time.Second)
	w.traffic(7 * time.Millisecond)
	w.run(1000 * time.Second)
	w.ok(t)
	for _, e := range w.ends {
		s := e.m.Stats()
		if e.lost != 0 || s.Epochs < 1000 || s.KeysUsed != s.Completed || s.KeysLost != 0 {
			t.Errorf("end %d lost %d records in %+v", e.id, e.lost, s)
		}
	}
}

func TestConfigIsChecked(t *testing.T) {
	w := newWorld(1)
	for name, tc := range map[string]struct {
		bend func(*Config)
		want error
	}{
		"zero link secret": {func(c *Config) { clear(c.LinkSecret.Expose()) }, ErrConfig},
		"no link secret":   {func(c *Config) { c.LinkSecret.Clear() }, ErrConfig},
		"long link secret": {func(c *Config) { c.LinkSecret = secret.New(33) }, ErrConfig},
		"short seed":       {func(c *Config) { c.StaticSeed = secret.New(31) }, ErrConfig},
		"no peer":          {func(c *Config) { c.PeerStatic = nil }, ErrConfig},
		"broken peer":      {func(c *Config) { c.PeerStatic = bytes.Repeat([]byte{255}, 1216) }, ErrConfig},
		"peer is oneself":  {func(c *Config) { c.PeerStatic = publics[0] }, ErrConfig},
		"no policy":        {func(c *Config) { c.Policy = 0 }, ErrPolicy},
		"policy 7":         {func(c *Config) { c.Policy = OTPStrict + 1 }, ErrPolicy},
		"suite 7":          {func(c *Config) { c.Suite = 7 }, ErrConfig},
		"short life":       {func(c *Config) { c.EpochLife = time.Second - 1 }, ErrConfig},
		"long life":        {func(c *Config) { c.EpochLife = time.Hour + 1 }, ErrConfig},
		"hold below life":  {func(c *Config) { c.HoldMax = 120 * time.Second }, ErrConfig},
		"too many bytes":   {func(c *Config) { c.EpochBytes = 1<<38 + 1 }, ErrConfig},
		"five keys":        {func(c *Config) { c.KeysPerEpoch = 5 }, ErrConfig},
		"key of 129 bits":  {func(c *Config) { c.KeyBits = 129 }, ErrConfig},
		"fast probe":       {func(c *Config) { c.ProbeEvery = time.Millisecond }, ErrConfig},
		"long key budget":  {func(c *Config) { c.KeyBudget = time.Minute }, ErrConfig},
		"negative RTT":     {func(c *Config) { c.RTT = -1 }, ErrConfig},
		"no randomness":    {func(c *Config) { c.Rand = bytes.NewReader(nil) }, nil},
	} {
		c := w.config(0, QKDStrict)
		tc.bend(&c)
		m, err := New(c)
		if err == nil || m != nil || tc.want != nil && !errors.Is(err, tc.want) {
			t.Errorf("%s: %v, want %v", name, err, tc.want)
		}
		if c.LinkSecret.Len() != 0 || c.StaticSeed.Len() != 0 {
			t.Errorf("%s: New leaves the secrets", name)
		}
	}
}

func TestKeyIDsAreUsedOnce(t *testing.T) {
	t.Run("own key manager gives one twice", func(t *testing.T) {
		w := upLine(t, QKDStrict, nil)
		w.kme.next-- // the same key_ID again
		e := w.scheduled()
		e.step(Input{Rekey: true})
		w.run(5 * time.Second)
		w.ok(t)
		if !e.alarmed("gave a key twice") || e.m.Stats().Epochs != 1 {
			t.Errorf("events %v, %+v", e.events, e.m.Stats())
		}
	})
	t.Run("peer names one twice", func(t *testing.T) {
		w := upLine(t, QKDStrict, nil)
		w.kme.next--
		i, r := w.scheduled(), w.other(w.scheduled())
		clear(i.m.used) // a peer that forgot
		i.step(Input{Rekey: true})
		w.run(5 * time.Second)
		if !r.alarmed("used before") {
			t.Errorf("no alarm at the responder: %v", r.events)
		}
		if s := i.m.Stats(); s.KeysLost != 1 || s.KeysDrawn != 3 || s.Completed != 2 {
			t.Errorf("the key is not replaced: %+v", s)
		}
	})
}

// TestKeyIDsAreForgotten: the memory of used key_IDs lasts an hour and is then
// as large as an hour's handshakes.
func TestKeyIDsAreForgotten(t *testing.T) {
	w := newWorld(1)
	w.toy = true
	w.start(QKDStrict, func(_ int, c *Config) { c.EpochLife = 10 * time.Second })
	w.run(keyMemory + 20*time.Minute)
	w.ok(t)
	for _, e := range w.ends {
		n := len(e.m.used)
		if n != len(e.m.usedList) || n < 340 || n > 400 {
			t.Errorf("end %d remembers %d and %d key_IDs", e.id, n, len(e.m.usedList))
		}
	}
}

func (e *end) alarmed(part string) bool {
	for _, ev := range e.events {
		if ev.Kind == "alarm" && strings.Contains(ev.Reason, part) {
			return true
		}
	}
	return false
}

func TestVolume(t *testing.T) {
	w := upLine(t, PQCOnly, nil)
	for _, e := range w.ends {
		n := e.m.Stats().Epochs
		e.step(Input{Sent: softBytes - 1})
		w.run(2 * time.Second)
		if e.m.Stats().Epochs != n {
			t.Fatalf("end %d rekeys too early", e.id)
		}
		e.step(Input{Sent: softBytes})
		w.run(20 * time.Second)
		if e.m.Stats().Epochs != n+1 {
			t.Fatalf("end %d does not rekey by volume", e.id)
		}
	}
	w.net.cut = [2]bool{true, true}
	e := w.ends[0]
	e.step(Input{Sent: hardBytes - 1})
	if e.blocked {
		t.Fatal("blocked below 2^38 bytes")
	}
	e.step(Input{Sent: hardBytes})
	if !e.blocked || e.m.State().Level != Blocked || !strings.Contains(e.m.State().Why, "2^38") {
		t.Fatalf("2^38 bytes do not block: %+v", e.m.State())
	}
	w.net.cut = [2]bool{}
	w.mustBeUp(t, 15*time.Second)
	w.ok(t)
}

// TestKeyManagerErrors: each kind of failure at each end holds the epoch and
// never blocks before HoldMax; it is up again when the key manager is.
func TestKeyManagerErrors(t *testing.T) {
	for _, who := range []string{"I", "R", "both"} {
		for _, err := range []error{tunnel.ErrKeyEmpty, tunnel.ErrKeyDown, tunnel.ErrKeyDenied,
			tunnel.ErrKeyUnknown, errors.New("strange")} {
			t.Run(fmt.Sprintf("%s %v", who, err), func(t *testing.T) {
				w := upLine(t, QKDStrict, func(_ int, c *Config) {
					c.EpochLife, c.HoldMax = 20*time.Second, 60*time.Second
				})
				for _, e := range w.ends {
					if who == "both" || e == w.named(who) {
						w.kme.state[e.id].err = err
					}
				}
				w.run(58 * time.Second)
				w.ok(t)
				for _, e := range w.ends {
					if e.blocked {
						t.Fatalf("blocked before the hold time: %+v", e.m.State())
					}
				}
				if who == "both" {
					w.run(10 * time.Second)
					for _, e := range w.ends {
						if s := e.m.State(); !e.blocked || s.Level != Blocked || !strings.Contains(s.Why, ":") {
							t.Fatalf("not blocked, or without reason: %+v", s)
						}
					}
				}
				w.kme.state = [2]kmeState{}
				w.mustBeUp(t, 30*time.Second)
				w.run(3 * time.Minute)
				w.ok(t)
				if !w.up() {
					t.Fatal("line is not healthy afterwards")
				}
			})
		}
	}
}

// TestRestart: either end loses its memory and the line is up again within
// the boot grace and three round trips.
func TestRestart(t *testing.T) {
	for _, who := range []string{"I", "R"} {
		for _, after := range []time.Duration{5 * time.Second, 117 * time.Second, 121 * time.Second} {
			w := upLine(t, QKDStrict, nil)
			w.traffic(100 * time.Millisecond)
			w.run(after)
			e := w.named(who)
			e.boot()
			w.mustBeUp(t, bootGrace+60*time.Millisecond)
			w.run(5 * time.Minute)
			w.ok(t)
			if o := w.other(e); !o.alarmed("chain secret was lost") {
				t.Errorf("%s restarted after %v: no alarm: %v", who, after, o.events)
			}
		}
	}
}

// TestChainGoesOn: each epoch's chain secret is the one before it, mixed; both
// ends hold the same and only one of it.
func TestChainGoesOn(t *testing.T) {
	w := upLine(t, PQCOnly, nil)
	seen := map[[16]byte]bool{}
	for range 5 {
		a, b := w.ends[0].m.chains, w.ends[1].m.chains
		if a[0].id != b[0].id || !bytes.Equal(a[0].rk.Expose(), b[0].rk.Expose()) {
			t.Fatal("ends hold different chain secrets")
		}
		if a[0].rk.Len() != chainSize || a[1].rk.Len() != 0 || b[1].rk.Len() != 0 || seen[a[0].id] {
			t.Fatalf("chain %x: %d and %d bytes", a[0].id, a[0].rk.Len(), a[1].rk.Len())
		}
		seen[a[0].id] = true
		w.run(12 * time.Second)
		w.ends[0].step(Input{Rekey: true})
		w.run(time.Second)
	}
	for _, e := range w.ends {
		if e.alarmed("chain") {
			t.Errorf("end %d alarms: %v", e.id, e.events)
		}
	}
}

func TestRandomnessFails(t *testing.T) {
	w := newWorld(1)
	left := 2*16 + 4 // two boot_ids and one index
	w.start(PQCOnly, func(_ int, c *Config) {
		c.Rand = &limited{&left, rngReader{w.rng}}
	})
	w.run(time.Minute)
	for _, e := range w.ends {
		if e.send != nil || len(e.events) == 0 {
			t.Errorf("end %d: %v", e.id, e.events)
		}
	}
	left = 1 << 30
	w.mustBeUp(t, time.Minute)
}

type limited struct {
	left *int
	r    rngReader
}

func (l *limited) Read(b []byte) (int, error) {
	if *l.left < len(b) {
		return 0, errors.New("no randomness")
	}
	*l.left -= len(b)
	return l.r.Read(b)
}
