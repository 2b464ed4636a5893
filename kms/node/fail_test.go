package node

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/kms"
	"github.com/quietline/quietline/kms/boltstore"
	"github.com/quietline/quietline/kms/keyring"
	"github.com/quietline/quietline/kms/peer"
	"github.com/quietline/quietline/kms/storetest"
)

// TestFailedCommitStopsTheKME: whether the failed commit is on the disk or not,
// no key of it leaves, the KME stops, and after a restart the key comes to
// nobody else.
func TestFailedCommitStopsTheKME(t *testing.T) {
	for name, stored := range map[string]bool{"failed": false, "failed but stored": true} {
		t.Run(strings.ReplaceAll(name, " ", "-"), func(t *testing.T) {
			a, b := newPair(t, 4096)
			b.start(t)
			a.cfg.Peers[0].Addr = b.ListenAddr().String()
			disk, err := boltstore.Open(filepath.Join(t.TempDir(), "kms.db"), "kme-a",
				boltstore.Options{})
			if err != nil {
				t.Fatal(err)
			}
			failing := &storetest.Failing{Store: disk, Stored: stored}
			if err := os.MkdirAll(a.cfg.Dir, 0o700); err != nil {
				t.Fatal(err)
			}
			if a.Node, err = open(a.cfg, failing); err != nil {
				t.Fatal(err)
			}
			ended := make(chan error, 1)
			go func() { ended <- a.Run(t.Context()) }()
			a.driver.allow(9)
			b.driver.allow(9)
			a.stored(t, "sae-a", "sae-b", 300)
			draw := func(ctx context.Context) (etsi014.Container, error) {
				return a.KME().Keys(ctx, etsi014.Caller{SAE: "sae-a"},
					etsi014.KeyRequest{Targets: []etsi014.SAEID{"sae-b"}, Number: 3})
			}
			if _, err := draw(t.Context()); err != nil {
				t.Fatal(err)
			}
			// The owner's goroutine reads At; nothing commits while it is set by
			// that same goroutine.
			if err := a.owner.ask(t.Context(), func(*peer.Machine) {
				failing.At = failing.Commits() + 1
			}); err != nil {
				t.Fatal(err)
			}
			if got, err := draw(t.Context()); !errors.Is(err, etsi014.ErrDown) || len(got.Keys) > 0 {
				t.Errorf("draw over a failing disk: %d keys, %v", len(got.Keys), err)
			}
			if err := <-ended; !errors.Is(err, kms.ErrStopped) || !errors.Is(err, storetest.ErrDisk) {
				t.Errorf("Run: %v, want the disk's error", err)
			}
			if err := a.Health(); !errors.Is(err, kms.ErrStopped) {
				t.Errorf("Health: %v", err)
			}
			if _, err := draw(t.Context()); !errors.Is(err, etsi014.ErrDown) {
				t.Errorf("draw after the stop: %v", err)
			}
			if n := failing.Commits(); n != failing.At {
				t.Errorf("%d commits were tried after the failed one", n-failing.At)
			}
			_ = a.Close()
		})
	}
}

// TestOpenRefuses: what is wrong with a KME's state is said in one line.
func TestOpenRefuses(t *testing.T) {
	for name, c := range map[string]struct {
		spoil func(t *testing.T, s *site)
		want  error
		text  string
	}{
		"another root key": {func(t *testing.T, s *site) {
			s.cfg.RootKey += ".other"
			if err := keyring.NewRootKey(s.cfg.RootKey); err != nil {
				t.Fatal(err)
			}
		}, kms.ErrRootKey, "set up with"},
		"no root key": {func(t *testing.T, s *site) { s.cfg.RootKey += ".none" }, nil, "no such file"},
		"another KME's": {func(t *testing.T, s *site) {
			s.cfg.KME, s.cfg.Peers[0].ID = "kme-b2", "kme-c"
			s.cfg.Links[0].Peer = "kme-c"
		}, kms.ErrForeign, "kme-a"},
		"epoch keys gone":  {func(t *testing.T, s *site) { remove(t, filepath.Join(s.cfg.Dir, epochFile)) }, nil, "no such file"},
		"our ID as a peer": {func(t *testing.T, s *site) { s.cfg.Peers[0].ID = "kme-a"; s.cfg.Links[0].Peer = "kme-a" }, nil, "own KME ID"},
		"same SAE twice":   {func(t *testing.T, s *site) { s.cfg.SAEs = append(s.cfg.SAEs, s.cfg.SAEs[0]) }, nil, "named twice"},
		"nobody to dial":   {func(t *testing.T, s *site) { s.cfg.Peers[0].Addr = "" }, nil, "needs an address"},
	} {
		t.Run(strings.ReplaceAll(name, " ", "-"), func(t *testing.T) {
			a, _ := newPair(t, 4096)
			a.start(t)
			a.stop(t)
			a.cfg.Links[0].Driver = newStream(1, 1, 4096)
			c.spoil(t, a)
			n, err := Open(a.cfg)
			if err == nil {
				n.Close()
			}
			if err == nil || c.want != nil && !errors.Is(err, c.want) ||
				!strings.Contains(err.Error(), c.text) || strings.Contains(err.Error(), "\n") {
				t.Errorf("Open: %v, want one line with %q", err, c.text)
			}
		})
	}
}

// TestSimulatedBlocksAreRefused without lab: true.
func TestSimulatedBlocksAreRefused(t *testing.T) {
	a, _ := newPair(t, 4096)
	a.cfg.Lab = false
	a.start(t)
	a.driver.allow(3)
	eventually(t, "refusal", func() bool {
		return strings.Contains(a.Stats().Links[0].DeviceReason, "lab: true")
	})
	if st := a.Stats().Links[0]; st.Ledger.Ingested != 0 || !st.Simulated {
		t.Errorf("simulated blocks were taken: %+v", st)
	}
}

// TestSimulatedBlockOfALyingDriver: the driver says that its link is real and
// hands out a simulated block. Nothing of it is taken.
func TestSimulatedBlockOfALyingDriver(t *testing.T) {
	a, _ := newPair(t, 4096)
	a.cfg.Lab = false
	a.driver.real, a.driver.lies = true, true
	acked := make(chan uint64, 3)
	a.driver.acked = func(seq uint64) { acked <- seq }
	a.start(t)
	a.driver.allow(3)
	eventually(t, "refusal", func() bool {
		return strings.Contains(a.Stats().Links[0].DeviceReason, "lab: true")
	})
	if st := a.Stats().Links[0]; st.Ledger.Ingested != 0 || st.DeviceUp || len(acked) != 0 {
		t.Errorf("simulated blocks were taken: %d acknowledged, %+v", len(acked), st)
	}
}

// TestBlocksThatDiffer never become keys, and the next ones do.
func TestBlocksThatDiffer(t *testing.T) {
	a, b := newPair(t, 4096)
	b.driver.flip = 2
	startPair(t, a, b)
	a.driver.allow(5)
	b.driver.allow(5)
	eventually(t, "void and confirmed", func() bool {
		for _, s := range []*site{a, b} {
			st := s.Stats()
			if segments(st, kms.StateConfirmed) != 3 || st.Links[0].Ledger.Void == 0 {
				return false
			}
		}
		return true
	})
	if alarms := strings.Join(a.Stats().Alarms, "\n"); !strings.Contains(alarms, "blocks differ") {
		t.Errorf("no alarm: %q", alarms)
	}
}

func remove(t *testing.T, path string) {
	t.Helper()
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
}
