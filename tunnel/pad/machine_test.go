package pad

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/quietline/quietline/tunnel"
)

func (e *end) said(text string) bool {
	for _, ev := range e.events {
		if strings.Contains(ev.Reason, text) {
			return true
		}
	}
	return false
}

// filled is a world in which both ends have good pad.
func filled(t *testing.T, cfg Config) *world {
	t.Helper()
	w := newWorld(1, cfg)
	w.run(10 * time.Second)
	for i, e := range w.ends {
		if s := e.m.State(); !s.Up || s.Mark != Good || s.Why != "" || s.Left < w.config.Target*3/4 {
			t.Fatalf("end %d: %+v", i, s)
		}
	}
	return w
}

func TestFills(t *testing.T) {
	w := filled(t, Config{Target: 1 << 20})
	for i, e := range w.ends {
		s := e.m.State()
		if s.Left > s.Target || s.Held < 60 || s.Drawn < 1<<20-16<<10 || s.Lost != 0 || s.Collision != 0 {
			t.Errorf("end %d: %+v", i, s)
		}
	}
	a, b := w.ends[0], w.ends[1]
	for range 500 {
		a.record(1000)
		w.run(20 * time.Millisecond)
	}
	w.run(15 * time.Second)
	if b.got != 500 {
		t.Errorf("%d of 500 records came", b.got)
	}
	s := a.m.State()
	if s.Sealed != 500 || s.Out == 0 || b.m.State().Opened != 500 {
		t.Errorf("%+v", s)
	}
	if held := b.m.State().Held; held > 66 {
		t.Errorf("%d blocks are held: old ones do not retire", held)
	}
	if w.fault != nil {
		t.Error(w.fault)
	}
}

// TestMarks: as pad runs out each mark is told once; it comes back with keys.
func TestMarks(t *testing.T) {
	w := filled(t, Config{Target: 64 << 10})
	w.stock = 0
	a := w.ends[0]
	for range 900 {
		if _, err := a.m.Out().Seal(nil, make([]byte, 100), 1408, true, w.now); err != nil {
			break
		}
		w.run(time.Second)
	}
	for _, mark := range []Mark{Low, Critical, Empty} {
		n := 0
		for _, ev := range a.events {
			if ev.Alarm && strings.HasPrefix(ev.Reason, "one-time pad is "+mark.String()) {
				n++
			}
		}
		if n != 1 {
			t.Errorf("mark %v told %d times: %v", mark, n, a.events)
		}
	}
	s := a.m.State()
	if s.Up || s.Mark != Empty || !strings.Contains(s.Why, "has no key") || !a.said("no new one-time pad") {
		t.Errorf("%+v %v", s, a.events)
	}
	w.stock = -1
	w.run(30 * time.Second)
	if s := a.m.State(); !s.Up || s.Why != "" {
		t.Errorf("keys are back: %+v", s)
	}
}

// TestSlowSource: where keys trickle, a small block is used rather than none.
func TestSlowSource(t *testing.T) {
	w := newWorld(1, Config{Target: 64 << 10})
	w.bits, w.stock = 256, 64+20
	w.run(3 * time.Minute)
	if s := w.ends[0].m.State(); s.Left < 1500 && w.ends[1].m.State().Left < 1500 {
		t.Errorf("%+v\n%+v", s, w.ends[1].m.State())
	}
}

// TestKeyGivenTwice: a key manager that gives one key twice gets no pad out of it.
func TestKeyGivenTwice(t *testing.T) {
	w := newWorld(1, Config{Target: 64 << 10})
	w.twice = true
	w.run(time.Minute)
	for i, e := range w.ends {
		if s := e.m.State(); s.Left != 0 || s.Collision == 0 {
			t.Errorf("end %d: %+v", i, s)
		}
	}
}

// TestRestart voids the pad of both ends; both fill again.
func TestRestart(t *testing.T) {
	for name, f := range map[string]func(*end){
		"restart": func(e *end) { e.boot() },
		"void":    func(e *end) { e.step(Input{Void: true}) },
	} {
		w := filled(t, Config{Target: 64 << 10})
		before := w.ends[1].m.State().Blocks
		f(w.ends[0])
		w.run(50 * time.Millisecond) // the hello
		if s := w.ends[1].m.State(); s.Left != 0 || !w.ends[1].said("begun anew") {
			t.Errorf("%s: the other end still has pad: %+v", name, s)
		}
		w.run(20 * time.Second)
		for i, e := range w.ends {
			if s := e.m.State(); !s.Up || i == 1 && s.Blocks == before {
				t.Errorf("%s: end %d: %+v", name, i, s)
			}
		}
	}
}

// TestLostHello: an end that has begun anew and was not heard says so when a
// record names a block that it does not hold.
func TestLostHello(t *testing.T) {
	w := filled(t, Config{Target: 64 << 10})
	w.cut = true
	w.ends[0].boot()
	w.run(2 * time.Second)
	w.ends[0].fail = tunnel.ErrKeyDown // no announcement tells either
	w.cut = false
	w.ends[1].record(10)
	w.run(time.Second)
	if !w.ends[1].said("begun anew") {
		t.Errorf("%v", w.ends[1].events)
	}
}

func TestConfigIsChecked(t *testing.T) {
	for i, cfg := range []Config{{Target: 1}, {Target: 65 << 20}, {BlockLen: 100}, {BlockLen: 1 << 20},
		{BlockLen: 4097}, {Budget: -1}, {ProbeEvery: -1}} {
		if m, err := New(cfg); !errors.Is(err, ErrConfig) || m != nil {
			t.Errorf("config %d: %v", i, err)
		}
	}
}

// TestNothingAfterClear: keys that come late are wiped.
func TestNothingAfterClear(t *testing.T) {
	w := newWorld(1, Config{Target: 64 << 10})
	w.run(time.Millisecond)
	m := w.ends[0].m
	m.Clear()
	keys, _ := w.draw(0, Request{New: 3, SizeBits: 256})
	m.Step(w.now, Input{Answer: &Answer{ID: 2, Keys: keys}})
	for _, k := range keys {
		if k.Bits.Len() != 0 {
			t.Error("a key is left")
		}
	}
	if s := fmt.Sprint(m.State().Left); s != "0" {
		t.Error(s)
	}
}
