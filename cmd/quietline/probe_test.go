package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/etsi014/probe"
)

// probeArgs names the hall's applications: tokyo draws, kochi collects, osaka
// is the third.
func (h *hall) probeArgs(more ...string) []string {
	return slices.Concat([]string{"probe", h.url, "--sae", "tokyo"}, h.files("tokyo"), []string{
		"--peer", "kochi", "--peer-cert", h.path("kochi.crt"), "--peer-key", h.path("kochi.key"),
		"--third", "osaka", "--third-cert", h.path("osaka.crt"), "--third-key", h.path("osaka.key"),
	}, more)
}

// probed runs quietline probe.
func probed(args []string) (code int, out, stderr string) {
	var o, e bytes.Buffer
	code = run(args, &o, &e)
	return code, o.String(), e.String()
}

func TestProbePasses(t *testing.T) {
	h := newHall(t)
	h.kme.Stock = 2000
	code, out, stderr := probed(h.probeArgs())
	lines := strings.Split(strings.TrimSuffix(out, "\n"), "\n")
	all := len(probe.Cases())
	if code != exitOK || stderr != "" || len(lines) != all+1 {
		t.Fatalf("exit %d, %d lines, %q\n%s", code, len(lines), stderr, out)
	}
	for i, c := range probe.Cases() {
		if want := "PASS " + c.Name + " (" + c.Clause + "): " + c.Title; lines[i] != want {
			t.Errorf("%q, want %q", lines[i], want)
		}
	}
	want := fmt.Sprintf("%d cases: %[1]d passed, 0 skipped, 0 warned, 0 failed", all)
	if lines[all] != want {
		t.Errorf("%q, want %q", lines[all], want)
	}
}

// TestProbeFails: a KME that serves nobody, asked through two addresses of it.
func TestProbeFails(t *testing.T) {
	h := newHall(t)
	h.kme.Fail = func() error { return etsi014.ErrDown }
	code, out, stderr := probed(h.probeArgs("--json", "--only", "status-*", "--only", "http-1.1",
		"--peer-url", h.url, "--peer-ca", h.path("ca.crt")))
	var a probeAnswer
	if err := json.Unmarshal([]byte(out), &a); err != nil {
		t.Fatal(err)
	}
	if code != exitFailure || stderr != "" || a.OK || a.URL != h.url || a.Fail == 0 ||
		a.Pass+a.Skip+a.Warn+a.Fail != len(a.Cases) {
		t.Errorf("exit %d, %q, %+v", code, stderr, a)
	}
	for _, c := range a.Cases {
		switch {
		case !strings.HasPrefix(c.Name, "status-") && c.Name != "http-1.1":
			t.Errorf("%s was asked", c.Name)
		case c.Verdict == probe.Fail && (c.Want == "" || c.Got == ""):
			t.Errorf("%s fails for no reason", c.Name)
		}
	}
	code, out, _ = probed(h.probeArgs("--only", "status-200"))
	if code != exitFailure || !strings.Contains(out, "FAIL status-200 (6.1): ") ||
		!strings.Contains(out, "\n     want 200\n     got  503 ") ||
		!strings.HasSuffix(out, "\n1 case: 0 passed, 0 skipped, 0 warned, 1 failed\n") {
		t.Errorf("exit %d, %q", code, out)
	}
}

func TestProbeLists(t *testing.T) {
	code, out, _ := probed([]string{"probe", "--list"})
	if code != exitOK || strings.Count(out, "\n") != len(probe.Cases()) ||
		!strings.Contains(out, "\ndec-head (RFC 9110 9.3.2): ") {
		t.Errorf("exit %d, %q", code, out)
	}
	code, out, _ = probed([]string{"probe", "--list", "--json", "--only", "tls-*"})
	var cases []map[string]string
	if err := json.Unmarshal([]byte(out), &cases); err != nil || code != exitOK || len(cases) != 6 {
		t.Fatalf("exit %d, %v, %d cases", code, err, len(cases))
	}
	if cases[0]["case"] == "" || cases[0]["clause"] == "" || cases[0]["title"] == "" {
		t.Errorf("%v", cases[0])
	}
}

func TestProbeRefusals(t *testing.T) {
	h := newHall(t)
	without := func(flag string) []string {
		args := h.probeArgs()
		i := slices.Index(args, flag)
		return slices.Delete(args, i, i+2)
	}
	for _, c := range []struct {
		name string
		args []string
		code int
		want string
	}{
		{"no URL", []string{"probe"}, 2, "probe takes one URL"},
		{"two URLs", h.probeArgs("x"), 2, "probe takes one URL"},
		{"list of a URL", []string{"probe", "--list", "x"}, 2, "takes no argument"},
		{"http", append([]string{"probe", "http://x"}, h.probeArgs()[2:]...), 2, "an https URL"},
		{"no case", h.probeArgs("--only", "tls"), 2, "--only tls is no case"},
		{"no sae", without("--sae"), 2, "--sae is missing"},
		{"no ca", without("--ca"), 2, "--ca is missing"},
		{"no peer", without("--peer"), 2, "--peer is missing"},
		{"no peer's key", without("--peer-key"), 2, "--peer-key is missing"},
		{"half a third", without("--third"), 2, "--third is missing"},
		{"timeout", h.probeArgs("--timeout", "0s"), 2, "above 0"},
		{"sae", h.probeArgs("--sae", strings.Repeat("x", 292)), 2, "1 to 291 characters"},
		{"file", h.probeArgs("--cert", h.path("none.crt")), 1, "none.crt"},
	} {
		t.Run(c.name, func(t *testing.T) {
			code, out, stderr := probed(c.args)
			if code != c.code || out != "" || !strings.Contains(stderr, c.want) {
				t.Errorf("exit %d, want %d: %q lacks %q", code, c.code, stderr, c.want)
			}
		})
	}
	if h.kme.Left() != 10 {
		t.Errorf("%d keys left", h.kme.Left())
	}
}
