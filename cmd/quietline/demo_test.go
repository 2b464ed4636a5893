package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/quietline/quietline/cmd/internal/demo"
)

// whole says that a test runs the whole demo, which takes half a minute. The
// demo makes its own namespaces; where it may not, the test fails with the
// demo's own words.
func whole(t *testing.T) {
	t.Helper()
	if os.Getenv("CI") == "" && os.Getenv("QUIETLINE_LONG") == "" {
		t.Skip("takes half a minute; set QUIETLINE_LONG=1 to run it (CI does)")
	}
}

// quietline builds the binary once more, as its user would.
func quietline(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "quietline")
	if out, err := exec.Command("go", "build", "-o", path, ".").CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	return path
}

// stopped ends a process as Ctrl-C would and returns when it is gone.
func stopped(cmd *exec.Cmd) error {
	_ = cmd.Process.Signal(syscall.SIGINT)
	return cmd.Wait()
}

// TestDemoKeepPrintsLinesThatWork pastes what the demo prints into a shell and
// reads the answers: the same key at both sites, then 400, 401 and 405.
func TestDemoKeepPrintsLinesThatWork(t *testing.T) {
	whole(t)
	if _, err := exec.LookPath("curl"); err != nil {
		t.Fatalf("%v; apt-get install curl", err)
	}
	cmd := exec.Command(quietline(t), "demo", "--for", "1s", "--keep")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := stopped(cmd); err != nil {
			t.Errorf("demo ended with %v\n%s", err, stderr.String())
		}
	}()
	lines := pasteable(t, out)
	shell := exec.Command("bash", "-e")
	shell.Stdin = strings.NewReader(lines)
	got, err := shell.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s\npasted:\n%s", err, got, lines)
	}
	var keys []string
	for _, m := range regexp.MustCompile(`"key":"([^"]+)"`).FindAllStringSubmatch(string(got), -1) {
		keys = append(keys, m[1])
	}
	if len(keys) != 2 || keys[0] != keys[1] {
		t.Errorf("the two sites' keys are not equal (%d keys came)", len(keys))
	}
	codes := regexp.MustCompile(`(?m) (\d{3})$`).FindAllStringSubmatch(string(got), -1)
	var seen []string
	for _, c := range codes {
		seen = append(seen, c[1])
	}
	if want := "200 200 200 400 401 405"; strings.Join(seen, " ") != want {
		t.Errorf("codes %v, want %s", seen, want)
	}
}

// pasteable reads the demo's output up to its end and returns the shell lines.
func pasteable(t *testing.T, out io.Reader) string {
	t.Helper()
	var lines strings.Builder
	timeout := time.AfterFunc(2*time.Minute, func() { panic("demo printed no lines to paste") })
	defer timeout.Stop()
	scan := bufio.NewScanner(out)
	for scan.Scan() {
		line := scan.Text()
		if lines.Len() > 0 || strings.HasPrefix(line, "Q=/proc/") {
			lines.WriteString(line + "\n")
		}
		if strings.Contains(line, " -I https://") {
			return lines.String()
		}
	}
	t.Fatal("the demo ended before it printed lines to paste")
	return ""
}

// TestDemoWithEve: an eavesdropper on every pulse is seen and starves the link.
func TestDemoWithEve(t *testing.T) {
	whole(t)
	cmd := exec.Command(quietline(t), "demo", "--eve", "1.0", "--for", "15s", "--json")
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	text := strings.TrimSpace(string(out))
	var last demo.Report
	if err := json.Unmarshal([]byte(text[strings.LastIndexByte(text, '\n')+1:]), &last); err != nil {
		t.Fatal(err)
	}
	if last.QBER < 0.24 || last.QBER > 0.28 {
		t.Errorf("QBER %.3f, want near 0.25", last.QBER)
	}
	if last.SecretBPS != 0 || last.FirstKeySeconds != 0 {
		t.Errorf("secret %v bit/s, first key after %v s; want none", last.SecretBPS, last.FirstKeySeconds)
	}
	if !last.Simulated {
		t.Error("the report does not say that it is simulated")
	}
}

// TestDemoLeavesNothingBehind kills a running demo the hard way.
func TestDemoLeavesNothingBehind(t *testing.T) {
	whole(t)
	cmd := exec.Command(quietline(t), "demo")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	scan := bufio.NewScanner(out)
	for scan.Scan() && !strings.Contains(scan.Text(), "first keys") {
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	// The pipe closes when the last process that holds it is gone.
	if _, err := io.Copy(io.Discard, out); err != nil && !errors.Is(err, os.ErrClosed) {
		t.Error(err)
	}
	_ = cmd.Wait()
	deadline := time.Now().Add(10 * time.Second)
	for {
		left, _ := exec.Command("pgrep", "-f", cmd.Path).Output()
		if len(left) == 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("processes left: %s", left)
		}
		time.Sleep(50 * time.Millisecond) // polls for processes of another tree
	}
}

func TestDemoRefusesWrongFlags(t *testing.T) {
	for _, args := range [][]string{
		{"demo", "--eve", "1.5"}, {"demo", "--eve", "NaN"}, {"demo", "--eve", "-0.1"},
		{"demo", "--for", "-1s"}, {"demo", "--for", "soon"}, {"demo", "--keep", "--json"}, {"demo", "now"},
	} {
		var out, stderr bytes.Buffer
		if code := run(args, &out, &stderr); code != exitUsage {
			t.Errorf("%v: exit %d, want %d\n%s", args, code, exitUsage, stderr.String())
		}
		if !strings.Contains(stderr.String(), "quietline: ") || !strings.Contains(stderr.String(), "hint: ") {
			t.Errorf("%v: %q names no fault or no hint", args, stderr.String())
		}
	}
}
