package daemon

import (
	"strings"
	"testing"

	"github.com/quietline/quietline/cmd/internal/config"
	"github.com/quietline/quietline/tunnel/line"
	"github.com/quietline/quietline/tunnel/pad"
)

// TestAssumptions: nothing that this end cannot know is called
// information-theoretic, a simulated link above all.
func TestAssumptions(t *testing.T) {
	here := &config.Keys{KMEs: []string{"https://127.0.0.1:8443"}}
	there := &config.Keys{KMEs: []string{"https://10.1.0.1:8443"}}
	named := &config.Keys{KMEs: []string{"https://localhost:8443"}} // a name may lead anywhere
	for _, tt := range []struct {
		simulated bool
		keys      *config.Keys
		want      []string
	}{
		{false, here, []string{"does not say"}},
		{true, here, []string{"simulated", "does not say"}},
		{false, there, []string{"TLS", "does not say"}},
		{false, named, []string{"TLS", "does not say"}},
		{true, there, []string{"simulated", "TLS", "does not say"}},
	} {
		got := assumptions(tt.simulated, tt.keys)
		if len(got) != len(tt.want) {
			t.Errorf("%+v: %q", tt, got)
			continue
		}
		for i, w := range tt.want {
			if !strings.Contains(got[i], w) {
				t.Errorf("%+v: %q, want %q", tt, got[i], w)
			}
		}
	}
}

func TestPadStatus(t *testing.T) {
	var e lineEnd
	cfg := &config.Line{Keys: &config.Keys{KMEs: []string{"https://127.0.0.1:1"}}}
	if e.padStatus(nil, cfg) != nil {
		t.Error("a line without pad shows one")
	}
	s := e.padStatus(&line.PadStats{State: pad.State{Mark: pad.Low, Left: 10, Target: 40, In: 1, Out: 3},
		SecondsLeft: 5, Classes: []line.ClassStats{{Name: "hl7", Padded: 1, Plain: 2, Demoted: 3, Refused: 4}}}, cfg)
	if s.Mark != "low" || s.Left != 10 || s.Hold != 40 || s.In != 8 || s.Out != 24 || s.LeftFor == nil ||
		*s.LeftFor != 5 || s.InformationTheoretic || s.Classes[0].Refused != 4 || s.Classes[0].Name != "hl7" {
		t.Errorf("%+v", s)
	}
	if s := e.padStatus(&line.PadStats{SecondsLeft: -1}, cfg); s.LeftFor != nil {
		t.Errorf("pad that does not run out lasts %v s", *s.LeftFor)
	}
}
