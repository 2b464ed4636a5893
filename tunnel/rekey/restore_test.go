package rekey

import (
	"testing"
	"time"
	"unsafe"
)

// monotonic returns t with its monotonic reading moved: what a wall clock that
// jumps looks like. No function of package time makes such a value.
func monotonic(t *testing.T, at time.Time, by time.Duration) time.Time {
	t.Helper()
	moved := at
	raw := (*struct {
		wall uint64
		ext  int64
		loc  *time.Location
	})(unsafe.Pointer(&moved))
	raw.ext += int64(by)
	if moved.Sub(at) != by || !moved.Round(0).Equal(at.Round(0)) {
		t.Fatal("time.Time has another form than this test knows")
	}
	return moved
}

func TestClockJump(t *testing.T) {
	now := time.Now()
	for _, tc := range []struct {
		name      string
		last, now time.Time
		want      time.Duration
	}{
		{"first step", time.Time{}, now, 0},
		{"both go on", now, now.Add(time.Hour), 0},
		{"no monotonic reading", now.Round(0), now.Round(0).Add(time.Hour), 0},
		{"suspended for an hour", now, monotonic(t, now.Add(time.Hour), -time.Hour), time.Hour},
		{"wall clock set back", now, monotonic(t, now, time.Minute), time.Minute},
	} {
		if got := clockJump(tc.last, tc.now); got != tc.want {
			t.Errorf("%s: %v, want %v", tc.name, got, tc.want)
		}
	}
}

// TestRestore: a restored or suspended end drops all its epochs at once and is
// up again within the boot grace, with its chain.
func TestRestore(t *testing.T) {
	for _, who := range []string{"I", "R"} {
		w := upLine(t, QKDStrict, func(_ int, c *Config) { c.EpochLife = 10 * time.Second })
		w.traffic(100 * time.Millisecond)
		w.run(20*time.Second + 500*time.Millisecond)
		e := w.named(who)
		held := len(e.recv)
		boot := e.m.boot
		e.step(Input{Restored: true})
		if len(e.recv) != 0 || !e.blocked || held == 0 {
			t.Fatalf("%s holds %d of %d epochs", who, len(e.recv), held)
		}
		if s := e.m.State(); s.Level != Blocked || s.Receive != 0 || e.m.boot == boot {
			t.Errorf("%s: %+v", who, s)
		}
		for i := range e.ever {
			e.gone[i] = true // dropped for a good reason
		}
		w.mustBeUp(t, bootGrace+time.Second)
		w.run(time.Minute)
		w.ok(t)
		if e.alarmed("chain") || w.other(e).alarmed("chain") {
			t.Errorf("%s: the chain was lost", who)
		}
	}
}

func TestSuspend(t *testing.T) {
	w := newWorld(1)
	m, err := New(w.config(0, PQCOnly))
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	m.Step(now, Input{})
	out := m.Step(now.Add(time.Second), Input{})
	if len(out.Events) != 0 {
		t.Fatalf("events without a jump: %v", out.Events)
	}
	out = m.Step(monotonic(t, now.Add(time.Hour), 2*time.Second-time.Hour), Input{})
	if !out.Stop || len(out.Events) == 0 || out.Events[0].Kind != "alarm" {
		t.Errorf("an hour of sleep: %+v", out)
	}
}
