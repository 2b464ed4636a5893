package probe_test

import (
	"context"
	"encoding/json"
	"regexp"
	"strings"
	"testing"

	"go.uber.org/goleak"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/etsi014/etsitest"
	"github.com/quietline/quietline/etsi014/probe"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// Our own server passes every case.
func TestOursPasses(t *testing.T) {
	b := newBench(t)
	cfg := b.serve(t, mutant{})
	n := 0
	sum, err := probe.Run(t.Context(), cfg, func(r probe.Result) {
		n++
		if r.Verdict != probe.Pass {
			t.Errorf("%s: %s, want %s, got %s", r.Name, r.Verdict, r.Want, r.Got)
		}
		if r.Took <= 0 {
			t.Errorf("%s took %v", r.Name, r.Took)
		}
		if _, err := json.Marshal(r); err != nil {
			t.Error(err)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	if want := (probe.Summary{Pass: n}); sum != want || n != len(probe.Cases()) || n < 60 {
		t.Errorf("%+v of %d cases", sum, n)
	}
}

// A pair of KMEs is probed through both: each party asks its own.
func TestTwoKMEs(t *testing.T) {
	b := newBench(t)
	shared := &etsitest.KME{Stock: 1000}
	m := kme(func(etsi014.KME) etsi014.KME { return shared })
	cfg, kochi := b.serve(t, m), b.serve(t, m)
	cfg.Slave, cfg.Third = kochi.Slave, kochi.Third
	if sum, err := probe.Run(t.Context(), cfg, nil); err != nil || sum.Pass != len(probe.Cases()) {
		t.Errorf("%+v, %v", sum, err)
	}
	// Two that do not know each other's keys are no pair.
	apart := b.serve(t, mutant{})
	cfg.Slave = apart.Slave
	if r := ask(t, cfg, "dec-get"); r.Verdict != probe.Fail ||
		!strings.Contains(r.Got, "not found on KME") {
		t.Errorf("%s, got %q", r.Verdict, r.Got)
	}
}

func TestCasesAreNamed(t *testing.T) {
	form := regexp.MustCompile(`^[a-z]+(-[a-z0-9.]+)+$`)
	seen := map[string]bool{}
	for _, c := range probe.Cases() {
		if !form.MatchString(c.Name) || seen[c.Name] || c.Title == "" || c.Clause == "" {
			t.Errorf("case %+v", c)
		}
		seen[c.Name] = true
	}
}

// Every case finds the fault that was made for it; none was forgotten. No
// reason shows a key.
func TestEveryCaseCanFail(t *testing.T) {
	b := newBench(t)
	faults := mutants()
	keyLike := regexp.MustCompile(`[A-Za-z0-9+/]{11,}=|[A-Za-z0-9+/]{40,}`)
	for _, c := range probe.Cases() {
		m, ok := faults[c.Name]
		delete(faults, c.Name)
		if !ok {
			t.Errorf("%s: no fault proves that it can fail", c.Name)
			continue
		}
		t.Run(c.Name, func(t *testing.T) {
			r := ask(t, b.serve(t, m), c.Name)
			if r.Verdict != probe.Fail && r.Verdict != probe.Warn {
				t.Errorf("%s in spite of the fault (want %q, got %q)", r.Verdict, r.Want, r.Got)
			}
			if keyLike.MatchString(r.Got) {
				t.Errorf("the reason may show a key: %q", r.Got)
			}
			if r.Want == "" || r.Got == "" {
				t.Errorf("no reason: want %q, got %q", r.Want, r.Got)
			}
		})
	}
	for name := range faults {
		t.Errorf("%s: a fault without a case", name)
	}
}

// What cannot be asked is skipped with its reason.
func TestSkips(t *testing.T) {
	b := newBench(t)
	cfg := b.serve(t, mutant{})
	cfg.Third = nil
	for _, name := range []string{"enc-multicast", "dec-stranger", "dec-stranger-free"} {
		if r := ask(t, cfg, name); r.Verdict != probe.Skip || r.Got == "" {
			t.Errorf("%s: %s %q", name, r.Verdict, r.Got)
		}
	}
	if r := ask(t, b.serve(t, member("max_SAE_ID_count", 0)), "enc-multicast"); r.Verdict !=
		probe.Skip {
		t.Errorf("enc-multicast: %s", r.Verdict)
	}
	if r := ask(t, b.serve(t, member("min_key_size", 8)), "enc-size-small"); r.Verdict != probe.Skip {
		t.Errorf("enc-size-small: %s", r.Verdict)
	}
	if r := ask(t, b.serve(t, recode(200, 503)), "enc-get-size"); r.Verdict != probe.Skip {
		t.Errorf("enc-get-size: %s", r.Verdict)
	}
}

// A KME without keys fails what needs keys, with its own words.
func TestEmptyKME(t *testing.T) {
	b := newBench(t)
	cfg := b.serve(t, mutant{config: func(c *etsi014.HandlerConfig) { c.KME = &etsitest.KME{} }})
	r := ask(t, cfg, "dec-get")
	if r.Verdict != probe.Fail || !strings.Contains(r.Got, "not enough key material") {
		t.Errorf("%s, got %q", r.Verdict, r.Got)
	}
}

func TestUselessConfig(t *testing.T) {
	b := newBench(t)
	good := b.serve(t, mutant{})
	for name, change := range map[string]func(*probe.Config){
		"plain HTTP": func(c *probe.Config) { c.Master.URL = "http://127.0.0.1" },
		"no URL":     func(c *probe.Config) { c.Slave.URL = "" },
		"bad URL":    func(c *probe.Config) { c.Slave.URL = "https://[" },
		"no TLS":     func(c *probe.Config) { c.Master.TLS = nil },
		"no SAE":     func(c *probe.Config) { c.Slave.SAE = "" },
	} {
		cfg := good
		change(&cfg)
		if _, err := probe.Run(t.Context(), cfg, nil); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := probe.Run(ctx, good, nil); err == nil {
		t.Error("a probe without time ended well")
	}
}

// A KME that does not answer fails, it does not end the run.
func TestUnreachable(t *testing.T) {
	b := newBench(t)
	cfg := b.serve(t, mutant{})
	cfg.Master.URL = "https://127.0.0.1:1"
	if r := ask(t, cfg, "status-200"); r.Verdict != probe.Fail || r.Got == "" {
		t.Errorf("%s, got %q", r.Verdict, r.Got)
	}
}
