package distill

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"path/filepath"
	"testing"
	"time"

	"github.com/quietline/quietline/hw"
)

// physics makes detections without photons: events are drawn in the shares
// that gains of a channel give them, errors independently.
type physics struct {
	eta, y0, err float64
	eve          float64 // share of pulses intercepted and resent
	testErr      float64 // more errors in the test basis only
}

func (p physics) qber() float64 { return (1-p.eve)*p.err + p.eve*(p.err/2+.25) }

// draw returns n events: what alice sent and what bob saw.
func (p physics) draw(rng *rand.Rand, cfg Config, n int, slot uint64) (
	map[uint64]Preparation, []Detection) {
	preps := map[uint64]Preparation{}
	var dets []Detection
	gain := func(mu float64) float64 { return p.y0 + 1 - math.Exp(-p.eta*mu) }
	q0 := cfg.Intensities[0].Probability * gain(cfg.Intensities[0].Mu)
	q1 := cfg.Intensities[1].Probability * gain(cfg.Intensities[1].Mu)
	for range n {
		slot += 1 + uint64(rng.ExpFloat64()/(q0+q1))
		sent := Preparation{Bit: uint8(rng.IntN(2))}
		saw := Detection{Slot: slot, Bit: uint8(rng.IntN(2))}
		if rng.Float64() > cfg.KeyBasis {
			sent.Basis = Test
		}
		if rng.Float64() > cfg.KeyBasis {
			saw.Basis = Test
		}
		if rng.Float64() < q1/(q0+q1) {
			sent.Intensity = 1
		}
		if sent.Basis == saw.Basis {
			saw.Bit = sent.Bit
			e := p.qber()
			if saw.Basis == Test {
				e += p.testErr
			}
			if rng.Float64() < e {
				saw.Bit ^= 1
			}
		}
		preps[slot] = sent
		dets = append(dets, saw)
	}
	return preps, dets
}

// seeded is a source for reproducible runs of what must be true randomness.
func seeded(seed uint64) *rand.ChaCha8 {
	return rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)})
}

// testConfig is a short block that still holds key.
func testConfig() Config {
	return Config{
		Intensities: []Intensity{{.4, .4}, {.15, .6}},
		KeyBasis:    .65, BlockBits: 1 << 16, EpsSec: 1e-6, EpsCor: 1e-9,
		Simulated: true,
	}
}

// tinyConfig is the shortest, over the channel clean.
func tinyConfig() Config {
	cfg := testConfig()
	cfg.Intensities = []Intensity{{.5, .2}, {.15, .8}}
	cfg.KeyBasis, cfg.BlockBits = .58, 1<<14
	return cfg
}

var (
	short = physics{eta: .1, y0: 1e-6, err: .01}
	clean = physics{eta: .1, y0: 1e-6, err: .005}
)

// link is two machines and the channels between them.
type link struct {
	t      testing.TB
	now    time.Time
	rng    *rand.Rand
	cfg    Config
	phys   physics
	slot   uint64
	ends   [2]*Machine
	auth   [2]*AuthFile
	queue  [2][][]byte // to alice, to bob
	preps  map[uint64]Preparation
	blocks [2][]hw.Block
	alarms [2][]hw.Event
	errs   [2]error
	bytes  int
	// tamper changes, drops or multiplies a message; nil = none.
	tamper func(to Role, raw []byte) [][]byte
}

func newLink(t testing.TB, cfg Config, phys physics, seed uint64) *link {
	l := &link{t: t, cfg: cfg, phys: phys, now: time.Unix(1e9, 0).UTC(),
		rng: rand.New(rand.NewPCG(seed, 7)), preps: map[uint64]Preparation{}}
	dir := t.TempDir()
	authSeed, err := NewAuthSeed(seeded(seed))
	if err != nil {
		t.Fatal(err)
	}
	for role := range l.auth {
		path := filepath.Join(dir, fmt.Sprint(role))
		if err := CreateAuthFile(path, authSeed.Expose()); err != nil {
			t.Fatal(err)
		}
		if l.auth[role], err = OpenAuthFile(path); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = l.auth[role].Close() })
	}
	l.restart(1)
	return l
}

// restart replaces both machines, as after a broken connection.
func (l *link) restart(generation uint64) {
	for role := range l.ends {
		cfg := l.cfg
		cfg.Role = Role(role)
		cfg.Generation = generation + uint64(role)
		cfg.Auth = l.auth[role]
		cfg.Rand = seeded(generation*16 + uint64(role))
		m, err := New(cfg)
		if err != nil {
			l.t.Fatal(err)
		}
		l.ends[role], l.errs[role], l.queue[role] = m, nil, nil
	}
	for role := range l.ends {
		l.step(Role(role), Input{})
	}
}

// step gives one input to one end and carries its messages away.
func (l *link) step(role Role, in Input) {
	if l.errs[role] != nil {
		return
	}
	out, err := l.ends[role].Step(l.now, in)
	l.errs[role] = err
	l.blocks[role] = append(l.blocks[role], out.Blocks...)
	l.alarms[role] = append(l.alarms[role], out.Alarms...)
	if err != nil && (len(out.Blocks) > 0 || len(out.Messages) > 0) {
		l.t.Fatalf("output with error %v", err)
	}
	for _, raw := range out.Messages {
		l.bytes += len(raw)
		if len(raw) > MaxMessage {
			l.t.Fatalf("message of %d bytes", len(raw))
		}
		msgs := [][]byte{raw}
		if l.tamper != nil {
			msgs = l.tamper(1-role, raw)
		}
		l.queue[1-role] = append(l.queue[1-role], msgs...)
	}
	if len(out.Prepared) > 0 {
		preps := make([]Preparation, len(out.Prepared))
		for i, s := range out.Prepared {
			p, ok := l.preps[s]
			if !ok && l.tamper == nil {
				l.t.Fatalf("slot %d was never sent", s)
			}
			preps[i] = p
		}
		half := l.rng.IntN(len(preps) + 1)
		l.step(role, Input{Preparations: preps[:half]})
		l.step(role, Input{Preparations: preps[half:]})
	}
}

// run makes the detections of so many blocks and carries messages until
// nothing moves.
func (l *link) run(blocks int) {
	n := l.ends[Bob].events*blocks - len(l.ends[Bob].pending)
	for n > 0 {
		k := min(n, 20000)
		preps, dets := l.phys.draw(l.rng, l.cfg, k, l.slot)
		for s, p := range preps {
			l.preps[s] = p
		}
		l.slot = dets[k-1].Slot
		l.step(Bob, Input{Detections: dets, Slots: l.slot + 1})
		l.pump()
		n -= k
	}
	l.pump()
}

func (l *link) pump() {
	for len(l.queue[Alice])+len(l.queue[Bob]) > 0 {
		role := Role(l.rng.IntN(2))
		if len(l.queue[role]) == 0 {
			role = 1 - role
		}
		raw := l.queue[role][0]
		l.queue[role] = l.queue[role][1:]
		l.now = l.now.Add(time.Millisecond)
		l.step(role, Input{Message: raw})
	}
}

// check holds for every run, however disturbed: blocks of one name are equal,
// names rise, and no key was made of fewer than both tags.
func (l *link) check() {
	l.t.Helper()
	byName := map[[2]uint64][]byte{}
	for role := range l.blocks {
		last := [2]uint64{}
		for _, b := range l.blocks[role] {
			name := [2]uint64{b.Generation, b.Seq}
			if name[0] < last[0] || (name[0] == last[0] && name[1] <= last[1]) {
				l.t.Fatalf("%d: block %v after %v", role, name, last)
			}
			last = name
			if !b.Simulated {
				l.t.Fatal("block does not say that it is simulated")
			}
			if other, ok := byName[name]; ok && !bytes.Equal(other, b.Bits.Expose()) {
				l.t.Fatalf("block %v differs", name)
			}
			byName[name] = b.Bits.Expose()
		}
	}
}

// quiet fails on any error or alarm.
func (l *link) quiet() {
	l.t.Helper()
	if err := errors.Join(l.errs[:]...); err != nil {
		l.t.Fatal(err)
	}
	for role, a := range l.alarms {
		if len(a) > 0 {
			l.t.Fatalf("alarms of %d: %+v", role, a)
		}
	}
}
