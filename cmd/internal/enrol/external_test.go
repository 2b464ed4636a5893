package enrol

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/quietline/quietline/cmd/internal/config"
	"github.com/quietline/quietline/cmd/internal/pki"
	"github.com/quietline/quietline/etsi014/doctor"
	"github.com/quietline/quietline/secret"
)

// office is a CA that belongs to somebody else, made with OpenSSL.
type office struct {
	t   *testing.T
	dir string
}

func newOffice(t *testing.T) office { return office{t, t.TempDir()} }

func (o office) path(name string) string { return filepath.Join(o.dir, name) }

func (o office) ssl(args ...string) {
	o.t.Helper()
	cmd := exec.Command("openssl", args...)
	cmd.Dir = o.dir
	if out, err := cmd.CombinedOutput(); err != nil {
		o.t.Fatalf("openssl %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

func (o office) write(name, text string) string {
	o.t.Helper()
	if err := os.WriteFile(o.path(name), []byte(text), 0o600); err != nil {
		o.t.Fatal(err)
	}
	return o.path(name)
}

// ca makes a CA, of itself or under another.
func (o office) ca(name, by, curve, ext string) {
	o.t.Helper()
	o.write(name+".ext", "basicConstraints=critical,CA:TRUE"+ext+"\nsubjectKeyIdentifier=hash\n"+
		"keyUsage=critical,keyCertSign,cRLSign\n")
	o.ssl("req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:"+curve, "-nodes",
		"-keyout", name+".key", "-out", name+".csr", "-subj", "/O=Hospital/CN="+name)
	args := []string{"x509", "-req", "-in", name + ".csr", "-days", "3650", "-extfile", name + ".ext",
		"-out", name + ".crt"}
	if by == "" {
		args = append(args, "-signkey", name+".key")
	} else {
		args = append(args, "-CA", by+".crt", "-CAkey", by+".key", "-CAcreateserial")
	}
	o.ssl(args...)
}

// leafExt is what step-ca's default template puts into a leaf, with the mark
// of the provisioner (1.3.6.1.4.1.37476.9000.64.1) and the place of its issuer.
const leafExt = "keyUsage=critical,digitalSignature\nextendedKeyUsage=serverAuth,clientAuth\n" +
	"subjectKeyIdentifier=hash\nauthorityKeyIdentifier=keyid\n" +
	"1.3.6.1.4.1.37476.9000.64.1=ASN1:UTF8String:acme\n" +
	"authorityInfoAccess=caIssuers;URI:http://ca.hospital.example/issuing.crt\n"

// sign answers a request with its own names, for a day, and returns the file of
// the chain.
func (o office) sign(request, by string, with ...string) string {
	o.t.Helper()
	o.write("leaf.ext", leafExt)
	name := strings.TrimSuffix(filepath.Base(request), ".csr")
	o.ssl("x509", "-req", "-in", request, "-CA", by+".crt", "-CAkey", by+".key", "-CAcreateserial",
		"-days", "1", "-copy_extensions", "copy", "-extfile", "leaf.ext", "-out", name+".leaf")
	return o.chain(name+".crt", append([]string{name + ".leaf"}, with...)...)
}

func (o office) chain(name string, parts ...string) string {
	o.t.Helper()
	var text []byte
	for _, p := range parts {
		b, err := os.ReadFile(o.path(p))
		if err != nil {
			o.t.Fatal(err)
		}
		text = append(text, b...)
	}
	return o.write(name, string(text))
}

// begun makes a folder that waits for the CA, twice as after a kill.
func begun(t *testing.T, site string) (dir string, p *Pending) {
	t.Helper()
	dir = filepath.Join(t.TempDir(), site)
	how := plan(site)
	how.CA = External
	for range 2 {
		if _, err := Create(dir, how); !errors.As(err, &p) || len(p.Requests) != 3 {
			t.Fatalf("%v", err)
		}
	}
	if _, err := os.Stat(filepath.Join(dir, "site.yaml")); !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("a site file before there are certificates: %v", err)
	}
	return dir, p
}

func (p *Pending) request(t *testing.T, name string) string {
	t.Helper()
	for _, r := range p.Requests {
		if strings.Contains(r.File, name) {
			return r.File
		}
	}
	t.Fatalf("no request for %s", name)
	return ""
}

// TestExternalCA takes sites from requests to a working enrolment under CAs of
// three kinds.
func TestExternalCA(t *testing.T) {
	for name, tc := range map[string]struct {
		make          func(o office)
		sae, peer     string   // who signs
		saeIn, peerIn []string // intermediates behind the leaf
		anchors       [2]string
	}{
		"two roots": {func(o office) {
			o.ca("apps root", "", "P-384", "")
			o.ca("apps", "apps root", "P-384", "")
			o.ca("kmes root", "", "P-384", "")
			o.ca("kmes", "kmes root", "P-384", "")
		}, "apps", "kmes", []string{"apps.crt"}, []string{"kmes.crt"}, [2]string{"apps root.crt", "kmes root.crt"}},
		"three levels": {func(o office) {
			o.ca("apps", "", "P-384", "")
			o.ca("root", "", "P-384", "")
			o.ca("policy", "root", "P-384", "")
			o.ca("kmes", "policy", "P-384", "")
		}, "apps", "kmes", nil, []string{"kmes.crt", "policy.crt", "root.crt"}, [2]string{"apps.crt", "root.crt"}},
		"step-ca": {func(o office) {
			o.ca("step root", "", "P-256", ",pathlen:1")
			o.ca("apps", "step root", "P-256", ",pathlen:0")
			o.ca("kmes", "step root", "P-256", ",pathlen:0")
		}, "apps", "kmes", []string{"apps.crt"}, []string{"kmes.crt"}, [2]string{"apps.crt", "kmes.crt"}},
	} {
		t.Run(name, func(t *testing.T) {
			o := newOffice(t)
			tc.make(o)
			dir, p := begun(t, "tokyo")
			s := Signed{SAECA: o.path(tc.anchors[0]), PeerCA: o.path(tc.anchors[1])}
			for i, name := range []string{doorPair, peerPair, linePair} {
				by, with := tc.sae, tc.saeIn
				if name == peerPair {
					by, with = tc.peer, tc.peerIn
				}
				s.Chains = append(s.Chains, o.sign(p.request(t, name), by, with...))
				h, err := Take(dir, s)
				left := new(Pending)
				if i < 2 && (!errors.As(err, &left) || len(left.Requests) != 2-i) {
					t.Fatalf("%d of 3 chains: %v", i+1, err)
				} else if i == 2 && (err != nil || h.Authority() != nil) {
					t.Fatal(err)
				}
			}
			a := externalSite(t, dir, s)
			b := newHome(t, "kochi")
			if told, serve, join := enrol(t, a, b); serve != nil || join != nil {
				t.Fatalf("%v, %v\n%s", serve, join, told)
			}
			trusted(t, a, b)
			// Revoked and enrolled anew, with the roles turned.
			if err := errors.Join(a.Revoke("kochi"), b.Revoke("tokyo")); err != nil {
				t.Fatal(err)
			}
			if told, serve, join := enrol(t, b, a); serve != nil || join != nil {
				t.Fatalf("%v, %v\n%s", serve, join, told)
			}
			trusted(t, b, a)
		})
	}
}

// externalSite opens a site that Take completed, once more as after a kill, and
// lets the doctor look at it.
func externalSite(t *testing.T, dir string, s Signed) *Home {
	t.Helper()
	if _, err := Take(dir, s); err != nil {
		t.Fatalf("a second time: %v", err)
	}
	h, err := OpenHome(filepath.Join(dir, "site.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	site, err := config.Load(h.SiteFile())
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range Inspect(h.SiteFile(), site, nil, time.Now().Add(time.Minute)) {
		if k.Verdict != doctor.OK {
			t.Errorf("%+v", k)
		}
	}
	left, err := filepath.Glob(h.Path("pki", "*.new.key"))
	if err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
	return h
}

// TestExternalRefusals: what a CA gets wrong is named exactly, nothing is taken,
// and the right chain is taken afterwards.
func TestExternalRefusals(t *testing.T) {
	o := newOffice(t)
	o.ca("apps", "", "P-256", "")
	o.ca("root", "", "P-256", "")
	o.ca("kmes", "root", "P-256", "")
	o.ca("narrow", "root", "P-256", "\nnameConstraints=critical,permitted;DNS:hospital.example")
	o.ca("other", "", "P-256", "")
	o.ca("short", "root", "P-256", ",pathlen:0")
	o.ca("below", "short", "P-256", "")
	o.ssl("req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout",
		"x.key", "-out", "x.csr", "-subj", "/CN=x")
	dir, p := begun(t, "tokyo")
	peer, door := p.request(t, peerPair), p.request(t, doorPair)
	bare := o.write("bare.csr", "") // a request without names, for the same key
	o.ssl("req", "-new", "-key", filepath.Join(dir, "pki", peerPair+".new.key"), "-out", bare, "-subj", "/CN=kme")
	nameless := o.write("door2.csr", "")
	o.ssl("req", "-new", "-key", filepath.Join(dir, "pki", doorPair+".new.key"), "-out", nameless,
		"-subj", "/CN=door", "-addext", "subjectAltName=DNS:door.hospital.example")
	good := Signed{SAECA: o.path("apps.crt"), PeerCA: o.path("root.crt")}
	for name, tc := range map[string]struct {
		chain func() string
		bend  func(*Signed)
		want  error
		says  []string
	}{
		"intermediate missing": {func() string { return o.sign(peer, "kmes") }, nil, pki.ErrChain,
			[]string{`the issuer "CN=kmes,O=Hospital" is neither in the chain nor among the roots ["CN=root,O=Hospital"]`,
				"append the intermediate of that name to the chain, which its issuer keeps at " +
					"http://ca.hospital.example/issuing.crt"}},
		"wrong CA": {func() string { return o.sign(peer, "other") }, nil, pki.ErrChain,
			[]string{`"CN=other,O=Hospital"`, "name the right CA"}},
		"no names": {func() string { return o.sign(bare, "kmes", "kmes.crt") }, nil, pki.ErrChain,
			[]string{"SAN URI urn:quietline:kme:kme-tokyo is missing", "have the CA copy the names"}},
		"another door": {func() string { return o.sign(nameless, "apps") }, nil, nil,
			[]string{"the SAN for 127.0.0.1 is missing", "door.hospital.example"}},
		"a CA too deep": {func() string { return o.sign(peer, "below", "below.crt", "short.crt") }, nil, pki.ErrChain,
			[]string{`the path to the root "CN=root,O=Hospital" is not valid`, `issuer "CN=below,O=Hospital"`,
				"too many intermediates", "ask who runs the CA what it may sign"}},
		"constraints and a URN": {func() string { return o.sign(peer, "narrow", "narrow.crt") }, nil, pki.ErrChain,
			[]string{`the path to the root "CN=root,O=Hospital" is not valid`, "urn:quietline:kme:kme-tokyo",
				"our names are URNs, which have no host: take a CA without name constraints"}},
		"another key": {func() string { return o.sign(o.path("x.csr"), "kmes", "kmes.crt") }, nil, pki.ErrChain,
			[]string{"it is for the key", "the requests have", "kme-peer.csr", "latest request"}},
		"leaf not first": {func() string {
			o.sign(peer, "kmes")
			return o.chain("turned.crt", "kmes.crt", peerPair+".leaf")
		}, nil, pki.ErrChain, []string{"leaf first"}},
		"no certificate":     {func() string { return peer }, nil, nil, []string{"expected certificates only"}},
		"one CA for both":    {func() string { return "none" }, func(s *Signed) { s.SAECA = s.PeerCA }, ErrOneCA, []string{"two intermediates"}},
		"a leaf as CA":       {func() string { return "none" }, func(s *Signed) { o.sign(peer, "kmes"); s.SAECA = o.path(peerPair + ".leaf") }, pki.ErrNotCA, []string{"name the file of the CA"}},
		"no such file of CA": {func() string { return "none" }, func(s *Signed) { s.SAECA += "x" }, os.ErrNotExist, nil},
	} {
		s := good
		s.Chains = []string{tc.chain()}
		if tc.bend != nil {
			tc.bend(&s)
		}
		_, err := Take(dir, s)
		if err == nil || tc.want != nil && !errors.Is(err, tc.want) {
			t.Errorf("%s: %v", name, err)
			continue
		}
		for _, w := range tc.says {
			if !strings.Contains(err.Error(), w) {
				t.Errorf("%s: %v\nlacks %q", name, err, w)
			}
		}
		if pairs, _ := filepath.Glob(filepath.Join(dir, "pki", "*.pem")); len(pairs) > 0 {
			t.Fatalf("%s: taken: %v", name, pairs)
		}
	}
	s := good
	s.Chains = []string{o.sign(peer, "kmes", "kmes.crt"), o.sign(door, "apps"), o.sign(p.request(t, linePair), "apps")}
	if _, err := Take(dir, s); err != nil {
		t.Error(err)
	}
	if _, err := Take(filepath.Join(dir, "none"), s); !errors.Is(err, ErrNoSite) {
		t.Errorf("no folder: %v", err)
	}
	if own := newHome(t, "kochi"); true {
		if _, err := Take(own.dir, s); !errors.Is(err, ErrExists) {
			t.Errorf("a site with its own CA: %v", err)
		}
	}
}

// TestDoorByName: a CA that signs no addresses has its door called by name.
func TestDoorByName(t *testing.T) {
	h := newHome(t, "tokyo")
	if got := h.doorURL(); got != "https://127.0.0.1:8443" {
		t.Errorf("door at %s", got)
	}
	issued, err := h.auth.Root(pki.SAERoot).Issue(pki.Request{CommonName: "d", Server: true,
		DNS: []string{"localhost"}, Life: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	if err := issued.Pair().Save(h.auth.PairFile(doorPair)); err != nil {
		t.Fatal(err)
	}
	if got := h.doorURL(); got != "https://localhost:8443" {
		t.Errorf("door at %s", got)
	}
}

// TestDestroy: what is removed was overwritten before, also below folders.
func TestDestroy(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "a", "b", "link.secret")
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := secret.WriteFile(path, []byte("forty-two")); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path) // keeps the blocks after the name is gone
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for range 2 { // one that is gone is no fault
		if err := destroy(filepath.Join(dir, "a")); err != nil {
			t.Fatal(err)
		}
	}
	left := make([]byte, 9)
	if n, err := f.ReadAt(left, 0); n != 9 || err != nil || string(left) == "forty-two" {
		t.Errorf("%d bytes %q, %v", n, left, err)
	}
	if list, err := os.ReadDir(dir); err != nil || len(list) > 0 {
		t.Errorf("left: %v, %v", list, err)
	}
	if err := destroy(filepath.Join(dir, fmt.Sprint("x", "\x00"))); err == nil {
		t.Error("a path that is none")
	}
}
