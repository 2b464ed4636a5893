package enrol

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/quietline/quietline/cmd/internal/config"
	"github.com/quietline/quietline/cmd/internal/pki"
)

// TestMain plays a command that kills itself when the environment says so.
func TestMain(m *testing.M) {
	if what := os.Getenv("ENROL_CHILD"); what != "" {
		if err := child(what, os.Args[1:]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// child is one command; it is killed (SIGKILL) after so many durable changes.
func child(what string, args []string) error {
	left, err := strconv.Atoi(os.Getenv("ENROL_KILL"))
	if err != nil {
		return err
	}
	step = func() {
		if left--; left == 0 {
			_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {} // nothing more is done
		}
	}
	pki.Step = step
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	switch what {
	case "create":
		_, err := Create(args[0], plan(args[1]))
		return err
	case "invite":
		return childInvite(ctx, args[0], args[1])
	case "join":
		h, err := OpenHome(args[0])
		if err != nil {
			return err
		}
		text, err := os.ReadFile(args[1])
		if err != nil {
			return err
		}
		t, err := ParseToken(string(text))
		if err != nil {
			return err
		}
		j, err := h.Join(t, t.Groups())
		if err != nil {
			return err
		}
		return j.Run(ctx, func(string) {})
	case "joinfiles", "reply":
		return childFiles(ctx, what, args[0], args[1])
	case "take":
		_, err := Take(args[0], Signed{Chains: args[3:], SAECA: args[1], PeerCA: args[2]})
		return err
	case "revoke":
		h, err := OpenHome(args[0])
		if err != nil {
			return err
		}
		return h.Revoke(args[1])
	}
	return errors.New("no such child")
}

// childInvite serves an invitation at a port of the kernel's choice and writes
// the token for it to a file.
func childInvite(ctx context.Context, file, told string) error {
	h, err := OpenHome(file)
	if err != nil {
		return err
	}
	inv, err := h.Invite(terms, time.Now())
	if err != nil || inv.Done() {
		return err
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	t := *inv.token
	t.Address = ln.Addr().(*net.TCPAddr).AddrPort()
	if err := os.WriteFile(told+".new", []byte(t.Text()), 0o600); err != nil {
		return err
	}
	if err := os.Rename(told+".new", told); err != nil {
		return err
	}
	told = filepath.Join(filepath.Dir(told), "heard") // what kochi's person reads out
	heard, err := os.ReadFile(told)
	if err != nil {
		return err
	}
	return inv.Serve(ctx, ln, reads(string(heard)), func(s string) { fmt.Fprintln(os.Stderr, s) })
}

// childFiles is one end of an enrolment by the files in a folder.
func childFiles(ctx context.Context, what, file, stick string) error {
	h, err := OpenHome(file)
	if err != nil {
		return err
	}
	if what == "reply" {
		off := terms
		off.Offline = true
		inv, err := h.Invite(off, time.Now())
		if err != nil || inv.Done() {
			return err
		}
		heard, err := os.ReadFile(filepath.Join(stick, "heard"))
		if err != nil {
			return err
		}
		_, err = inv.ReadReply(ctx, filepath.Join(stick, "back"), reads(string(heard)))
		return err
	}
	text, err := os.ReadFile(filepath.Join(stick, "token"))
	if err != nil {
		return err
	}
	t, err := ParseToken(string(text))
	if err != nil {
		return err
	}
	j, err := h.Join(t, t.Groups())
	if err != nil {
		return err
	}
	return j.RunFiles(filepath.Join(stick, "there"), filepath.Join(stick, "back"), time.Now())
}

// run starts a child that is killed after n changes; 0 = never.
func run(t *testing.T, n int, what string, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Env = append(os.Environ(), "ENROL_CHILD="+what, fmt.Sprintf("ENROL_KILL=%d", n))
	var out strings.Builder
	cmd.Stderr = &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("%s killed after %d: %s", what, n, out.String())
		}
	})
	return cmd
}

// killed waits and tells whether the child was killed; another fault fails.
func killed(t *testing.T, cmd *exec.Cmd) bool {
	t.Helper()
	err := cmd.Wait()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.Sys().(syscall.WaitStatus).Signal() == syscall.SIGKILL {
		return true
	}
	if err != nil {
		t.Fatalf("%v: %v", cmd.Env[len(cmd.Env)-2:], err)
	}
	return false
}

// TestKillCreate kills init after every step; the same command completes it.
func TestKillCreate(t *testing.T) {
	t.Parallel()
	for n := 1; ; n++ {
		dir := filepath.Join(t.TempDir(), "tokyo")
		if !killed(t, run(t, n, "create", dir, "tokyo")) {
			if n < 4 {
				t.Errorf("only %d steps", n-1)
			}
			return
		}
		if _, err := os.Stat(filepath.Join(dir, "site.yaml")); err == nil {
			continue // the last step: it was whole
		}
		if killed(t, run(t, 0, "create", dir, "tokyo")) {
			t.Fatal("killed without a reason")
		}
		if h, err := OpenHome(filepath.Join(dir, "site.yaml")); err != nil {
			t.Fatalf("after %d steps: %v", n, err)
		} else if _, err := config.Load(h.SiteFile()); err != nil {
			t.Fatalf("after %d steps: %v", n, err)
		}
	}
}

// stride is how many steps lie between two kills; CI and the long switch leave
// none out.
func stride() int {
	if os.Getenv("CI") == "" && os.Getenv("QUIETLINE_LONG") == "" {
		return 4
	}
	return 1
}

// token waits for the inviting child's token.
func token(t *testing.T, told string) {
	t.Helper()
	limit := time.Now().Add(20 * time.Second)
	for {
		if _, err := os.Stat(told); err == nil {
			return
		}
		if time.Now().After(limit) {
			t.Fatal("no token comes")
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// TestKillJoin kills the joiner after every one of its steps; the same command
// completes it, whatever the inviter had done by then.
func TestKillJoin(t *testing.T) {
	t.Parallel()
	for n := 1; ; n += stride() {
		a, b := newHome(t, "tokyo"), newHome(t, "kochi")
		told := filepath.Join(t.TempDir(), "told")
		if err := os.WriteFile(filepath.Join(filepath.Dir(told), "heard"), []byte(b.Fingerprint()), 0o600); err != nil {
			t.Fatal(err)
		}
		inviting := run(t, 0, "invite", a.SiteFile(), told)
		token(t, told)
		again := killed(t, run(t, n, "join", b.SiteFile(), told))
		if again && killed(t, run(t, 0, "join", b.SiteFile(), told)) {
			t.Fatal("killed without a reason")
		}
		if killed(t, inviting) {
			t.Fatal("killed without a reason")
		}
		trusted(t, a, b)
		if !again {
			if n < 8 {
				t.Errorf("only %d steps", n-1)
			}
			return
		}
	}
}

// TestKillInvite kills the inviter after every one of its steps, those before
// the token is out and those while the joiner waits; both commands repeated
// complete it.
func TestKillInvite(t *testing.T) {
	t.Parallel()
	for n := 1; ; n += stride() {
		a, b := newHome(t, "tokyo"), newHome(t, "kochi")
		told := filepath.Join(t.TempDir(), "told")
		if err := os.WriteFile(filepath.Join(filepath.Dir(told), "heard"), []byte(b.Fingerprint()), 0o600); err != nil {
			t.Fatal(err)
		}
		if !both(t, n, a, b, told) {
			trusted(t, a, b)
			if n < 8 {
				t.Errorf("only %d steps", n-1)
			}
			return
		}
		if err := os.Remove(told); err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
		if both(t, 0, a, b, told) {
			t.Fatal("killed without a reason")
		}
		trusted(t, a, b)
		if left, _ := filepath.Glob(a.Path("enrol", "invite-kochi", "*")); len(left) != 1 {
			t.Fatalf("after %d steps: left are %v", n, left)
		}
	}
}

// both runs the inviter, which is killed after n steps, and once its token is
// out the joiner. It tells whether the inviter was killed.
func both(t *testing.T, n int, a, b *Home, told string) bool {
	t.Helper()
	inviting := run(t, n, "invite", a.SiteFile(), told)
	ended := make(chan bool, 1)
	go func() {
		state, err := inviting.Process.Wait()
		ended <- err == nil && state.Sys().(syscall.WaitStatus).Signal() == syscall.SIGKILL
	}()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case dead := <-ended:
			return dead
		case <-tick.C:
		}
		if _, err := os.Stat(told); err != nil {
			continue
		}
		err := run(t, 0, "join", b.SiteFile(), told).Wait()
		select {
		case dead := <-ended:
			if !dead && err != nil {
				t.Fatalf("tokyo is done, kochi is not: %v", err)
			}
			return dead
		case <-time.After(20 * time.Second):
			_ = inviting.Process.Kill()
			t.Fatalf("after %d steps the inviter does not end; the joiner: %v", n, err)
		}
	}
}

// TestKillFiles kills each end of an enrolment by files after every one of its
// steps; the same command completes it.
func TestKillFiles(t *testing.T) {
	t.Parallel()
	for what, least := range map[string]int{"joinfiles": 8, "reply": 8} {
		for n := 1; ; n += stride() {
			a, b, stick := newHome(t, "tokyo"), newHome(t, "kochi"), t.TempDir()
			off := terms
			off.Offline = true
			inv := invite(t, a, off)
			err := errors.Join(inv.WriteFile(filepath.Join(stick, "there")),
				os.WriteFile(filepath.Join(stick, "token"), []byte(inv.token.Text()), 0o600),
				os.WriteFile(filepath.Join(stick, "heard"), []byte(b.Fingerprint()), 0o600))
			if err != nil {
				t.Fatal(err)
			}
			kills := map[string]int{what: n}
			again := false
			for _, c := range []struct{ what, site string }{{"joinfiles", b.SiteFile()}, {"reply", a.SiteFile()}} {
				if killed(t, run(t, kills[c.what], c.what, c.site, stick)) {
					again = true
					if killed(t, run(t, 0, c.what, c.site, stick)) {
						t.Fatal("killed without a reason")
					}
				}
			}
			trusted(t, a, b)
			if !again {
				if n < least {
					t.Errorf("%s: only %d steps", what, n-1)
				}
				break
			}
		}
	}
}

// TestKillTake kills the command that takes the chains of another CA after
// every one of its steps; the same command completes it.
func TestKillTake(t *testing.T) {
	t.Parallel()
	o := newOffice(t)
	o.ca("apps", "", "P-256", "")
	o.ca("kmes", "", "P-256", "")
	for n := 1; ; n += stride() {
		dir, p := begun(t, "tokyo")
		args := []string{dir, o.path("apps.crt"), o.path("kmes.crt"), o.sign(p.request(t, doorPair), "apps"),
			o.sign(p.request(t, peerPair), "kmes"), o.sign(p.request(t, linePair), "apps")}
		again := killed(t, run(t, n, "take", args...))
		if again && killed(t, run(t, 0, "take", args...)) {
			t.Fatal("killed without a reason")
		}
		if _, err := config.Load(filepath.Join(dir, "site.yaml")); err != nil {
			t.Fatalf("after %d steps: %v", n, err)
		}
		if left, _ := filepath.Glob(filepath.Join(dir, "pki", "*.new.key")); len(left) > 0 {
			t.Fatalf("after %d steps: left are %v", n, left)
		}
		if !again {
			if n < 8 {
				t.Errorf("only %d steps", n-1)
			}
			return
		}
	}
}
