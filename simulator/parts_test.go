package simulator

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"math"
	"net"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"pgregory.net/rapid"

	"github.com/quietline/quietline/hw"
	"github.com/quietline/quietline/hw/distill"
	"github.com/quietline/quietline/secret"
	"github.com/quietline/quietline/simulator/optics"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestPacer(t *testing.T) {
	at := func(ms float64) time.Time {
		return time.Unix(1_000_000, 0).Add(time.Duration(ms * float64(time.Millisecond)))
	}
	p := newPacer(1000.5, 0.1)
	steps := []struct {
		ms   float64
		want uint64
	}{
		{0, 0},      // the first call only starts the clock
		{20, 20},    // 20.01
		{40, 20},    // 40.02
		{40, 0},     // no time, no slots
		{30, 0},     // a clock that goes back
		{50, 20},    // and goes on
		{5000, 101}, // lag is lost, not made up for
		{5010, 10},
	}
	for i, s := range steps {
		if got := p.due(at(s.ms)); got != s.want {
			t.Errorf("step %d: due(%v ms) = %d, want %d", i, s.ms, got, s.want)
		}
	}
	p.idle(at(5500))
	if got := p.due(at(5520)); got != 20 {
		t.Errorf("after idle due = %d, want 20", got)
	}
}

func TestPacerKeepsTheClock(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		hz := rapid.Float64Range(10, 1e9).Draw(t, "hz")
		p := newPacer(hz, 0)
		now := time.Unix(1_000_000, 0)
		begin := now
		p.due(now)
		var sum uint64
		for range rapid.IntRange(1, 50).Draw(t, "ticks") {
			us := rapid.IntRange(0, int(maxLag/time.Microsecond/2)).Draw(t, "us")
			now = now.Add(time.Duration(us) * time.Microsecond)
			sum += p.due(now)
		}
		want := hz * now.Sub(begin).Seconds()
		if math.Abs(float64(sum)-want) > 1.001 {
			t.Errorf("%d slots in %v at %g Hz, want %g", sum, now.Sub(begin), hz, want)
		}
	})
}

func TestPacerBoundsAWindow(t *testing.T) {
	p := newPacer(1e11, 0.9)
	now := time.Unix(1_000_000, 0)
	p.due(now)
	if got := p.due(now.Add(time.Second)); float64(got)*0.9 > maxWindowPulses+1 {
		t.Errorf("a window of %d slots at gain 0.9", got)
	}
}

func block(generation, seq uint64, b byte) hw.Block {
	return hw.Block{Generation: generation, Seq: seq, Bits: secret.Own(bytes.Repeat([]byte{b}, 10))}
}

func TestSpool(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	s := newSpool(25)
	for i := range uint64(3) {
		if s.full() {
			t.Fatalf("full with %d blocks", i)
		}
		s.put(block(1, i, byte(i)))
	}
	if n, size := s.size(); n != 3 || size != 30 || !s.full() {
		t.Errorf("size() = %d, %d, full %v", n, size, s.full())
	}
	first, err := s.take(ctx)
	if err != nil || first.Seq != 0 || !bytes.Equal(first.Bits.Expose(), make([]byte, 10)) {
		t.Errorf("take = block %d, %v", first.Seq, err)
	}
	if n, size := s.size(); n != 2 || size != 20 || s.full() {
		t.Errorf("size() = %d, %d, full %v", n, size, s.full())
	}
	cancel()
	if b, err := s.take(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("take at the end = block %d, %v", b.Seq, err)
	}
	kept := s.blocks[0].Bits
	s.clear()
	if n, size := s.size(); n != 0 || size != 0 || kept.Len() != 0 || first.Bits.Len() == 0 {
		t.Errorf("after clear: %d blocks, %d bytes, %d bytes of a kept one and %d of a taken one",
			n, size, kept.Len(), first.Bits.Len())
	}
}

func TestSpoolWakesAReader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSpool(100)
		got := make(chan uint64)
		go func() {
			b, err := s.take(t.Context())
			if err != nil {
				t.Error(err)
			}
			got <- b.Seq
		}()
		synctest.Wait()
		s.put(block(1, 7, 7))
		if seq := <-got; seq != 7 {
			t.Errorf("took block %d", seq)
		}
	})
}

func TestEventsDropTheOldestAlarm(t *testing.T) {
	q := newEvents()
	q.report(hw.Event{Status: &hw.Status{SiftedBPS: 1}})
	q.report(hw.Event{Status: &hw.Status{SiftedBPS: 2}})
	for i := range maxAlarms + 3 {
		q.alarm(hw.Event{Alarm: "a", At: time.Unix(int64(i), 0)})
	}
	first, err := q.next(t.Context())
	if err != nil || first.At.Unix() != 3 {
		t.Errorf("first alarm is %v, %v; want the fourth", first, err)
	}
	for range maxAlarms - 1 {
		_, _ = q.next(t.Context())
	}
	last, err := q.next(t.Context())
	if err != nil || last.Status == nil || last.Status.SiftedBPS != 2 {
		t.Errorf("after the alarms comes %+v, %v; want the newest report", last, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if e, err := q.next(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("next = %+v, %v", e, err)
	}
}

func TestStateOutlivesTheProcess(t *testing.T) {
	dir := t.TempDir()
	s, err := loadState(dir)
	if err != nil || s.Generation != 0 {
		t.Fatalf("loadState of an empty folder = %+v, %v", s, err)
	}
	for _, g := range []uint64{5, 3, 9} {
		if err := s.raise(g); err != nil {
			t.Fatal(err)
		}
	}
	s, err = loadState(dir)
	if err != nil || s.Generation != 9 {
		t.Errorf("loadState = %+v, %v; want generation 9", s, err)
	}
	path := filepath.Join(dir, stateFile)
	for name, test := range map[string]struct {
		text string
		want error
	}{
		"newer":     {`{"schema":2,"generation":9}`, ErrNewerState},
		"no schema": {`{"generation":9}`, nil},
		"torn":      {`{"schema":1,"gen`, nil},
	} {
		if err := os.WriteFile(path, []byte(test.text), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := loadState(dir)
		if err == nil || (test.want != nil && !errors.Is(err, test.want)) {
			t.Errorf("%s: loadState = %v", name, err)
		}
	}
}

func TestStateThatCannotBeWritten(t *testing.T) {
	s := &state{path: filepath.Join(t.TempDir(), "gone", stateFile), Schema: stateSchema}
	if err := s.raise(1); !errors.Is(err, fs.ErrNotExist) || s.Generation != 0 {
		t.Errorf("raise = %v, generation %d", err, s.Generation)
	}
}

func TestFibreWireRoundTrip(t *testing.T) {
	digest, err := linkDigest(bench().Link)
	if err != nil {
		t.Fatal(err)
	}
	h := hello{distill.Bob, digest}
	if got, err := parseHello(appendHello(nil, h)); err != nil || got != h {
		t.Errorf("parseHello = %v, %v", got, err)
	}
	for _, c := range []credit{{}, {1 << 60, true}} {
		if got, err := parseCredit(appendCredit(nil, c)); err != nil || got != c {
			t.Errorf("parseCredit = %v, %v; want %v", got, err, c)
		}
	}
	w := optics.Window{Generation: 3, From: 10, To: 20,
		Pulses: []optics.Pulse{{Slot: 12, Bit: 1, Photons: 1}}}
	got, err := parseWindow(appendWindow(nil, w), nil)
	if diff := cmp.Diff(w, got); err != nil || diff != "" {
		t.Errorf("parseWindow: %v\n%s", err, diff)
	}
	other := bench().Link
	other.Fibre.LengthKM++
	if d, _ := linkDigest(other); d == digest {
		t.Error("two links have one digest")
	}
}

func TestFibreWireRefuses(t *testing.T) {
	good := appendHello(nil, hello{role: distill.Alice})
	spoil := func(i int, b byte) []byte {
		c := bytes.Clone(good)
		c[i] = b
		return c
	}
	for name, b := range map[string][]byte{
		"empty": nil, "type": spoil(0, 2), "magic": spoil(1, 'q'), "version": spoil(5, 2),
		"role": spoil(6, 2), "short": good[:len(good)-1], "long": append(bytes.Clone(good), 0),
	} {
		if h, err := parseHello(b); !errors.Is(err, ErrFibre) {
			t.Errorf("%s: parseHello = %v, %v", name, h, err)
		}
	}
	for _, b := range [][]byte{nil, {3}, {3, 0, 0, 0, 0, 0, 0, 0, 0, 2},
		{2, 0, 0, 0, 0, 0, 0, 0, 0, 0}} {
		if c, err := parseCredit(b); !errors.Is(err, ErrFibre) {
			t.Errorf("parseCredit(%x) = %v, %v", b, c, err)
		}
	}
	for _, b := range [][]byte{nil, {3, 0, 0, 0, 0}} {
		if w, err := parseWindow(b, nil); !errors.Is(err, ErrFibre) {
			t.Errorf("parseWindow(%x) = %v, %v", b, w, err)
		}
	}
}

func FuzzFibreWire(f *testing.F) {
	f.Add(appendHello(nil, hello{role: distill.Bob}))
	f.Add(appendCredit(nil, credit{7, true}))
	f.Add(appendWindow(nil, optics.Window{Generation: 1, To: 9}))
	f.Fuzz(func(t *testing.T, b []byte) {
		if h, err := parseHello(b); err == nil && !bytes.Equal(appendHello(nil, h), b) {
			t.Errorf("hello %x is written differently", b)
		}
		if c, err := parseCredit(b); err == nil && !bytes.Equal(appendCredit(nil, c), b) {
			t.Errorf("credit %x is written differently", b)
		}
		if w, err := parseWindow(b, nil); err == nil && !bytes.Equal(appendWindow(nil, w), b) {
			t.Errorf("window %x is written differently", b)
		}
	})
}

func TestFrames(t *testing.T) {
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	const most = 100_000
	sent := [][]byte{{}, {1}, bytes.Repeat([]byte{2}, most), bytes.Repeat([]byte{3}, most+1)}
	done := make(chan struct{})
	go func() {
		defer close(done)
		f := newFramed(a, most, time.Second)
		for _, body := range sent {
			_ = f.write(body) // the last one is not read to its end
		}
	}()
	f := newFramed(b, most, time.Second)
	var buf []byte
	for i, want := range sent[:3] {
		got, err := f.read(buf)
		if err != nil || !bytes.Equal(got, want) {
			t.Fatalf("frame %d: %d bytes, %v; want %d", i, len(got), err, len(want))
		}
		buf = got
	}
	if _, err := f.read(buf); !errors.Is(err, errFrame) {
		t.Errorf("a frame that is too long: %v", err)
	}
	_ = b.Close()
	<-done
}

func TestChannels(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	for _, address := range []string{"127.0.0.1:0", "unix:" + path} {
		for range 2 { // the second time the socket file is there
			l, err := Listen(address)
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithCancel(t.Context())
			cancel()
			if _, err := l.Conn(ctx); !errors.Is(err, context.Canceled) {
				t.Errorf("Conn after the end = %v", err)
			}
			dial := address
			if address[0] != 'u' {
				dial = l.Addr().String()
			}
			out, err := Dial(dial).Conn(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			in, err := l.Conn(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			_, _ = out.Write([]byte("x"))
			if n, err := in.Read(make([]byte, 1)); n != 1 || err != nil {
				t.Errorf("Read = %d, %v", n, err)
			}
			_, _ = out.Close(), in.Close()
			if err := l.Close(); err != nil {
				t.Error(err)
			}
			if c, err := Dial(dial).Conn(t.Context()); err == nil {
				_ = c.Close()
				t.Error("dialled a closed listener")
			}
		}
	}
}
