package rekey

import (
	"testing"
	"time"
)

func TestLineComesUp(t *testing.T) {
	for _, p := range []Policy{PQCOnly, QKDStrict} {
		t.Run(p.String(), func(t *testing.T) {
			w := newWorld(1)
			w.log = t.Logf
			w.start(p, nil)
			if !w.until(time.Second, w.up) {
				t.Fatalf("line is not up: %+v, %+v", w.ends[0].m.State(), w.ends[1].m.State())
			}
			t.Logf("up after %v", w.now.Sub(epochZero))
			w.run(10 * time.Minute)
			if w.fault != nil {
				t.Fatal(w.fault)
			}
			for _, e := range w.ends {
				t.Logf("%+v\n%+v", e.m.State(), e.m.Stats())
				if got := e.m.Stats().Epochs; got != 6 {
					t.Errorf("end %d made %d epochs in ten minutes, want 6", e.id, got)
				}
				if e.lost != 0 {
					t.Errorf("end %d could not open %d records", e.id, e.lost)
				}
			}
		})
	}
}
