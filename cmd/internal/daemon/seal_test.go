package daemon

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/quietline/quietline/cmd/internal/config"
	"github.com/quietline/quietline/cmd/internal/control"
	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/kms"
	"github.com/quietline/quietline/kms/keyring"
	"github.com/quietline/quietline/secret"
)

var phrase = secret.Copy([]byte("correct horse battery staple"))

// sealedRoot puts a root key under the passphrase and returns the key that
// opens it.
func sealedRoot(t *testing.T, path string) secret.Bytes {
	t.Helper()
	if err := keyring.NewSealedRoot(path, phrase); err != nil {
		t.Fatal(err)
	}
	s, err := keyring.ReadSealedRoot(path)
	if err != nil {
		t.Fatal(err)
	}
	return s.Key(phrase)
}

// ask sends a request as an SAE and returns the answer's code and text.
func (l *lit) ask(t *testing.T, method, sae, door, path string) (int, string) {
	t.Helper()
	c := &http.Client{Transport: &http.Transport{DisableKeepAlives: true,
		TLSClientConfig: l.certificates(t, sae).Client()}}
	req, err := http.NewRequestWithContext(t.Context(), method, "https://"+door+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	res, err := c.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return res.StatusCode, string(body)
}

// TestSealedStart: a key manager whose root key is under a passphrase answers
// nobody and reads no device before it is unsealed; then it serves; sealed by
// command it forgets everything and can be unsealed again, with its stock.
func TestSealedStart(t *testing.T) {
	var key secret.Bytes
	path := ""
	opened := make(chan error, 1)
	l := newLit(t, 8, 4096, func(_, kochi *Env) {
		path = kochi.Site.KME.RootKey + ".sealed"
		key = sealedRoot(t, path)
		kochi.Site.KME.RootKey = path
		env := *kochi
		go func() { opened <- checkSealed(t, env, key) }()
	})
	if err := <-opened; err != nil {
		t.Fatal(err)
	}
	if s := kmeStatus(t, l.kochi); s.Sealed || !s.Serving {
		t.Errorf("after unseal: %+v", s)
	}
	a, b := l.client(t, "sae-tokyo", l.tokyoDoor), l.client(t, "sae-kochi", l.kochiDoor)
	give := func() error {
		keys, err := a.Keys(t.Context(), etsi014.KeyRequest{
			Targets: []etsi014.SAEID{"sae-kochi"}, Number: 1})
		if err != nil {
			return err
		}
		_, err = b.KeysByID(t.Context(), etsi014.IDRequest{Initiator: "sae-tokyo",
			IDs: []etsi014.KeyID{keys.Keys[0].ID}})
		return err
	}
	if err := give(); err != nil {
		t.Fatal(err)
	}
	c := control.Dial(l.kochi.KME.Control)
	if err := c.Seal(t.Context()); err != nil {
		t.Fatal(err)
	}
	await(t, "kochi is sealed", func() bool { return kmeStatus(t, l.kochi).Sealed })
	await(t, "tokyo sees it go", func() bool { return !kmeStatus(t, l.tokyo).Peers[0].Up })
	if err := c.Seal(t.Context()); !errors.Is(err, control.ErrRefused) {
		t.Errorf("seal once more: %v", err)
	}
	if code, text := l.ask(t, "GET", "sae-kochi", l.kochiDoor,
		"/api/v1/keys/sae-tokyo/status"); code != 503 || text != sealedAnswer {
		t.Errorf("sealed: %d %s", code, text)
	}
	if err := c.Unseal(t.Context(), key); err != nil {
		t.Fatal(err)
	}
	await(t, "keys again", func() bool { return give() == nil })
}

// checkSealed looks at kochi's door before it is unsealed, and unseals it.
func checkSealed(t *testing.T, env Env, key secret.Bytes) error {
	c := control.Dial(env.Site.KME.Control)
	var k *control.KME
	for {
		st, err := c.Status(t.Context())
		if err == nil {
			k = st.KME
			break
		}
		if t.Context().Err() != nil {
			return err
		}
		time.Sleep(5 * time.Millisecond)
	}
	if !k.Sealed || k.SealedSince == nil || k.Serving || k.PeerListen != "" || len(k.Links) != 0 ||
		!strings.Contains(k.Reason, "sealed since") {
		t.Errorf("sealed status %+v", k)
	}
	l := &lit{tokyo: env.Site}
	for _, r := range []struct{ method, sae, path string }{
		{"GET", "sae-kochi", "/api/v1/keys/sae-tokyo/status"},
		{"GET", "sae-kochi", "/api/v1/keys/sae-tokyo/enc_keys"},
		{"POST", "sae-kochi", "/api/v1/keys/sae-tokyo/dec_keys"},
		{"GET", "sae-tokyo", "/api/v1/keys/x/status"}, // no SAE of this site
		{"DELETE", "sae-kochi", "/nothing"},
		{"HEAD", "sae-kochi", "/"},
	} {
		code, text := l.ask(t, r.method, r.sae, k.Listen, r.path)
		var body struct{ Message string }
		if code != 503 || r.method != "HEAD" && (json.Unmarshal([]byte(text), &body) != nil ||
			body.Message != "key manager is sealed") {
			t.Errorf("%+v while sealed: %d %s", r, code, text)
		}
	}
	for _, err := range c.Audit(t.Context()) {
		if !strings.Contains(err.Error(), "sealed") {
			t.Errorf("audit while sealed: %v", err)
		}
	}
	wrong := secret.Copy(bytes.Repeat([]byte{1}, keyring.KeySize))
	if err := c.Unseal(t.Context(), wrong); !errors.Is(err, control.ErrRefused) ||
		!strings.Contains(err.Error(), "passphrase does not fit") {
		t.Errorf("wrong passphrase: %v", err)
	}
	if _, err := os.Stat(filepath.Join(storeDir(env.Site), "kms.db")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a sealed key manager has opened its store: %v", err)
	}
	await(t, "the pause is over", func() bool { return c.Unseal(t.Context(), key) == nil })
	return nil
}

// TestVaultSlowsTriesDown: each wrong passphrase doubles the pause, up to a
// minute; none is looked at in between, not even the right one.
func TestVaultSlowsTriesDown(t *testing.T) {
	path := filepath.Join(t.TempDir(), "root")
	key := sealedRoot(t, path)
	synctest.Test(t, func(t *testing.T) {
		v := newVault(slog.New(slog.DiscardHandler))
		defer v.close()
		if err := v.load(&config.KME{RootKey: path}); err != nil {
			t.Fatal(err)
		}
		wrong := secret.New(keyring.KeySize)
		pause := time.Second
		for n := range uint64(9) {
			if err := v.unseal(wrong); !errors.Is(err, kms.ErrPassphrase) {
				t.Fatalf("try %d: %v", n+1, err)
			}
			time.Sleep(pause - time.Nanosecond)
			if err := v.unseal(key); !errors.Is(err, ErrSoon) {
				t.Errorf("try %d: the right one %v after it: %v", n+1, pause, err)
			}
			time.Sleep(time.Nanosecond)
			pause = min(2*pause, time.Minute)
			if _, _, tries := v.state(); tries != n+1 {
				t.Errorf("%d tries, want %d", tries, n+1)
			}
		}
		if _, err := v.key(); !errors.Is(err, kms.ErrSealed) {
			t.Errorf("key while sealed: %v", err)
		}
		if err := v.unseal(key); err != nil {
			t.Fatal(err)
		}
		if err := v.unseal(key); !errors.Is(err, ErrUnsealed) {
			t.Errorf("unseal once more: %v", err)
		}
		if n := v.counted(); n != 9 {
			t.Errorf("%d wrong tries for the audit log, want 9", n)
		}
		root, err := v.key()
		if err != nil || root.Len() != keyring.KeySize {
			t.Errorf("key: %d bytes, %v", root.Len(), err)
		}
		root.Clear()
		if err := v.load(&config.KME{RootKey: path}); err != nil {
			t.Fatal(err)
		}
		if sealed, _, _ := v.state(); sealed {
			t.Error("a second load of the same file seals")
		}
		shut := v.sealed()
		v.drop()
		<-shut
		if sealed, _, _ := v.state(); !sealed {
			t.Error("not sealed after drop")
		}
		inner, stop := v.until(t.Context())
		defer stop()
		<-inner.Done() // who comes late must not run on
	})
}

func TestRootCredential(t *testing.T) {
	k := &config.KME{RootCredential: "root"}
	for name, dir := range map[string]string{"no systemd": "", "no such credential": t.TempDir()} {
		t.Setenv("CREDENTIALS_DIRECTORY", dir)
		err := newVault(slog.New(slog.DiscardHandler)).load(k)
		if !errors.Is(err, ErrCredential) || !strings.Contains(err.Error(), "LoadCredentialEncrypted=root") {
			t.Errorf("%s: %v", name, err)
		}
	}
	dir := t.TempDir()
	t.Setenv("CREDENTIALS_DIRECTORY", dir)
	sealedRoot(t, filepath.Join(dir, "root"))
	if err := newVault(slog.New(slog.DiscardHandler)).load(k); !errors.Is(err, kms.ErrSealed) {
		t.Errorf("a credential under a passphrase: %v", err)
	}
	if err := errors.Join(os.Remove(filepath.Join(dir, "root")),
		os.WriteFile(filepath.Join(dir, "root"), make([]byte, 32), 0o400)); err != nil {
		t.Fatal(err)
	}
	v := newVault(slog.New(slog.DiscardHandler))
	defer v.close()
	if err := v.load(k); err != nil {
		t.Error(err)
	}
	if err := v.maySeal(); !errors.Is(err, ErrNoPassphrase) {
		t.Errorf("seal without a passphrase: %v", err)
	}
}

// TestConfigurationIsAudited: at the first start, when it changed, and not
// otherwise.
func TestConfigurationIsAudited(t *testing.T) {
	a, b := simSites(t)
	addKMEs(t, a.Site, b.Site)
	a.Site.Links, a.Site.Peers = nil, nil
	a.Site.SAEs = a.Site.SAEs[:1]
	for i, want := range []int{1, 1, 2, 3, 3} {
		switch i {
		case 2:
			a.Site.KME.MaxKeys = 7
		case 3:
			a.Site.KME.MaxKeys = 8
		}
		stop := start(t, func(ctx context.Context) error { return KME(ctx, a) })
		await(t, "start is recorded", func() bool { return noted(t, a.Site, kms.NoteUnsealed) == i+1 })
		if n := noted(t, a.Site, kms.NoteConfig); n != want {
			t.Errorf("start %d: %d changes recorded, want %d", i+1, n, want)
		}
		stop()
	}
}

// noted counts notes of the audit log that begin with a reason; -1 while the
// key manager does not answer.
func noted(t *testing.T, s *config.Site, reason string) (n int) {
	for rec, err := range control.Dial(s.KME.Control).Audit(t.Context()) {
		if err != nil {
			return -1
		}
		for _, l := range rec.Lines {
			if strings.HasPrefix(l.Reason, reason) {
				n++
			}
		}
	}
	return n
}
