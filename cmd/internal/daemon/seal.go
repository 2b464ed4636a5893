package daemon

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/quietline/quietline/cmd/internal/config"
	"github.com/quietline/quietline/kms"
	"github.com/quietline/quietline/kms/keyring"
	"github.com/quietline/quietline/secret"
)

// Errors of a key manager's root key.
var (
	// ErrCredential: systemd shows no credential of the name in the site file.
	ErrCredential = errors.New("systemd credential is not there")
	// ErrNoPassphrase: the root key has no passphrase, so there is nothing to
	// seal or unseal.
	ErrNoPassphrase = errors.New("root key is under no passphrase")
	// ErrUnsealed: the key manager has its root key already.
	ErrUnsealed = errors.New("key manager is not sealed")
	// ErrSoon: tries to unseal come too fast.
	ErrSoon = errors.New("too many wrong passphrases")
)

// The pause after a wrong passphrase, doubling up to the longest. Whoever can
// try here can copy the root key file and try elsewhere as fast as Argon2id
// lets him: the pause is there so that tries are seen.
const (
	firstPause = time.Second
	mostPause  = time.Minute
)

// vault holds the root key of a key manager for as long as the process runs,
// also while the key manager begins anew. It is sealed while it has none. Its
// methods may be called from several goroutines; load by one.
type vault struct {
	path string // "" before load
	log  *slog.Logger

	mu    sync.Mutex
	root  secret.Bytes // in locked memory; empty = sealed
	since time.Time    // sealed since then
	tries uint64       // refused since then
	again time.Time    // no try before
	shut  chan struct{}
}

func newVault(log *slog.Logger) *vault { return &vault{log: log, shut: make(chan struct{})} }

// rootPath is where the root key lies.
func rootPath(k *config.KME) (string, error) {
	if k.RootCredential == "" {
		return k.RootKey, nil
	}
	dir := os.Getenv("CREDENTIALS_DIRECTORY") // systemd.exec(5)
	path := filepath.Join(dir, k.RootCredential)
	if _, err := os.Stat(path); dir == "" || errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("read root key: %w: %s; the service's unit needs the line "+
			"LoadCredentialEncrypted=%s (or LoadCredential=%s:/path)", ErrCredential,
			k.RootCredential, k.RootCredential, k.RootCredential)
	}
	return path, nil
}

// load reads the root key, or is sealed if it is under a passphrase. It does
// nothing when it has done so before, unless the site file names another.
func (v *vault) load(k *config.KME) error {
	path, err := rootPath(k)
	if err != nil || path == v.path {
		return err
	}
	root, err := keyring.ReadRootKey(path)
	switch {
	case errors.Is(err, kms.ErrSealed) && k.RootCredential != "":
		return fmt.Errorf("%w: the credential %s is under a passphrase; name its file as root_key "+
			"instead", err, k.RootCredential)
	case errors.Is(err, kms.ErrSealed):
		if _, err := keyring.ReadSealedRoot(path); err != nil {
			return err
		}
		v.log.Warn("key manager is sealed; quietline kme unseal opens it")
	case err != nil:
		return err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.root.Clear()
	v.path, v.root, v.since, v.tries = path, root, time.Now(), 0
	return nil
}

// close forgets the root key.
func (v *vault) close() {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.root.Clear()
}

// key is a copy of the root key in locked memory, which the caller clears;
// kms.ErrSealed without one.
func (v *vault) key() (secret.Bytes, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.root.Len() == 0 {
		return secret.Bytes{}, kms.ErrSealed
	}
	c, err := secret.NewLocked(v.root.Len())
	if err == nil {
		copy(c.Expose(), v.root.Expose())
	}
	return c, err
}

// unseal takes the key of the passphrase.
func (v *vault) unseal(key secret.Bytes) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.root.Len() != 0 {
		return ErrUnsealed
	}
	if wait := time.Until(v.again); wait > 0 {
		return fmt.Errorf("%w: %d; the next try is in %v", ErrSoon, v.tries,
			wait.Round(time.Second)+time.Second)
	}
	root, err := v.read(key)
	if errors.Is(err, kms.ErrPassphrase) {
		pause := min(firstPause<<min(v.tries, 16), mostPause)
		v.tries, v.again = v.tries+1, time.Now().Add(pause)
		v.log.Warn("wrong passphrase", "tries", v.tries)
		return fmt.Errorf("%w: wrong tries so far: %d", err, v.tries)
	} else if err != nil {
		return err
	}
	v.root = root
	return nil
}

// counted takes the number of wrong passphrases, for the audit log.
func (v *vault) counted() uint64 {
	v.mu.Lock()
	defer v.mu.Unlock()
	n := v.tries
	v.tries, v.again = 0, time.Time{}
	return n
}

// read reads the root key where it lies, with the key of its passphrase if it
// is under one.
func (v *vault) read(key secret.Bytes) (secret.Bytes, error) {
	root, err := keyring.ReadRootKey(v.path)
	if !errors.Is(err, kms.ErrSealed) {
		return root, err
	}
	s, err := keyring.ReadSealedRoot(v.path)
	if err != nil {
		return secret.Bytes{}, err
	}
	return s.Open(key)
}

// take replaces the root key by one that the key manager has gone over to; it
// is the vault's from then on.
func (v *vault) take(root secret.Bytes) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.root.Clear()
	v.root = root
}

// maySeal refuses to seal what could not be unsealed.
func (v *vault) maySeal() error {
	_, err := keyring.ReadSealedRoot(v.path)
	if errors.Is(err, kms.ErrCorrupt) {
		return fmt.Errorf("%w: %s opens without one; stop the daemon instead", ErrNoPassphrase, v.path)
	}
	return err
}

// drop forgets the root key; whoever waits for sealed is woken.
func (v *vault) drop() {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.root.Clear()
	v.since = time.Now()
	close(v.shut)
	v.shut = make(chan struct{})
}

// sealed is closed when the vault is sealed, which it may be already.
func (v *vault) sealed() <-chan struct{} {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.root.Len() == 0 {
		shut := make(chan struct{})
		close(shut)
		return shut
	}
	return v.shut
}

// state tells whether the vault is sealed, since when, and how many wrong
// passphrases were given since.
func (v *vault) state() (sealed bool, since time.Time, tries uint64) {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.root.Len() == 0, v.since, v.tries
}

// until returns a context that ends when ctx does or the vault is sealed.
func (v *vault) until(ctx context.Context) (context.Context, context.CancelFunc) {
	shut := v.sealed()
	inner, cancel := context.WithCancel(ctx)
	go func() {
		select {
		case <-shut:
			cancel()
		case <-inner.Done():
		}
	}()
	return inner, cancel
}
