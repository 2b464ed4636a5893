package tunneltest

import (
	"testing"
	"time"
)

// A path that swallows full packets without a word is found out by both ends,
// and what the hosts send then fits it.
func TestBlackHole(t *testing.T) {
	const believed, takes, outer = 1500, 1400, 20 + 8
	bubble(t, Options{PathMTU: believed}, func(t *testing.T, p *Pair) {
		p.Up(10 * time.Second)
		for _, s := range []*Site{p.Tokyo, p.Kochi} {
			if !p.Wait(10*time.Second, func() bool { return s.Line.Stats().PathProven }) {
				t.Fatalf("a healthy path is not proven: %+v", s.Line.Stats())
			}
			if st := s.Line.Stats(); st.PathMTU != believed || st.Device.MTU != 1424 {
				t.Errorf("path MTU %d, device %d", st.PathMTU, st.Device.MTU)
			}
		}
		p.Net.Tap(func(_ int, d []byte) []byte {
			if len(d)+outer > takes {
				return nil
			}
			return d
		})
		for _, s := range []*Site{p.Tokyo, p.Kochi} {
			found := func() bool {
				st := s.Line.Stats()
				return st.PathProven && st.PathMTU <= takes && st.PathMTU > takes-8 &&
					st.Device.MTU == st.PathMTU-(believed-1424)
			}
			if !p.Wait(2*time.Minute, found) {
				t.Fatalf("path MTU %d of %d, proven %v, device %d", s.Line.Stats().PathMTU, takes,
					s.Line.Stats().PathProven, s.Line.Stats().Device.MTU)
			}
		}
		mtu := p.Tokyo.Line.Stats().Device.MTU
		if err := p.Tokyo.Device.Inject(0, packet(1, mtu)); err != nil {
			t.Fatal(err)
		}
		if got, err := p.Kochi.Device.Take(t.Context()); err != nil || len(got) != mtu {
			t.Errorf("a full packet came as %d bytes, %v", len(got), err)
		}
		if d := p.Kochi.Line.Stats().Drops; d["bad_record"] != 0 {
			t.Errorf("drops %v", d)
		}
	})
}
