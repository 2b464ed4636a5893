package daemon

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/quietline/quietline/cmd/internal/control"
	"github.com/quietline/quietline/kms"
	"github.com/quietline/quietline/kms/keyring"
	"github.com/quietline/quietline/secret"
)

// Rotation changes the root key of a running key manager. It can be cut short
// at any step: at every moment the file at Path starts the key manager, and
// the next Run goes on where the last one ended. Beside Path it uses two
// files: .next, the root key to come, and .old, the one before, which is
// destroyed at the end.
type Rotation struct {
	// Path is the root key file of the site.
	Path string
	// Client speaks to the key manager.
	Client *control.Client
	// New makes the file of the root key to come.
	New func(path string) error
	// Key asks for the passphrase of a file and makes its key.
	Key func(path string, s *keyring.SealedRoot) (secret.Bytes, error)
	// Replace gives up a root key that was admitted and is lost.
	Replace bool

	reached func(step string) error // of tests; nil = go on
}

// Run begins a change or ends one that was begun; it tells which.
func (r *Rotation) Run(ctx context.Context) (resumed bool, err error) {
	next, old := r.Path+".next", r.Path+".old"
	begun, err := isThere(next)
	if err != nil {
		return false, err
	}
	half, err := isThere(old)
	if err != nil {
		return false, err
	}
	if begun || !half {
		if !begun {
			if err := r.New(next); err != nil {
				return false, err
			}
		}
		if err := sameOwner(next, r.Path); err != nil {
			return begun, err
		}
		if err := r.admit(ctx, next, !begun); err != nil {
			return begun, err
		}
		if err := r.swap(next, old); err != nil {
			return begun, fmt.Errorf("put root key in place: %w", err)
		}
	}
	return begun || half, r.adopt(ctx, old)
}

func isThere(path string) (bool, error) {
	_, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

func (r *Rotation) at(step string) error {
	if r.reached == nil {
		return nil
	}
	return r.reached(step)
}

// admit has the key manager take the root key to come beside its own. A fresh
// one that it refuses is of no use to anybody.
func (r *Rotation) admit(ctx context.Context, next string, fresh bool) error {
	if err := r.at("made"); err != nil {
		return err
	}
	root, err := r.read(next)
	if err != nil {
		return err
	}
	defer root.Clear()
	step := control.RootAdmit
	if r.Replace {
		step = control.RootReplace
	}
	if err := r.Client.Root(ctx, step, root); err != nil {
		if fresh && errors.Is(err, control.ErrRefused) {
			err = errors.Join(err, destroy(next))
		}
		return err
	}
	return r.at("admitted")
}

// read opens a root key file.
func (r *Rotation) read(path string) (secret.Bytes, error) {
	root, err := keyring.ReadRootKey(path)
	if !errors.Is(err, kms.ErrSealed) {
		return root, err
	}
	key, err := r.key(path)
	if err != nil {
		return secret.Bytes{}, err
	}
	defer key.Clear()
	s, err := keyring.ReadSealedRoot(path)
	if err != nil {
		return secret.Bytes{}, err
	}
	return s.Open(key)
}

// key is that of the passphrase of a root key file; empty if it has none.
func (r *Rotation) key(path string) (secret.Bytes, error) {
	s, err := keyring.ReadSealedRoot(path)
	if errors.Is(err, kms.ErrCorrupt) {
		root, err := keyring.ReadRootKey(path)
		root.Clear()
		return secret.Bytes{}, err
	} else if err != nil {
		return secret.Bytes{}, err
	}
	return r.Key(path, s)
}

// sameOwner gives a file to the owner of another: the daemon must be able to
// read what root makes for it.
func sameOwner(path, like string) error {
	var want, have unix.Stat_t
	if err := errors.Join(unix.Stat(like, &want), unix.Stat(path, &have)); err != nil {
		return fmt.Errorf("look at root key: %w", err)
	}
	if want.Uid == have.Uid && want.Gid == have.Gid {
		return nil
	}
	return os.Lchown(path, int(want.Uid), int(want.Gid))
}

// swap puts the root key to come in place and keeps the one before.
func (r *Rotation) swap(next, old string) error {
	if err := os.Remove(old); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.Link(r.Path, old); err != nil {
		return err
	}
	if err := r.at("linked"); err != nil {
		return err
	}
	if err := os.Rename(next, r.Path); err != nil {
		return err
	}
	if err := secret.SyncDir(filepath.Dir(r.Path)); err != nil {
		return err
	}
	return r.at("in place")
}

// adopt has the key manager go over to the root key in place, then destroys the
// one before.
func (r *Rotation) adopt(ctx context.Context, old string) error {
	key, err := r.key(r.Path)
	if err != nil {
		return err
	}
	defer key.Clear()
	if err := r.Client.Root(ctx, control.RootAdopt, key); err != nil {
		return err
	}
	if err := r.at("adopted"); err != nil {
		return err
	}
	return destroy(old)
}

// destroy overwrites a small file and removes it. What copies the disk or the
// file system kept of it stay.
func destroy(path string) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return fmt.Errorf("destroy %s: %w", path, err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err == nil {
		noise := make([]byte, info.Size())
		_, _ = rand.Read(noise)
		_, err = f.WriteAt(noise, 0)
	}
	if err == nil {
		err = f.Sync()
	}
	if err == nil {
		err = os.Remove(path)
	}
	if err == nil {
		err = secret.SyncDir(filepath.Dir(path))
	}
	if err != nil {
		return fmt.Errorf("destroy %s: %w", path, err)
	}
	return nil
}
