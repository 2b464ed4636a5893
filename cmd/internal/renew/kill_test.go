package renew

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/quietline/quietline/cmd/internal/pki"
)

// TestMain plays a daemon that kills itself when the environment says so.
func TestMain(m *testing.M) {
	what := os.Getenv("RENEW_CHILD")
	if what == "" {
		os.Exit(m.Run())
	}
	left, err := strconv.Atoi(os.Getenv("RENEW_KILL"))
	if err == nil {
		step = func() {
			if left--; left == 0 {
				_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
				select {} // nothing more is done
			}
		}
		pki.Step = step
		err = child(what, os.Args[1:])
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// child renews the pair "line" of an authority: as a line at a door, as the key
// manager itself, or it is the door.
func child(what string, args []string) error {
	a, err := pki.Open(args[0])
	if err != nil {
		return err
	}
	path := a.PairFile("line")
	switch what {
	case "line":
		roots := x509.NewCertPool()
		roots.AddCert(a.Root(pki.SAERoot).Certificate())
		k := NewKeeper([]string{path}, Client{URL: args[1], TLS: func() *tls.Config {
			shown, err := tls.LoadX509KeyPair(path, path)
			if err != nil {
				return &tls.Config{}
			}
			return &tls.Config{RootCAs: roots, ServerName: "kme", Certificates: []tls.Certificate{shown}}
		}}, nil)
		return k.renew(context.Background(), path)
	case "key manager":
		return NewKeeper([]string{path}, Local{a}, nil).renew(context.Background(), path)
	case "door":
		s := killDoor(a)
		if err := os.WriteFile(args[1]+".new", []byte(s.URL), 0o600); err != nil {
			return err
		}
		if err := os.Rename(args[1]+".new", args[1]); err != nil {
			return err
		}
		time.Sleep(time.Minute) // until it is killed
		return errors.New("nobody came")
	}
	return errors.New("no such child")
}

// killDoor is a door that renews, at a port of the kernel's choice.
func killDoor(a *pki.Authority) *httptest.Server {
	roots := x509.NewCertPool()
	roots.AddCert(a.Root(pki.SAERoot).Certificate())
	s := httptest.NewUnstartedServer(&Handler{Authority: a, Allow: func(*tls.ConnectionState) error { return nil }})
	s.TLS = &tls.Config{ClientCAs: roots, ClientAuth: tls.RequireAndVerifyClientCert,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			c, err := tls.LoadX509KeyPair(a.PairFile("door"), a.PairFile("door"))
			return &c, err
		}}
	s.Config.ErrorLog = quiet()
	s.StartTLS()
	return s
}

// spawn starts a child that is killed at its nth step; 0 = never.
func spawn(t *testing.T, n int, what string, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Env = append(os.Environ(), "RENEW_CHILD="+what, fmt.Sprintf("RENEW_KILL=%d", n))
	var out strings.Builder
	cmd.Stderr = &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("%s killed at %d: %s", what, n, out.String())
		}
	})
	return cmd
}

func wasKilled(t *testing.T, cmd *exec.Cmd) bool {
	t.Helper()
	err := cmd.Wait()
	exit := new(exec.ExitError)
	if errors.As(err, &exit) && exit.Sys().(syscall.WaitStatus).Signal() == syscall.SIGKILL {
		return true
	}
	if err != nil {
		t.Fatalf("%v: %v", cmd.Args, err)
	}
	return false
}

// whole looks at the folder after a kill: the pair is a good one, and every
// certificate that anybody could show is written down, or it could never be
// revoked.
func whole(t *testing.T, a *pki.Authority) *x509.Certificate {
	t.Helper()
	p, err := pki.LoadPair(a.PairFile("line"))
	if err != nil {
		t.Fatal(err)
	}
	use := pki.Use{URI: pki.SAEURI("line-tokyo"), Client: true}
	roots := []*x509.Certificate{a.Root(pki.SAERoot).Certificate()}
	if err := pki.CheckChain(p.Chain, roots, p.Key.Public(), use, time.Now()); err != nil {
		t.Fatal(err)
	}
	list, err := a.List()
	if err != nil {
		t.Fatal(err)
	}
	if !slices.ContainsFunc(list, func(e pki.Entry) bool { return e.Cert.Equal(p.Chain[0]) }) {
		t.Fatalf("never written down: %s", pki.Describe(p.Chain[0]))
	}
	return p.Chain[0]
}

// TestKilledAtEveryStep kills a line that renews over mutual TLS, and a key
// manager that renews its own, at every one of their steps; after each the
// folder is whole and the same renewal completes.
func TestKilledAtEveryStep(t *testing.T) {
	for what, least := range map[string]int{"line": 4, "key manager": 4} {
		a := authority(t, t.TempDir())
		s := killDoor(a)
		for n := 1; ; n++ {
			before := whole(t, a)
			killed := wasKilled(t, spawn(t, n, what, a.Dir(), s.URL))
			whole(t, a)
			if killed && wasKilled(t, spawn(t, 0, what, a.Dir(), s.URL)) {
				t.Fatal("killed without a reason")
			}
			if whole(t, a).Equal(before) {
				t.Errorf("%s killed at %d: the same renewal does not complete", what, n)
			}
			if !killed {
				if n <= least {
					t.Errorf("%s: only %d steps", what, n-1)
				}
				break
			}
		}
		s.Close()
	}
}

// TestDoorKilledAtEveryStep kills the door at every step of a renewal that a
// line asks for; the line keeps what it has, and the same request completes at
// the door that was started again.
func TestDoorKilledAtEveryStep(t *testing.T) {
	a := authority(t, t.TempDir())
	roots := x509.NewCertPool()
	roots.AddCert(a.Root(pki.SAERoot).Certificate())
	path := a.PairFile("line")
	ask := func(n int) (dead bool, err error) {
		told := filepath.Join(t.TempDir(), "url")
		door := spawn(t, n, "door", a.Dir(), told)
		url := ""
		for limit := time.Now().Add(20 * time.Second); url == ""; time.Sleep(5 * time.Millisecond) {
			if text, err := os.ReadFile(told); err == nil {
				url = string(text)
			} else if time.Now().After(limit) {
				t.Fatal("no door opens")
			}
		}
		k := NewKeeper([]string{path}, Client{URL: url, TLS: func() *tls.Config {
			shown, err := tls.LoadX509KeyPair(path, path)
			if err != nil {
				t.Error(err)
			}
			return &tls.Config{RootCAs: roots, ServerName: "kme", Certificates: []tls.Certificate{shown}}
		}}, nil)
		err = k.renew(t.Context(), path)
		dead = door.Process.Signal(syscall.Signal(0)) != nil || err != nil
		_ = door.Process.Kill()
		_ = door.Wait()
		return dead, err
	}
	for n := 1; ; n++ {
		before := whole(t, a)
		dead, err := ask(n)
		if err != nil && !whole(t, a).Equal(before) {
			t.Fatalf("killed at %d: the pair changed, and %v", n, err)
		}
		if err != nil {
			if _, err := ask(0); err != nil {
				t.Fatalf("killed at %d: the same renewal: %v", n, err)
			}
		}
		if whole(t, a).Equal(before) {
			t.Fatalf("killed at %d: nothing was renewed", n)
		}
		if !dead {
			if n <= 4 {
				t.Errorf("only %d steps", n-1)
			}
			return
		}
	}
}
