package pki_test

import (
	"bytes"
	"crypto/x509"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/quietline/quietline/cmd/internal/pki"
	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/etsi014/identity"
	"github.com/quietline/quietline/secret"
	"software.sslmate.com/src/go-pkcs12"
)

func newAuthority(t *testing.T) *pki.Authority {
	t.Helper()
	a, err := pki.Init(filepath.Join(t.TempDir(), "pki"), "tokyo")
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func line(name string) pki.Request {
	return pki.Request{CommonName: name, SAE: name, Client: true, Life: pki.LeafLife}
}

func TestInitIsRepeatable(t *testing.T) {
	a := newAuthority(t)
	before := a.Root(pki.SAERoot).Certificate()
	// As after a kill between the roots: the last one has a key and no more.
	for _, f := range []string{a.RootFile(pki.AdminRoot), a.CRLFile(pki.AdminRoot), a.CRLFile(pki.SAERoot)} {
		if err := os.Remove(f); err != nil {
			t.Fatal(err)
		}
	}
	again, err := pki.Init(a.Dir(), "tokyo")
	if err != nil {
		t.Fatal(err)
	}
	if !again.Root(pki.SAERoot).Certificate().Equal(before) {
		t.Error("a root that was whole is another one")
	}
	if _, err := pki.Open(a.Dir()); err != nil {
		t.Error(err)
	}
	seen := map[string]bool{}
	for _, r := range pki.Roots {
		seen[pki.KeyPrint(again.Root(r).Certificate().PublicKey)] = true
		if _, err := os.Stat(again.CRLFile(r)); err != nil {
			t.Error(err)
		}
	}
	if len(seen) != 3 {
		t.Errorf("%d different root keys, want 3", len(seen))
	}
}

func TestOpenRefuses(t *testing.T) {
	for name, tc := range map[string]struct {
		spoil func(*pki.Authority) error
		want  error
	}{
		"exposed key": {func(a *pki.Authority) error {
			return os.Chmod(filepath.Join(a.Dir(), "sae-ca.key"), 0o640)
		}, secret.ErrExposed},
		"no key": {func(a *pki.Authority) error {
			return os.Remove(filepath.Join(a.Dir(), "peer-ca.key"))
		}, fs.ErrNotExist},
		"swapped key": {func(a *pki.Authority) error {
			return os.Rename(filepath.Join(a.Dir(), "peer-ca.key"), filepath.Join(a.Dir(), "sae-ca.key"))
		}, pki.ErrKeyPair},
	} {
		a := newAuthority(t)
		if err := tc.spoil(a); err != nil {
			t.Fatal(err)
		}
		if _, err := pki.Open(a.Dir()); !errors.Is(err, tc.want) {
			t.Errorf("%s: %v, want %v", name, err, tc.want)
		}
	}
	a := newAuthority(t)
	if err := os.Chmod(a.Dir(), 0o770); err != nil {
		t.Fatal(err)
	}
	if _, err := pki.Open(a.Dir()); err == nil || !strings.Contains(err.Error(), "chmod 700") {
		t.Errorf("a folder that the group may write: %v", err)
	}
}

func TestMakeRenewRevoke(t *testing.T) {
	a := newAuthority(t)
	p, err := a.Make(pki.SAERoot, "line-tokyo", line("line-tokyo"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := a.Make(pki.SAERoot, "line-tokyo", line("line-tokyo")); !errors.Is(err, pki.ErrExists) {
		t.Errorf("a second of that name: %v", err)
	}
	if _, err := a.Make(pki.SAERoot, "../x", line("x")); !errors.Is(err, pki.ErrRequest) {
		t.Errorf("a name with a path: %v", err)
	}
	info, err := os.Stat(a.PairFile("line-tokyo"))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("pair file: %v %v", info, err)
	}
	r, err := a.Renew("line-tokyo")
	if err != nil {
		t.Fatal(err)
	}
	if pki.KeyPrint(r.Chain[0].PublicKey) == pki.KeyPrint(p.Chain[0].PublicKey) {
		t.Error("a renewal keeps the key")
	}
	if got, want := r.Chain[0].URIs[0].String(), pki.SAEURI("line-tokyo"); got != want {
		t.Errorf("renewed names %s, want %s", got, want)
	}
	if got := r.Chain[0].NotAfter.Sub(p.Chain[0].NotAfter); got < 0 || got > time.Minute {
		t.Errorf("renewed for %v more", got)
	}
	gone, err := a.Revoke("line-tokyo")
	if err != nil || len(gone) != 2 {
		t.Fatalf("revoked %d, %v: both serials belong to the name", len(gone), err)
	}
	if gone, err := a.Revoke("line-tokyo"); err != nil || len(gone) != 0 {
		t.Errorf("a second time: %d, %v", len(gone), err)
	}
	if _, err := a.Revoke("nobody"); !errors.Is(err, pki.ErrUnknown) {
		t.Errorf("an unknown name: %v", err)
	}
	if _, err := a.Renew("line-tokyo"); !errors.Is(err, pki.ErrRevoked) {
		t.Errorf("renewal after revocation: %v", err)
	}
	list, err := a.List()
	if err != nil || len(list) != 2 || !list[0].Revoked || !list[1].Revoked {
		t.Errorf("%v, %v", list, err)
	}
	if list[0].Root != pki.SAERoot {
		t.Errorf("root %s", list[0].Root)
	}
}

// TestDoorTakesTheList: what this package writes is what the door reads.
func TestDoorTakesTheList(t *testing.T) {
	a := newAuthority(t)
	if _, err := a.Make(pki.SAERoot, "door", pki.Request{CommonName: "door", DNS: []string{"localhost"},
		Server: true, Life: pki.LeafLife}); err != nil {
		t.Fatal(err)
	}
	p, err := a.Make(pki.SAERoot, "x", line("x"))
	if err != nil {
		t.Fatal(err)
	}
	pair := a.PairFile("door")
	cfg := identity.Config{Pairs: []identity.Pair{{Cert: pair, Key: pair}},
		CA: a.RootFile(pki.SAERoot), CRLs: []string{a.CRLFile(pki.SAERoot)},
		Rules: []identity.Rule{{SAE: etsi014.SAEID("x")}}}
	live, err := identity.Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := a.Revoke("x"); err != nil {
		t.Fatal(err)
	}
	if err := live.Reload(cfg); err != nil {
		t.Fatal(err)
	}
	if got := live.Stats().Revoked; got != 1 {
		t.Errorf("%d revoked at the door of %s, want 1", got, pki.Describe(p.Chain[0]))
	}
}

func TestWrongClock(t *testing.T) {
	a := newAuthority(t)
	p, err := a.Make(pki.SAERoot, "x", line("x"))
	if err != nil {
		t.Fatal(err)
	}
	chain, roots := p.Chain, []*x509.Certificate{a.Root(pki.SAERoot).Certificate()}
	for name, tc := range map[string]struct {
		at   time.Time
		want string
	}{
		"now":       {time.Now(), ""},
		"two hours": {time.Now().Add(-2 * time.Hour), "check this machine's clock"},
		"a year on": {time.Now().Add(365 * day), "renew it, or set the clock"},
	} {
		err := pki.CheckChain(chain, roots, nil, pki.Use{Client: true}, tc.at)
		if (err == nil) != (tc.want == "") || err != nil && !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v, want %q", name, err, tc.want)
		}
	}
}

// TestTwoYears renews at two thirds of each life for two simulated years.
func TestTwoYears(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		a, err := pki.Init(filepath.Join(dir, "pki"), "tokyo")
		if err != nil {
			t.Fatal(err)
		}
		p, err := a.Make(pki.SAERoot, "x", line("x"))
		if err != nil {
			t.Fatal(err)
		}
		roots := []*x509.Certificate{a.Root(pki.SAERoot).Certificate()}
		end, renewals := time.Now().Add(2*365*day), 0
		for ; time.Now().Before(end); time.Sleep(day) {
			if err := pki.CheckChain(p.Chain, roots, p.Key.Public(), pki.Use{Client: true}, time.Now()); err != nil {
				t.Fatalf("day of %s: %v", time.Now(), err)
			}
			if time.Until(p.Chain[0].NotAfter) < pki.LeafLife/3 {
				if p, err = a.Renew("x"); err != nil {
					t.Fatal(err)
				}
				renewals++
			}
		}
		if renewals != 11 { // every 61 days: the first look after two thirds
			t.Errorf("%d renewals in two years of 90-day certificates, want 11", renewals)
		}
	})
}

func TestExport(t *testing.T) {
	a := newAuthority(t)
	p, err := a.Make(pki.SAERoot, "x", line("x"))
	if err != nil {
		t.Fatal(err)
	}
	root := a.Root(pki.SAERoot).Certificate()
	dir := t.TempDir()
	file := filepath.Join(dir, "x.p12")
	err = pki.WritePKCS12(file, p, []*x509.Certificate{root}, secret.Copy([]byte("short")))
	if !errors.Is(err, pki.ErrPassword) {
		t.Errorf("a short password: %v", err)
	}
	password := "correct horse battery"
	if err := pki.WritePKCS12(file, p, []*x509.Certificate{root}, secret.Copy([]byte(password))); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	_, leaf, cas, err := pkcs12.DecodeChain(data, password)
	if err != nil || !leaf.Equal(p.Chain[0]) || len(cas) != 1 || !cas[0].Equal(root) {
		t.Errorf("read back: %v", err)
	}
	out, err := exec.Command("openssl", "pkcs12", "-in", file, "-nodes", "-passin", "pass:"+password).CombinedOutput()
	if err != nil || bytes.Count(out, []byte("BEGIN CERTIFICATE")) != 2 || !bytes.Contains(out, []byte("BEGIN PRIVATE KEY")) {
		t.Errorf("openssl: %v\n%s", err, out)
	}
	cert, key := filepath.Join(dir, "x.crt"), filepath.Join(dir, "x.key")
	if err := pki.WritePEM(cert, key, p); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(key); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("key file %v %v", info, err)
	}
	if out, err := exec.Command("openssl", "verify", "-CAfile", a.RootFile(pki.SAERoot), cert).CombinedOutput(); err != nil {
		t.Errorf("openssl verify: %v\n%s", err, out)
	}
}
