package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/quietline/quietline/cmd/internal/enrol"
	"github.com/quietline/quietline/cmd/internal/pki"
	"github.com/quietline/quietline/etsi014/doctor"
	"github.com/quietline/quietline/secret"
	"github.com/quietline/quietline/tunnel/bundle"
)

// clinic is two sites that trust each other, tokyo and kochi; a test spoils
// tokyo, or both.
type clinic struct {
	t            *testing.T
	tokyo, kochi *enrol.Home
}

func newHomeAt(t *testing.T, site string) *enrol.Home {
	t.Helper()
	h, err := enrol.Create(filepath.Join(t.TempDir(), site), enrol.Plan{Site: site,
		Address: netip.MustParseAddr("127.0.0.1"), Device: enrol.Simulated})
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// reads is a person who reads a site's own fingerprint out.
func reads(h *enrol.Home) enrol.Ask {
	return func(context.Context, string) (string, error) { return h.Fingerprint(), nil }
}

func inviteTo(t *testing.T, h *enrol.Home, site string, offline bool) *enrol.Invitation {
	t.Helper()
	inv, err := h.Invite(enrol.Terms{Site: site, Life: enrol.DefaultLife, Policy: "qkd-strict",
		Offline: offline}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return inv
}

func newClinic(t *testing.T) *clinic {
	t.Helper()
	c := &clinic{t, newHomeAt(t, "tokyo"), newHomeAt(t, "kochi")}
	inv, stick := inviteTo(t, c.tokyo, "kochi", true), t.TempDir()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(inv.WriteFile(stick + "/there"))
	j, err := c.kochi.Join(inv.Token(), inv.Token().Groups())
	must(err)
	must(j.RunFiles(stick+"/there", stick+"/back", time.Now()))
	_, err = inv.ReadReply(t.Context(), stick+"/back", reads(c.kochi))
	must(err)
	return c
}

// certify replaces a pair of tokyo by one that its root signs, whatever is in it.
func (c *clinic) certify(name string, root pki.Root, bend func(*x509.Certificate)) error {
	dir := c.tokyo.Authority().Dir()
	text, err := os.ReadFile(filepath.Join(dir, string(root)+"-ca.key"))
	if err != nil {
		return err
	}
	block, _ := pem.Decode(text)
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return err
	}
	return c.signed(name, c.tokyo.Authority().Root(root).Certificate(), key.(*ecdsa.PrivateKey), bend)
}

func (c *clinic) signed(name string, ca *x509.Certificate, by *ecdsa.PrivateKey,
	bend func(*x509.Certificate),
) error {
	old, err := pki.LoadPair(c.tokyo.Authority().PairFile(name))
	if err != nil {
		return err
	}
	was := old.Chain[0]
	next := &x509.Certificate{Subject: was.Subject, NotBefore: was.NotBefore, NotAfter: was.NotAfter,
		KeyUsage: was.KeyUsage, ExtKeyUsage: was.ExtKeyUsage, URIs: was.URIs, DNSNames: was.DNSNames,
		IPAddresses: was.IPAddresses, BasicConstraintsValid: true}
	bend(next)
	own, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	der, err := x509.CreateCertificate(rand.Reader, next, ca, &own.PublicKey, by)
	if err != nil {
		return err
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return err
	}
	p := &pki.Pair{Chain: []*x509.Certificate{leaf}, Key: own}
	return p.Save(c.tokyo.Authority().PairFile(name))
}

// withoutBetween signs the pair by an intermediate that stands in no file.
func (c *clinic) withoutBetween() error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	return c.signed("kme-peer", &x509.Certificate{Subject: pkix.Name{CommonName: "hospital issuing CA 2"},
		SubjectKeyId: []byte{1}}, key, func(n *x509.Certificate) {
		n.IssuingCertificateURL = []string{"http://pki.hospital.example/issuing2.crt"}
	})
}

// swapKey puts another pair's key behind a certificate.
func (c *clinic) swapKey() error {
	a := c.tokyo.Authority()
	chain, err := os.ReadFile(a.PairFile("line"))
	if err != nil {
		return err
	}
	key, err := os.ReadFile(a.PairFile("kme-door"))
	if err != nil {
		return err
	}
	cut := func(b []byte) int { return bytes.Index(b, []byte("-----BEGIN PRIVATE")) }
	return os.WriteFile(a.PairFile("line"), slices.Concat(chain[:cut(chain)], key[cut(key):]), 0o600)
}

// edit replaces text in tokyo's site file.
func (c *clinic) edit(old, now string) error {
	text, err := os.ReadFile(c.tokyo.SiteFile())
	if err != nil {
		return err
	}
	return os.WriteFile(c.tokyo.SiteFile(), bytes.Replace(text, []byte(old), []byte(now), 1), 0o600)
}

// thief lets another machine use the token for osaka, and be confirmed, but not
// come to the end; then the right one comes.
func (c *clinic) usedTwice() error {
	first, second := newHomeAt(c.t, "osaka"), newHomeAt(c.t, "osaka")
	inv := inviteTo(c.t, c.tokyo, "osaka", false)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	tok := *inv.Token()
	tok.Address = netip.MustParseAddrPort(ln.Addr().String())
	ctx, stop := context.WithCancel(c.t.Context())
	dies, die := context.WithCancel(ctx)
	served := make(chan error, 1)
	go func() { served <- inv.Serve(ctx, ln, reads(first), func(string) { die() }) }()
	defer func() { stop(); <-served }()
	for _, h := range []*enrol.Home{first, second} {
		j, err := h.Join(&tok, tok.Groups())
		if err != nil {
			return err
		}
		if err := j.Run(dies, func(string) {}); err == nil {
			c.t.Error("a token is used twice")
		}
		dies = ctx
	}
	return nil
}

// expired leaves an invitation open beyond its time, as when nobody came.
func (c *clinic) expired() error {
	inv := inviteTo(c.t, c.tokyo, "osaka", true)
	tok := *inv.Token()
	tok.Expires = time.Now().Add(-time.Hour).Truncate(time.Second).UTC()
	path := c.tokyo.Path("enrol", "invite-osaka", "token.secret")
	return secret.WriteFile(path, []byte(tok.Text()))
}

// linkCheck is the value that kochi's doctor prints for the line.
func (c *clinic) linkCheck() string {
	_, answer := c.doctor(c.kochi)
	for _, k := range answer.Checks {
		if _, rest, ok := strings.Cut(k.Found, "check value "); ok {
			value, _, _ := strings.Cut(rest, ",")
			return value
		}
	}
	c.t.Fatal("no check value is printed")
	return ""
}

func (c *clinic) doctor(h *enrol.Home, args ...string) (code int, answer doctorAnswer) {
	c.t.Helper()
	var out, stderr bytes.Buffer
	code = run(append([]string{"doctor", "--json", "--config", h.SiteFile()}, args...), &out, &stderr)
	if err := json.Unmarshal(out.Bytes(), &answer); err != nil {
		c.t.Fatalf("%v: %s%s", err, out.String(), stderr.String())
	}
	return code, answer
}

// TestDoctorFindsSeededFaults seeds the fifteen faults that people meet, one at
// a time, and wants each found by the command, at its place, with its fix.
func TestDoctorFindsSeededFaults(t *testing.T) {
	c := newClinic(t)
	if code, answer := c.doctor(c.tokyo); code != exitOK || !answer.OK {
		t.Fatalf("a good site: exit %d, %+v", code, answer)
	}
	day := 24 * time.Hour
	uri := func(s string) []*url.URL {
		u, err := url.Parse(s)
		if err != nil {
			t.Fatal(err)
		}
		return []*url.URL{u}
	}
	faults := []struct {
		name  string
		seed  func() error
		args  func() []string
		check string
		found []string // what was compared with what
		hint  string   // the fix
	}{
		{"wrong CA", func() error {
			return c.certify("line", pki.PeerRoot, func(*x509.Certificate) {})
		}, nil, "certificate of SAE", []string{"peer root of tokyo", "sae root of tokyo", `subject "CN=line-tokyo"`},
			"name the right CA"},
		{"missing SAN", func() error {
			return c.certify("kme-door", pki.SAERoot, func(n *x509.Certificate) { n.IPAddresses = nil })
		}, nil, "door as its client sees it", []string{"the SAN for 127.0.0.1 is missing", "localhost"},
			"quietline pki issue door NAME --ip 127.0.0.1"},
		{"expired", func() error {
			return c.certify("kme-peer", pki.PeerRoot, func(n *x509.Certificate) {
				n.NotBefore, n.NotAfter = time.Now().Add(-90*day), time.Now().Add(-day)
			})
		}, nil, "towards peers", []string{"it expired before", "valid "}, "renew it"},
		{"not yet valid", func() error {
			return c.certify("kme-peer", pki.PeerRoot, func(n *x509.Certificate) {
				n.NotBefore = time.Now().Add(day)
			})
		}, nil, "towards peers", []string{"not yet valid at", "valid "}, "check this machine's clock"},
		{"swapped key", c.swapKey, nil, "certificate of SAE",
			[]string{"key does not belong", "line-tokyo"}, "quietline pki renew"},
		{"wrong usage", func() error {
			return c.certify("line", pki.SAERoot, func(n *x509.Certificate) {
				n.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
			})
		}, nil, "certificate of SAE", []string{"clientAuth is missing"}, "have the CA set it"},
		{"clock", func() error {
			return os.Chtimes(c.tokyo.Path("pki", "sae.crl"), time.Time{}, time.Now().Add(3*time.Hour))
		}, nil, "clock", []string{"clocks differ", "this machine says", "sae.crl was written", "behind by 3h"},
			"set the clock"},
		{"permissions", func() error {
			return os.Chmod(c.tokyo.Authority().PairFile("kme-peer"), 0o644)
		}, nil, "towards peers", []string{"readable by others", "0644"}, "chmod 600"},
		{"revoked", func() error { _, err := c.tokyo.Authority().Revoke("line-tokyo"); return err }, nil,
			"revocation", []string{"revoked since", "serial", "sae.crl"}, "issue a new one"},
		{"intermediate missing", c.withoutBetween, nil, "towards peers",
			[]string{`issuer "CN=hospital issuing CA 2" is neither in the chain nor among the roots`},
			"append the intermediate of that name to the chain, which its issuer keeps at " +
				"http://pki.hospital.example/issuing2.crt"},
		{"wrong peer ID", func() error {
			return c.certify("kme-peer", pki.PeerRoot, func(n *x509.Certificate) {
				n.URIs = uri(pki.KMEURI("kme-osaka"))
			})
		}, nil, "towards peers", []string{"urn:quietline:kme:kme-tokyo is missing", "kme-osaka"},
			"have the CA copy the names"},
		{"token used twice", c.usedTwice, nil, "invitation of osaka",
			[]string{"was refused: token was used before", "by the site with fingerprint", "this one has"},
			"quietline pki revoke --site osaka"},
		{"token expired", c.expired, nil, "invitation of osaka",
			[]string{"token has expired", "it ended", "this clock says"}, "quietline pki invite osaka"},
		{"wrong link secret", func() error {
			return bundle.WriteSecret(c.tokyo.Path("lines", "kochi", bundle.LinkFile), secret.Copy(make([]byte, 32)))
		}, func() []string { return []string{"--link", "kochi-tokyo=" + c.linkCheck()} }, "link secret",
			[]string{"check value is", "here and", "at the other end"}, "quietline pki invite --again"},
		{"wrong fingerprint", func() error { return c.edit(c.kochi.Fingerprint(), c.tokyo.Fingerprint()) }, nil,
			"bundle of the other end", []string{"is signed by " + c.kochi.Fingerprint(),
				"peer_fingerprint says " + c.tokyo.Fingerprint()}, "ask the other site which is right"},
		// And two that look alike.
		{"own bundle", func() error {
			own, err := bundle.ReadSecret(c.kochi.Path("lines", "tokyo", bundle.SeedFile))
			if err != nil {
				return err
			}
			return bundle.WriteSecret(c.tokyo.Path("lines", "kochi", bundle.SeedFile), own)
		}, nil, "bundle of the other end", []string{"own bundle"}, "take the other end's"},
		{"damaged bundle", func() error {
			return os.WriteFile(c.tokyo.Path("lines", "kochi", "peer.bundle"), []byte("x"), 0o600)
		}, nil, "bundle of the other end", []string{"first line is not"}, "enrol the line again"},
	}
	if len(faults) != 15+2 {
		t.Fatalf("%d faults", len(faults))
	}
	sound := keepFiles(t, filepath.Dir(c.tokyo.SiteFile()))
	for _, f := range faults {
		if err := f.seed(); err != nil {
			t.Fatalf("%s: %v", f.name, err)
		}
		var args []string
		if f.args != nil {
			args = f.args()
		}
		code, answer := c.doctor(c.tokyo, args...)
		i := slices.IndexFunc(answer.Checks, func(k doctor.Check) bool {
			return strings.Contains(k.Name, f.check) && k.Verdict == doctor.Fail &&
				strings.Contains(k.Found, f.found[0])
		})
		if code != exitFailure || answer.OK || i < 0 {
			t.Errorf("%s is not found: exit %d, %+v", f.name, code, answer.Checks)
			sound()
			continue
		}
		k := answer.Checks[i]
		for _, s := range f.found {
			if !strings.Contains(k.Found, s) {
				t.Errorf("%s: %s\nlacks %q", f.name, k.Found, s)
			}
		}
		if !strings.Contains(k.Hint, f.hint) {
			t.Errorf("%s: the fix is %q, want %q", f.name, k.Hint, f.hint)
		}
		var out, stderr bytes.Buffer
		run(append([]string{"doctor", "site", "--config", c.tokyo.SiteFile()}, args...), &out, &stderr)
		if !strings.Contains(out.String(), "fail "+k.Name+": ") || !strings.Contains(out.String(), "     next: "+k.Hint) {
			t.Errorf("%s: in text: %s%s", f.name, out.String(), stderr.String())
		}
		sound()
	}
}

// TestDoctorAtTheJoiner: the site that was refused is told the same.
func TestDoctorAtTheJoiner(t *testing.T) {
	c := newClinic(t)
	osaka := newHomeAt(t, "osaka")
	inv := inviteTo(t, c.tokyo, "osaka", true)
	tok := *inv.Token()
	tok.Expires = time.Now().Add(-time.Hour).Truncate(time.Second).UTC()
	j, err := osaka.Join(&tok, tok.Groups())
	if err != nil {
		t.Fatal(err)
	}
	if err := j.RunFiles("none", "none", time.Now()); err == nil {
		t.Fatal("an expired token works")
	}
	_, answer := c.doctor(osaka)
	for _, k := range answer.Checks {
		if k.Name == "joining tokyo" && k.Verdict == doctor.Fail && strings.Contains(k.Found, "token has expired") &&
			strings.Contains(k.Hint, "quietline pki invite osaka") {
			return
		}
	}
	t.Errorf("%+v", answer.Checks)
}

// keepFiles copies a folder and returns what puts it back.
func keepFiles(t *testing.T, dir string) func() {
	t.Helper()
	type file struct {
		text []byte
		info os.FileInfo
	}
	all := map[string]file{}
	walk := func(f func(path string, info os.FileInfo) error) {
		t.Helper()
		err := filepath.Walk(dir, func(path string, info os.FileInfo, err error) error {
			if err != nil || info.IsDir() {
				return err
			}
			return f(path, info)
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	walk(func(path string, info os.FileInfo) error {
		text, err := os.ReadFile(path)
		all[path] = file{text, info}
		return err
	})
	return func() {
		walk(func(path string, _ os.FileInfo) error {
			if _, known := all[path]; known {
				return nil
			}
			return os.Remove(path)
		})
		for path, f := range all {
			for _, err := range []error{os.WriteFile(path, f.text, 0o600), os.Chmod(path, f.info.Mode().Perm()),
				os.Chtimes(path, time.Time{}, f.info.ModTime())} {
				if err != nil {
					t.Fatal(err)
				}
			}
		}
	}
}
