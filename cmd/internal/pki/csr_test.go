package pki_test

import (
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/quietline/quietline/cmd/internal/pki"
)

// hospital is a CA as a hospital runs it: a root and an intermediate, made
// with OpenSSL.
type hospital struct {
	t   *testing.T
	dir string
}

func newHospital(t *testing.T) hospital {
	h := hospital{t, t.TempDir()}
	h.write("ca.ext", "basicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign,cRLSign\n")
	for _, name := range []string{"root", "other", "between"} {
		h.ssl("req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-384", "-nodes",
			"-keyout", name+".key", "-out", name+".csr", "-subj", "/O=Hospital/CN="+name)
	}
	for _, name := range []string{"root", "other"} {
		h.ssl("x509", "-req", "-in", name+".csr", "-signkey", name+".key", "-days", "30",
			"-extfile", "ca.ext", "-out", name+".crt")
	}
	h.sign("between", "root", "ca.ext", 20)
	return h
}

func (h hospital) path(name string) string { return filepath.Join(h.dir, name) }

func (h hospital) write(name, text string) {
	if err := os.WriteFile(h.path(name), []byte(text), 0o600); err != nil {
		h.t.Fatal(err)
	}
}

func (h hospital) ssl(args ...string) {
	h.t.Helper()
	cmd := exec.Command("openssl", args...)
	cmd.Dir = h.dir
	if out, err := cmd.CombinedOutput(); err != nil {
		h.t.Fatalf("openssl %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

// sign makes name.crt of name.csr.
func (h hospital) sign(name, by, ext string, days int) {
	h.t.Helper()
	h.ssl("x509", "-req", "-in", name+".csr", "-CA", by+".crt", "-CAkey", by+".key",
		"-CAcreateserial", "-days", fmt.Sprint(days), "-extfile", ext, "-out", name+".crt")
}

func (h hospital) read(names ...string) (list []*x509.Certificate) {
	h.t.Helper()
	for _, n := range names {
		c, err := pki.ReadCertificates(h.path(n + ".crt"))
		if err != nil {
			h.t.Fatal(err)
		}
		list = append(list, c...)
	}
	return list
}

const goodExt = "subjectAltName=URI:urn:quietline:kme:kme-tokyo\n" +
	"extendedKeyUsage=serverAuth,clientAuth\n"

var kmeUse = pki.Use{URI: "urn:quietline:kme:kme-tokyo", Server: true, Client: true}

func TestHospitalCA(t *testing.T) {
	h := newHospital(t)
	req := pki.Request{CommonName: "kme-tokyo", KME: "kme-tokyo", Server: true, Client: true, Life: day}
	key := h.path("kme.new.key")
	for range 2 { // a repeated request keeps the key
		if err := pki.WriteCSR(req, key, h.path("kme.csr")); err != nil {
			t.Fatal(err)
		}
	}
	h.ssl("req", "-in", "kme.csr", "-verify", "-noout")
	h.write("good.ext", goodExt)
	h.write("noname.ext", "extendedKeyUsage=serverAuth,clientAuth\n")
	h.write("nouse.ext", "subjectAltName=URI:urn:quietline:kme:kme-tokyo\nextendedKeyUsage=serverAuth\n")
	h.write("other.ext", "subjectAltName=URI:urn:quietline:kme:kme-kochi\nextendedKeyUsage=serverAuth,clientAuth\n")
	now := time.Now().Add(time.Minute) // after the NotBefore of all that is made below
	for name, tc := range map[string]struct {
		ext   string
		chain []string
		roots []string
		at    time.Time
		want  []string
	}{
		"good":                 {"good.ext", []string{"kme", "between"}, []string{"root"}, now, nil},
		"two roots":            {"good.ext", []string{"kme", "between"}, []string{"other", "root"}, now, nil},
		"root in the chain":    {"good.ext", []string{"kme", "between", "root"}, []string{"root"}, now, nil},
		"intermediate missing": {"good.ext", []string{"kme"}, []string{"root"}, now, []string{"between", "append the intermediate"}},
		"wrong CA":             {"good.ext", []string{"kme", "between"}, []string{"other"}, now, []string{"CN=root", "CN=other", "name the right CA"}},
		"missing SAN":          {"noname.ext", []string{"kme", "between"}, []string{"root"}, now, []string{"urn:quietline:kme:kme-tokyo", "copy the names"}},
		"wrong peer ID":        {"other.ext", []string{"kme", "between"}, []string{"root"}, now, []string{"urn:quietline:kme:kme-tokyo", "urn:quietline:kme:kme-kochi"}},
		"wrong usage":          {"nouse.ext", []string{"kme", "between"}, []string{"root"}, now, []string{"clientAuth is missing", "have the CA set it"}},
		"expired":              {"good.ext", []string{"kme", "between"}, []string{"root"}, now.Add(60 * day), []string{"expired", "renew"}},
		"clock behind":         {"good.ext", []string{"kme", "between"}, []string{"root"}, now.Add(-3 * time.Hour), []string{"not yet valid", "clock"}},
		"leaf not first":       {"good.ext", []string{"between", "kme"}, []string{"root"}, now, []string{"leaf first"}},
	} {
		h.sign("kme", "between", tc.ext, 10)
		err := pki.CheckChain(h.read(tc.chain...), h.read(tc.roots...), nil, kmeUse, tc.at)
		if tc.want == nil && err != nil || tc.want != nil && !errors.Is(err, pki.ErrChain) {
			t.Errorf("%s: %v", name, err)
			continue
		}
		for _, w := range append(tc.want, "") {
			if err != nil && (!strings.Contains(err.Error(), w) || !strings.Contains(err.Error(), "issuer")) {
				t.Errorf("%s: %v\nlacks %q", name, err, w)
			}
		}
	}
	importTwice(t, h, key)
}

// importTwice imports the chain, also as after a kill, and with another key.
func importTwice(t *testing.T, h hospital, key string) {
	h.sign("kme", "between", "good.ext", 10)
	chain, roots := h.read("kme", "between"), h.read("root")
	pair := h.path("kme.pem")
	kept, err := os.ReadFile(key)
	if err != nil {
		t.Fatal(err)
	}
	for i := range 3 {
		if i == 2 { // killed after the pair was written, before the key was removed
			if err := os.WriteFile(key, kept, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		p, err := pki.Import(key, pair, chain, roots, kmeUse)
		if err != nil || len(p.Chain) != 2 {
			t.Fatalf("import %d: %v", i, err)
		}
	}
	if _, err := os.Stat(key); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the key lies in a second file: %v", err)
	}
	req := pki.Request{CommonName: "kme-tokyo", KME: "kme-tokyo", Server: true, Client: true, Life: day}
	if err := pki.WriteCSR(req, key, h.path("again.csr")); err != nil {
		t.Fatal(err)
	}
	_, err = pki.Import(key, pair, chain, roots, kmeUse)
	if !errors.Is(err, pki.ErrChain) || !strings.Contains(err.Error(), "latest request") {
		t.Errorf("a chain for another key: %v", err)
	}
}

func TestSignForeignRequest(t *testing.T) {
	a, h := newAuthority(t), newHospital(t)
	h.ssl("req", "-new", "-newkey", "rsa:2048", "-nodes", "-keyout", "box.key", "-out", "box.csr",
		"-subj", "/CN=i am kme-tokyo", "-addext", "subjectAltName=URI:urn:quietline:kme:kme-tokyo")
	text, err := os.ReadFile(h.path("box.csr"))
	if err != nil {
		t.Fatal(err)
	}
	csr, err := pki.ParseCSR(text)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := a.Sign(pki.SAERoot, line("box-7"), csr)
	if err != nil {
		t.Fatal(err)
	}
	if len(cert.URIs) != 1 || cert.URIs[0].String() != pki.SAEURI("box-7") || cert.Subject.CommonName != "box-7" {
		t.Errorf("the request chose its own name: %s", pki.Describe(cert))
	}
	next, err := a.Resign(cert, csr)
	if err != nil || next.URIs[0].String() != pki.SAEURI("box-7") {
		t.Errorf("renewal: %v", err)
	}
	if _, err := a.Resign(h.read("root")[0], csr); !errors.Is(err, pki.ErrForeign) {
		t.Errorf("renewal of a foreign certificate: %v", err)
	}
	if gone, err := a.Revoke(fmt.Sprintf("%x", cert.SerialNumber)); err != nil || len(gone) != 1 {
		t.Errorf("revoke by number: %v, %v", gone, err)
	}
	if _, err := a.Resign(cert, csr); !errors.Is(err, pki.ErrRevoked) {
		t.Errorf("renewal of a revoked certificate: %v", err)
	}
}

func FuzzParseCSR(f *testing.F) {
	dir := f.TempDir()
	if err := pki.WriteCSR(line("x"), filepath.Join(dir, "k"), filepath.Join(dir, "c")); err != nil {
		f.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(dir, "c"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(text)
	f.Add([]byte("-----BEGIN CERTIFICATE REQUEST-----\n-----END CERTIFICATE REQUEST-----\n"))
	f.Add([]byte{0x30, 0x82})
	f.Fuzz(func(t *testing.T, text []byte) {
		csr, err := pki.ParseCSR(text)
		if err != nil {
			if !errors.Is(err, pki.ErrRequest) {
				t.Fatalf("error of another kind: %v", err)
			}
			return
		}
		if csr.CheckSignature() != nil {
			t.Fatal("a request without proof of its key")
		}
	})
}

func FuzzParseCertificates(f *testing.F) {
	ca, err := pki.NewCA("x", day)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(pki.EncodeCertificates([]*x509.Certificate{ca.Certificate(), ca.Certificate()}))
	f.Add([]byte("-----BEGIN CERTIFICATE-----"))
	f.Fuzz(func(t *testing.T, text []byte) {
		list, err := pki.ParseCertificates(text)
		if err != nil {
			return
		}
		again, err := pki.ParseCertificates(pki.EncodeCertificates(list))
		if err != nil || len(again) != len(list) {
			t.Fatalf("read, written and read again: %v", err)
		}
	})
}
