package keyring

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/crypto/argon2"

	"github.com/quietline/quietline/kms"
	"github.com/quietline/quietline/secret"
)

var phrase = secret.Copy([]byte("correct horse battery staple"))

func TestRootUnderAPassphrase(t *testing.T) {
	path := filepath.Join(t.TempDir(), "root.key")
	if err := NewSealedRoot(path, phrase); err != nil {
		t.Fatal(err)
	}
	if err := NewSealedRoot(path, phrase); !errors.Is(err, fs.ErrExist) {
		t.Errorf("NewSealedRoot over a file: %v", err)
	}
	if _, err := ReadRootKey(path); !errors.Is(err, kms.ErrSealed) {
		t.Errorf("ReadRootKey: %v", err)
	}
	s, err := ReadSealedRoot(path)
	if err != nil {
		t.Fatal(err)
	}
	key := s.Key(phrase)
	root, err := s.Open(key)
	if err != nil || root.Len() != KeySize || bytes.Equal(root.Expose(), make([]byte, KeySize)) {
		t.Fatalf("Open: %d bytes, %v", root.Len(), err)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(data, root.Expose()[:8]) || bytes.Contains(data, phrase.Expose()[:8]) {
		t.Error("the file shows a secret")
	}
	// The key is what RFC 9106 says, of the file's own numbers.
	want := argon2.IDKey(phrase.Expose(), data[20:36], 3, 64<<10, 4, 32)
	if !bytes.Equal(want, key.Expose()) {
		t.Error("the key is not Argon2id with the second recommended parameters")
	}
	for name, k := range map[string]secret.Bytes{"another": s.Key(secret.Copy([]byte("correct horse battery stapl"))),
		"empty": s.Key(secret.Copy(nil)), "short": secret.New(16)} {
		if r, err := s.Open(k); !errors.Is(err, kms.ErrPassphrase) || r.Len() != 0 {
			t.Errorf("%s passphrase: %v", name, err)
		}
	}
}

func TestShortPassphraseIsRefused(t *testing.T) {
	path := filepath.Join(t.TempDir(), "root.key")
	err := NewSealedRoot(path, secret.Copy([]byte("14 characters.")))
	if !errors.Is(err, kms.ErrPassphrase) || !strings.Contains(err.Error(), "at least 15") {
		t.Errorf("err = %v", err)
	}
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a file was made: %v", err)
	}
}

// TestSealedRootIsBound: no byte of the file can be changed, not even with its
// checksum made good.
func TestSealedRootIsBound(t *testing.T) {
	path := filepath.Join(t.TempDir(), "root.key")
	if err := NewSealedRoot(path, phrase); err != nil {
		t.Fatal(err)
	}
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	s, err := parseSealedRoot(good)
	if err != nil {
		t.Fatal(err)
	}
	key := s.Key(phrase)
	for i := range good {
		bad := bytes.Clone(good)
		bad[i] ^= 1
		if _, err := parseSealedRoot(bad); !errors.Is(err, kms.ErrCorrupt) {
			t.Errorf("byte %d flipped: %v", i, err)
		}
		if i < sealedSize-32 {
			s, err := parseSealedRoot(summed(bad))
			if err == nil {
				_, err = s.Open(key)
			}
			if err == nil {
				t.Errorf("byte %d flipped and summed: it opens", i)
			}
		}
	}
	weak := bytes.Clone(good)
	weak[11] = 1 // one pass
	if _, err := parseSealedRoot(summed(weak)); err == nil || !strings.Contains(err.Error(), "weaker") {
		t.Errorf("weak costs: %v", err)
	}
	if err := os.Chmod(path, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := ReadSealedRoot(path); !errors.Is(err, secret.ErrExposed) {
		t.Errorf("exposed: %v", err)
	}
}

func FuzzParseSealedRoot(f *testing.F) {
	good := append([]byte("QLroot01\x00\x00\x00\x03\x00\x01\x00\x00\x00\x00\x00\x04"), make([]byte, 108)...)
	f.Add(summed(good))
	f.Add(good[:50])
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, b := range [][]byte{b, summed(bytes.Clone(b))} {
			s, err := parseSealedRoot(b)
			if err != nil {
				continue
			}
			if tt, m, p := s.costs(); tt > maxPasses || m > maxMemory || p > maxLanes || p == 0 {
				t.Errorf("costs %d %d %d are taken", tt, m, p)
			}
			if _, err := s.Open(secret.New(KeySize)); !errors.Is(err, kms.ErrPassphrase) {
				t.Errorf("a zero key: %v", err)
			}
		}
	})
}

// summed makes the checksum at the end of a file good.
func summed(b []byte) []byte {
	if len(b) >= 32 {
		sum := sha256.Sum256(b[:len(b)-32])
		copy(b[len(b)-32:], sum[:])
	}
	return b
}
