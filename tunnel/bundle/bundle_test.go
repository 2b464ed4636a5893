package bundle

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/quietline/quietline/secret"
	"github.com/quietline/quietline/tunnel/rekey"
)

func sample(t testing.TB) *Bundle {
	t.Helper()
	static, err := rekey.Public(rekey.XWing, secret.Copy(bytes.Repeat([]byte{1}, 32)))
	if err != nil {
		t.Fatal(err)
	}
	b := &Bundle{Version: 2, LinkID: [16]byte{1, 2, 3}, Site: "kochi", Suite: rekey.XWing,
		Static: static, EpochSAE: "line-kochi", PadSAE: "pad-kochi", Endpoint: "192.0.2.7:4500"}
	sign(t, b)
	return b
}

// signer is a site's enrolment key that is always the same.
func signer(t testing.TB) *Signer {
	t.Helper()
	s, err := NewSigner(secret.Copy(bytes.Repeat([]byte{7}, SignerSeedSize)))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func sign(t testing.TB, b *Bundle) {
	t.Helper()
	if err := b.Sign(signer(t)); err != nil {
		t.Fatal(err)
	}
}

func TestRoundTrip(t *testing.T) {
	for name, bend := range map[string]func(*Bundle){
		"full":          func(*Bundle) {},
		"no pad":        func(b *Bundle) { b.PadSAE = "" },
		"no endpoint":   func(b *Bundle) { b.Endpoint = "" },
		"IPv6":          func(b *Bundle) { b.Endpoint = "[2001:db8::7]:4500" },
		"host name":     func(b *Bundle) { b.Endpoint = "line.kochi.example:1" },
		"long SAE":      func(b *Bundle) { b.EpochSAE = strings.Repeat("s", maxSAE) },
		"SAE in kanji":  func(b *Bundle) { b.EpochSAE = "高知 <&>" },
		"greatest port": func(b *Bundle) { b.Endpoint = "h:65535" },
	} {
		b := sample(t)
		bend(b)
		sign(t, b)
		text, err := b.Marshal()
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		got, err := Unmarshal(text)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if d := cmp.Diff(b, got); d != "" {
			t.Errorf("%s: %s", name, d)
		}
	}
}

func TestMarshalRefuses(t *testing.T) {
	for name, tc := range map[string]struct {
		bend func(*Bundle)
		want error
	}{
		"version 0":      {func(b *Bundle) { b.Version = 0 }, ErrFormat},
		"version 1":      {func(b *Bundle) { b.Version = 1 }, ErrVersion},
		"version 3":      {func(b *Bundle) { b.Version = 3 }, ErrVersion},
		"no signature":   {func(b *Bundle) { b.Signature = nil }, ErrSignature},
		"other site":     {func(b *Bundle) { b.Site = "tokyo" }, ErrSignature},
		"other signer":   {func(b *Bundle) { b.Signer = bytes.Repeat([]byte{1}, PublicSize) }, ErrSignature},
		"zero link":      {func(b *Bundle) { b.LinkID = [16]byte{} }, ErrFormat},
		"no site":        {func(b *Bundle) { b.Site = "" }, ErrFormat},
		"site with /":    {func(b *Bundle) { b.Site = "../kochi" }, ErrFormat},
		"long site":      {func(b *Bundle) { b.Site = strings.Repeat("k", 65) }, ErrFormat},
		"no SAE":         {func(b *Bundle) { b.EpochSAE = "" }, ErrFormat},
		"long SAE":       {func(b *Bundle) { b.EpochSAE = strings.Repeat("s", maxSAE+1) }, ErrFormat},
		"SAE line end":   {func(b *Bundle) { b.EpochSAE = "a\nb" }, ErrFormat},
		"SAE not UTF-8":  {func(b *Bundle) { b.PadSAE = "a\xff" }, ErrFormat},
		"one SAE":        {func(b *Bundle) { b.PadSAE = b.EpochSAE }, ErrFormat},
		"suite 0":        {func(b *Bundle) { b.Suite = 0 }, rekey.ErrConfig},
		"no key":         {func(b *Bundle) { b.Static = nil }, ErrFormat},
		"broken key":     {func(b *Bundle) { b.Static = bytes.Repeat([]byte{255}, 1216) }, ErrFormat},
		"no port":        {func(b *Bundle) { b.Endpoint = "192.0.2.7" }, ErrFormat},
		"port 0":         {func(b *Bundle) { b.Endpoint = "192.0.2.7:0" }, ErrFormat},
		"port 65536":     {func(b *Bundle) { b.Endpoint = "192.0.2.7:65536" }, ErrFormat},
		"port 0080":      {func(b *Bundle) { b.Endpoint = "192.0.2.7:0080" }, ErrFormat},
		"no host":        {func(b *Bundle) { b.Endpoint = ":4500" }, ErrFormat},
		"host w/ spaces": {func(b *Bundle) { b.Endpoint = "a b:4500" }, ErrFormat},
	} {
		b := sample(t)
		tc.bend(b)
		if text, err := b.Marshal(); !errors.Is(err, tc.want) || text != nil {
			t.Errorf("%s: %v, want %v", name, err, tc.want)
		}
	}
}

// armour writes inner as a bundle's text, as no Marshal would.
func armour(inner string) []byte {
	body := base64.StdEncoding.EncodeToString([]byte(inner))
	var b strings.Builder
	b.WriteString(begin)
	for len(body) > lineWidth {
		b.WriteString(body[:lineWidth] + "\n")
		body = body[lineWidth:]
	}
	b.WriteString(body + "\n" + end)
	return []byte(b.String())
}

func TestUnmarshalIsStrict(t *testing.T) {
	text, err := sample(t).Marshal()
	if err != nil {
		t.Fatal(err)
	}
	body := strings.ReplaceAll(strings.TrimSuffix(strings.TrimPrefix(string(text), begin), end), "\n", "")
	raw, err := base64.StdEncoding.DecodeString(body)
	if err != nil {
		t.Fatal(err)
	}
	inner := string(raw)
	if _, err := Unmarshal(armour(inner)); err != nil {
		t.Fatalf("the good form: %v", err)
	}
	for name, bad := range map[string][]byte{
		"empty":           nil,
		"text before":     append([]byte("x"), text...),
		"text after":      append(bytes.Clone(text), '\n'),
		"CR LF":           bytes.ReplaceAll(text, []byte("\n"), []byte("\r\n")),
		"one long line":   []byte(begin + body + "\n" + end),
		"cut":             text[:len(text)/2],
		"no JSON":         armour("{"),
		"more JSON":       armour(inner + "{}"),
		"space":           armour(" " + inner),
		"unknown field":   armour(strings.Replace(inner, "{", `{"x":1,`, 1)),
		"field twice":     armour(strings.Replace(inner, `"version":2`, `"version":2,"version":2`, 1)),
		"other case":      armour(strings.Replace(inner, `"version"`, `"Version"`, 1)),
		"link_id short":   armour(strings.Replace(inner, `"link_id":"0102`, `"link_id":"01`, 1)),
		"link_id in caps": armour(strings.Replace(inner, `"version":2`, `"version":2.0`, 1)),
		"too long":        bytes.Repeat([]byte("a"), maxText+1),
	} {
		if b, err := Unmarshal(bad); !errors.Is(err, ErrFormat) && !errors.Is(err, ErrSignature) || b != nil {
			t.Errorf("%s: %v, %v", name, b, err)
		}
	}
	newer := armour(strings.Replace(inner, `"version":2`, `"version":3,"more":"fields"`, 1))
	if _, err := Unmarshal(newer); !errors.Is(err, ErrVersion) {
		t.Errorf("a newer version: %v", err)
	}
	older := armour(strings.Replace(inner, `"version":2`, `"version":1`, 1))
	if _, err := Unmarshal(older); !errors.Is(err, ErrVersion) || !strings.Contains(err.Error(), "enrol") {
		t.Errorf("version 1: %v", err)
	}
	for i := 0; i < len(text); i += 5 {
		bad := bytes.Clone(text)
		bad[i] ^= 1
		if b, err := Unmarshal(bad); err == nil && cmp.Equal(b, sample(t)) {
			t.Errorf("byte %d changed and nothing seen", i)
		}
	}
}

func TestFingerprint(t *testing.T) {
	a, b := sample(t), sample(t)
	if f := a.Fingerprint(); len(f) != 32+7 || f != b.Fingerprint() {
		t.Errorf("fingerprint %q", f)
	}
	b.Signer = bytes.Clone(b.Signer)
	b.Signer[7] ^= 1
	if a.Fingerprint() == b.Fingerprint() {
		t.Error("another key has the same fingerprint")
	}
}

func TestSecretsOnDisk(t *testing.T) {
	dir := t.TempDir()
	s, public, err := Generate(rekey.XWing, secret.Bytes{})
	if err != nil {
		t.Fatal(err)
	}
	peer, other, err := Generate(rekey.XWing, s.Link)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Equal(public, other) || bytes.Equal(s.Seed.Expose(), peer.Seed.Expose()) {
		t.Error("both ends get the same key")
	}
	if !bytes.Equal(s.Link.Expose(), peer.Link.Expose()) {
		t.Error("the ends get different link secrets")
	}
	if err := WriteSecrets(dir, s); err != nil {
		t.Fatal(err)
	}
	if err := WriteSecrets(dir, peer); !errors.Is(err, ErrExists) {
		t.Errorf("secrets are overwritten: %v", err)
	}
	for _, name := range []string{SeedFile, LinkFile} {
		info, err := os.Stat(filepath.Join(dir, name))
		if err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", name, info, err)
		}
	}
	got, err := ReadSecrets(dir)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got.Seed.Expose(), s.Seed.Expose()) || !bytes.Equal(got.Link.Expose(), s.Link.Expose()) {
		t.Error("other secrets come back")
	}
	seed := got.Seed.Expose()
	got.Clear()
	if !bytes.Equal(seed, make([]byte, 32)) {
		t.Error("Clear leaves the seed")
	}
	if err := os.Chmod(filepath.Join(dir, SeedFile), 0o640); err != nil {
		t.Fatal(err)
	}
	if _, err := ReadSecrets(dir); !errors.Is(err, secret.ErrExposed) {
		t.Errorf("a seed that the group can read: %v", err)
	}
	if _, err := ReadSecrets(t.TempDir()); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no files: %v", err)
	}
}

func TestSecretsAreChecked(t *testing.T) {
	if _, _, err := Generate(rekey.XWing, secret.New(32)); !errors.Is(err, ErrFormat) {
		t.Errorf("a zero link secret: %v", err)
	}
	if _, _, err := Generate(rekey.XWing, secret.Copy(make([]byte, 16))); !errors.Is(err, ErrFormat) {
		t.Errorf("a short link secret: %v", err)
	}
	if _, _, err := Generate(77, secret.Bytes{}); !errors.Is(err, rekey.ErrConfig) {
		t.Errorf("suite 77: %v", err)
	}
	if err := WriteSecrets(t.TempDir(), &Secrets{}); !errors.Is(err, ErrFormat) {
		t.Errorf("empty secrets: %v", err)
	}
	if err := WriteSecrets(filepath.Join(t.TempDir(), "none"), mustGenerate(t)); err == nil {
		t.Error("a folder that does not exist")
	}
	if a, b := NewLinkID(), NewLinkID(); a == b {
		t.Error("two link_ids are the same")
	}
}

func mustGenerate(t testing.TB) *Secrets {
	s, _, err := Generate(rekey.XWing, secret.Bytes{})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestDecodeSecretIsStrict(t *testing.T) {
	good := base64.StdEncoding.EncodeToString(bytes.Repeat([]byte{0xa5}, 32)) + "\n"
	if b, err := decodeSecret([]byte(good)); err != nil || b.Len() != 32 {
		t.Fatalf("the good form: %v", err)
	}
	for name, text := range map[string]string{
		"empty": "", "no line end": good[:44], "two line ends": good + "\n", "CR": good[:44] + "\r",
		"line end inside": good[:20] + "\n" + good[20:43] + "\n", "not base64": "*" + good[1:],
		"33 bytes":       base64.StdEncoding.EncodeToString(make([]byte, 33)) + "\n",
		"31 bytes":       base64.StdEncoding.EncodeToString(make([]byte, 31)) + "\n",
		"loose end bits": good[:42] + "V=\n",
	} {
		_, err := decodeSecret([]byte(text))
		if !errors.Is(err, ErrFormat) {
			t.Errorf("%s: %v", name, err)
		} else if len(text) > 20 && strings.Contains(err.Error(), text[:8]) {
			t.Errorf("%s: the error shows the secret: %v", name, err)
		}
	}
}

func TestSecretsAreHidden(t *testing.T) {
	s := mustGenerate(t)
	js, _ := json.Marshal(s)
	for _, text := range []string{fmt.Sprintf("%v %+v %#v %x %s", s, s, s, s, s), string(js)} {
		for _, b := range []secret.Bytes{s.Seed, s.Link} {
			for _, form := range []string{fmt.Sprintf("%x", b.Expose()), fmt.Sprint(b.Expose()),
				base64.StdEncoding.EncodeToString(b.Expose())} {
				if strings.Contains(text, form) {
					t.Fatalf("a secret is shown: %s", text)
				}
			}
		}
	}
}

func TestSecretRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		raw := rapid.SliceOfN(rapid.Byte(), 32, 32).Draw(t, "secret")
		b, err := decodeSecret(encodeSecret(secret.Copy(raw)).Expose())
		if err != nil || !bytes.Equal(b.Expose(), raw) {
			t.Fatalf("%v", err)
		}
	})
}

func FuzzUnmarshal(f *testing.F) {
	text, err := sample(f).Marshal()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(text)
	f.Add(armour(`{"version":2}`))
	f.Add([]byte(begin + end))
	f.Fuzz(func(t *testing.T, text []byte) {
		b, err := Unmarshal(text)
		if err != nil {
			if !errors.Is(err, ErrFormat) && !errors.Is(err, ErrVersion) && !errors.Is(err, ErrSignature) {
				t.Fatalf("error of another kind: %v", err)
			}
			return
		}
		again, err := b.Marshal()
		if err != nil || !bytes.Equal(again, text) {
			t.Fatalf("a bundle of two forms, %v", err)
		}
	})
}

func FuzzDecodeSecret(f *testing.F) {
	f.Add(encodeSecret(secret.Copy(make([]byte, 32))).Expose())
	f.Add([]byte("\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		if b, err := decodeSecret(text); err == nil && !bytes.Equal(encodeSecret(b).Expose(), text) {
			t.Fatal("a secret of two forms")
		}
	})
}
