package main

import (
	"bytes"
	"crypto/tls"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/quietline/quietline/secret"
)

func fixed(n int) secret.Bytes { return secret.New(n) }

// profile runs quietline client profile for tokyo's box.
func (h *hall) profile(sae, name, out, peer string, args ...string) (
	code int, stdout, stderr string,
) {
	line := slices.Concat([]string{"client", "profile", name}, h.files(sae),
		[]string{"--url", h.url, "--peer", peer, "--out", out}, args)
	var o, e bytes.Buffer
	code = run(line, &o, &e)
	return code, o.String(), e.String()
}

func TestProfileWritesTextAndBundle(t *testing.T) {
	h := newHall(t)
	host, port, _ := strings.Cut(h.addr, ":")
	for name, c := range map[string]struct {
		file string
		want []string
	}{
		"fortigate": {"fortigate.conf", []string{`set server "` + host + `"`, "set port " + port,
			`set id "tokyo"`, "config vpn qkd", "UNVERIFIED", `id "kochi"`}},
		"junos": {"junos.set", []string{"quantum-key-manager url " + h.url,
			`local-sae-id "tokyo"`, "UNVERIFIED", "carries no DNS name", `SAE ID "kochi"`}},
		"arnika": {"arnika.env", []string{"KMS_URL=" + h.url + "/api/v1/keys/kochi\n",
			"UNVERIFIED", "/arnika/sae.crt\n", "/arnika/kme-ca.crt\n"}},
		"strongswan": {"strongswan.conf", []string{"ppk_required = yes", "UNVERIFIED", `"kochi"`}},
	} {
		t.Run(name, func(t *testing.T) {
			dir := h.path(name)
			code, stdout, stderr := h.profile("tokyo", name, dir, "kochi", "--json")
			if code != exitOK || stderr != "" {
				t.Fatalf("exit %d: %s", code, stderr)
			}
			var answer profileAnswer
			if err := json.Unmarshal([]byte(stdout), &answer); err != nil {
				t.Fatal(err)
			}
			text, err := os.ReadFile(filepath.Join(dir, c.file))
			if err != nil {
				t.Fatal(err)
			}
			for _, want := range c.want {
				if !strings.Contains(string(text), want) {
					t.Errorf("the text lacks %q", want)
				}
			}
			if answer.Unverified == 0 || !slices.Contains(answer.Files, c.file) {
				t.Errorf("answer %+v", answer)
			}
			for file, mode := range map[string]os.FileMode{"sae.crt": 0o644, "sae.key": 0o600,
				"kme-ca.crt": 0o644, "sae.p12": 0o600, "sae-legacy.p12": 0o600, "p12-password": 0o600} {
				info, err := os.Stat(filepath.Join(dir, file))
				if err != nil || info.Mode().Perm() != mode {
					t.Errorf("%s: %v, %v, want mode %v", file, info, err, mode)
				}
			}
			if _, err := tls.LoadX509KeyPair(filepath.Join(dir, "sae.crt"),
				filepath.Join(dir, "sae.key")); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestProfilePKCS12 lets OpenSSL open both files.
func TestProfilePKCS12(t *testing.T) {
	openssl, err := exec.LookPath("openssl")
	if err != nil {
		if os.Getenv("CI") != "" {
			t.Fatal(err)
		}
		t.Skipf("%v; install openssl to run this test (CI does)", err)
	}
	h := newHall(t)
	dir := h.path("box")
	if code, _, stderr := h.profile("tokyo", "fortigate", dir, "kochi"); code != exitOK {
		t.Fatal(stderr)
	}
	for file, c := range map[string]struct{ extra, want string }{
		"sae.p12":        {"-nocerts", "PBES2, PBKDF2, AES-256-CBC, Iteration 2048, PRF hmacWithSHA256"},
		"sae-legacy.p12": {"-legacy", "pbeWithSHA1And3-KeyTripleDES-CBC"},
	} {
		pkcs12 := func(password string, args ...string) (string, error) {
			out, err := exec.Command(openssl, append([]string{"pkcs12", "-in",
				filepath.Join(dir, file), "-passin", password}, args...)...).CombinedOutput()
			return string(out), err
		}
		good := "file:" + filepath.Join(dir, "p12-password")
		out, err := pkcs12(good, "-info", "-noout", c.extra)
		if err != nil || !strings.Contains(out, c.want) {
			t.Errorf("%s: %v: %q lacks %q", file, err, out, c.want)
		}
		if out, err := pkcs12("pass:wrong", "-noout", c.extra); err == nil {
			t.Errorf("%s opens with a wrong password: %s", file, out)
		}
		extra := []string{"-nodes"}
		if c.extra == "-legacy" {
			extra = append(extra, c.extra)
		}
		out, err = pkcs12(good, extra...)
		if err != nil || strings.Count(out, "BEGIN CERTIFICATE") != 2 ||
			strings.Count(out, "PRIVATE KEY-----") != 2 {
			t.Errorf("%s: %v: %d certificates", file, err, strings.Count(out, "BEGIN CERTIFICATE"))
		}
		if _, err := tls.X509KeyPair([]byte(out), []byte(out)); err != nil {
			t.Errorf("%s: %v", file, err)
		}
	}
}

// TestProfileStrongSwanScripts runs both scripts against the door: both ends
// load the same PPK.
func TestProfileStrongSwanScripts(t *testing.T) {
	h := newHall(t)
	program, err := exec.LookPath("quietline") // testscript puts it there
	if err != nil {
		t.Fatal(err)
	}
	script := func(sae, peer, name string, args ...string) (printed, secrets string) {
		t.Helper()
		dir := h.path(sae)
		if code, _, stderr := h.profile(sae, "strongswan", dir, peer); code != exitOK {
			t.Fatal(stderr)
		}
		ppk := filepath.Join(dir, "ppk.conf")
		cmd := exec.Command("sh", append([]string{filepath.Join(dir, name)}, args...)...)
		cmd.Env = append(os.Environ(), "QUIETLINE="+program, "SWANCTL=true", "PPK_FILE="+ppk)
		var out, stderr bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &stderr
		if err := cmd.Run(); err != nil {
			t.Fatalf("%s: %v: %s", name, err, stderr.String())
		}
		info, err := os.Stat(ppk)
		if err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%v, %v", info, err)
		}
		b, err := os.ReadFile(ppk)
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(out.String()), string(b)
	}
	id, drawn := script("tokyo", "kochi", "draw.sh")
	_, collected := script("kochi", "tokyo", "collect.sh", id)
	if drawn != collected || !strings.Contains(drawn, "secret = 0s") || len(id) != 36 {
		t.Errorf("the two ends' secrets differ; key_ID %q", id)
	}
}

func TestProfileRefusals(t *testing.T) {
	h := newHall(t)
	for _, c := range []struct {
		name string
		run  func() (int, string, string)
		code int
		want string
	}{
		{"no such box", func() (int, string, string) {
			return h.profile("tokyo", "pix", h.path("x"), "kochi")
		}, 2, "there are arnika, fortigate, junos, strongswan"},
		{"quote in a value", func() (int, string, string) {
			return h.profile("tokyo", "fortigate", h.path("x"), "a\" end")
		}, 2, "has a character with a meaning there"},
		{"shell in a value", func() (int, string, string) {
			return h.profile("tokyo", "strongswan", h.path("x"), "a'; reboot; '")
		}, 2, "has a character with a meaning there"},
		{"line break", func() (int, string, string) {
			return h.profile("tokyo", "junos", h.path("x"), "a\nset system")
		}, 2, "has a character with a meaning there"},
		{"folder with a quote", func() (int, string, string) {
			return h.profile("tokyo", "strongswan", h.path("x'y"), "kochi")
		}, 2, "the folder's name"},
		{"folder exists", func() (int, string, string) {
			return h.profile("tokyo", "arnika", h.dir, "kochi")
		}, 1, "file exists"},
		{"no certificate", func() (int, string, string) {
			return h.profile("nobody", "arnika", h.path("x"), "kochi")
		}, 1, "nobody.crt"},
		{"nameless certificate", func() (int, string, string) {
			return h.profile("kme", "arnika", h.path("x"), "kochi")
		}, 2, "the certificate names no SAE"},
		{"long SAE ID", func() (int, string, string) {
			return h.profile("tokyo", "fortigate", h.path("x"), "kochi", "--sae", strings.Repeat("x", 292))
		}, 2, "SAE ID of 292 characters, it takes 291"},
		{"no folder", func() (int, string, string) { return h.profile("tokyo", "arnika", "", "kochi") },
			2, "--out is missing"},
	} {
		code, out, stderr := c.run()
		if code != c.code || out != "" || !strings.Contains(stderr, c.want) {
			t.Errorf("%s: exit %d, want %d: %q lacks %q", c.name, code, c.code, stderr, c.want)
		}
	}
	if _, err := os.Stat(h.path("x")); err == nil {
		t.Error("a refused call left a folder")
	}
}

func TestProfileList(t *testing.T) {
	var out, stderr bytes.Buffer
	if code := run([]string{"client", "profile", "list"}, &out, &stderr); code != exitOK ||
		strings.Count(out.String(), "\n") != 4 {
		t.Errorf("exit %d: %s%s", code, out.String(), stderr.String())
	}
	out.Reset()
	var list []map[string]string
	if code := run([]string{"client", "profile", "list", "--json"}, &out, &stderr); code != exitOK ||
		json.Unmarshal(out.Bytes(), &list) != nil || len(list) != 4 || list[1]["name"] != "fortigate" {
		t.Errorf("exit %d: %s", code, out.String())
	}
}
