package daemon

import (
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/quietline/quietline/cmd/internal/config"
	"github.com/quietline/quietline/cmd/internal/pki"
	"github.com/quietline/quietline/etsi014"
)

// newFollowed runs two key managers that follow their site files, and returns
// what each logs.
func newFollowed(t *testing.T) (l *lit, logs [2]*pages) {
	t.Helper()
	l = newLit(t, 256, 16<<10, func(tokyo, kochi *Env) {
		kochi.Site.Peers = []config.Peer{{KME: "kme-tokyo", Address: "127.0.0.1:1"}} // until it is known
		for i, env := range []*Env{tokyo, kochi} {
			logs[i] = new(pages)
			env.File = filepath.Join(filepath.Dir(env.Site.State), env.Site.Site+".yaml")
			write(t, env.File, siteFile(t, env.Site))
			env.Log = slog.New(slog.NewTextHandler(logs[i], nil))
		}
	})
	return l, logs
}

// with is a site with one more SAE, of its own or of the other site.
func (l *lit) with(s *config.Site, more ...config.SAE) *config.Site {
	next := *s
	next.SAEs = append([]config.SAE{}, s.SAEs...)
	for _, a := range more {
		if a.KME != s.KME.ID {
			a.Identity, a.Limits = config.Identity{}, config.SAELimits{}
		}
		next.SAEs = append(next.SAEs, a)
	}
	return &next
}

// enrol makes the certificate of a new SAE and returns its entry.
func (l *lit) enrol(t *testing.T, id, kme string) config.SAE {
	t.Helper()
	issued, err := l.root.Issue(pki.Request{CommonName: id, SAE: id, Client: true, Life: time.Hour})
	if err == nil {
		err = issued.Save(l.path(id+".crt"), l.path(id+".key"))
	}
	if err != nil {
		t.Fatal(err)
	}
	return config.SAE{ID: id, KME: kme, Identity: config.Identity{URI: pki.SAEURI(id)}}
}

// give writes both site files and has them loaded, by signal or by the change
// alone.
func (l *lit) give(t *testing.T, logs [2]*pages, signal bool, more ...config.SAE) {
	t.Helper()
	var before [2]int
	for i, s := range []*config.Site{l.tokyo, l.kochi} {
		before[i] = logs[i].count("site file loaded")
		file := filepath.Join(filepath.Dir(s.State), s.Site+".yaml")
		write(t, file, siteFile(t, l.with(s, more...)))
	}
	if signal {
		if err := unix.Kill(os.Getpid(), unix.SIGHUP); err != nil {
			t.Fatal(err)
		}
	}
	for i, log := range logs {
		await(t, "the site file is loaded", func() bool { return log.count("site file loaded") > before[i] })
	}
}

// TestNewSAEWithoutRestart adds SAEs at both sites while others draw and
// collect without losing a request: the new ones draw at once, under their own
// limits, and are cut off at once when they leave.
func TestNewSAEWithoutRestart(t *testing.T) {
	l, logs := newFollowed(t)
	var work load
	var ends sync.WaitGroup
	defer ends.Wait()
	for range 2 {
		draw, collect := l.client(t, "sae-tokyo", l.tokyoDoor), l.client(t, "sae-kochi", l.kochiDoor)
		ends.Go(func() { work.run(t, draw, collect) })
	}
	defer func() { work.mu.Lock(); work.over = true; work.mu.Unlock() }()

	near, far := l.enrol(t, "new-tokyo", "kme-tokyo"), l.enrol(t, "new-kochi", "kme-kochi")
	a, b := l.client(t, near.ID, l.tokyoDoor), l.client(t, far.ID, l.kochiDoor)
	request := etsi014.KeyRequest{Targets: []etsi014.SAEID{"new-kochi"}, Number: 2}
	for round, signal := range []bool{true, false} {
		if _, err := a.Keys(t.Context(), request); !errors.Is(err, etsi014.ErrDenied) {
			t.Fatalf("round %d: a stranger draws: %v", round, err)
		}
		l.give(t, logs, signal, near, far)
		keys, err := a.Keys(t.Context(), request)
		if err != nil {
			t.Fatalf("round %d: a new SAE cannot draw: %v", round, err)
		}
		got, err := b.KeysByID(t.Context(), etsi014.IDRequest{Initiator: "new-tokyo",
			IDs: []etsi014.KeyID{keys.Keys[0].ID}})
		if err != nil {
			t.Fatalf("round %d: a new SAE cannot collect: %v", round, err)
		}
		got.Clear()
		left := keys.Keys[1].ID
		keys.Clear()

		near.Limits.KeysPerSecond = 1
		l.give(t, logs, true, near, far)
		_, err = a.Keys(t.Context(), request)
		if _, again := a.Keys(t.Context(), request); !errors.Is(errors.Join(err, again), etsi014.ErrEmpty) {
			t.Errorf("round %d: a new limit does not hold: %v, %v", round, err, again)
		}
		near.Limits = config.SAELimits{}

		l.give(t, logs, true)
		_, err = b.KeysByID(t.Context(), etsi014.IDRequest{Initiator: "new-tokyo",
			IDs: []etsi014.KeyID{left}})
		if !errors.Is(err, etsi014.ErrDenied) {
			t.Errorf("round %d: an SAE that left collects: %v", round, err)
		}
		c := l.client(t, "sae-tokyo", l.tokyoDoor)
		if _, err := c.Keys(t.Context(), request); !errors.Is(err, etsi014.ErrRequest) {
			t.Errorf("round %d: keys for an SAE that left: %v", round, err)
		}
	}
	before := work.count()
	await(t, "the load goes on", func() bool { return work.count() > before+4 || t.Failed() })
	for _, log := range logs {
		if n := log.count("begins anew") + log.count("key manager begins"); n != 1 {
			t.Errorf("the key manager began %d times", n)
		}
	}
}
