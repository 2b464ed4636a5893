package daemon

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/quietline/quietline/cmd/internal/config"
	"github.com/quietline/quietline/cmd/internal/control"
	"github.com/quietline/quietline/kms"
	"github.com/quietline/quietline/kms/keyring"
	"github.com/quietline/quietline/secret"
)

// lone is a key manager without links.
type lone struct {
	env  Env
	stop func()
}

func newLone(t *testing.T) *lone {
	a, b := simSites(t)
	addKMEs(t, a.Site, b.Site)
	a.Site.Links, a.Site.Peers = nil, nil
	a.Site.SAEs = a.Site.SAEs[:1]
	l := &lone{env: a}
	l.start(t)
	t.Cleanup(func() { l.stop() })
	return l
}

func (l *lone) start(t *testing.T) {
	t.Helper()
	l.stop = start(t, func(ctx context.Context) error { return KME(ctx, l.env) })
	await(t, "it serves", func() bool { return kmeStatus(t, l.env.Site).Serving })
}

func rotation(path, socket string) *Rotation {
	return &Rotation{Path: path, Client: control.Dial(socket), New: keyring.NewRootKey}
}

// opens tells whether a root key opens the epoch keys as they lie there.
func (l *lone) opens(t *testing.T, root secret.Bytes) error {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(storeDir(l.env.Site), "epoch.keys"))
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "copy")
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	last := error(kms.ErrCorrupt)
	for epoch := uint64(1); epoch < 200 && errors.Is(last, kms.ErrCorrupt); epoch++ {
		r, err := keyring.Open(path, root, epoch, false)
		if last = err; err == nil {
			r.Close()
		}
	}
	return last
}

// done checks that a change is over: the root key in place opens, the one
// before does not, and nothing else is left.
func (l *lone) done(t *testing.T, name string, before secret.Bytes) {
	t.Helper()
	path := l.env.Site.KME.RootKey
	root, err := keyring.ReadRootKey(path)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Clear()
	if err := l.opens(t, root); err != nil {
		t.Errorf("%s: the root key in place: %v", name, err)
	}
	if err := l.opens(t, before); !errors.Is(err, kms.ErrRootKey) {
		t.Errorf("%s: the root key before: %v", name, err)
	}
	for _, left := range []string{path + ".next", path + ".old"} {
		if _, err := os.Lstat(left); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: %s is left: %v", name, left, err)
		}
	}
}

// TestRotationGoesOnWhereItEnded: cut short after each step, with and without a
// new start of the key manager in between, the next run ends it.
func TestRotationGoesOnWhereItEnded(t *testing.T) {
	l := newLone(t)
	path := l.env.Site.KME.RootKey
	for _, restart := range []bool{false, true} {
		for _, step := range []string{"made", "admitted", "linked", "in place", "adopted", ""} {
			name := fmt.Sprintf("%q, restart %v", step, restart)
			before, err := keyring.ReadRootKey(path)
			if err != nil {
				t.Fatal(err)
			}
			r := rotation(path, l.env.Site.KME.Control)
			cut := errors.New("cut")
			r.reached = func(s string) error {
				if s == step {
					return cut
				}
				return nil
			}
			resumed, err := r.Run(t.Context())
			if step != "" && !errors.Is(err, cut) || step == "" && err != nil || resumed {
				t.Fatalf("%s: %v, resumed %v", name, err, resumed)
			}
			if restart {
				l.stop()
				l.start(t)
			}
			if step != "" {
				r.reached = nil
				if resumed, err := r.Run(t.Context()); err != nil || !resumed {
					t.Fatalf("%s: once more: %v, resumed %v", name, err, resumed)
				}
			}
			l.done(t, name, before)
			before.Clear()
		}
	}
	if n := noted(t, l.env.Site, kms.NoteRootRotated); n != 12 {
		t.Errorf("%d changes in the audit log, want 12", n)
	}
}

// rotateAndWait is the process that TestRotationSurvivesKills kills.
func rotateAndWait(path, socket string) int {
	fmt.Println("begin")
	if _, err := rotation(path, socket).Run(context.Background()); err != nil {
		fmt.Println(err)
		return 1
	}
	return 0
}

// TestRotationSurvivesKills: the process that changes the root key is killed at
// any moment; the key manager starts with what lies in place, and the next run
// ends the change.
func TestRotationSurvivesKills(t *testing.T) {
	l := newLone(t)
	path := l.env.Site.KME.RootKey
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	draw := rand.New(rand.NewPCG(seed, 0))
	killed := 0
	for n := range 20 {
		before, err := keyring.ReadRootKey(path)
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = append(os.Environ(), "QUIETLINE_TEST_ROTATE="+path,
			"QUIETLINE_TEST_SOCKET="+l.env.Site.KME.Control)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		bufio.NewScanner(out).Scan()
		time.Sleep(time.Duration(draw.Int64N(int64(12 * time.Millisecond))))
		_ = cmd.Process.Kill()
		if cmd.Wait() != nil {
			killed++
		}
		if n%2 == 0 {
			l.stop()
			l.start(t)
		}
		if _, err := rotation(path, l.env.Site.KME.Control).Run(t.Context()); err != nil {
			t.Fatalf("after kill %d: %v", n, err)
		}
		l.done(t, fmt.Sprintf("kill %d", n), before)
		before.Clear()
	}
	if killed == 0 {
		t.Error("no process was killed: the test means little")
	}
	t.Logf("%d of 20 killed before the end", killed)
}

// TestRotationRefused: what cannot be leaves everything as it is.
func TestRotationRefused(t *testing.T) {
	l := newLone(t)
	path := l.env.Site.KME.RootKey
	other := path + ".other"
	if err := keyring.NewRootKey(other); err != nil {
		t.Fatal(err)
	}
	root, err := keyring.ReadRootKey(other)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Clear()
	r := rotation(path, l.env.Site.KME.Control)
	if err := r.Client.Root(t.Context(), control.RootAdmit, root); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Run(t.Context()); !errors.Is(err, control.ErrRefused) {
		t.Errorf("beside another change: %v", err)
	}
	if _, err := os.Lstat(path + ".next"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a refused root key is left: %v", err)
	}
	r.Replace = true
	before, err := keyring.ReadRootKey(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.Run(t.Context()); err != nil {
		t.Error(err)
	}
	l.done(t, "replaced", before)
	if err := l.opens(t, root); !errors.Is(err, kms.ErrRootKey) {
		t.Errorf("the one that was given up: %v", err)
	}
	s := &config.Site{KME: &config.KME{Control: path + ".none"}}
	if _, err := rotation(path, s.KME.Control).Run(t.Context()); !errors.Is(err, control.ErrDown) {
		t.Errorf("nobody there: %v", err)
	}
}

// TestRotationKeepsTheOwner: root may change the root key of a daemon that runs
// as somebody else, who must be able to read it.
func TestRotationKeepsTheOwner(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("to give a file away needs root")
	}
	l := newLone(t)
	path := l.env.Site.KME.RootKey
	const nobody = 65534
	if err := os.Chown(path, nobody, nobody); err != nil {
		t.Fatal(err)
	}
	if _, err := rotation(path, l.env.Site.KME.Control).Run(t.Context()); err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil || st.Uid != nobody || st.Gid != nobody ||
		st.Mode&0o777 != 0o600 {
		t.Errorf("owner %d:%d, mode %o, %v", st.Uid, st.Gid, st.Mode&0o777, err)
	}
}
