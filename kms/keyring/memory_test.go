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

// TestOpenerHoldsNoKeyInClear: between two answers an open segment's data key
// lies in memory only wrapped, in no spread-out form either, and the turn of
// the epoch does not take it away.
func TestOpenerHoldsNoKeyInClear(t *testing.T) {
	r, _, root := newRing(t)
	defer r.Close()
	root.Clear()
	sealed, err := r.Seal(seg, plain(8), 32)
	if err != nil {
		t.Fatal(err)
	}
	if sealed.Key, err = r.Settle(Name(seg), sealed.Key); err != nil {
		t.Fatal(err)
	}
	key, err := r.Unwrap(Name(seg), sealed.Key)
	if err != nil {
		t.Fatal(err)
	}
	needles := []memscan.Needle{memscan.Hide(key.Expose())}
	key.Clear()
	o, err := r.Opener(seg, sealed, 32)
	if err != nil {
		t.Fatal(err)
	}
	next, err := r.Next()
	if err == nil {
		err = r.Finish(next)
	}
	if err != nil {
		t.Fatal(err)
	}
	open, err := o.Open()
	if err != nil {
		t.Fatal(err)
	}
	k, err := open.Key(3, 1, 256)
	if err != nil {
		t.Fatal(err)
	}
	k.Clear()
	report, err := memscan.Scan(needles...) // as expanded keys begin with the key
	if err != nil {
		t.Fatal(err)
	}
	if raw, _ := report.Total(); raw == 0 {
		t.Error("no copy while the segment is spread out: the test cannot fail")
	}
	open.Close()
	if k, err = o.Key(4, 2, 512); err != nil {
		t.Fatal(err)
	}
	k.Clear()
	if report, err = memscan.Scan(needles...); err != nil {
		t.Fatal(err)
	}
	if raw, text := report.Total(); raw+text > 0 {
		t.Errorf("%d raw and %d base64 copies of the data key: %+v", raw, text, report.Counts)
	}
	r.Close()
	if _, err := o.Key(0, 1, 256); err == nil {
		t.Error("an opener outlives its ring")
	}
}

// BenchmarkOpener: what it costs not to keep data keys in clear: per answer
// with one key, and with 128.
func BenchmarkOpener(b *testing.B) {
	path := filepath.Join(b.TempDir(), "epoch.keys")
	r, err := Open(path, secret.Own(make([]byte, KeySize)), 0, true)
	if err != nil {
		b.Fatal(err)
	}
	defer r.Close()
	sealed, err := r.Seal(seg, plain(128), 32)
	if err != nil {
		b.Fatal(err)
	}
	o, err := r.Opener(seg, sealed, 32)
	if err != nil {
		b.Fatal(err)
	}
	for _, c := range []struct {
		name string
		keys int
	}{{"keys=1", 1}, {"keys=128", 128}} {
		b.Run(c.name, func(b *testing.B) {
			for b.Loop() {
				open, err := o.Open()
				if err != nil {
					b.Fatal(err)
				}
				for i := range c.keys {
					if k, err := open.Key(i, 1, 256); err != nil {
						b.Fatal(err)
					} else {
						k.Clear()
					}
				}
				open.Close()
			}
		})
	}
	b.Run("kept", func(b *testing.B) { // as it would be with the key in clear
		open, err := o.Open()
		if err != nil {
			b.Fatal(err)
		}
		defer open.Close()
		for b.Loop() {
			if k, err := open.Key(0, 1, 256); err != nil {
				b.Fatal(err)
			} else {
				k.Clear()
			}
		}
	})
}
