package daemon

import (
	"context"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/quietline/quietline/cmd/internal/config"
	"github.com/quietline/quietline/cmd/internal/pki"
	"github.com/quietline/quietline/cmd/internal/renew"
	"github.com/quietline/quietline/etsi014/identity"
)

func TestCertificateStatus(t *testing.T) {
	if got := certificateStatus(nil); got != nil {
		t.Errorf("without a keeper: %v", got)
	}
	a, err := pki.Init(filepath.Join(t.TempDir(), "pki"), "tokyo")
	if err != nil {
		t.Fatal(err)
	}
	_, err = a.Make(pki.SAERoot, "line", pki.Request{CommonName: "line-tokyo", SAE: "line-tokyo",
		Client: true, Life: 30 * time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	k := renew.NewKeeper([]string{a.PairFile("line"), "none"}, renew.Local{Authority: a}, nil)
	list := certificateStatus(k)
	if len(list) != 2 {
		t.Fatalf("%d certificates, want 2", len(list))
	}
	if c := list[0]; c.Left == nil || *c.Left < 29*3600 || *c.Left > 30*3600 || c.Fault != "" ||
		c.Subject != "line-tokyo" || !c.Due.Before(c.NotAfter) {
		t.Errorf("%+v", c)
	}
	if c := list[1]; c.Left != nil || !strings.Contains(c.Fault, "no such file") {
		t.Errorf("%+v", c)
	}
}

// TestLineKeeper: a pair in two files is somebody else's to renew; its end is
// told all the same.
func TestLineKeeper(t *testing.T) {
	dir := t.TempDir()
	cert := filepath.Join(dir, "a.crt")
	k := config.Keys{KMEs: []string{"https://127.0.0.1:1"}, Certificate: cert, Key: filepath.Join(dir, "a.key")}
	if list := lineKeeper(&k, nil, nil).Certificates(); len(list) != 1 || list[0].Fault == "" {
		t.Errorf("a file that is missing: %+v", list)
	}
	k.Key = cert
	if err := os.WriteFile(cert, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	got := lineKeeper(&k, nil, nil)
	if list := got.Certificates(); len(list) != 1 || list[0].Path != cert {
		t.Errorf("%+v", list)
	}
	ctx, stop := context.WithCancel(t.Context())
	stop()
	for _, k := range []*renew.Keeper{nil, got} {
		if err := keep(k)(ctx); err != nil {
			t.Error(err)
		}
	}
}

// authoritySite makes the part of a site file that names an authority's certificates.
func authoritySite(t *testing.T, life time.Duration) (*pki.Authority, *config.KME) {
	t.Helper()
	a, err := pki.Init(filepath.Join(t.TempDir(), "pki"), "tokyo")
	if err != nil {
		t.Fatal(err)
	}
	for name, req := range map[string]pki.Request{
		"door": {CommonName: "door", Server: true, DNS: []string{"localhost"}},
		"peer": {CommonName: "kme-tokyo", KME: "kme-tokyo", Server: true, Client: true},
		"line": {CommonName: "line-tokyo", SAE: "line-tokyo", Client: true},
	} {
		req.Life = life
		if _, err := a.Make(pki.SAERoot, name, req); err != nil {
			t.Fatal(err)
		}
	}
	return a, &config.KME{Certificate: a.PairFile("door"), Key: a.PairFile("door"),
		PeerCertificate: a.PairFile("peer"), PeerKey: a.PairFile("peer"), ClientCA: a.RootFile(pki.SAERoot)}
}

// TestRevive: a box that was off for a year serves at once, and what was
// revoked stays ended.
func TestRevive(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, k := authoritySite(t, pki.LeafLife)
		if _, err := a.Revoke("line-tokyo"); err != nil {
			t.Fatal(err)
		}
		before, err := pki.LoadPair(k.Certificate)
		if err != nil {
			t.Fatal(err)
		}
		for _, off := range []time.Duration{time.Hour, 365 * 24 * time.Hour} {
			time.Sleep(off)
			if err := revive(k, slog.New(slog.DiscardHandler)); err != nil {
				t.Fatal(err)
			}
			now, err := pki.LoadPair(k.Certificate)
			if err != nil {
				t.Fatal(err)
			}
			if renewed := !now.Chain[0].Equal(before.Chain[0]); renewed != (off > pki.LeafLife) {
				t.Errorf("off for %v: renewed %v", off, renewed)
			}
			line, err := pki.LoadPair(a.PairFile("line"))
			if err != nil || off > pki.LeafLife && time.Now().Before(line.Chain[0].NotAfter) {
				t.Errorf("off for %v: what was revoked lives: %v", off, err)
			}
		}
	})
}

// TestNoAuthority: certificates of a hospital's CA are left alone, but watched:
// when they are due, status says whose business that is.
func TestNoAuthority(t *testing.T) {
	for name, bend := range map[string]func(*config.KME){
		"two files":   func(k *config.KME) { k.Key += ".key" },
		"two folders": func(k *config.KME) { k.PeerCertificate, k.PeerKey = "/x/p", "/x/p" },
		"another place": func(k *config.KME) {
			*k = config.KME{Certificate: "/x/a", Key: "/x/a", PeerCertificate: "/x/p", PeerKey: "/x/p"}
		},
	} {
		_, k := authoritySite(t, time.Hour)
		bend(k)
		keeper, door, err := renewals(k, nil, http.NotFoundHandler(), nil)
		if keeper == nil || door == nil || err != nil {
			t.Errorf("%s: %v, %v", name, keeper, err)
		}
	}
}

// TestForeignDue: the file of another CA stays as it is, and the fault names it
// and the next step, for a pair in one file and in two.
func TestForeignDue(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		_, k := authoritySite(t, pki.LeafLife)
		pair, err := pki.LoadPair(k.Certificate)
		if err != nil {
			t.Fatal(err)
		}
		k.Certificate, k.Key = filepath.Join(dir, "d.crt"), filepath.Join(dir, "d.key")
		if err := pki.WritePEM(k.Certificate, k.Key, pair); err != nil {
			t.Fatal(err)
		}
		keeper, _, err := renewals(k, nil, http.NotFoundHandler(), slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		ctx, stop := context.WithCancel(t.Context())
		go keeper.Run(ctx)
		for _, days := range []int{1, 75} {
			time.Sleep(time.Duration(days) * 24 * time.Hour)
			synctest.Wait()
			list := certificateStatus(keeper)
			if len(list) != 2 {
				t.Fatalf("%+v", list)
			}
			for _, c := range list {
				due := strings.Contains(c.Fault, "signed by another CA") && strings.Contains(c.Fault, "pki issue --request")
				if c.Left == nil || due != (days > 1) {
					t.Errorf("after %d days: %+v", days, c)
				}
			}
		}
		stop()
		if now, err := pki.ReadCertificates(k.Certificate); err != nil || !now[0].Equal(pair.Chain[0]) {
			t.Errorf("the file was changed: %v", err)
		}
	})
}

// TestDoorRenews: a line gets its next certificate where it gets its keys, and
// one that was revoked gets none.
func TestDoorRenews(t *testing.T) {
	a, k := authoritySite(t, time.Hour)
	s := &config.Site{Site: "tokyo", KME: k, SAEs: []config.SAE{{ID: "line-tokyo", KME: k.ID,
		Identity: config.Identity{URI: pki.SAEURI("line-tokyo")}}}}
	k.ClientCRL = a.CRLFile(pki.SAERoot)
	live, err := identity.Open(doorIdentity(s))
	if err != nil {
		t.Fatal(err)
	}
	keeper, door, err := renewals(k, live, http.NotFoundHandler(), nil)
	if err != nil || len(keeper.Certificates()) != 2 {
		t.Fatalf("%v, %v", keeper, err)
	}
	server := httptest.NewUnstartedServer(door)
	server.TLS = live.Server()
	server.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelInfo)
	server.StartTLS()
	defer server.Close()
	line := a.PairFile("line")
	client, err := identity.Open(identity.Config{Pairs: []identity.Pair{{Cert: line, Key: line}}, CA: a.RootFile(pki.SAERoot)})
	if err != nil {
		t.Fatal(err)
	}
	issuer := renew.Client{URL: strings.Replace(server.URL, "127.0.0.1", "localhost", 1), TLS: client.Client}
	old, err := pki.LoadPair(line)
	if err != nil {
		t.Fatal(err)
	}
	next, err := issuer.Renew(t.Context(), line, old)
	if err != nil || next.Chain[0].URIs[0].String() != pki.SAEURI("line-tokyo") {
		t.Fatalf("%v, %v", next, err)
	}
	if _, err := a.Revoke("line-tokyo"); err != nil {
		t.Fatal(err)
	}
	if err := live.Reload(doorIdentity(s)); err != nil {
		t.Fatal(err)
	}
	if _, err := issuer.Renew(t.Context(), line, old); err == nil {
		t.Error("a revoked certificate is renewed")
	}
}
