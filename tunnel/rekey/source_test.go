package rekey

import (
	"testing"
	"time"

	"github.com/quietline/quietline/secret"
	"github.com/quietline/quietline/tunnel"
)

// TestSlowKeyManager: with one-second epochs a key manager that needs longer
// than an epoch for its answer holds up no rekey.
func TestSlowKeyManager(t *testing.T) {
	w := newWorld(3)
	w.toy = true
	w.start(QKDStrict, func(_ int, c *Config) { c.EpochLife = time.Second })
	i := w.scheduled()
	w.kme.state[i.id].delay = 1700 * time.Millisecond
	w.mustBeUp(t, 3*time.Second)
	w.traffic(10 * time.Millisecond)
	w.run(5 * time.Second)
	before := i.m.Stats()
	w.run(100 * time.Second)
	w.ok(t)
	s := i.m.Stats()
	if n := s.Epochs - before.Epochs; n < 98 || s.Failed != 0 || s.KeysLost != 0 || i.lost != 0 {
		t.Errorf("%d epochs in 100 s; %+v", n, s)
	}
}

// TestSlowKeyManagerOfTheResponder: it collects the keys of the next epoch
// while the present one lives.
func TestSlowKeyManagerOfTheResponder(t *testing.T) {
	w := newWorld(3)
	w.toy = true
	w.start(QKDStrict, func(_ int, c *Config) { c.EpochLife = time.Second })
	i, r := w.named("I"), w.named("R")
	w.kme.state[r.id].delay = 800 * time.Millisecond
	w.mustBeUp(t, 3*time.Second)
	w.traffic(10 * time.Millisecond)
	w.run(10 * time.Second)
	before := i.m.Stats()
	w.run(100 * time.Second)
	w.ok(t)
	s := i.m.Stats()
	if n := s.Epochs - before.Epochs; n < 98 || s.Failed != 0 || s.KeysLost != 0 || i.lost != 0 {
		t.Errorf("%d epochs in 100 s; %+v", n, s)
	}
	if s := r.m.Stats(); s.KeysMissed != 0 {
		t.Errorf("%+v", s)
	}
}

// TestForetoldKeysAreChecked: keys collected ahead serve only the M3 that
// names them, and go with the epoch.
func TestForetoldKeysAreChecked(t *testing.T) {
	w := upLine(t, QKDStrict, nil)
	r := w.named("R")
	ids := []tunnel.KeyID{{1}, {2}}
	key := func(id tunnel.KeyID) tunnel.Key { return tunnel.Key{ID: id, Bits: secret.New(32)} }
	for name, a := range map[string]*KeyAnswer{
		"failed":    {Err: tunnel.ErrKeyDown},
		"too few":   {Keys: []tunnel.Key{key(ids[0])}},
		"others":    {Keys: []tunnel.Key{key(ids[0]), key(tunnel.KeyID{3})}},
		"too short": {Keys: []tunnel.Key{key(ids[0]), {ID: ids[1], Bits: secret.New(16)}}},
	} {
		r.m.now = w.now
		r.m.foretell(ids, a)
		if len(r.m.stock.foretold) != 0 {
			t.Errorf("%s: taken", name)
		}
		for _, k := range a.Keys {
			if k.Bits.Len() != 0 {
				t.Errorf("%s: not wiped", name)
			}
		}
	}
	good := &KeyAnswer{Keys: []tunnel.Key{key(ids[0]), key(ids[1])}}
	raw := good.Keys[1].Bits.Expose()
	raw[0] = 1
	r.m.foretell(ids, good)
	for _, other := range [][]tunnel.KeyID{{{1}}, {{2}, {1}}, {{1}, {4}}} {
		if r.m.fromForetold(other) != nil {
			t.Errorf("keys %v are served for %v", ids, other)
		}
	}
	w.net.cut = [2]bool{true, true}
	w.run(stockLife + time.Second)
	if !allZero(raw) || len(r.m.stock.foretold) != 0 {
		t.Error("foretold keys live on")
	}
}

// TestStockIsSmallAndDies: at most one set waits beside a live epoch of
// ordinary life, and none outlives ten minutes, the epoch, or the machine.
func TestStockIsSmallAndDies(t *testing.T) {
	w := upLine(t, QKDStrict, func(_ int, c *Config) { c.HoldMax = 30 * time.Minute })
	i := w.scheduled()
	var raw [][]byte
	i.keys = func(ks []tunnel.Key) {
		for _, k := range ks {
			raw = append(raw, k.Bits.Expose())
		}
	}
	if len(i.m.stock.sets) != 0 {
		t.Fatal("keys are drawn too early")
	}
	w.run(i.m.due.Sub(w.now) - time.Second)
	if len(i.m.stock.sets) != 1 || len(raw) != 1 {
		t.Fatalf("%d sets on stock", len(i.m.stock.sets))
	}
	w.net.cut = [2]bool{true, true} // the handshake does not come to use it
	w.run(stockLife - time.Minute)
	if allZero(raw[0]) {
		t.Fatal("the key went too early")
	}
	w.run(2 * time.Minute)
	if !allZero(raw[0]) || i.m.Stats().KeysLost == 0 {
		t.Error("a key on stock lives longer than ten minutes")
	}
	w.run(time.Hour)
	for n, b := range raw {
		if !allZero(b) {
			t.Errorf("key %d lives on without an epoch", n)
		}
	}
	if n := len(i.m.stock.sets) + len(i.m.stock.waiting); n != 0 {
		t.Errorf("%d sets without an epoch", n)
	}
	w.net.cut = [2]bool{}
	w.mustBeUp(t, 15*time.Second)
	w.run(i.m.due.Sub(w.now) - time.Second)
	last := raw[len(raw)-1]
	if allZero(last) {
		t.Fatal("no key on stock")
	}
	i.m.Clear()
	if !allZero(last) {
		t.Error("Clear leaves keys on stock")
	}
}

// TestResponderDrawsNothingAhead: key_IDs of keys that this end draws would
// not be used, for the other end starts.
func TestResponderDrawsNothingAhead(t *testing.T) {
	w := upLine(t, QKDStrict, nil)
	w.run(30 * time.Minute)
	w.ok(t)
	if s := w.named("R").m.Stats(); s.KeysDrawn != 0 {
		t.Errorf("%+v", s)
	}
	if s := w.named("I").m.Stats(); s.KeysDrawn-s.KeysUsed > 1 || s.KeysLost != 0 {
		t.Errorf("%+v", s)
	}
}
