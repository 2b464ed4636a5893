package daemon

import (
	"context"
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/quietline/quietline/cmd/internal/control"
	"github.com/quietline/quietline/kms/keyring"
	"github.com/quietline/quietline/secret"
	"github.com/quietline/quietline/secret/memscan"
)

// makeSealedRoot is the verb that derives the key, in a process of its own: it
// puts a root key under a passphrase and tells the key veiled.
func makeSealedRoot(path string) int {
	err := keyring.NewSealedRoot(path, phrase)
	if err == nil {
		var s *keyring.SealedRoot
		if s, err = keyring.ReadSealedRoot(path); err == nil {
			key := s.Key(phrase).Expose()
			for i := range key {
				key[i] ^= drawVeil
			}
			fmt.Printf("%x\n", key)
			return 0
		}
	}
	fmt.Println(err)
	return 1
}

// sealedRootElsewhere is sealedRoot without a trace in this process; the key is
// in locked memory.
func sealedRootElsewhere(t *testing.T, path string) secret.Bytes {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), "QUIETLINE_TEST_SEALED_ROOT="+path)
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	veiled, err := hex.DecodeString(strings.TrimSpace(string(out)))
	if err != nil {
		t.Fatal(err)
	}
	key, err := secret.NewLocked(len(veiled))
	if err != nil {
		t.Fatal(err)
	}
	for i := range veiled {
		key.Expose()[i] = veiled[i] ^ drawVeil
	}
	return key
}

// TestUnsealLeavesNoCopies: neither the key of the passphrase, on its way over
// the control socket, nor the root key stays anywhere in memory that can be
// read, while the key manager serves and after it was sealed again. Both ends of
// the socket are in this process.
func TestUnsealLeavesNoCopies(t *testing.T) {
	a, b := simSites(t)
	addKMEs(t, a.Site, b.Site)
	a.Site.Links, a.Site.Peers = nil, nil
	a.Site.SAEs = a.Site.SAEs[:1]
	path := a.Site.KME.RootKey + ".sealed"
	a.Site.KME.RootKey = path
	key := sealedRootElsewhere(t, path)
	s, err := keyring.ReadSealedRoot(path)
	if err != nil {
		t.Fatal(err)
	}
	root, err := s.Open(key)
	if err != nil {
		t.Fatal(err)
	}
	needles := []memscan.Needle{memscan.Hide(key.Expose()), memscan.Hide(root.Expose())}
	root.Clear()
	seen := secret.Copy(key.Expose()) // locked memory may not be seen
	if r, err := memscan.Scan(needles[0]); err != nil || r.Counts[0].Raw == 0 {
		t.Fatalf("positive control: %+v, %v", r.Counts, err)
	}
	seen.Clear()
	defer start(t, func(ctx context.Context) error { return KME(ctx, a) })()
	await(t, "it is sealed", func() bool { return kmeStatus(t, a.Site).Sealed })
	c := control.Dial(a.Site.KME.Control)
	if err := c.Unseal(t.Context(), key); err != nil {
		t.Fatal(err)
	}
	key.Clear()
	none := func(when string, locked int) {
		t.Helper()
		r, err := memscan.Scan(needles...)
		if err != nil {
			t.Fatal(err)
		}
		if r.Unreadable > 0 {
			locked = 0 // memfd_secret: not even we can read it
		}
		k, root := r.Counts[0], r.Counts[1]
		if k.Raw+k.Base64 > 0 || root.Raw > locked || root.Base64 > 0 {
			t.Errorf("%s: %d copies of the passphrase's key, %d of the root key: %+v", when, k.Raw+k.Base64,
				root.Raw+root.Base64, r.Counts)
		}
	}
	await(t, "it serves", func() bool { return kmeStatus(t, a.Site).Serving })
	none("while it serves", 2) // of vault and ring
	if err := c.Seal(t.Context()); err != nil {
		t.Fatal(err)
	}
	await(t, "it is sealed again", func() bool { return kmeStatus(t, a.Site).Sealed })
	none("sealed again", 0)
}
