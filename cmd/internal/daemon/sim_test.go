package daemon

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/quietline/quietline/cmd/internal/config"
	"github.com/quietline/quietline/cmd/internal/control"
	"github.com/quietline/quietline/hw"
	"github.com/quietline/quietline/hw/distill"
	"github.com/quietline/quietline/secret"
)

// writeSeed writes the same random bytes to each path.
func writeSeed(t *testing.T, paths ...string) {
	t.Helper()
	seed := make([]byte, 64<<10)
	_, _ = rand.Read(seed)
	for _, p := range paths {
		if err := secret.WriteFile(p, seed); err != nil {
			t.Fatal(err)
		}
	}
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return !errors.Is(err, fs.ErrNotExist)
}

// TestSeedStartsOnce: a seed becomes a pool once; what is left of it goes, and
// another one beside the pool is neither used nor destroyed.
func TestSeedStartsOnce(t *testing.T) {
	dir := t.TempDir()
	pool, seed := filepath.Join(dir, "auth"), filepath.Join(dir, "seed")
	if _, err := openAuth(pool, seed); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("neither seed nor pool: err = %v", err)
	}
	writeSeed(t, seed)
	old, err := os.ReadFile(seed)
	if err != nil {
		t.Fatal(err)
	}
	open := func() *distill.AuthFile {
		t.Helper()
		a, err := openAuth(pool, seed)
		if err != nil {
			t.Fatal(err)
		}
		if exists(seed) {
			t.Fatal("the seed is still there")
		}
		return a
	}
	a := open()
	left := a.Left()
	if _, err := openAuth(pool, seed); err == nil {
		t.Error("the pool was opened twice")
	}
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	// As after a crash between making the pool and removing the seed.
	if err := secret.WriteFile(seed, old); err != nil {
		t.Fatal(err)
	}
	a = open()
	if a.Left() != left {
		t.Errorf("%d bits left, want %d", a.Left(), left)
	}
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	writeSeed(t, seed)
	if _, err := openAuth(pool, seed); !errors.Is(err, ErrSeed) || !exists(seed) {
		t.Errorf("another seed: err = %v, still there %v", err, exists(seed))
	}
	if err := os.Chmod(seed, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := openAuth(pool, seed); !errors.Is(err, secret.ErrExposed) {
		t.Errorf("a seed that others can read: err = %v", err)
	}
}

func TestOpenDriver(t *testing.T) {
	for _, address := range []string{"", "ftp://x", "unix:rel", "%"} {
		if d, err := openDriver(address, nil); err == nil {
			t.Errorf("opened %q as %v", address, d.Describe())
		}
	}
}

// simSites gives the two ends of a simulated link, over Unix sockets.
func simSites(t *testing.T) (alice, bob Env) {
	t.Helper()
	dir := t.TempDir()
	file := func(name string) string { return filepath.Join(dir, name) }
	unix := func(name string) string { return "unix://" + file(name) }
	env := func(site, role string, fibre, classical config.Channel) Env {
		return Env{Version: "test", Log: testLog(t), Site: &config.Site{
			Version: 1, Site: site, Lab: true, State: file(site),
			Links: []config.Link{{ID: "q", Peer: "kme-other", Driver: unix(site + ".drv"),
				Simulator: &config.Simulator{Role: role, Preset: "bench", Fibre: fibre,
					Classical: classical, AuthSeed: file(site + ".seed"),
					Control: file(site + ".sim")}}},
		}}
	}
	writeSeed(t, file("tokyo.seed"), file("kochi.seed"))
	return env("tokyo", "alice", config.Channel{Listen: unix("fibre")},
			config.Channel{Listen: unix("classical")}),
		env("kochi", "bob", config.Channel{Connect: unix("fibre")},
			config.Channel{Connect: unix("classical")})
}

// start runs a daemon until stop is called.
func start(t *testing.T, run func(context.Context) error) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- run(ctx) }()
	return func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("daemon ended: %v", err)
		}
	}
}

// patience is for a machine that is busy with other tests: a block takes two
// seconds when it is not.
const patience = 3 * time.Minute

// await polls until what holds.
func await(t *testing.T, what string, holds func() bool) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for !holds() {
		if time.Now().After(deadline) {
			t.Fatalf("not within %v: %s", patience, what)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// TestTwoEnds runs both ends of a link as the sim verb does, and takes the
// first block at both drivers.
func TestTwoEnds(t *testing.T) {
	a, b := simSites(t)
	for _, env := range []Env{a, b} {
		defer start(t, func(ctx context.Context) error {
			return Sim(ctx, env, &env.Site.Links[0])
		})()
	}
	var blocks [2]hw.Block
	for i, env := range []Env{a, b} {
		d, err := openDriver(env.Site.Links[0].Driver, env.Log)
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		if err := d.ReadBlock(ctx, &blocks[i]); err != nil {
			t.Fatalf("read block at %s: %v", env.Site.Site, err)
		}
		defer blocks[i].Bits.Clear()
		if !d.Describe().Simulated || !blocks[i].Simulated {
			t.Error("a simulated block is not marked so")
		}
	}
	if blocks[0].Seq != blocks[1].Seq || blocks[0].Bits.Len() == 0 ||
		!bytes.Equal(blocks[0].Bits.Expose(), blocks[1].Bits.Expose()) {
		t.Errorf("blocks differ: %d bytes of %d, %d bytes of %d", blocks[0].Bits.Len(),
			blocks[0].Seq, blocks[1].Bits.Len(), blocks[1].Seq)
	}
	alice := control.Dial(a.Site.Links[0].Simulator.Control)
	bob := control.Dial(b.Site.Links[0].Simulator.Control)
	if err := bob.Eve(t.Context(), 1); !errors.Is(err, control.ErrRefused) {
		t.Errorf("eve at bob: err = %v", err)
	}
	if err := alice.Eve(t.Context(), 0.5); err != nil {
		t.Error(err)
	}
	if err := alice.Fibre(t.Context(), false); err != nil {
		t.Error(err)
	}
	await(t, "both ends see the cut", func() bool {
		s, err := alice.Status(t.Context())
		u, uerr := bob.Status(t.Context())
		if err != nil || uerr != nil {
			t.Fatal(err, uerr)
		}
		return !s.Sim.Up && !s.Sim.FibreUp && s.Sim.Eve == 0.5 && !u.Sim.Up && u.Sim.Reason != ""
	})
	s, err := alice.Status(t.Context())
	if err != nil || !s.Simulated || s.Sim.Blocks == 0 || s.Sim.AuthBits == nil ||
		s.Sim.AuthUsed == 0 {
		t.Errorf("alice tells %+v, %v", s.Sim, err)
	}
}

// TestPools: a seed with a name of its own makes a pool of its own, and those
// of older seeds go.
func TestPools(t *testing.T) {
	dir := t.TempDir()
	for seed, want := range map[string]string{"/x/link.seed": "auth", "/x/auth-1a2b.seed": "auth-1a2b"} {
		pool := filepath.Join(dir, poolOf(seed))
		if filepath.Base(pool) != want {
			t.Errorf("%s: pool %s, want %s", seed, pool, want)
		}
		for _, name := range []string{"auth", "auth.lock", "auth-1a2b", "auth-1a2b.lock", "auth-old", "sim.json"} {
			if err := put(dir, name, "x"); err != nil {
				t.Fatal(err)
			}
		}
		if err := dropPools(dir, pool); err != nil {
			t.Fatal(err)
		}
		left, err := filepath.Glob(filepath.Join(dir, "*"))
		if err != nil || len(left) != 3 {
			t.Errorf("%s: left %v, %v", seed, left, err)
		}
	}
}
