package rekey

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/datadriven"

	"github.com/quietline/quietline/tunnel"
)

// TestTranscripts plays the worlds in testdata/transcripts. Commands:
//
//	start policy=P [life=D] [hold=D]   two machines, 10 ms apart
//	run D                              let time pass, print what happened
//	kme end=I|R [err=empty|down|denied] [lose] [wrong] [late=D]; without = healthy
//	net [cut=I|R|both] [loss=0.3]      without = healthy
//	restart end=I|R
//	rekey end=I|R                      the operator's word
//	state                              of both
//	stats
func TestTranscripts(t *testing.T) {
	datadriven.Walk(t, "testdata/transcripts", func(t *testing.T, path string) {
		var w *world
		var lines []string
		datadriven.RunTest(t, path, func(t *testing.T, d *datadriven.TestData) string {
			if d.Cmd == "start" {
				w = newWorld(42)
				w.log = func(f string, a ...any) { lines = append(lines, fmt.Sprintf(f, a...)) }
			}
			w.command(t, d)
			if w.fault != nil {
				t.Fatal(w.fault)
			}
			out := strings.Join(lines, "\n")
			lines = nil
			if out != "" {
				out += "\n"
			}
			return out
		})
	})
}

func (w *world) command(t *testing.T, d *datadriven.TestData) {
	switch d.Cmd {
	case "start":
		p, err := ParsePolicy(argOf(d, "policy"))
		if err != nil {
			t.Fatal(err)
		}
		w.start(p, func(_ int, c *Config) {
			c.EpochLife, c.HoldMax = durationOf(t, argOf(d, "life")), durationOf(t, argOf(d, "hold"))
		})
	case "run":
		w.run(durationOf(t, d.CmdArgs[0].Key))
	case "kme":
		w.kme.state[w.named(argOf(d, "end")).id] = kmeState{
			err: map[string]error{"empty": tunnel.ErrKeyEmpty, "down": tunnel.ErrKeyDown,
				"denied": tunnel.ErrKeyDenied}[argOf(d, "err")],
			loseNew: share(d, "lose"), wrong: share(d, "wrong"), delay: durationOf(t, argOf(d, "late")),
		}
	case "net":
		cut := argOf(d, "cut")
		w.net.loss = 0
		_, _ = fmt.Sscan(argOf(d, "loss"), &w.net.loss)
		for _, name := range []string{"I", "R"} {
			w.net.cut[w.named(name).id] = cut == name || cut == "both"
		}
	case "restart":
		w.named(argOf(d, "end")).boot()
	case "rekey":
		w.named(argOf(d, "end")).step(Input{Rekey: true})
	case "state":
		for _, name := range []string{"I", "R"} {
			s := w.named(name).m.State()
			w.log("%s: %s since %.3fs (%s), epoch %d, receives %d, handshake %q, failure %q, key manager %s",
				name, s.Level, s.Since.Sub(epochZero).Seconds(), s.Why, s.Epoch, s.Receive,
				s.Handshake, s.Failure, s.KeyManager)
		}
	case "stats":
		for _, name := range []string{"I", "R"} {
			w.log("%s: %+v", name, w.named(name).m.Stats())
		}
	default:
		t.Fatalf("unknown command %s", d.Cmd)
	}
}

func (w *world) named(name string) *end {
	if name == "I" {
		return w.scheduled()
	}
	return w.other(w.scheduled())
}

func argOf(d *datadriven.TestData, key string) string {
	for _, a := range d.CmdArgs {
		if a.Key == key && len(a.Vals) > 0 {
			return a.Vals[0]
		}
	}
	return ""
}

func share(d *datadriven.TestData, key string) float64 {
	if d.HasArg(key) {
		return 1
	}
	return 0
}

func durationOf(t *testing.T, s string) time.Duration {
	if s == "" {
		return 0
	}
	v, err := time.ParseDuration(s)
	if err != nil {
		t.Fatal(err)
	}
	return v
}
