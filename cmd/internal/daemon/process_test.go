package daemon

import (
	"bytes"
	"encoding/json"
	"log/slog"
	"os"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/quietline/quietline/secret"
	"github.com/quietline/quietline/tunnel/lab"
)

// TestMain lets a test run Harden in a process of its own, as it cannot be
// undone, and the others in a lab with TUN devices.
func TestMain(m *testing.M) {
	if os.Getenv("QUIETLINE_TEST_HARDEN") != "" {
		hardened()
		return
	}
	if os.Getenv("QUIETLINE_TEST_DRAW") != "" {
		os.Exit(drawAndWait())
	}
	if path := os.Getenv("QUIETLINE_TEST_LINE"); path != "" {
		os.Exit(runLine(path))
	}
	if path := os.Getenv("QUIETLINE_TEST_ROTATE"); path != "" {
		os.Exit(rotateAndWait(path, os.Getenv("QUIETLINE_TEST_SOCKET")))
	}
	if path := os.Getenv("QUIETLINE_TEST_SEALED_ROOT"); path != "" {
		os.Exit(makeSealedRoot(path))
	}
	os.Exit(lab.Main(m))
}

// hardened prints what a hardened process may still do.
func hardened() {
	if err := secret.Harden(); err != nil {
		os.Stdout.WriteString("harden: " + err.Error())
		return
	}
	dumpable, err := unix.PrctlRetInt(unix.PR_GET_DUMPABLE, 0, 0, 0, 0)
	if err != nil || dumpable != 0 {
		os.Stdout.WriteString("still dumpable")
		return
	}
	for _, path := range []string{"/proc/self/status", "/proc/thread-self/ns/net",
		"/proc/self/mountinfo", "/proc/net/route", "/proc/self/exe"} {
		f, err := os.Open(path)
		if err != nil {
			os.Stdout.WriteString("open own /proc: " + err.Error())
			return
		}
		f.Close()
	}
	path := os.Getenv("QUIETLINE_TEST_HARDEN")
	if err := os.WriteFile(path, nil, 0o666); err != nil {
		os.Stdout.WriteString(err.Error())
		return
	}
	os.Stdout.WriteString("ok")
}

func TestHarden(t *testing.T) {
	path := t.TempDir() + "/file"
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "QUIETLINE_TEST_HARDEN="+path)
	out, err := cmd.CombinedOutput()
	if err != nil || string(out) != "ok" {
		t.Fatalf("%s, %v", out, err)
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("a new file has mode %v, %v, want 0600", info.Mode(), err)
	}
}

func TestLogger(t *testing.T) {
	var b bytes.Buffer
	log := Logger(&b, slog.LevelInfo)
	log.Debug("not shown")
	log.Info("key manager serves", "kme", "kme-tokyo")
	var line map[string]any
	if err := json.Unmarshal(b.Bytes(), &line); err != nil {
		t.Fatalf("not one line of JSON: %v\n%s", err, &b)
	}
	if line["msg"] != "key manager serves" || line["kme"] != "kme-tokyo" {
		t.Errorf("line %v", line)
	}
	if strings.Contains(b.String(), "not shown") {
		t.Error("debug is shown")
	}
}

// testLog writes a daemon's log to the test's output.
func testLog(t *testing.T) *slog.Logger {
	return slog.New(slog.NewTextHandler(t.Output(), nil))
}
