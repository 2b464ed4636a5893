package rekey

import (
	"strings"
	"testing"
	"time"

	"github.com/quietline/quietline/secret"
)

// TestPlantedBugs bends what a machine says, as a wrong machine would say it:
// the simulator must notice each within a few seeds.
func TestPlantedBugs(t *testing.T) {
	for name, tc := range map[string]struct {
		bend func(*end)
		want string
	}{
		"responder sends at once, unconfirmed": {func(e *end) {
			e.bend = func(o *Output) {
				if o.Install != nil && o.Send == 0 {
					o.Send = o.Install.RecvIndex
				}
			}
		}, "lost|seals|not up"},
		"old epoch goes at install": {func(e *end) {
			e.bend = func(o *Output) {
				if o.Send != 0 && e.send != nil && e.recv[e.send.RecvIndex] != nil && !o.Stop {
					o.Retire = append(o.Retire, e.send.RecvIndex)
				}
			}
		}, "has dropped|unknown index"},
		"old epochs stay": {func(e *end) {
			e.bend = func(o *Output) { o.Retire = nil }
		}, "receive epochs"},
		"no confirmation": {func(e *end) {
			e.bend = func(o *Output) { o.Confirm = false }
			e.mute = true
		}, "not up|rekeyed 0 times|is blocked"},
		"goes on when blocked": {func(e *end) {
			e.bend = func(o *Output) {
				if o.Stop {
					o.Stop, o.Retire = false, nil
				}
			}
		}, "of age|seals|receive epochs|unknown"},
		"epoch without its QKD key": {func(e *end) {
			e.bend = func(o *Output) {
				if o.Install != nil {
					o.Install.KeyIDs, o.Install.Level = nil, PQC
				}
			}
		}, "without a QKD key|disagree"},
		"a direction key is used twice": {func(e *end) {
			var kept secret.Bytes
			e.bend = func(o *Output) {
				if o.Install == nil {
					return
				}
				if kept.Len() == 0 {
					kept = secret.Copy(o.Install.SendKey.Expose())
				}
				o.Install.SendKey = secret.Copy(kept.Expose())
			}
		}, "used before"},
		"another key at one end": {func(e *end) {
			if e.id == 0 {
				e.bend = func(o *Output) {
					if o.Install != nil {
						o.Install.RecvKey.Expose()[0] ^= 1
					}
				}
			}
		}, "disagree"},
		"never wakes": {func(e *end) {
			e.bend = func(o *Output) { o.Wake = time.Time{} }
		}, "not up"},
	} {
		t.Run(name, func(t *testing.T) {
			for seed := range uint64(200) {
				err := chaos(seed, nil, tc.bend)
				if err == nil {
					continue
				}
				for _, part := range strings.Split(tc.want, "|") {
					if strings.Contains(err.Error(), part) {
						return
					}
				}
				t.Fatalf("seed %d finds something else: %v", seed, err)
			}
			t.Error("200 seeds do not find it")
		})
	}
}
