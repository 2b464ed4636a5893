package bench

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestMedian(t *testing.T) {
	for _, tt := range []struct {
		v    []float64
		want float64
	}{
		{[]float64{5}, 5}, {[]float64{3, 1}, 2}, {[]float64{9, 1, 2}, 2}, {[]float64{4, 1, 2, 100}, 3},
	} {
		if got := median(tt.v); got != tt.want {
			t.Errorf("%v: %v, want %v", tt.v, got, tt.want)
		}
	}
}

// sample is a report of three rounds in which the machine was slower each time.
func sample() *Report {
	start := func(*pair) error { return nil }
	r := newReport(Options{Rounds: 3, Time: 2 * time.Second, MTU: 1500}, []contender{
		{name: "quietline", what: "ours", start: start},
		{name: "wireguard-go", what: "theirs", start: start},
		{name: "openvpn", install: "apt-get install openvpn"},
		{name: "veth", what: "cable", start: start},
	})
	for round, speed := range []float64{4, 2, 1} {
		r.note(round, 0, Figures{TCP1: 3 * speed, CPUPerGB: 1 / speed, Retransmits1: 0}, nil)
		r.note(round, 3, Figures{TCP1: 10 * speed}, nil)
		if round == 1 {
			r.note(round, 1, nil, errors.New("it fell over"))
			continue
		}
		r.note(round, 1, Figures{TCP1: speed, CPUPerGB: 4 / speed, Retransmits1: 0}, nil)
	}
	r.finish()
	return r
}

func TestRatiosCompareWithinARound(t *testing.T) {
	r := sample()
	if r.Baseline != "wireguard-go" {
		t.Fatalf("baseline %q", r.Baseline)
	}
	// Rounds differ by a factor of four, the ratio is the same in each. The
	// round in which the baseline failed gives none. Nought divides nothing.
	want := []Figures{{TCP1: 3, CPUPerGB: 0.25}, {TCP1: 1, CPUPerGB: 1}, {}, {TCP1: 10}}
	medians := []Figures{{TCP1: 6, CPUPerGB: 0.5, Retransmits1: 0},
		{TCP1: 2.5, CPUPerGB: 2.5, Retransmits1: 0}, {}, {TCP1: 20}}
	for i, res := range r.Results {
		if diff := cmp.Diff(want[i], res.Ratio); diff != "" {
			t.Errorf("%s, ratio: %s", res.Name, diff)
		}
		if diff := cmp.Diff(medians[i], res.Median); diff != "" {
			t.Errorf("%s, median: %s", res.Name, diff)
		}
	}
}

func TestBaseline(t *testing.T) {
	start := func(*pair) error { return nil }
	r := newReport(Options{Rounds: 1}, []contender{{name: "wireguard-go", start: start},
		{name: "veth", start: start}, {name: "plain", start: start}})
	r.note(0, 0, nil, errors.New("no"))
	r.note(0, 1, Figures{TCP1: 9}, nil)
	r.finish()
	if r.Baseline != "" || r.Results[1].Ratio != nil {
		t.Errorf("compared with %q, which gave nothing", r.Baseline)
	}
	r.note(0, 2, Figures{TCP1: 3}, nil)
	r.finish()
	if r.Baseline != "plain" || r.Results[1].Ratio[TCP1] != 3 {
		t.Errorf("baseline %q: %v", r.Baseline, r.Results[1].Ratio)
	}
}

func TestPrint(t *testing.T) {
	r := sample()
	r.Machine = Machine{CPUs: 2, Model: "Abacus 3000", Kernel: "6.18", Go: "go1.26",
		LoadBefore: 0.5, LoadAfter: 2.25}
	var b strings.Builder
	if err := r.Print(&b); err != nil {
		t.Fatal(err)
	}
	var got []string
	for line := range strings.Lines(b.String()) {
		got = append(got, strings.Join(strings.Fields(line), " "))
	}
	const head = "TCP1 Gbit/s TCP4 Gbit/s CPU s/GB UDP64 pkt/s idle p50 us p99 us " +
		"loaded p50 us p99 us rtx 1 rtx 4"
	want := []string{
		"2 CPUs, Abacus 3000, Linux 6.18, go1.26; load 0.50 before, 2.25 after",
		"3 rounds, 2 s a transfer, MTU 1500, cable as the kernel makes it",
		"",
		"quietline ours",
		"wireguard-go theirs",
		"failed in round 2: it fell over",
		"openvpn not here: apt-get install openvpn",
		"veth cable",
		"",
		"medians",
		head,
		"quietline 6.00 – 0.50 – – – – – 0 –",
		"wireguard-go 2.50 – 2.50 – – – – – 0 –",
		"veth 20.00 – – – – – – – – –",
		"",
		"times wireguard-go in the same round, medians",
		head,
		"quietline 3.00 – 0.25 – – – – – – –",
		"wireguard-go 1.00 – 1.00 – – – – – – –",
		"veth 10.00 – – – – – – – – –",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

// Programs read the JSON: its names and units are a promise.
func TestReportAsJSON(t *testing.T) {
	text, err := json.Marshal(sample())
	if err != nil {
		t.Fatal(err)
	}
	var back Report
	if err := json.Unmarshal(text, &back); err != nil {
		t.Fatal(err)
	}
	if back.Results[0].Ratio["tcp1_gbit_s"] != 3 || back.Results[1].Rounds[1] != nil ||
		back.Results[2].Install == "" || back.Seconds != 2 || back.Baseline != "wireguard-go" {
		t.Errorf("%s", text)
	}
	for _, name := range []string{`"load_before":`, `"cpu_s_per_gb":0.5`, `"plain_cable":false`} {
		if !strings.Contains(string(text), name) {
			t.Errorf("%s is not in %s", name, text)
		}
	}
}

func TestThisMachine(t *testing.T) {
	m := thisMachine()
	if m.CPUs < 1 || m.Kernel == "" || !strings.HasPrefix(m.Go, "go") || m.Model == "" {
		t.Errorf("%+v", m)
	}
}
