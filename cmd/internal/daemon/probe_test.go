package daemon

import (
	"testing"

	"github.com/quietline/quietline/cmd/internal/config"
	"github.com/quietline/quietline/cmd/internal/pki"
	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/etsi014/probe"
)

// TestKeyManagersPassTheProbe asks two key managers, with their stores and the
// channel between them, all there is to ask; and then one of them alone.
func TestKeyManagersPassTheProbe(t *testing.T) {
	l := newLit(t, 64, 4096, func(tokyo, kochi *Env) {
		tokyo.Site.KME.MaxKeys, kochi.Site.KME.MaxKeys = 50, 50
		// The other end of the question about one key manager.
		tokyo.Site.SAEs = append(tokyo.Site.SAEs, config.SAE{ID: "third-tokyo", KME: "kme-tokyo",
			Identity: config.Identity{URI: pki.SAEURI("third-tokyo")}})
	})
	l.enrol(t, "third-tokyo", "kme-tokyo")
	st, err := l.client(t, "sae-tokyo", l.tokyoDoor).Status(t.Context(), "sae-kochi")
	if err != nil || st.MaxKeysPerRequest != 50 {
		t.Errorf("%d keys a request, want 50, %v", st.MaxKeysPerRequest, err)
	}
	party := func(door, sae string) probe.Party {
		return probe.Party{SAE: etsi014.SAEID(sae), URL: "https://" + door,
			TLS: l.certificates(t, sae).Client()}
	}
	for name, c := range map[string]struct {
		master, slave probe.Party
		third         probe.Party
	}{
		"two": {party(l.tokyoDoor, "sae-tokyo"), party(l.kochiDoor, "sae-kochi"),
			party(l.kochiDoor, "other-kochi")},
		"one": {party(l.tokyoDoor, "sae-tokyo"), party(l.tokyoDoor, "other-tokyo"),
			party(l.tokyoDoor, "third-tokyo")},
	} {
		sum, err := probe.Run(t.Context(), probe.Config{Master: c.master, Slave: c.slave,
			Third: &c.third}, func(r probe.Result) {
			if r.Verdict != probe.Pass {
				t.Errorf("%s key managers: %s: %s: want %s, got %s", name, r.Verdict, r.Name, r.Want,
					r.Got)
			}
		})
		if err != nil || sum.Pass != len(probe.Cases()) {
			t.Errorf("%s key managers: %+v of %d cases, %v", name, sum, len(probe.Cases()), err)
		}
	}
}
