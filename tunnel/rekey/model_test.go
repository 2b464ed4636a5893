package rekey

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

const epochModel = "../../docs/model/epochs.pml"

// TestEpochModel lets Spin search every run of the epoch model, and find the
// fault in each of its broken variants: the searches that pass could fail.
func TestEpochModel(t *testing.T) {
	for _, tool := range []string{"spin", "gcc"} {
		if _, err := exec.LookPath(tool); err != nil {
			if os.Getenv("CI") == "true" {
				t.Fatalf("%s is not installed: apt-get install spin gcc", tool)
			}
			t.Skipf("%s is not installed: apt-get install spin gcc", tool)
		}
	}
	for _, c := range []struct {
		variant string
		refuted string // a piece of the assertion that fails; "" = none does
	}{
		{"", ""},                         // the model itself
		{"RETIRE_AT_INSTALL", "e==curA"}, // undecryptable
		{"SEND_AT_INSTALL", "e==curA"},   // undecryptable
		{"NEVER_BUSY", "<=2"},            // a third receive epoch
		{"NO_CONFIRM", "begun=="},        // stuck
		{"REACH", "e!="},                 // the last handshake ends well
	} {
		t.Run(c.variant, func(t *testing.T) {
			out := search(t, c.variant)
			if !strings.Contains(out, "State-vector") || strings.Contains(out, "depth too small") {
				t.Fatalf("the search did not run:\n%s", out)
			}
			if c.refuted == "" {
				if !strings.Contains(out, "errors: 0") || strings.Contains(out, "not completed") {
					t.Errorf("the model does not hold:\n%s", out)
				}
				return
			}
			_, claim, found := strings.Cut(out, "assertion violated ")
			claim, _, _ = strings.Cut(claim, "\n")
			if !found || !strings.Contains(claim, c.refuted) {
				t.Errorf("variant %s is to violate %q:\n%s", c.variant, c.refuted, out)
			}
		})
	}
}

// search runs one whole search, in a folder of its own, and returns what it
// printed.
func search(t *testing.T, variant string) string {
	t.Helper()
	model, err := os.ReadFile(epochModel)
	if err != nil {
		t.Fatal(err)
	}
	folder := t.TempDir()
	if err := os.WriteFile(filepath.Join(folder, "epochs.pml"), model, 0o600); err != nil {
		t.Fatal(err)
	}
	run := func(name string, args ...string) string {
		cmd := exec.Command(name, args...)
		cmd.Dir = folder
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%s: %v\n%s", name, err, out)
		}
		return string(out)
	}
	args, optimize := []string{"-a"}, "-O1"
	if variant != "" {
		args, optimize = append(args, "-D"+variant), "-O0" // found before gcc would have optimized
	}
	run("spin", append(args, "epochs.pml")...)
	run("gcc", "-w", optimize, "-DSAFETY", "-DMEMLIM=1500", "-o", "pan", "pan.c")
	return run("./pan", "-m200000")
}
