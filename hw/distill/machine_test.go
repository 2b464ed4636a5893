package distill

import (
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/quietline/quietline/hw"
)

func TestBlocksAreEqual(t *testing.T) {
	t.Parallel()
	l := newLink(t, testConfig(), short, 1)
	l.run(3)
	l.quiet()
	l.check()
	for role := range l.ends {
		s := l.ends[role].Stats()
		if len(l.blocks[role]) != 3 || s.Blocks != 3 || s.Aborted != 0 {
			t.Fatalf("%d: %d blocks, stats %+v", role, len(l.blocks[role]), s)
		}
		for _, b := range l.blocks[role] {
			if b.Generation != 2 { // the larger of both ends'
				t.Errorf("generation is %d", b.Generation)
			}
			if math.Abs(b.QBER-.01) > .002 {
				t.Errorf("qber is %g, the channel's is 0.01", b.QBER)
			}
			if want := 1e-6 + 1e-9 + 3e-15; math.Abs(b.Epsilon-want) > 1e-12 {
				t.Errorf("epsilon is %g, want %g", b.Epsilon, want)
			}
		}
	}
	a, b := l.ends[Alice].Stats().Last, l.ends[Bob].Stats().Last
	if diff := cmp.Diff(a, b); diff != "" {
		t.Errorf("reports differ (-alice +bob):\n%s", diff)
	}
	t.Logf("%+v", a)
}

func TestKeyBitsLookRandom(t *testing.T) {
	t.Parallel()
	l := newLink(t, testConfig(), short, 2)
	l.run(1)
	ones, n := 0, 0
	for _, b := range l.blocks[Alice] {
		for _, v := range b.Bits.Expose() {
			for ; v > 0; v &= v - 1 {
				ones++
			}
			n += 8
		}
	}
	if n == 0 || math.Abs(float64(ones)-float64(n)/2) > 5*math.Sqrt(float64(n))/2 {
		t.Errorf("%d ones in %d bits", ones, n)
	}
}

// Every parity and hash bit that alice sends is counted, and nothing else.
func TestLeakIsWhatWasSent(t *testing.T) {
	t.Parallel()
	l := newLink(t, testConfig(), short, 3)
	frames, least, most := 0, 0, 0
	l.tamper = func(to Role, raw []byte) [][]byte {
		if to == Bob && raw[0] == kindParities {
			bits := 8 * (len(raw) - headBytes)
			frames++
			most += bits
			least += bits - 7
		}
		if to == Bob && raw[0] == kindVerify {
			most += 8 * (len(raw) - headBytes - 16)
			least += 8 * (len(raw) - headBytes - 16)
		}
		return [][]byte{raw}
	}
	l.run(1)
	l.quiet()
	r := l.ends[Bob].Stats().Last
	if r.Leak < least || r.Leak > most {
		t.Errorf("leak is %d, %d to %d bits were sent in %d messages", r.Leak, least, most, frames)
	}
	if r.Outcome != "secret" || r.Efficiency > 1.1 {
		t.Errorf("report: %+v", r)
	}
}

func TestEveLeavesNoKey(t *testing.T) {
	t.Parallel()
	phys := short
	phys.eve = 1
	l := newLink(t, testConfig(), phys, 4)
	l.run(2)
	l.check()
	if err := errors.Join(l.errs[:]...); err != nil {
		t.Fatal(err) // an eavesdropper ends blocks, not sessions
	}
	for role := range l.ends {
		if len(l.blocks[role]) > 0 || len(l.alarms[role]) != 2 {
			t.Fatalf("%d blocks, alarms %+v", len(l.blocks[role]), l.alarms[role])
		}
		a := l.alarms[role][0]
		if a.Alarm != "qber above limit" || !strings.Contains(a.Detail, "qber 0.2") {
			t.Errorf("alarm is %q, %q", a.Alarm, a.Detail)
		}
		q := l.ends[role].Stats().Last.Test.QBER()
		if math.Abs(q-.255) > .02 {
			t.Errorf("qber is %g, want about 0.255", q)
		}
	}
	// She goes away: the same session makes key again.
	l.phys.eve = 0
	l.run(1)
	l.check()
	if len(l.blocks[Alice]) != 1 || len(l.blocks[Bob]) != 1 {
		t.Errorf("after Eve: %d and %d blocks", len(l.blocks[Alice]), len(l.blocks[Bob]))
	}
}

// Half of the pulses intercepted: the key basis is above the limit or the
// phase error eats the key; either way there is none.
func TestHalfAnEve(t *testing.T) {
	t.Parallel()
	phys := short
	phys.eve = .3
	l := newLink(t, testConfig(), phys, 5)
	l.run(1)
	l.check()
	if got := l.ends[Bob].Stats(); got.Blocks != 0 || got.Aborted != 1 {
		t.Errorf("stats: %+v", got)
	}
}

func TestErrorsInTestBasisAloneCostKey(t *testing.T) {
	t.Parallel()
	phys := short
	before := newLink(t, testConfig(), phys, 6)
	before.run(1)
	phys.testErr = .02
	after := newLink(t, testConfig(), phys, 6)
	after.run(1)
	b, a := before.ends[Bob].Stats().Last, after.ends[Bob].Stats().Last
	if a.SecretBits >= b.SecretBits || a.PhaseError <= b.PhaseError {
		t.Errorf("secret bits %d then %d, phase error %g then %g",
			b.SecretBits, a.SecretBits, b.PhaseError, a.PhaseError)
	}
}

func TestAuthenticationKeyIsCounted(t *testing.T) {
	t.Parallel()
	l := newLink(t, testConfig(), short, 8)
	before := l.auth[Bob].Left()
	l.run(3)
	l.quiet()
	for role := range l.ends {
		s := l.ends[role].Stats()
		if s.AuthUsed != 3*3*128 {
			t.Errorf("%d used %d bits, three tags a block are %d", role, s.AuthUsed, 3*3*128)
		}
		if got := l.auth[role].Left(); got != before+int64(s.AuthAdded)-int64(s.AuthUsed) {
			t.Errorf("%d has %d bits, had %d, used %d, added %d", role, got, before, s.AuthUsed, s.AuthAdded)
		}
		if s.AuthAdded != 3*3*128 || s.Last.SecretBits != s.Last.AuthBits+8*l.blocks[role][2].Bits.Len() {
			t.Errorf("%d: %+v", role, s)
		}
	}
	if diff := cmp.Diff(l.auth[Alice].Segments(), l.auth[Bob].Segments()); diff != "" {
		t.Error(diff)
	}
}

// A broken connection in any place loses blocks, never equality, and the next
// session works with what authentication key both have.
func TestBrokenConnectionAnywhere(t *testing.T) {
	t.Parallel()
	l := newLink(t, tinyConfig(), clean, 9)
	kinds := []uint8{kindHello, kindAnnounce, kindSifted, kindParities, kindVerify, kindVerified,
		kindAmplify, kindAccept, kindAck}
	for i, kind := range kinds {
		broken := false
		l.tamper = func(_ Role, raw []byte) [][]byte {
			broken = broken || raw[0] == kind
			if broken {
				return nil
			}
			return [][]byte{raw}
		}
		l.restart(uint64(10 + 10*i))
		l.run(1)
		if !broken {
			t.Fatalf("no message of kind %d", kind)
		}
	}
	before := len(l.blocks[Bob])
	l.tamper = nil
	l.restart(1000)
	l.run(2)
	l.check()
	if err := errors.Join(l.errs[:]...); err != nil {
		t.Fatal(err)
	}
	if got := len(l.blocks[Bob]) - before; got != 2 {
		t.Errorf("%d blocks after the faults, want 2", got)
	}
	// Without its ack the block is alice's alone, and so is its pad.
	if len(l.blocks[Alice]) != len(l.blocks[Bob])+1 {
		t.Errorf("alice has %d blocks, bob %d", len(l.blocks[Alice]), len(l.blocks[Bob]))
	}
}

// One changed, lost, doubled or reordered message in a random place.
func TestDisturbedChannel(t *testing.T) {
	t.Parallel()
	runs := 25
	if os.Getenv("QUIETLINE_LONG") != "" {
		runs = 2000
	}
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 1))
	l := newLink(t, tinyConfig(), clean, 10)
	for run := range runs {
		d := disturber{rng: rng, how: run % 5, at: rng.IntN(12), spareRounds: run/5%2 == 0}
		l.alarms = [2][]hw.Event{}
		l.tamper = nil
		before := len(l.blocks[Alice]) + len(l.blocks[Bob])
		l.restart(uint64(100 * (run + 1)))
		l.tamper = d.tamper
		l.run(2)
		l.now = l.now.Add(2 * stallAfter)
		l.step(Alice, Input{})
		l.step(Bob, Input{})
		l.check()
		made := len(l.blocks[Alice]) + len(l.blocks[Bob]) - before
		noticed := len(l.alarms[Alice])+len(l.alarms[Bob]) > 0
		// A message that comes twice or late may belong to a closed block.
		harmless := d.how == disturbDouble || d.how == disturbSwap
		if d.done && made == 4 && !noticed && !harmless {
			t.Fatalf("run %d: kind %d disturbed in way %d and nobody noticed", run, d.kind, d.how)
		}
	}
	l.tamper = nil
	l.alarms = [2][]hw.Event{}
	l.restart(1 << 40)
	l.run(1)
	l.quiet()
}

const (
	disturbBit = iota
	disturbLose
	disturbDouble
	disturbCut
	disturbSwap
)

// disturber spoils one message. Rounds of parities are most of the messages:
// with spareRounds it counts the others only, so that each stage is hit.
type disturber struct {
	rng         *rand.Rand
	how, at     int
	spareRounds bool
	done        bool
	kind        uint8
	held        [2][]byte
}

func (d *disturber) tamper(to Role, raw []byte) [][]byte {
	if held := d.held[to]; held != nil {
		d.held[to] = nil
		return [][]byte{raw, held}
	}
	if d.done || (d.spareRounds && (raw[0] == kindParities || raw[0] == kindDifferences)) {
		return [][]byte{raw}
	}
	if d.at > 0 {
		d.at--
		return [][]byte{raw}
	}
	d.done, d.kind = true, raw[0]
	switch d.how {
	case disturbBit:
		bad := append([]byte(nil), raw...)
		bad[d.rng.IntN(len(bad))] ^= 1 << d.rng.IntN(8)
		return [][]byte{bad}
	case disturbLose:
		return nil
	case disturbDouble:
		return [][]byte{raw, raw}
	case disturbCut:
		return [][]byte{raw[:d.rng.IntN(len(raw))]}
	}
	d.held[to] = raw
	return nil
}

func TestConfigIsChecked(t *testing.T) {
	t.Parallel()
	l := newLink(t, testConfig(), short, 11)
	for name, change := range map[string]func(*Config){
		"role":          func(c *Config) { c.Role = 2 },
		"three levels":  func(c *Config) { c.Intensities = append(c.Intensities, Intensity{.01, .1}) },
		"rising mu":     func(c *Config) { c.Intensities = []Intensity{{.1, .5}, {.5, .5}} },
		"no decoy":      func(c *Config) { c.Intensities = []Intensity{{.5, 1}, {.1, 0}} },
		"probabilities": func(c *Config) { c.Intensities = []Intensity{{.5, .6}, {.1, .6}} },
		"basis":         func(c *Config) { c.KeyBasis = 1 },
		"small block":   func(c *Config) { c.BlockBits = 4095 },
		"large block":   func(c *Config) { c.BlockBits = 1<<22 + 1 },
		"epsilon":       func(c *Config) { c.EpsSec = 2 },
		"correctness":   func(c *Config) { c.EpsCor = 1e-36 },
		"authenticity":  func(c *Config) { c.EpsAuth = 1e-36 },
		"qber":          func(c *Config) { c.MaxQBER = .5 },
		"no key":        func(c *Config) { c.Auth = nil },
	} {
		cfg := testConfig()
		cfg.Auth = l.auth[Alice]
		if _, err := New(cfg); err != nil {
			t.Fatal(err)
		}
		change(&cfg)
		if _, err := New(cfg); !errors.Is(err, ErrConfig) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestDifferentConfigsDoNotTalk(t *testing.T) {
	t.Parallel()
	l := newLink(t, testConfig(), short, 12)
	cfg := testConfig()
	cfg.EpsSec = 1e-7
	cfg.Auth = l.auth[Alice]
	other, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	out, err := other.Step(l.now, Input{})
	if err != nil {
		t.Fatal(err)
	}
	_, err = l.ends[Bob].Step(l.now, Input{Message: out.Messages[0]})
	if !errors.Is(err, ErrMismatch) {
		t.Errorf("error is %v", err)
	}
}

func TestWrongInputKills(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		role Role
		in   Input
	}{
		"alice detects":   {Alice, Input{Detections: []Detection{{Slot: 1}}}},
		"bob prepares":    {Bob, Input{Preparations: []Preparation{{}}}},
		"unasked":         {Alice, Input{Preparations: []Preparation{{}}}},
		"falling slots":   {Bob, Input{Detections: []Detection{{Slot: 2}, {Slot: 1}}}},
		"no such basis":   {Bob, Input{Detections: []Detection{{Slot: 2, Basis: 2}}}},
		"no such bit":     {Bob, Input{Detections: []Detection{{Slot: 2, Bit: 2}}}},
		"one slot, twice": {Bob, Input{Detections: []Detection{{Slot: 2}, {Slot: 2}}}},
	} {
		t.Run(name, func(t *testing.T) {
			l := newLink(t, testConfig(), short, 13)
			for range 2 { // dead, it stays dead
				if _, err := l.ends[c.role].Step(l.now, c.in); !errors.Is(err, ErrInput) {
					t.Fatalf("error is %v", err)
				}
			}
		})
	}
}

func TestBacklogIsBounded(t *testing.T) {
	t.Parallel()
	cfg := testConfig()
	cfg.BlockBits = 4096
	l := newLink(t, cfg, short, 14)
	l.queue = [2][][]byte{} // the peer never answers
	_, dets := short.draw(l.rng, cfg, 20*l.ends[Bob].events, 0)
	l.step(Bob, Input{Detections: dets})
	s := l.ends[Bob].Stats()
	if s.Pending != maxPending*s.BlockEvents || s.Dropped != uint64(16*s.BlockEvents) {
		t.Errorf("pending %d, dropped %d of %d", s.Pending, s.Dropped, len(dets))
	}
}

func TestSilentPeerEndsSession(t *testing.T) {
	t.Parallel()
	l := newLink(t, testConfig(), short, 15)
	l.tamper = func(to Role, raw []byte) [][]byte {
		if raw[0] == kindBegin {
			return nil
		}
		return [][]byte{raw}
	}
	l.run(1)
	l.tamper = nil
	l.now = l.now.Add(stallAfter)
	l.step(Bob, Input{})
	l.now = l.now.Add(time.Second)
	l.step(Bob, Input{})
	if !errors.Is(l.errs[Bob], ErrStalled) && !errors.Is(l.errs[Bob], ErrProtocol) {
		t.Errorf("error is %v", l.errs[Bob])
	}
}

func BenchmarkSession(b *testing.B) {
	cfg := testConfig()
	cfg.BlockBits = 1 << 20
	cfg.KeyBasis = .8
	cfg.Intensities = []Intensity{{.5, .5}, {.2, .5}}
	cfg.EpsSec = 1e-9
	l := newLink(b, cfg, short, 16)
	n := 0
	for b.Loop() {
		b.StopTimer()
		preps, dets := short.draw(l.rng, cfg, l.ends[Bob].events, l.slot)
		l.preps, l.slot = preps, dets[len(dets)-1].Slot
		b.StartTimer()
		l.step(Bob, Input{Detections: dets})
		l.pump()
		n++
	}
	l.quiet()
	s := l.ends[Bob].Stats()
	b.ReportMetric(float64(s.SiftedBits)/b.Elapsed().Seconds()/1e6, "sifted-Mbit/s")
	b.ReportMetric(float64(s.SecretBits)/float64(s.SiftedBits), "secret/sifted")
	b.ReportMetric(s.Last.Efficiency, "f")
	b.ReportMetric(float64(l.bytes)/float64(n), "channel-B/op")
	b.Logf("%s", fmt.Sprintf("%+v", s.Last))
}

// An alice who does not mind errors cannot talk bob into a key: he compares
// the key basis himself.
func TestBobHoldsTheLimitToo(t *testing.T) {
	t.Parallel()
	cfg := testConfig()
	cfg.MaxQBER = short.err / 2
	for _, careless := range []bool{false, true} {
		l := newLink(t, cfg, short, 7)
		if careless {
			l.ends[Alice].cfg.MaxQBER = .11
		}
		l.run(1)
		l.check()
		if len(l.blocks[Alice])+len(l.blocks[Bob]) != 0 {
			t.Errorf("careless %v: a key was made above bob's limit", careless)
		}
		if got := l.ends[Bob].Stats(); got.Aborted != 1 {
			t.Errorf("careless %v: stats %+v", careless, got)
		}
	}
}
