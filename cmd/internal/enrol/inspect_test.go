package enrol

import (
	"crypto/x509"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/quietline/quietline/cmd/internal/config"
	"github.com/quietline/quietline/cmd/internal/pki"
	"github.com/quietline/quietline/tunnel/bundle"
)

// reissue replaces a pair of a site by one that was made otherwise.
func reissue(h *Home, name string, root pki.Root, req pki.Request) error {
	if req.Life == 0 {
		req.Life = pki.LeafLife
	}
	issued, err := h.auth.Root(root).Issue(req)
	if err != nil {
		return err
	}
	return issued.Pair().Save(h.auth.PairFile(name))
}

// TestSeededFaults spoils a site in each of the ways that people meet and
// looks whether the fault is found, named, and told what to do about. The
// faults of tokens are in TestRefusals: there the command itself says them.
func TestSeededFaults(t *testing.T) {
	a, b := newHome(t, "tokyo"), newHome(t, "kochi")
	if told, serve, join := enrol(t, a, b); serve != nil || join != nil {
		t.Fatalf("%v, %v\n%s", serve, join, told)
	}
	now := time.Now().Add(time.Minute)
	sound := keep(t, a)
	for _, f := range inspect(t, a, nil, now) {
		if f.Fault != "" {
			t.Errorf("of a good site: %s: %s", f.What, f.Fault)
		}
	}
	for name, tc := range map[string]struct {
		spoil func() error
		links map[string]string
		at    time.Duration
		what  string
		says  []string
	}{
		"wrong CA": {spoil: func() error {
			return reissue(a, "line", pki.PeerRoot, pki.Request{CommonName: "x", SAE: "line-tokyo", Client: true})
		}, what: "certificate of SAE", says: []string{"peer root of tokyo", "sae root of tokyo", "name the right CA"}},
		"missing SAN": {spoil: func() error {
			return reissue(a, "kme-door", pki.SAERoot, pki.Request{CommonName: "d", Server: true, DNS: []string{"elsewhere"}})
		}, what: "door as its client sees it", says: []string{"127.0.0.1", "SAN", "pki issue door NAME --ip 127.0.0.1"}},
		"missing URI": {spoil: func() error {
			return reissue(a, "line", pki.SAERoot, pki.Request{CommonName: "x", Client: true})
		}, what: "certificate of SAE", says: []string{"urn:quietline:sae:line-tokyo is missing"}},
		"expired":       {at: 100 * 24 * time.Hour, what: "towards peers", says: []string{"expired", "renew it"}},
		"not yet valid": {at: -30 * 24 * time.Hour, what: "towards peers", says: []string{"not yet valid", "check this machine's clock"}},
		"clock":         {at: -3 * time.Hour, what: "door: certificate", says: []string{"not yet valid", "check this machine's clock"}},
		"swapped key": {spoil: func() error {
			chain, err := os.ReadFile(a.auth.PairFile("line"))
			if err != nil {
				return err
			}
			key, err := os.ReadFile(a.auth.PairFile("kme-door"))
			if err != nil {
				return err
			}
			cut := func(s string) int { return strings.Index(s, "-----BEGIN PRIVATE") }
			mixed := string(chain[:cut(string(chain))]) + string(key[cut(string(key)):])
			return os.WriteFile(a.auth.PairFile("line"), []byte(mixed), 0o600)
		}, what: "certificate of SAE", says: []string{"key does not belong", "line-tokyo", "pki renew"}},
		"wrong usage": {spoil: func() error {
			return reissue(a, "line", pki.SAERoot, pki.Request{CommonName: "x", SAE: "line-tokyo", Server: true, DNS: []string{"x"}})
		}, what: "certificate of SAE", says: []string{"clientAuth is missing", "have the CA set it"}},
		"permissions": {spoil: func() error { return os.Chmod(a.auth.PairFile("kme-peer"), 0o644) },
			what: "towards peers", says: []string{"readable by others", "chmod 600"}},
		"revoked": {spoil: func() error { _, err := a.auth.Revoke("line-tokyo"); return err },
			what: "revocation", says: []string{"revoked since", "issue a new one"}},
		"intermediate missing": {spoil: func() error { return missingIntermediate(t, a) },
			what: "towards peers", says: []string{"CN=between", "append the intermediate"}},
		"wrong peer ID": {spoil: func() error {
			return reissue(a, "kme-peer", pki.PeerRoot, pki.Request{CommonName: "k", KME: "kme-osaka", Server: true, Client: true})
		}, what: "towards peers", says: []string{"urn:quietline:kme:kme-tokyo is missing", "kme-osaka"}},
		"wrong link secret": {links: map[string]string{"tokyo-kochi": "0000 1111 2222 3333"},
			what: "link secret", says: []string{"0000 1111 2222 3333 at the other end", "pki invite --again"}},
		"wrong fingerprint": {spoil: func() error {
			text, err := os.ReadFile(a.SiteFile())
			if err != nil {
				return err
			}
			return os.WriteFile(a.SiteFile(), []byte(strings.Replace(string(text), b.Fingerprint(), a.Fingerprint(), 1)), 0o600)
		}, what: "bundle of the other end", says: []string{"peer_fingerprint says", "enrol the line again"}},
		"own bundle": {spoil: func() error {
			own, err := bundle.ReadSecret(b.Path("lines", "tokyo", bundle.SeedFile))
			if err != nil {
				return err
			}
			return bundle.WriteSecret(a.Path("lines", "kochi", bundle.SeedFile), own)
		}, what: "bundle of the other end", says: []string{"own bundle", "take the other end's"}},
		"damaged bundle": {spoil: func() error { return os.WriteFile(a.Path("lines", "kochi", "peer.bundle"), []byte("x"), 0o600) },
			what: "bundle of the other end", says: []string{"enrol the line again"}},
	} {
		if tc.spoil != nil {
			if err := tc.spoil(); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
		}
		found := false
		for _, f := range inspect(t, a, tc.links, now.Add(tc.at)) {
			if f.Fault == "" || !strings.Contains(f.What, tc.what) {
				continue
			}
			found = true
			for _, s := range tc.says {
				if !strings.Contains(f.Fault, s) {
					t.Errorf("%s: %s: %s\nlacks %q", name, f.What, f.Fault, s)
				}
			}
		}
		if !found {
			t.Errorf("%s is not found at %q", name, tc.what)
		}
		sound()
	}
}

func inspect(t *testing.T, h *Home, links map[string]string, now time.Time) []Finding {
	t.Helper()
	s, err := config.Load(h.SiteFile())
	if err != nil {
		t.Fatal(err)
	}
	return Inspect(s, links, now)
}

// keep copies a site's files and returns what puts them back.
func keep(t *testing.T, h *Home) func() {
	t.Helper()
	type file struct {
		text []byte
		mode os.FileMode
	}
	all := map[string]file{}
	err := filepath.Walk(h.dir, func(path string, info os.FileInfo, err error) error {
		if err != nil || info.IsDir() {
			return err
		}
		text, err := os.ReadFile(path)
		all[path] = file{text, info.Mode().Perm()}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return func() {
		for path, f := range all {
			if err := os.WriteFile(path, f.text, f.mode); err != nil {
				t.Fatal(err)
			}
			if err := os.Chmod(path, f.mode); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// missingIntermediate gives the key manager a certificate of an intermediate
// that stands in no file.
func missingIntermediate(t *testing.T, h *Home) error {
	between, err := pki.NewCA("between", pki.LeafLife)
	if err != nil {
		return err
	}
	issued, err := between.Issue(pki.Request{CommonName: "k", KME: "kme-tokyo", Server: true, Client: true, Life: time.Hour})
	if err != nil {
		return err
	}
	p := issued.Pair()
	p.Chain = []*x509.Certificate{p.Chain[0]}
	return p.Save(h.auth.PairFile("kme-peer"))
}
