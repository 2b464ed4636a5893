package lab

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// playEnv makes this binary play a part instead of running tests.
const playEnv = "QUIETLINE_LAB_PLAY"

func TestMain(m *testing.M) {
	if part := os.Getenv(playEnv); part != "" {
		os.Exit(play(part))
	}
	os.Exit(Main(m))
}

func play(part string) int {
	if part == "namespace" {
		fmt.Println(os.Readlink("/proc/self/ns/net"))
		return 0
	}
	if !Inside() {
		code, err := Reexec(context.Background(), Options{TUN: true})
		var limit *LimitError
		if errors.As(err, &limit) {
			fmt.Printf("limit %s\nhint %s\neacces %v\n", limit.Limit, limit.Hint,
				errors.Is(err, fs.ErrPermission))
			return 3
		}
		return code
	}
	switch part {
	case "look":
		return playLook()
	case "stay":
		return playStay()
	case "signal":
		_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
	}
	return 99
}

// playLook prints what the inside looks like, leaves an orphan and exits 7.
func playLook() int {
	links, err := netlink.LinkList()
	for _, l := range links {
		up := l.Attrs().Flags&net.FlagUp != 0
		fmt.Println("link", l.Attrs().Name, up)
	}
	dir, serr := Scratch()
	werr := os.WriteFile(dir+"/secret", nil, 0o600)
	orphan := exec.Command("sh", "-c", "sleep 1000 & exec true").Run()
	fmt.Println("errors", err, serr, werr, orphan, "uid", os.Geteuid(), "parent", os.Getppid())
	return 7
}

// playStay listens outside and greets until it is asked to stop.
func playStay() int {
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM)
	ln, err := ListenOutside("tcp", "127.0.0.1:0")
	if err != nil {
		fmt.Println(err)
		return 1
	}
	if _, err := ListenOutside("tcp", "192.0.2.1:0"); !errors.Is(err, unix.EADDRNOTAVAIL) {
		fmt.Println("listen on an address that is not ours:", err)
		return 1
	}
	pid, err := OutsidePID()
	if err != nil {
		fmt.Println(err)
		return 1
	}
	fmt.Println(ln.Addr())
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			_, _ = fmt.Fprintf(c, "hello from inside %d\n", pid)
			_ = c.Close()
		}
	}()
	<-stop
	return 42
}

// actor is this binary playing a part, as a user would start it.
func actor(part string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe")
	for _, e := range os.Environ() {
		if !strings.HasPrefix(e, stageEnv+"=") {
			cmd.Env = append(cmd.Env, e)
		}
	}
	cmd.Env = append(cmd.Env, playEnv+"="+part)
	cmd.Stderr = os.Stderr
	return cmd
}

func TestReexec(t *testing.T) {
	Need(t)
	out, err := actor("look").Output()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 7 {
		t.Fatalf("exit: %v, want 7; output:\n%s", err, out)
	}
	want := "link lo true\nerrors <nil> <nil> <nil> <nil> uid 0 parent 1\n"
	if diff := cmp.Diff(want, string(out)); diff != "" {
		t.Errorf("inside (-want +got):\n%s", diff)
	}
	if _, err := os.Stat(scratchPoint + "/secret"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the scratch folder is seen outside: %v", err)
	}
}

func TestReexecReportsSignal(t *testing.T) {
	Need(t)
	err := actor("signal").Run()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 128+9 {
		t.Errorf("exit: %v, want %d", err, 128+9)
	}
}

// startStay starts the staying actor and returns its address outside.
func startStay(t *testing.T) (*exec.Cmd, string) {
	t.Helper()
	cmd := actor("stay")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill() })
	addr, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatalf("the inside says %q: %v", addr, err)
	}
	return cmd, strings.TrimSpace(addr)
}

func greeting(addr string) (string, error) {
	c, err := net.DialTimeout("tcp", addr, 5*time.Second)
	if err != nil {
		return "", err
	}
	defer c.Close()
	b, err := io.ReadAll(c)
	return string(b), err
}

func TestListenOutsideAndStop(t *testing.T) {
	Need(t)
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT} {
		cmd, addr := startStay(t)
		got, err := greeting(addr)
		if err != nil || !strings.HasPrefix(got, "hello from inside ") {
			t.Errorf("greeting %q, %v", got, err)
		}
		// The number must lead from out here to the root of the inside, where
		// the network namespace is another one than ours.
		pid := strings.TrimSpace(strings.TrimPrefix(got, "hello from inside "))
		here, _ := os.Readlink("/proc/self/ns/net")
		there, err := os.Readlink("/proc/" + pid + "/ns/net")
		if err != nil || there == here {
			t.Errorf("process %s: network %q (%v), ours is %q", pid, there, err, here)
		}
		if err := cmd.Process.Signal(sig); err != nil {
			t.Fatal(err)
		}
		_ = cmd.Wait()
		if code := cmd.ProcessState.ExitCode(); code != 42 {
			t.Errorf("after %v: exit %d, want 42 from the inside", sig, code)
		}
	}
}

// Killing the outer process leaves nothing behind.
func TestKilledOuter(t *testing.T) {
	Need(t)
	cmd, addr := startStay(t)
	if _, err := greeting(addr); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	deadline := time.Now().Add(10 * time.Second)
	for {
		if _, err := greeting(addr); errors.Is(err, unix.ECONNREFUSED) {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal("the inside still answers 10 s after the outer process was killed")
		}
	}
}

// A user who may not open /dev/net/tun is told so, at once.
func TestLimitForUser(t *testing.T) {
	Need(t)
	info, err := os.Stat("/dev/net/tun")
	if err != nil {
		t.Fatal(err)
	}
	if info.Mode().Perm()&0o006 == 0o006 {
		t.Skip("everybody may open /dev/net/tun here")
	}
	const nobody = 65534
	cmd := actor("look")
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Credential: &syscall.Credential{Uid: nobody, Gid: nobody},
	}
	out, err := cmd.Output()
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EINVAL) {
		t.Skip("this root may not become another user:", err)
	}
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 3 {
		t.Fatalf("exit: %v, want 3; output:\n%s", err, out)
	}
	if !strings.Contains(string(out), "limit ") || !strings.Contains(string(out), "sudo") {
		t.Errorf("output names no limit or way out:\n%s", out)
	}
}

func TestLimits(t *testing.T) {
	sysctlSays := sysctl("user/max_user_namespaces") == "0"
	tests := []struct {
		name  string
		err   *LimitError
		limit string
	}{
		{"tun missing", tunLimit(fs.ErrNotExist), "no TUN device on this machine"},
		{"tun closed", tunLimit(unix.EACCES), "this user may not open /dev/net/tun"},
		{"tun refused", tunLimit(unix.EPERM),
			"no TUN device can be made in the new namespaces"},
		{"clone full", cloneLimit(unix.ENOSPC),
			"too many namespaces on this machine (user.max_*_namespaces)"},
		{"clone unknown", cloneLimit(unix.EINVAL), "this kernel has no such namespaces"},
		{"clone refused", cloneLimit(unix.EPERM),
			"this process may not make namespaces (seccomp filter or security module)"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if strings.HasPrefix(tt.name, "clone") && (sysctlSays ||
				sysctl("kernel/unprivileged_userns_clone") == "0") {
				t.Skip("this machine's own setting speaks first")
			}
			if tt.err.Limit != tt.limit {
				t.Errorf("limit %q, want %q", tt.err.Limit, tt.limit)
			}
			if tt.err.Hint == "" || tt.err.Unwrap() == nil {
				t.Errorf("no hint or cause: %v", tt.err)
			}
		})
	}
}

func TestReportCrossesTheSocket(t *testing.T) {
	outer, inner, err := controlPair()
	if err != nil {
		t.Fatal(err)
	}
	sent := setUpLimit("mount /proc", unix.EACCES)
	if err := report(inner, sent); err != nil {
		t.Fatal(err)
	}
	_ = inner.Close()
	got := serve(outer, 1)
	if got == nil || got.Error() != sent.Error() {
		t.Fatalf("got %v, want %v", got, sent)
	}
	if !errors.Is(got, unix.EACCES) || !errors.Is(got, fs.ErrPermission) {
		t.Error("the error number is lost on the way")
	}
}

// noTest is a test framework that only records.
type noTest struct{ skipped, failed string }

func (*noTest) Helper()             {}
func (n *noTest) Skip(args ...any)  { n.skipped = fmt.Sprint(args...) }
func (n *noTest) Fatal(args ...any) { n.failed = fmt.Sprint(args...) }

func TestNeed(t *testing.T) {
	saved := refusal
	defer func() { refusal = saved }()
	t.Setenv(stageEnv, "")
	t.Setenv("CI", "")
	refusal = "no namespaces for you"
	var n noTest
	if Need(&n); !strings.Contains(n.skipped, refusal) || n.failed != "" {
		t.Errorf("outside: %+v", n)
	}
	t.Setenv("CI", "true")
	n = noTest{}
	if Need(&n); !strings.Contains(n.failed, refusal) {
		t.Errorf("outside with CI=true: %+v", n)
	}
	refusal = ""
	n = noTest{}
	if Need(&n); n.failed == "" {
		t.Errorf("without TestMain: %+v", n)
	}
}
