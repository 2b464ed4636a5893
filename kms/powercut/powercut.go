//go:build linux

// Package powercut is test infrastructure, no part of the product: a disk that
// loses power and a file whose calls fail, under real programs and a real file
// system. Only tests import it.
//
// [Disk] is the main type: a block device with a volatile write cache, which
// keeps 4 KiB blocks until a flush, and ext4 upon it. [Disk.Cut] takes the
// power away: of the blocks that no flush has covered, a seeded choice reaches
// the disk, one in eight of them torn between its 512-byte sectors; then ext4
// replays its journal. [File] is a single file where each write, sync,
// truncate and read is counted and a chosen one fails.
//
// Both are served through FUSE by a second process, because a program that
// maps a file served by itself can stop for ever in a page fault. It is this
// very test binary started again, so a test package must have
//
//	func TestMain(m *testing.M) {
//		powercut.Main()
//		os.Exit(m.Run())
//	}
//
// A caller must keep in mind: root is needed, /dev/fuse, for a Disk also
// /dev/loop-control and mkfs.ext4; without them the test is skipped, with the
// reason ([Unusable]). All mounts stand in the second process's own mount
// namespace and loop devices clear themselves, so nothing stays behind however
// the test ends. Close what lies on a Disk before the test ends: a mapped page
// that can no longer be read is a SIGBUS.
package powercut

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// roleEnv tells the second process what it serves.
const roleEnv = "QUIETLINE_POWERCUT"

// Main serves a disk or a file and ends the process, if the process was
// started for that; else it returns at once.
func Main() {
	serve, ok := map[string]func(*json.Decoder, *json.Encoder) error{
		"disk": serveDisk, "file": serveFile,
	}[os.Getenv(roleEnv)]
	if !ok {
		return
	}
	err := serve(json.NewDecoder(os.Stdin), json.NewEncoder(os.Stdout))
	if err != nil && !errors.Is(err, io.EOF) {
		fmt.Fprintln(os.Stderr, "powercut:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// Unusable says why this machine has no modelled disk, or nil.
func Unusable() error {
	if err := unusableFile(); err != nil {
		return err
	}
	if _, err := os.Stat("/dev/loop-control"); err != nil {
		return err
	}
	_, err := mkfs()
	return err
}

func unusableFile() error {
	if os.Geteuid() != 0 {
		return errors.New("mounting needs root")
	}
	_, err := os.Stat("/dev/fuse")
	return err
}

// mkfs finds mkfs.ext4, also where only root's PATH looks.
func mkfs() (string, error) {
	for _, name := range []string{"mkfs.ext4", "/usr/sbin/mkfs.ext4", "/sbin/mkfs.ext4"} {
		if p, err := exec.LookPath(name); err == nil {
			return p, nil
		}
	}
	return "", errors.New("mkfs.ext4 is not installed (package e2fsprogs)")
}

// request is one line to the second process, answer one line back.
type request struct {
	Op       string // start, cut, arm, calls
	Dir      string
	Size     int64         `json:",omitempty"`
	Flush    time.Duration `json:",omitempty"`
	Fraction float64       `json:",omitempty"`
	Seed     uint64        `json:",omitempty"`
	Fault    Fault
}

type answer struct {
	Err   string `json:",omitempty"`
	Loss  Loss
	Calls []Call `json:",omitempty"`
}

// server is the second process, seen from the test.
type server struct {
	mu   sync.Mutex
	cmd  *exec.Cmd
	in   io.WriteCloser
	out  *json.Decoder
	root string // its root folder, as this process reaches it
	dir  string
}

// leaveMost is how long the second process may take to unmount and end. A test
// that hangs there would hide what the others found.
const leaveMost = 30 * time.Second

// start starts the second process and gives it a folder. The test's cleanup
// ends it.
func start(t testing.TB, role string, first request) *server {
	t.Helper()
	s := &server{cmd: exec.Command("/proc/self/exe"), dir: t.TempDir()}
	s.cmd.Env = append(os.Environ(), roleEnv+"="+role)
	s.cmd.Stderr = os.Stderr
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS}
	var err error
	if s.in, err = s.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := s.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	s.out = json.NewDecoder(out)
	if err := s.cmd.Start(); err != nil {
		t.Fatalf("start %s server: %v", role, err)
	}
	t.Cleanup(func() { // the end of its input is its sign to leave
		_ = s.in.Close()
		late := time.AfterFunc(leaveMost, func() { _ = s.cmd.Process.Kill() })
		defer late.Stop()
		if err := s.cmd.Wait(); err != nil {
			t.Errorf("%s server: %v", role, err)
		}
	})
	s.root = fmt.Sprintf("/proc/%d/root", s.cmd.Process.Pid)
	first.Op, first.Dir = "start", s.dir
	if _, err := s.ask(first); err != nil {
		t.Fatalf("start %s server: %v (does TestMain call powercut.Main?)", role, err)
	}
	return s
}

// ask sends one request and waits for its answer.
func (s *server) ask(r request) (answer, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := json.NewEncoder(s.in).Encode(r); err != nil {
		return answer{}, fmt.Errorf("ask server: %w", err)
	}
	var a answer
	if err := s.out.Decode(&a); err != nil {
		return answer{}, fmt.Errorf("hear server: %w", err)
	}
	if a.Err != "" {
		return answer{}, errors.New(a.Err)
	}
	return a, nil
}

// path is where this process reaches a file of the server's namespace. Any
// other process of root does too.
func (s *server) path(name ...string) string {
	return filepath.Join(append([]string{s.root, s.dir}, name...)...)
}

// require skips the test where the machine has no such thing, and fails it
// where CI promises one: it runs as root and the devices are there.
func require(t testing.TB, reason error, devices ...string) {
	t.Helper()
	if reason == nil {
		return
	}
	for _, d := range devices {
		if _, err := os.Stat(d); err != nil {
			t.Skipf("no modelled disk: %v", reason)
		}
	}
	if os.Getenv("CI") == "true" && os.Geteuid() == 0 {
		t.Fatalf("no modelled disk, though we are root and have %s: %v",
			strings.Join(devices, ", "), reason)
	}
	t.Skipf("no modelled disk: %v", reason)
}
