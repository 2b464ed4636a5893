//go:build linux

package keyring

import (
	"crypto/aes"
	"crypto/cipher"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/quietline/quietline/secret"
	"github.com/quietline/quietline/secret/memscan"
)

// TestLongLivedKeysAreInLockedMemoryOnly: after turns and wrappings no copy of
// the root or of an epoch key is left outside of locked memory, nor the key
// that AES begins its expanded form with.
func TestLongLivedKeysAreInLockedMemoryOnly(t *testing.T) {
	dir := t.TempDir()
	rootFile, path := filepath.Join(dir, "root"), filepath.Join(dir, "epoch.keys")
	if err := NewRootKey(rootFile); err != nil {
		t.Fatal(err)
	}
	root, err := ReadRootKey(rootFile)
	if err != nil {
		t.Fatal(err)
	}
	needles := []memscan.Needle{memscan.Hide(root.Expose())}
	r, err := Open(path, root, 0, true)
	root.Clear()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	needles = append(needles, memscan.Hide(r.epochs[1].Expose()),
		memscan.Hide(r.transit.Expose()))
	key := []byte("a data key that is not the needle")
	for range 3 {
		w, err := r.Wrap([]byte("use"), key)
		if err != nil {
			t.Fatal(err)
		}
		s, err := r.Seal(seg, make([]byte, 320), 32)
		if err != nil {
			t.Fatal(err)
		}
		next, err := r.Next()
		if err != nil {
			t.Fatal(err)
		}
		needles = append(needles, memscan.Hide(r.epochs[next].Expose()))
		if _, err := r.Rewrap([]byte("use"), w, next); err != nil {
			t.Fatal(err)
		}
		if _, err := r.Rewrap(Name(seg), s.Key, next); err != nil {
			t.Fatal(err)
		}
		if err := r.Finish(next); err != nil {
			t.Fatal(err)
		}
	}
	// Where the kernel has memfd_secret the scan cannot see locked memory;
	// else it finds the live keys there once: root, transit and epoch 4.
	live := 3
	if report, err := memscan.Scan(needles[0]); err != nil {
		t.Fatal(err)
	} else if report.Unreadable > 0 {
		live = 0
	}
	report, err := memscan.Scan(needles...)
	if err != nil {
		t.Fatal(err)
	}
	raw, text := report.Total()
	if raw > live || text > 0 {
		t.Errorf("%d raw copies, at most %d in locked memory are right, %d in base64: %+v", raw, live,
			text, report.Counts)
	}
	r.Close()
	if report, err = memscan.Scan(needles...); err != nil {
		t.Fatal(err)
	}
	if raw, text := report.Total(); raw+text > 0 {
		t.Errorf("after Close %d raw copies, %d in base64: %+v", raw, text, report.Counts)
	}
	if _, err := r.Wrap([]byte("use"), key); err == nil {
		t.Error("a closed ring wraps")
	}
}

// TestSealedIsGCM holds that what wipes its key seals as AES-256-GCM does: a
// key wiped too early would still open what it sealed.
func TestSealedIsGCM(t *testing.T) {
	dir := t.TempDir()
	root := secret.Own(make([]byte, KeySize))
	root.Expose()[0] = 7
	path := filepath.Join(dir, "epoch.keys")
	r, err := Open(path, root, 0, true)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	gcm := func(key []byte) cipher.AEAD {
		b, err := aes.NewCipher(key)
		if err != nil {
			t.Fatal(err)
		}
		a, err := cipher.NewGCM(b)
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
	slot, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	epoch, err := gcm(root.Expose()).Open(nil, slot[16:28], slot[28:recordLen], slot[:16])
	if err != nil {
		t.Fatalf("epoch slot is not AES-256-GCM under the root key: %v", err)
	}
	if diff := cmp.Diff(r.epochs[1].Expose(), epoch); diff != "" {
		t.Errorf("epoch key (-ring +file):\n%s", diff)
	}
	w, err := r.Wrap([]byte("use"), []byte("key"))
	if err != nil {
		t.Fatal(err)
	}
	key, err := gcm(epoch).Open(nil, w.Bytes[:nonceSize], w.Bytes[nonceSize:], []byte("use"))
	if err != nil || string(key) != "key" {
		t.Errorf("wrapping is not AES-256-GCM under the epoch key: %q, %v", key, err)
	}
}
