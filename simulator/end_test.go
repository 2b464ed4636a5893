package simulator

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"math"
	"net"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/quietline/quietline/hw"
	"github.com/quietline/quietline/hw/distill"
	"github.com/quietline/quietline/hw/socket"
	"github.com/quietline/quietline/simulator/optics"
)

// limit bounds every wait of these tests. A working pair needs a second or two,
// but much more with the race detector on a busy machine.
const limit = 5 * time.Minute

// site is what one end keeps over a restart.
type site struct {
	cfg  Config
	auth string // path
}

// running is an end at work.
type running struct {
	*End
	t    *testing.T
	ctx  context.Context
	stop func()
}

// newSites lays down two ends that listen and dial on loopback.
func newSites(t *testing.T, p Preset) (alice, bob *site) {
	t.Helper()
	listen := func() *Listener {
		l, err := Listen("127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = l.Close() })
		return l
	}
	fibre, classical := listen(), listen()
	seed, err := distill.NewAuthSeed(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	defer seed.Clear()
	add := func(role distill.Role, f, c Channel) *site {
		dir := t.TempDir()
		s := &site{auth: filepath.Join(dir, "auth"), cfg: Config{
			Role: role, Link: "test", Preset: p, Fibre: f, Classical: c, StateDir: dir,
			Seeds: &Seeds{Own: sha256.Sum256([]byte{byte(role)}), Physics: [32]byte{7, byte(role)}},
		}}
		if err := distill.CreateAuthFile(s.auth, seed.Expose()); err != nil {
			t.Fatal(err)
		}
		return s
	}
	return add(distill.Alice, fibre, classical),
		add(distill.Bob, Dial(fibre.Addr().String()), Dial(classical.Addr().String()))
}

// start runs an end until the test ends or stop is called.
func (s *site) start(t *testing.T) *running {
	t.Helper()
	auth, err := distill.OpenAuthFile(s.auth)
	if err != nil {
		t.Fatal(err)
	}
	s.cfg.Auth = auth
	e, err := New(s.cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := e.Run(ctx); err != nil {
			t.Errorf("Run = %v", err)
		}
		if err := auth.Close(); err != nil {
			t.Errorf("close authentication file: %v", err)
		}
	}()
	r := &running{End: e, t: t, ctx: ctx, stop: func() { cancel(); <-done }}
	t.Cleanup(r.stop)
	return r
}

func startPair(t *testing.T, p Preset) (a, b *running) {
	t.Helper()
	sa, sb := newSites(t, p)
	return sa.start(t), sb.start(t)
}

// block takes the next block.
func (r *running) block() hw.Block {
	r.t.Helper()
	b, err := r.Next(r.ctx)
	if err != nil {
		r.t.Fatalf("take block: %v; %+v", err, r.Stats())
	}
	return b
}

// until reads events until one fits.
func (r *running) until(what string, fits func(hw.Event) bool) hw.Event {
	r.t.Helper()
	for {
		ev, err := r.NextEvent(r.ctx)
		if err != nil {
			r.t.Fatalf("wait for %s: %v; %+v", what, err, r.Stats())
		}
		if fits(ev) {
			return ev
		}
	}
}

func (r *running) untilStatus(what string, fits func(hw.Status) bool) hw.Status {
	r.t.Helper()
	ev := r.until(what, func(e hw.Event) bool { return e.Status != nil && fits(*e.Status) })
	return *ev.Status
}

// pairOf reads from both ends until one block came out at both.
func pairOf(t *testing.T, a, b *running) hw.Block {
	t.Helper()
	x, y := a.block(), b.block()
	for x.Generation != y.Generation || x.Seq != y.Seq {
		if x.Generation < y.Generation || x.Generation == y.Generation && x.Seq < y.Seq {
			x = a.block()
		} else {
			y = b.block()
		}
	}
	if !bytes.Equal(x.Bits.Expose(), y.Bits.Expose()) {
		t.Fatalf("block %d/%d differs at the two ends", x.Generation, x.Seq)
	}
	if x.Bits.Len() == 0 || !x.Simulated || !y.Simulated {
		t.Fatalf("block %d/%d: %d bytes, simulated %v and %v", x.Generation, x.Seq,
			x.Bits.Len(), x.Simulated, y.Simulated)
	}
	return x
}

func TestBlocksAreEqualAndErrorIsTheSetOne(t *testing.T) {
	t.Parallel()
	a, b := startPair(t, bench())
	const blocks = 4
	var sum float64
	last := hw.Block{}
	for range blocks {
		x := pairOf(t, a, b)
		if last.Bits.Len() > 0 && bytes.Equal(last.Bits.Expose(), x.Bits.Expose()) {
			t.Error("two blocks have the same bits")
		}
		last = x
		sum += x.QBER
	}
	want, n := bench().Forecast().QBER, float64(blocks*bench().BlockBits)
	if sigma := math.Sqrt(want * (1 - want) / n); math.Abs(sum/blocks-want) > 5*sigma {
		t.Errorf("QBER = %.5f, set error %.5f, off by %.1f sigma (physics seed 7)",
			sum/blocks, want, (sum/blocks-want)/sigma)
	}
	got := float64(8 * last.Bits.Len())
	if f := bench().Forecast(); got < 0.8*float64(f.SecretBits) || got > 1.1*float64(f.SecretBits) {
		t.Errorf("the last block has %g bits, forecast %d", got, f.SecretBits)
	}
	for _, r := range []*running{a, b} {
		st := r.untilStatus("rates", func(s hw.Status) bool { return s.SecretBPS > 0 })
		if !st.Up || st.Reason != "" || !st.Simulated || st.SiftedBPS < st.SecretBPS ||
			math.Abs(st.QBER-want) > 0.003 || st.AuthBits <= 0 {
			t.Errorf("status = %+v", st)
		}
		s := r.Stats()
		if s.Total.AuthUsed == 0 || s.Total.Blocks < blocks || s.Total.SecretBits == 0 ||
			s.SetQBER != want || s.Sessions != 1 || s.Generation != 1 {
			t.Errorf("stats = %+v", s)
		}
		if in := r.Describe(); !in.Simulated || in.BlockBytes == 0 {
			t.Errorf("Describe() = %+v", in)
		}
	}
	if s := a.Stats(); s.Pulses == 0 || s.Slots < s.Pulses {
		t.Errorf("alice sent %d slots with %d pulses", s.Slots, s.Pulses)
	}
	if c := b.Stats().Clicks; c.Detections == 0 || c.Light == 0 {
		t.Errorf("bob's clicks = %+v", c)
	}
}

func TestEveStarvesTheLink(t *testing.T) {
	t.Parallel()
	sa, sb := newSites(t, bench())
	sa.cfg.Eve = 1
	a, b := sa.start(t), sb.start(t)
	alarm := b.until("an alarm", func(e hw.Event) bool { return e.Alarm != "" })
	want := bench().Link.Expect(1).Error
	for _, r := range []*running{a, b} {
		st := r.untilStatus("error ratio", func(s hw.Status) bool { return !math.IsNaN(s.QBER) })
		// The ratio may be of the smaller, test basis: some 18,000 events.
		if math.Abs(st.QBER-want) > 5*math.Sqrt(want*(1-want)/18_000) || st.Up || st.Reason == "" {
			t.Errorf("with eve, status = %+v, want QBER %.3f (alarm %+v)", st, want, alarm)
		}
		s := r.Stats()
		if s.Total.Blocks != 0 || s.SpoolBlocks != 0 || s.Total.Aborted == 0 {
			t.Errorf("with eve, %d blocks, %d aborted", s.Total.Blocks, s.Total.Aborted)
		}
	}
	if err := b.SetEve(0); !errors.Is(err, ErrNotAlice) {
		t.Errorf("SetEve at bob = %v", err)
	}
	for _, x := range []float64{-0.1, 1.1, math.NaN()} {
		if err := a.SetEve(x); !errors.Is(err, ErrConfig) {
			t.Errorf("SetEve(%v) = %v", x, err)
		}
	}
	if err := a.SetEve(0); err != nil {
		t.Fatal(err)
	}
	pairOf(t, a, b)
}

func TestFibreCutAndRestored(t *testing.T) {
	t.Parallel()
	a, b := startPair(t, bench())
	for _, cutter := range []*running{a, b} {
		pairOf(t, a, b)
		cutter.CutFibre(true)
		for _, r := range []*running{a, b} {
			st := r.untilStatus("a dark fibre", func(s hw.Status) bool { return !s.Up })
			if want := "fibre"; !strings.Contains(st.Reason, want) {
				t.Errorf("reason is %q, want one with %q", st.Reason, want)
			}
		}
		cutter.CutFibre(false)
		for _, r := range []*running{a, b} {
			r.untilStatus("light", func(s hw.Status) bool { return s.Up })
		}
	}
	x := pairOf(t, a, b)
	if x.Generation != 1 {
		t.Errorf("cutting the fibre began generation %d", x.Generation)
	}
}

func TestRestartOfEitherEnd(t *testing.T) {
	t.Parallel()
	sa, sb := newSites(t, bench())
	a, b := sa.start(t), sb.start(t)
	first := pairOf(t, a, b)
	b.stop()
	b = sb.start(t)
	second := pairOf(t, a, b)
	for second.Generation == first.Generation { // alice had more of the first
		second = pairOf(t, a, b)
	}
	a.stop()
	a = sa.start(t)
	third := pairOf(t, a, b)
	for third.Generation == second.Generation {
		third = pairOf(t, a, b)
	}
	if !(first.Generation < second.Generation && second.Generation < third.Generation) {
		t.Errorf("generations %d, %d, %d do not rise", first.Generation, second.Generation,
			third.Generation)
	}
	for _, s := range []*site{sa, sb} {
		st, err := loadState(s.cfg.StateDir)
		if err != nil || st.Generation < third.Generation {
			t.Errorf("state holds %+v, %v; want generation %d", st, err, third.Generation)
		}
	}
}

// noisy is a classical channel that changes one byte when it is told to.
type noisy struct {
	Channel
	hit atomic.Bool
}

type noisyConn struct {
	net.Conn
	n *noisy
}

func (n *noisy) Conn(ctx context.Context) (net.Conn, error) {
	c, err := n.Channel.Conn(ctx)
	if err != nil {
		return nil, err
	}
	return noisyConn{c, n}, nil
}

func (c noisyConn) Write(b []byte) (int, error) {
	// Not a keep-alive and not the length, which would only break the frame.
	if len(b) > 64 && c.n.hit.CompareAndSwap(true, false) {
		b = bytes.Clone(b)
		b[len(b)/2] ^= 0x10
	}
	return c.Conn.Write(b)
}

func TestChangedByteIsNoticed(t *testing.T) {
	t.Parallel()
	for name, pick := range map[string]int{"from bob": 1, "from alice": 0} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			sa, sb := newSites(t, bench())
			s := []*site{sa, sb}[pick]
			n := &noisy{Channel: s.cfg.Classical}
			s.cfg.Classical = n
			a, b := sa.start(t), sb.start(t)
			pairOf(t, a, b)
			n.hit.Store(true)
			// Which end notices, when, and whether it costs the block or the
			// session depends on the byte that was hit. What both release must
			// be equal in any case, and there must be an alarm.
			alarms := a.alarms() + b.alarms()
			for alarms == "" {
				pairOf(t, a, b)
				alarms = a.alarms() + b.alarms()
			}
			t.Logf("alarms: %s", alarms)
			if n.hit.Load() {
				t.Fatal("there was an alarm before a byte was changed")
			}
			pairOf(t, a, b)
		})
	}
}

// alarms shows the alarms nobody has read yet.
func (r *running) alarms() (all string) {
	r.events.mu.Lock()
	defer r.events.mu.Unlock()
	for _, a := range r.events.alarms {
		all += fmt.Sprintf("%s (%s); ", a.Alarm, a.Detail)
	}
	return all
}

func TestFullSpoolStopsBothEnds(t *testing.T) {
	t.Parallel()
	sa, sb := newSites(t, bench())
	sb.cfg.SpoolBytes = 1 // full with the first block
	a, b := sa.start(t), sb.start(t)
	b.untilStatus("a full spool", func(s hw.Status) bool { return s.Reason == "block spool is full" })
	a.untilStatus("the peer's", func(s hw.Status) bool {
		return s.Reason == "peer's block spool is full"
	})
	first := pairOf(t, a, b)
	for b.Stats().SpoolBlocks > 0 {
		b.block()
	}
	next := pairOf(t, a, b)
	for next.Seq <= first.Seq {
		next = pairOf(t, a, b)
	}
}

// The key manager's driver on the device's socket: what it did not acknowledge
// comes again to the next one, and both sites read the same bits.
func TestBlocksThroughTheSocket(t *testing.T) {
	t.Parallel()
	sa, sb := newSites(t, bench())
	var got []hw.Block
	for _, r := range []*running{sa.start(t), sb.start(t)} {
		path := filepath.Join(t.TempDir(), "device.sock")
		l, err := socket.Listen(path)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(r.ctx)
		served := make(chan error)
		go func() { served <- socket.Serve(ctx, l, r) }()
		t.Cleanup(func() {
			cancel()
			if err := <-served; err != nil {
				t.Errorf("Serve = %v", err)
			}
		})
		first := readOne(t, r.ctx, path, false)
		again := readOne(t, r.ctx, path, true)
		if first.Seq != again.Seq || !bytes.Equal(first.Bits.Expose(), again.Bits.Expose()) {
			t.Errorf("block %d comes to the next driver, want %d again", again.Seq, first.Seq)
		}
		got = append(got, again)
	}
	if got[0].Seq != got[1].Seq || !bytes.Equal(got[0].Bits.Expose(), got[1].Bits.Expose()) {
		t.Errorf("blocks %d and %d of the two sites differ", got[0].Seq, got[1].Seq)
	}
}

// readOne is a key manager that reads a block and an event, and goes.
func readOne(t *testing.T, ctx context.Context, path string, ack bool) (b hw.Block) {
	t.Helper()
	d, err := socket.Open("unix://"+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if err := d.ReadBlock(ctx, &b); err != nil {
		t.Fatal(err)
	}
	if e, err := d.Events(ctx); err != nil || (e.Status != nil && !e.Status.Simulated) {
		t.Errorf("Events = %+v, %v", e, err)
	}
	if info := d.Describe(); !info.Simulated || !b.Simulated {
		t.Errorf("driver says %+v, block simulated %v", info, b.Simulated)
	}
	if ack {
		if err := d.Ack(ctx, b.Generation, b.Seq); err != nil {
			t.Error(err)
		}
	}
	return b
}

func TestDifferentLinksDoNotJoin(t *testing.T) {
	t.Parallel()
	sa, sb := newSites(t, bench())
	sb.cfg.Preset.Link.Fibre.LengthKM = 3
	a, b := sa.start(t), sb.start(t)
	for _, r := range []*running{a, b} {
		st := r.untilStatus("a report", func(hw.Status) bool { return true })
		if st.Up || r.Stats().Total.Blocks != 0 {
			t.Errorf("status = %+v", st)
		}
	}
}

func TestNewRefuses(t *testing.T) {
	sa, sb := newSites(t, bench())
	good := sa.cfg
	good.Auth = nopAuth{}
	if _, err := New(good); err != nil {
		t.Fatal(err)
	}
	for name, spoil := range map[string]func(*Config){
		"role":      func(c *Config) { c.Role = 7 },
		"fibre":     func(c *Config) { c.Fibre = nil },
		"classical": func(c *Config) { c.Classical = nil },
		"auth":      func(c *Config) { c.Auth = nil },
		"state":     func(c *Config) { c.StateDir = "" },
		"spool":     func(c *Config) { c.SpoolBytes = -1 },
		"eve":       func(c *Config) { c.Eve = 2 },
		"bob's eve": func(c *Config) { c.Role, c.Eve = sb.cfg.Role, 0.5 },
		"link":      func(c *Config) { c.Preset.Link = optics.Link{} },
	} {
		c := good
		spoil(&c)
		if _, err := New(c); !errors.Is(err, ErrConfig) {
			t.Errorf("%s: New = %v, want ErrConfig", name, err)
		}
	}
}

// nopAuth is never asked.
type nopAuth struct{ distill.AuthKeys }

func TestSlotsOfTheFutureAreRefused(t *testing.T) {
	sa, _ := newSites(t, bench())
	sa.cfg.Auth = nopAuth{}
	e, err := New(sa.cfg)
	if err != nil {
		t.Fatal(err)
	}
	d := &distiller{end: e, session: &session{},
		source: optics.NewSource(bench().Link, e.seeds.Own, 1)}
	d.session.sent.Store(10)
	if p, err := d.prepared([]uint64{3, 9}); err != nil || len(p) != 2 || p[1] != d.source.At(9) {
		t.Errorf("prepared = %v, %v", p, err)
	}
	if _, err := d.prepared([]uint64{3, 10}); !errors.Is(err, ErrSlot) {
		t.Errorf("prepared of an unsent slot = %v, want ErrSlot", err)
	}
}

func TestLaggingMachineTakesNoDetections(t *testing.T) {
	_, sb := newSites(t, bench())
	auth, err := distill.OpenAuthFile(sb.auth)
	if err != nil {
		t.Fatal(err)
	}
	defer auth.Close()
	cfg := sb.cfg.Preset.distill()
	cfg.Role, cfg.Generation, cfg.Auth = distill.Bob, 1, auth
	m, err := distill.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	d := &distiller{machine: m, session: &session{batches: make(chan batch)}}
	need := m.Stats().BlockEvents
	if need == 0 {
		_, _ = m.Step(time.Unix(1, 0), distill.Input{})
		need = m.Stats().BlockEvents
	}
	clicks := make([]distill.Detection, need)
	for i := range clicks {
		clicks[i].Slot = uint64(i)
	}
	if d.batches() == nil {
		t.Error("an idle machine takes no detections")
	}
	for _, part := range [][]distill.Detection{clicks[:need-1], clicks[need-1:]} {
		if d.batches() == nil {
			t.Errorf("no detections are taken with %d of %d waiting", m.Stats().Pending, need)
		}
		slots := part[len(part)-1].Slot + 1
		if _, err := m.Step(time.Unix(1, 0), distill.Input{Detections: part, Slots: slots}); err != nil {
			t.Fatal(err)
		}
	}
	if d.batches() != nil {
		t.Errorf("detections are taken with %d of %d waiting", m.Stats().Pending, need)
	}
}
