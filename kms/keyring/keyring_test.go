package keyring

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/quietline/quietline/kms"
	"github.com/quietline/quietline/secret"
)

var seg = kms.SegmentID{Link: "l", Generation: 1, Number: 2}

func newRing(t *testing.T) (r *Ring, path string, root secret.Bytes) {
	t.Helper()
	path, root = filepath.Join(t.TempDir(), "epoch.keys"), secret.Copy(bytes.Repeat([]byte{7}, KeySize))
	r, err := Open(path, root, 0, true)
	if err != nil {
		t.Fatal(err)
	}
	return r, path, root
}

func plain(n int) []byte {
	b := make([]byte, 32*n)
	for i := range b {
		b[i] = byte(i * 3)
	}
	return b
}

func TestSlotsComeBack(t *testing.T) {
	r, _, _ := newRing(t)
	slots := plain(5)
	sealed, err := r.Seal(seg, slots, 32)
	if err != nil {
		t.Fatal(err)
	}
	if sealed.Key, err = r.Settle(Name(seg), sealed.Key); err != nil || sealed.Key.Epoch != 1 {
		t.Fatalf("Settle: epoch %d, %v", sealed.Key.Epoch, err)
	}
	o, err := r.Opener(seg, sealed, 32)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ first, n, bits int }{{0, 1, 256}, {4, 1, 64}, {1, 3, 768}, {2, 2, 264}} {
		got, err := o.Key(c.first, c.n, c.bits)
		if err != nil || !bytes.Equal(got.Expose(), slots[32*c.first:32*c.first+c.bits/8]) {
			t.Errorf("%+v: %x, %v", c, got.Expose(), err)
		}
	}
	for _, c := range []struct{ first, n, bits int }{{-1, 1, 8}, {5, 1, 8}, {4, 2, 8}, {0, 0, 0},
		{0, 1, 264}} {
		if _, err := o.Key(c.first, c.n, c.bits); !errors.Is(err, kms.ErrCorrupt) {
			t.Errorf("%+v: %v, want ErrCorrupt", c, err)
		}
	}
}

// TestSealedIsBound: slots cannot be flipped, swapped, or moved to another
// segment, nor a data key.
func TestSealedIsBound(t *testing.T) {
	r, _, _ := newRing(t)
	sealed, err := r.Seal(seg, plain(2), 32)
	if err != nil {
		t.Fatal(err)
	}
	other := seg
	other.Number++
	if _, err := r.Opener(other, sealed, 32); !errors.Is(err, kms.ErrCorrupt) {
		t.Errorf("another segment's key: %v", err)
	}
	for bit := range 8 * 48 {
		sealed.Slots[bit/8] ^= 1 << (bit % 8)
		o, err := r.Opener(seg, sealed, 32)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := o.Key(0, 1, 256); !errors.Is(err, kms.ErrCorrupt) {
			t.Fatalf("bit %d flipped: %v", bit, err)
		}
		sealed.Slots[bit/8] ^= 1 << (bit % 8)
	}
	swapped := sealed
	swapped.Slots = append(bytes.Clone(sealed.Slots[48:]), sealed.Slots[:48]...)
	o, err := r.Opener(seg, swapped, 32)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := o.Key(0, 1, 256); !errors.Is(err, kms.ErrCorrupt) {
		t.Errorf("swapped slots: %v", err)
	}
	for i := range sealed.Key.Bytes {
		bad := kms.Wrapped{Epoch: sealed.Key.Epoch, Bytes: bytes.Clone(sealed.Key.Bytes)}
		bad.Bytes[i] ^= 1
		if _, err := r.Unwrap(Name(seg), bad); !errors.Is(err, kms.ErrCorrupt) {
			t.Errorf("byte %d of the wrapped key flipped: %v", i, err)
		}
	}
}

// TestTurnForgets: after a turn a copy of everything that was on the disk opens
// nothing that was left out, and what was kept still opens.
func TestTurnForgets(t *testing.T) {
	r, path, root := newRing(t)
	slots := plain(4)
	old, err := r.Seal(seg, slots, 32)
	if err != nil {
		t.Fatal(err)
	}
	if old.Key, err = r.Settle(Name(seg), old.Key); err != nil {
		t.Fatal(err)
	}
	next, err := r.Next()
	if err != nil {
		t.Fatal(err)
	}
	gone := kms.NewBitmap(4)
	gone.Set(1)
	fresh, err := r.Reseal(seg, old, 32, gone, next)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Finish(next); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Unwrap(Name(seg), old.Key); !errors.Is(err, kms.ErrCorrupt) {
		t.Errorf("the old wrapping opens: %v", err)
	}
	again, err := Open(path, root, next, false)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := again.Unwrap(Name(seg), old.Key); !errors.Is(err, kms.ErrCorrupt) {
		t.Errorf("the old wrapping opens after a restart: %v", err)
	}
	for _, r := range []*Ring{r, again} {
		o, err := r.Opener(seg, fresh, 32)
		if err != nil {
			t.Fatal(err)
		}
		for i := range 4 {
			key, err := o.Key(i, 1, 256)
			if i == 1 {
				if !errors.Is(err, kms.ErrCorrupt) {
					t.Errorf("slot 1 was left out and opens: %v", err)
				}
			} else if err != nil || !bytes.Equal(key.Expose(), slots[32*i:32*i+32]) {
				t.Errorf("slot %d: %v", i, err)
			}
		}
		// The data key is another: old slots under it do not open.
		mixed := kms.Sealed{Key: fresh.Key, Slots: old.Slots}
		o, err = r.Opener(seg, mixed, 32)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := o.Key(1, 1, 256); !errors.Is(err, kms.ErrCorrupt) {
			t.Errorf("the old ciphertext opens under the new data key: %v", err)
		}
	}
}

// TestHalfTurns: a crash before the commit destroys the new key, one after it
// the old.
func TestHalfTurns(t *testing.T) {
	for _, committed := range []bool{false, true} {
		r, path, root := newRing(t)
		w, err := r.Wrap([]byte("x"), plain(1))
		if err != nil {
			t.Fatal(err)
		}
		next, err := r.Next()
		if err != nil {
			t.Fatal(err)
		}
		moved, err := r.Rewrap([]byte("x"), w, next)
		if err != nil {
			t.Fatal(err)
		}
		epoch, live, lost := uint64(0), w, moved
		if committed {
			epoch, live, lost = next, moved, w
		}
		for range 2 { // the second start finds one slot only
			r, err = Open(path, root, epoch, false)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := r.Unwrap([]byte("x"), live); err != nil {
				t.Errorf("committed %v: the live wrapping: %v", committed, err)
			}
			if _, err := r.Unwrap([]byte("x"), lost); err == nil {
				t.Errorf("committed %v: the lost wrapping opens", committed)
			}
		}
		for range 3 { // and turns go on
			if epoch, err = r.Next(); err != nil {
				t.Fatal(err)
			}
			if live, err = r.Rewrap([]byte("x"), live, epoch); err != nil {
				t.Fatal(err)
			}
			if err := r.Finish(epoch); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func TestOpenRefuses(t *testing.T) {
	_, path, root := newRing(t)
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	write := func(b []byte) {
		t.Helper()
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	flipped := bytes.Clone(good)
	flipped[40] ^= 1
	for name, c := range map[string]struct {
		file  []byte
		root  secret.Bytes
		epoch uint64
		want  error
		text  string
	}{
		"another root":   {good, secret.Copy(bytes.Repeat([]byte{8}, KeySize)), 0, kms.ErrRootKey, "set up with"},
		"flipped":        {flipped, root, 0, kms.ErrCorrupt, "neither slot"},
		"cut":            {good[:slotSize-1], root, 0, kms.ErrCorrupt, "neither slot"},
		"empty":          {nil, root, 0, kms.ErrCorrupt, "neither slot"},
		"a newer store":  {good, root, 9, kms.ErrCorrupt, "older copy"},
		"root too short": {good, secret.New(5), 0, nil, "invalid key size"},
	} {
		write(c.file)
		_, err := Open(path, c.root, c.epoch, false)
		if err == nil || c.want != nil && !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.text) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
	if _, err := Open(path+".none", root, 0, false); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no file, not fresh: %v", err)
	}
	write(good)
	if _, err := Open(path, root, 0, true); err != nil {
		t.Errorf("the good file: %v", err)
	}
}

func TestRootKeyFiles(t *testing.T) {
	path := filepath.Join(t.TempDir(), "root.key")
	if err := NewRootKey(path); err != nil {
		t.Fatal(err)
	}
	key, err := ReadRootKey(path)
	if err != nil || key.Len() != KeySize || bytes.Equal(key.Expose(), make([]byte, KeySize)) {
		t.Fatalf("ReadRootKey: %d bytes, %v", key.Len(), err)
	}
	if s := fmt.Sprintf("%v %+v %x", key, key, key); strings.Contains(s, fmt.Sprintf("%x", key.Expose()[:4])) {
		t.Error("the key shows itself")
	}
	if err := NewRootKey(path); !errors.Is(err, fs.ErrExist) {
		t.Errorf("NewRootKey over a file: %v", err)
	}
	if err := os.Chmod(path, 0o640); err != nil {
		t.Fatal(err)
	}
	if _, err := ReadRootKey(path); !errors.Is(err, secret.ErrExposed) {
		t.Errorf("exposed root key: %v", err)
	}
	short := path + ".short"
	if err := os.WriteFile(short, make([]byte, 16), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := ReadRootKey(short); err == nil || !strings.Contains(err.Error(), "16 bytes, want 32") {
		t.Errorf("short root key: %v", err)
	}
}

// TestRootKeyOfCredential: systemd shows a credential to the service as a file
// of mode 0400 in a folder of mode 0500.
func TestRootKeyOfCredential(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "quietline-kme.service")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	path, want := filepath.Join(dir, "root"), bytes.Repeat([]byte{3}, KeySize)
	if err := os.WriteFile(path, want, 0o400); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o500); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.Chmod(dir, 0o700) })
	root, err := ReadRootKey(path)
	if err != nil || !bytes.Equal(root.Expose(), want) {
		t.Fatalf("read a credential: %v", err)
	}
	root.Clear()
}
