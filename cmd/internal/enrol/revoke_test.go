package enrol

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/quietline/quietline/cmd/internal/config"
	"github.com/quietline/quietline/cmd/internal/pki"
)

func TestRevokeSite(t *testing.T) {
	a, b, c := newHome(t, "tokyo"), newHome(t, "kochi"), newHome(t, "osaka")
	for _, other := range []*Home{b, c} {
		if told, serve, join := enrol(t, a, other); serve != nil || join != nil {
			t.Fatalf("%v, %v\n%s", serve, join, told)
		}
	}
	pool := a.Path("state", "sim-kochi-tokyo", "auth-x") // as a simulator makes it
	if err := errors.Join(os.MkdirAll(filepath.Dir(pool), 0o700), os.WriteFile(pool, nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	if err := a.Revoke("kochi"); err != nil {
		t.Fatal(err)
	}
	s, err := config.Load(a.SiteFile())
	if err != nil {
		t.Fatal(err)
	}
	if len(s.Peers) != 1 || s.Peers[0].KME != "kme-osaka" || len(s.Links) != 1 || len(s.Lines) != 1 || len(s.SAEs) != 2 {
		t.Errorf("left: %+v", s)
	}
	roots, err := pki.ReadCertificates(s.KME.PeerCA)
	if err != nil || len(roots) != 2 {
		t.Errorf("%d roots are trusted, want tokyo's and osaka's: %v", len(roots), err)
	}
	for _, r := range roots {
		if r.Equal(b.auth.Root(pki.PeerRoot).Certificate()) {
			t.Error("kochi's root is trusted still")
		}
	}
	for _, path := range []string{a.lineDir("kochi"), a.Path("state", "sim-kochi-tokyo", "auth-x"), a.Path("enrol", "invite-kochi")} {
		if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is left: %v", path, err)
		}
	}
	if err := a.Revoke("kochi"); !errors.Is(err, pki.ErrUnknown) {
		t.Errorf("a second time: %v", err)
	}
	for _, name := range []string{"tokyo", "../x", ""} {
		if err := a.Revoke(name); !errors.Is(err, ErrName) {
			t.Errorf("%q: %v", name, err)
		}
	}
	// Killed after the site file: the same command completes it.
	if found, err := a.leave("osaka"); !found || err != nil {
		t.Fatal(found, err)
	}
	if err := a.Revoke("osaka"); err != nil {
		t.Error(err)
	}
	// Enrolled anew, with new secrets.
	if err := b.Revoke("tokyo"); err != nil {
		t.Fatal(err)
	}
	if told, serve, join := enrol(t, a, b); serve != nil || join != nil {
		t.Fatalf("%v, %v\n%s", serve, join, told)
	}
	trusted(t, a, b)
	text, err := os.ReadFile(a.SiteFile())
	if err != nil || bytes.Contains(text, []byte("osaka")) {
		t.Errorf("osaka is left in the file: %v\n%s", err, text)
	}
}
