package secret_test

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"unsafe"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/quietline/quietline/secret"
)

// childEnv names the part a re-executed test binary plays.
const childEnv = "QUIETLINE_SECRET_CHILD"

func TestMain(m *testing.M) {
	if part := os.Getenv(childEnv); part != "" {
		children[part]()
	}
	os.Exit(m.Run())
}

// children end the process themselves.
var children = map[string]func(){
	"limit": lockUnderZeroLimit,
	"bare":  func() { abort(false) },
	"hard":  func() { abort(true) },
	"files": hardenedFiles,
}

// child runs this test binary in one of its parts, in dir.
func child(t *testing.T, part, dir string) (string, *os.ProcessState) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), childEnv+"="+part, "GOTRACEBACK=none")
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return string(out), cmd.ProcessState
}

// peek reads what another goroutine sees of b through the process's mem file.
func peek(b []byte) ([]byte, error) {
	type result struct {
		got []byte
		err error
	}
	done := make(chan result)
	go func() {
		f, err := os.Open("/proc/self/mem")
		if err != nil {
			done <- result{err: err}
			return
		}
		defer f.Close()
		got := make([]byte, len(b))
		n, err := f.ReadAt(got, int64(uintptr(unsafe.Pointer(unsafe.SliceData(b)))))
		done <- result{got[:n], err}
	}()
	r := <-done
	runtime.KeepAlive(b)
	return r.got, r.err
}

// vmFlags are the flags that /proc/self/smaps shows for the mapping of b.
func vmFlags(t *testing.T, b []byte) []string {
	t.Helper()
	f, err := os.Open("/proc/self/smaps")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	addr, inside := uint64(uintptr(unsafe.Pointer(unsafe.SliceData(b)))), false
	for lines := bufio.NewScanner(f); lines.Scan(); {
		var from, to uint64
		if n, _ := fmt.Sscanf(lines.Text(), "%x-%x ", &from, &to); n == 2 {
			inside = from <= addr && addr < to
		}
		if flags, ok := strings.CutPrefix(lines.Text(), "VmFlags:"); ok && inside {
			return strings.Fields(flags)
		}
	}
	return nil
}

func TestSecretPagesCannotBeReadFromOutside(t *testing.T) {
	plain := bytes.Clone(known)
	if got, err := peek(plain); err != nil || !bytes.Equal(got, known) {
		t.Fatalf("ordinary memory reads %q, %v: the test cannot fail", got, err)
	}
	b, err := secret.MapSecret(len(known))
	if errors.Is(err, unix.ENOSYS) {
		t.Skipf("kernel has no memfd_secret: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	defer secret.Unmap(b)
	copy(b, known)
	if got, err := peek(b); !errors.Is(err, unix.EIO) || len(got) != 0 {
		t.Errorf("mem file gave %q, %v; want EIO", got, err)
	}
	wantFlags(t, b, "lo", "dd", "dc")
}

func TestPinnedPagesStayOffTheDisk(t *testing.T) {
	b, err := secret.MapPinned(len(known))
	if err != nil {
		t.Fatal(err)
	}
	defer secret.Unmap(b)
	copy(b, known)
	wantFlags(t, b, "lo", "dd", "wf")
}

// wantFlags: lo locked, dd not dumped, dc not forked, wf wiped on fork.
func wantFlags(t *testing.T, b []byte, want ...string) {
	t.Helper()
	flags := vmFlags(t, b)
	for _, f := range want {
		if !slices.Contains(flags, f) {
			t.Errorf("mapping has flags %v, want %s among them", flags, f)
		}
	}
	if ordinary := vmFlags(t, bytes.Clone(known)); ordinary == nil || slices.Contains(ordinary, "lo") {
		t.Errorf("ordinary memory has flags %v: the test cannot fail", ordinary)
	}
}

func TestNewLocked(t *testing.T) {
	s, err := secret.NewLocked(len(known))
	if err != nil {
		t.Fatal(err)
	}
	form := "memfd_secret"
	if _, err := peek(s.Expose()); err == nil {
		form = "mlock"
	}
	t.Logf("this kernel gives %s", form)
	if !slices.Contains(vmFlags(t, s.Expose()), "lo") {
		t.Error("memory is not locked")
	}
	if diff := cmp.Diff(make([]byte, len(known)), s.Expose()); diff != "" {
		t.Errorf("fresh secret is not zero (-want +got):\n%s", diff)
	}
	copy(s.Expose(), known)
	other := s
	if text := fmt.Sprintf("%v %+v %#v %x", s, other, s, s); strings.Contains(text, "KNOWN") {
		t.Errorf("printed form shows the secret: %s", text)
	}
	held := lockedBytes(t)
	s.Clear()
	s.Clear()
	if other.Len() != 0 {
		t.Error("a copy of the value still shows bytes after Clear")
	}
	if after := lockedBytes(t); after != held-os.Getpagesize()>>10 {
		t.Errorf("%d kB locked after Clear, %d before: want one page less", after, held)
	}
}

func TestNewLockedRefusesNothing(t *testing.T) {
	for _, n := range []int{0, -1} {
		if s, err := secret.NewLocked(n); err == nil || s.Len() != 0 {
			t.Errorf("NewLocked(%d) = %d bytes, %v", n, s.Len(), err)
		}
	}
}

// TestNewLockedManyTimes would run out of the lock limit, 8 MiB by default and
// unlimited for root, or of mappings, if Clear kept the pages.
func TestNewLockedManyTimes(t *testing.T) {
	before := lockedBytes(t)
	for range 5000 {
		s, err := secret.NewLocked(32)
		if err != nil {
			t.Fatal(err)
		}
		s.Clear()
	}
	if after := lockedBytes(t); after != before {
		t.Errorf("%d kB locked after 5000 secrets, %d before", after, before)
	}
}

// lockedBytes is VmLck of the process, in kB.
func lockedBytes(t *testing.T) (kB int) {
	t.Helper()
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	_, after, _ := strings.Cut(string(b), "VmLck:")
	if _, err := fmt.Sscanf(after, "%d kB", &kB); err != nil {
		t.Fatal(err)
	}
	return kB
}

// lockUnderZeroLimit asks for locked memory without the right to any.
func lockUnderZeroLimit() {
	runtime.LockOSThread() // capabilities belong to the thread
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var none [2]unix.CapUserData
	err := errors.Join(unix.Setrlimit(unix.RLIMIT_MEMLOCK, &unix.Rlimit{}),
		unix.Capset(&hdr, &none[0]))
	if err != nil {
		fmt.Println("set limit:", err)
		os.Exit(2)
	}
	s, err := secret.NewLocked(32)
	fmt.Println(s.Len(), errors.Is(err, secret.ErrNotLocked), err)
	os.Exit(0)
}

func TestNewLockedNeverFallsBackToPlainMemory(t *testing.T) {
	out, state := child(t, "limit", "")
	if state.ExitCode() != 0 || !strings.HasPrefix(out, "0 true ") ||
		!strings.Contains(out, "RLIMIT_MEMLOCK") {
		t.Errorf("exit %v: %s\nwant no bytes, ErrNotLocked and the way out", state, out)
	}
}

// abort ends the process by SIGABRT, the core limit as high as it may go.
func abort(harden bool) {
	var l unix.Rlimit
	_ = unix.Getrlimit(unix.RLIMIT_CORE, &l)
	l.Cur = l.Max
	_ = unix.Setrlimit(unix.RLIMIT_CORE, &l)
	if harden {
		if err := secret.Harden(); err != nil {
			fmt.Println(err)
			os.Exit(2)
		}
	}
	_ = unix.Getrlimit(unix.RLIMIT_CORE, &l)
	dumpable, _ := unix.PrctlRetInt(unix.PR_GET_DUMPABLE, 0, 0, 0, 0)
	fmt.Printf("core %d/%d dumpable %d\n", l.Cur, l.Max, dumpable)
	signalDefault(unix.SIGABRT)
	_ = unix.Kill(os.Getpid(), unix.SIGABRT)
	select {}
}

// signalDefault takes the Go runtime's handler away, so that the kernel deals
// with the signal as it does with any program's.
func signalDefault(sig unix.Signal) {
	var act struct {
		handler, flags, restorer, mask uintptr
	}
	_, _, _ = unix.RawSyscall6(unix.SYS_RT_SIGACTION, uintptr(sig),
		uintptr(unsafe.Pointer(&act)), 0, 8, 0, 0)
}

func TestHardenLeavesNoCore(t *testing.T) {
	out, state := child(t, "bare", t.TempDir())
	ws := state.Sys().(syscall.WaitStatus)
	if ws.Signal() != syscall.SIGABRT {
		t.Fatalf("bare child: %v: %s", state, out)
	}
	if ws.CoreDump() {
		t.Log("the bare child dumps core here, as it should")
	} else {
		t.Logf("this system writes no core even for a bare child (%s)", strings.TrimSpace(out))
	}
	dir := t.TempDir()
	out, state = child(t, "hard", dir)
	ws = state.Sys().(syscall.WaitStatus)
	if ws.Signal() != syscall.SIGABRT || ws.CoreDump() {
		t.Errorf("hardened child: %v", state)
	}
	if diff := cmp.Diff("core 0/0 dumpable 0\n", out); diff != "" {
		t.Errorf("hardened child (-want +got):\n%s", diff)
	}
	if names, err := os.ReadDir(dir); err != nil || len(names) != 0 {
		t.Errorf("hardened child left %v, %v", names, err)
	}
}

// hardenedFiles makes a file and a folder with modes open to all.
func hardenedFiles() {
	err := errors.Join(secret.Harden(), os.WriteFile("file", nil, 0o666), os.Mkdir("dir", 0o777))
	if err != nil {
		fmt.Println(err)
		os.Exit(2)
	}
	os.Exit(0)
}

func TestHardenSetsTheUmask(t *testing.T) {
	dir := t.TempDir()
	if out, state := child(t, "files", dir); state.ExitCode() != 0 {
		t.Fatalf("child: %v: %s", state, out)
	}
	for name, want := range map[string]os.FileMode{"file": 0o600, "dir": 0o700} {
		info, err := os.Stat(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode().Perm() != want {
			t.Errorf("%s has mode %04o, want %04o", name, info.Mode().Perm(), want)
		}
	}
}
