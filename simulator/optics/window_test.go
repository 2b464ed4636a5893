package optics

import (
	"bytes"
	"errors"
	"math"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/quietline/quietline/hw/distill"
)

func TestWindowRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := Window{Generation: rapid.Uint64().Draw(t, "generation"),
			From: rapid.Uint64Max(math.MaxUint64-1e9).Draw(t, "from")}
		next := w.From
		for range rapid.IntRange(0, 20).Draw(t, "pulses") {
			p := Pulse{
				Slot:    next + rapid.Uint64Max(1e6).Draw(t, "gap"),
				Basis:   distill.Basis(rapid.IntRange(0, 1).Draw(t, "basis")),
				Bit:     uint8(rapid.IntRange(0, 1).Draw(t, "bit")),
				Photons: uint8(rapid.IntRange(1, maxPhotons).Draw(t, "photons")),
			}
			w.Pulses = append(w.Pulses, p)
			next = p.Slot + 1
		}
		w.To = next + rapid.Uint64Max(1e6).Draw(t, "rest")
		got, err := ParseWindow(AppendWindow(nil, w), nil)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(w, got); diff != "" {
			t.Error(diff)
		}
	})
}

func TestParseWindowRefuses(t *testing.T) {
	good := AppendWindow(nil, Window{Generation: 3, From: 100, To: 200, Pulses: []Pulse{
		{Slot: 100, Photons: 1}, {Slot: 199, Basis: 1, Bit: 1, Photons: 2}}})
	if _, err := ParseWindow(good, nil); err != nil {
		t.Fatal(err)
	}
	tests := map[string][]byte{
		"empty":       nil,
		"short":       good[:len(good)-1],
		"long":        append(bytes.Clone(good), 0),
		"too many":    {3, 100, 100, 101},
		"outside":     {3, 100, 10, 1, 10, 0},
		"long number": {0x83, 0, 100, 10, 0},
		"wraps": append(AppendWindow(nil,
			Window{From: math.MaxUint64, To: math.MaxUint64})[:11], 1, 0),
		"second outside": {3, 100, 10, 2, 9, 0, 0, 0},
	}
	for name, b := range tests {
		t.Run(name, func(t *testing.T) {
			if w, err := ParseWindow(b, nil); !errors.Is(err, ErrWindow) {
				t.Errorf("ParseWindow = %+v, %v; want ErrWindow", w, err)
			}
		})
	}
}

func TestManyPhotonsAreCapped(t *testing.T) {
	w := Window{To: 1, Pulses: []Pulse{{Photons: 255}}}
	got, err := ParseWindow(AppendWindow(nil, w), nil)
	if err != nil || got.Pulses[0].Photons != maxPhotons {
		t.Errorf("ParseWindow = %+v, %v", got, err)
	}
}

func FuzzParseWindow(f *testing.F) {
	f.Add([]byte{})
	f.Add(AppendWindow(nil, Window{Generation: 1, From: 5, To: 500}))
	f.Add(AppendWindow(nil, Window{Generation: 1 << 40, From: 1 << 50, To: 1<<50 + 1000,
		Pulses: []Pulse{{Slot: 1<<50 + 3, Bit: 1, Photons: 1}, {Slot: 1<<50 + 999, Photons: 9}}}))
	f.Add([]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1, 1, 1, 1, 0, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		w, err := ParseWindow(b, nil)
		if err != nil {
			return
		}
		if again := AppendWindow(nil, w); !bytes.Equal(again, b) {
			t.Errorf("%x parses as %+v, which is written %x", b, w, again)
		}
		last := w.From
		for _, p := range w.Pulses {
			if p.Slot < last || p.Slot >= w.To || p.Photons == 0 || p.Bit > 1 || p.Basis > 1 {
				t.Errorf("bad pulse %+v in [%d, %d)", p, w.From, w.To)
			}
			last = p.Slot + 1
		}
	})
}
