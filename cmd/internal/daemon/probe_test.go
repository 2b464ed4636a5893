package daemon

import (
	"testing"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/etsi014/probe"
)

// TestKeyManagersPassTheProbe asks two key managers, with their stores and the
// channel between them, all there is to ask.
func TestKeyManagersPassTheProbe(t *testing.T) {
	l := newLit(t, 64, 4096, func(tokyo, kochi *Env) {
		tokyo.Site.KME.MaxKeys, kochi.Site.KME.MaxKeys = 50, 50
	})
	st, err := l.client(t, "sae-tokyo", l.tokyoDoor).Status(t.Context(), "sae-kochi")
	if err != nil || st.MaxKeysPerRequest != 50 {
		t.Errorf("%d keys a request, want 50, %v", st.MaxKeysPerRequest, err)
	}
	party := func(door, sae string) probe.Party {
		return probe.Party{SAE: etsi014.SAEID(sae), URL: "https://" + door,
			TLS: l.certificates(t, sae).Client()}
	}
	third := party(l.kochiDoor, "other-kochi")
	sum, err := probe.Run(t.Context(), probe.Config{
		Master: party(l.tokyoDoor, "sae-tokyo"),
		Slave:  party(l.kochiDoor, "sae-kochi"), Third: &third,
	}, func(r probe.Result) {
		if r.Verdict != probe.Pass {
			t.Errorf("%s: %s: want %s, got %s", r.Verdict, r.Name, r.Want, r.Got)
		}
	})
	if err != nil || sum.Pass != len(probe.Cases()) {
		t.Errorf("%+v of %d cases, %v", sum, len(probe.Cases()), err)
	}
}
