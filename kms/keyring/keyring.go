// Package keyring seals what a KME keeps on disk: root key → epoch key → data
// key of a segment → slots.
//
// The main type is [Ring]. Every slot is sealed with AES-256-GCM under its
// segment's data key with the slot's number as nonce (a data key seals each
// number once) and the segment's name as associated data. Data keys and ID
// keys are wrapped under the epoch key with a random nonce. Epoch keys stand
// wrapped under the root key in a file of their own with two slots, so that
// the key of the epoch before can be destroyed in place, and a third slot, the
// bridge, which is zeros but while the root key changes:
//
//	slot (4096 bytes): magic (8) || epoch (8) || nonce (12) || sealed epoch key (48)
//	                   || SHA-256 of all before (32) || zeros
//	bridge: the same, with epoch 0 and, sealed under the root key to come, the
//	        root key that it replaces
//
// The root key itself is a file of 32 bytes, or one under a passphrase; see
// [ReadRootKey] and [SealedRoot].
//
// A caller must keep in mind that databases keep old pages: only the
// destruction of an epoch key makes what was wrapped under it unreadable.
package keyring

import (
	"crypto/aes"
	"crypto/subtle"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sync"

	"github.com/quietline/quietline/kms"
	"github.com/quietline/quietline/secret"
)

// KeySize is the length of root, epoch and data keys, bytes: AES-256.
const KeySize = 32

// TagSize is what sealing adds to a slot, bytes.
const TagSize = 16

// Ring holds the root key and the epoch key of one KME; between Next and Finish
// of a turn, two of these. They lie in locked memory (secret.NewLocked) until
// Close, and are spread out for AES only while they are used. Its methods may
// be called from several goroutines.
type Ring struct {
	path string
	open func(path string) (file, error)

	mu      sync.RWMutex
	root    secret.Bytes
	epochs  map[uint64]secret.Bytes
	current uint64
	// crossed: root came over the bridge, which the next turn takes down.
	crossed bool

	transitMu sync.RWMutex
	// transit wraps data keys between Seal and the commit that stores them,
	// when the epoch that will be theirs is known, and those of [Opener]s. It
	// never leaves this process.
	transit secret.Bytes
}

// Open unwraps the epoch key that the store's keys are wrapped under: epoch as
// the store tells it, 0 for one that never turned. The other half of a turn
// that a crash cut short is destroyed. Without a file a fresh KME gets one.
// While the root key changes (see [Ring.Admit]) both root keys open it, and
// [Ring.Crossed] tells that it was the new one. The root key stays the
// caller's. Nothing is destroyed when it does not fit. Errors: kms.ErrRootKey,
// kms.ErrCorrupt, secret.ErrNotLocked, or the file system's.
func Open(path string, root secret.Bytes, epoch uint64, fresh bool) (*Ring, error) {
	r := &Ring{path: path, open: openFile, epochs: map[uint64]secret.Bytes{},
		current: max(epoch, 1)}
	if err := r.load(root, fresh); err != nil {
		r.Close()
		return nil, fmt.Errorf("open epoch keys %s: %w", path, err)
	}
	return r, nil
}

// Close clears the keys; whatever needs one afterwards fails.
func (r *Ring) Close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.root.Clear()
	for epoch, key := range r.epochs {
		key.Clear()
		delete(r.epochs, epoch)
	}
	r.transitMu.Lock()
	defer r.transitMu.Unlock()
	r.transit.Clear()
}

func (r *Ring) load(root secret.Bytes, fresh bool) (err error) {
	if r.transit, err = newLockedKey(); err != nil {
		return err
	}
	if root.Len() != KeySize {
		return fmt.Errorf("root key: %w", aes.KeySizeError(root.Len()))
	}
	if r.root, err = locked(root); err != nil {
		return err
	}
	data, err := os.ReadFile(r.path)
	if errors.Is(err, fs.ErrNotExist) && fresh {
		data, err = create(r.path, r.root)
	} else if errors.Is(err, fs.ErrNotExist) {
		err = fmt.Errorf("%w; without this file the stock cannot be read: put it back, or move "+
			"the whole folder away and begin with an empty one", err)
	}
	if err != nil {
		return err
	}
	return r.unwrap(readSlots(data))
}

// unwrap fills epochs with what the root key opens, by itself or over the
// bridge.
func (r *Ring) unwrap(s slots) (err error) {
	roots := []secret.Bytes{r.root}
	if s[bridgeAt] != nil {
		_, before, err := openSlot(r.root, s[bridgeAt])
		if err == nil {
			defer before.Clear()
			roots, r.crossed = append(roots, before), true
		} else if !errors.Is(err, kms.ErrRootKey) {
			return err
		}
	}
	whole, newest := 0, uint64(0)
	for _, slot := range s[:bridgeAt] {
		if slot == nil {
			continue
		}
		whole++
		for _, root := range roots {
			epoch, key, err := openSlot(root, slot)
			if errors.Is(err, kms.ErrRootKey) {
				continue
			} else if err != nil {
				return err
			}
			r.epochs[epoch], newest = key, max(newest, epoch)
			break
		}
	}
	switch {
	case r.epochs[r.current].Len() != 0:
		return r.forgetOthers(r.current)
	case whole == 0:
		return fmt.Errorf("%w: neither slot is whole; without one the stock cannot be read: put the "+
			"file back, or move the whole folder away and begin with an empty one", kms.ErrCorrupt)
	case len(r.epochs) == 0:
		return fmt.Errorf("%w; give the root key that this KME was set up with, or that it was "+
			"changed to; the stock is as it was", kms.ErrRootKey)
	}
	return fmt.Errorf("%w: the store is of epoch %d, the keys are of epoch %d: one of the two "+
		"files is an older copy; what was stored cannot be read any more", kms.ErrCorrupt,
		r.current, newest)
}

// forgetOthers destroys every epoch key but one, on disk and in memory.
func (r *Ring) forgetOthers(keep uint64) error {
	for epoch, key := range r.epochs {
		if epoch != keep {
			if err := r.writeSlot(slotAt(epoch), make([]byte, slotSize)); err != nil {
				return fmt.Errorf("destroy epoch key %d: %w", epoch, err)
			}
			key.Clear()
			delete(r.epochs, epoch)
		}
	}
	return nil
}

// Next begins a turn: the next epoch's key is on disk when it returns. Keys
// are wrapped under it by [Ring.Rewrap] and [Ring.Reseal]; until Finish
// everything else still uses the epoch before. After an error the turn has not
// begun and the epoch before goes on: the caller tries again, and must not go
// on for long without a turn.
func (r *Ring) Next() (uint64, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	next := r.current + 1
	err := r.forgetOthers(r.current) // what an earlier Finish could not
	if err == nil {
		err = r.begin(next)
	}
	if err != nil {
		return 0, fmt.Errorf("begin epoch %d: %w", next, err)
	}
	return next, nil
}

// begin writes a new epoch's key. Nothing is wrapped under a key whose writing
// failed, so it does not matter what of it reached the disk: the next try
// writes another over it.
func (r *Ring) begin(epoch uint64) error {
	key, err := newLockedKey()
	if err != nil {
		return err
	}
	slot, err := newSlot(epochMagic, epoch, r.root, key)
	if err == nil {
		err = r.writeSlot(slotAt(epoch), slot)
	}
	if err != nil {
		key.Clear()
		return err
	}
	r.epochs[epoch] = key
	return nil
}

// Finish ends a turn after the commit that names the new epoch: the key before
// is destroyed, and with it all that was wrapped under it only; after a change
// of the root key the bridge is too. After an error the new epoch holds, but
// the key before may still be on disk; the next Next or Finish tries again.
func (r *Ring) Finish(epoch uint64) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.current = epoch
	err := r.forgetOthers(epoch)
	if err == nil && r.crossed {
		// Every slot that is left is under the new root key.
		if err = r.writeSlot(bridgeAt, make([]byte, slotSize)); err == nil {
			r.crossed = false
		}
	}
	if err != nil {
		return fmt.Errorf("end turn: %w", err)
	}
	return nil
}

// Admit begins a change of the root key: from now on until it is over, next
// opens the epoch file as well as the root key in use. The change is over one
// turn after next was used, by [Ring.Adopt] or [Open]; before that the root
// key in use must be kept. The same next may be admitted again; another is
// kms.ErrRotation. Next stays the caller's.
func (r *Ring) Admit(next secret.Bytes) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if next.Len() != KeySize {
		return fmt.Errorf("admit root key: %w", aes.KeySizeError(next.Len()))
	}
	if subtle.ConstantTimeCompare(next.Expose(), r.root.Expose()) == 1 {
		return nil
	}
	if r.crossed {
		return fmt.Errorf("admit root key: %w: the change before this ends with the next turn of "+
			"the epoch", kms.ErrRotation)
	}
	switch there, err := r.bridged(next); {
	case err == nil && there:
		return nil
	case err != nil:
		return fmt.Errorf("admit root key: %w", err)
	}
	slot, err := newSlot(bridgeMagic, 0, next, r.root)
	if err == nil {
		err = r.writeSlot(bridgeAt, slot)
	}
	if err != nil {
		return fmt.Errorf("admit root key: %w", err)
	}
	return nil
}

// bridged tells whether there is a bridge from next; one from another key is
// kms.ErrRotation.
func (r *Ring) bridged(next secret.Bytes) (bool, error) {
	data, err := os.ReadFile(r.path)
	if err != nil {
		return false, err
	}
	bridge := readSlots(data)[bridgeAt]
	if bridge == nil {
		return false, nil
	}
	_, before, err := openSlot(next, bridge)
	if errors.Is(err, kms.ErrRootKey) {
		return false, kms.ErrRotation
	}
	before.Clear()
	return err == nil, err
}

// Adopt goes over to a root key that was admitted: the next turn is wrapped
// under it, and its end destroys what the root key before opens. It tells
// whether anything changed; it does not with the root key in use. A root key
// that was not admitted is kms.ErrRootKey. Next stays the caller's.
func (r *Ring) Adopt(next secret.Bytes) (changed bool, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if subtle.ConstantTimeCompare(next.Expose(), r.root.Expose()) == 1 {
		return false, nil
	}
	there, err := r.bridged(next)
	if err == nil && !there || errors.Is(err, kms.ErrRotation) {
		err = fmt.Errorf("%w: it was not admitted", kms.ErrRootKey)
	}
	if err != nil {
		return false, fmt.Errorf("adopt root key: %w", err)
	}
	root, err := locked(next)
	if err != nil {
		return false, fmt.Errorf("adopt root key: %w", err)
	}
	r.root.Clear()
	r.root, r.crossed = root, true
	return true, nil
}

// Abandon gives up a change of the root key that nobody has adopted: the root
// key in use is the only one again.
func (r *Ring) Abandon() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.crossed {
		return fmt.Errorf("abandon root key: %w: the new one is in use", kms.ErrRotation)
	}
	if err := r.writeSlot(bridgeAt, make([]byte, slotSize)); err != nil {
		return fmt.Errorf("abandon root key: %w", err)
	}
	return nil
}

// Crossed tells that the root key in use replaces another, which still opens
// the file until the next turn.
func (r *Ring) Crossed() bool {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.crossed
}

// Rewrap moves a wrapped key to an epoch: from the epoch before, or from
// transit, where Seal leaves it.
func (r *Ring) Rewrap(use []byte, w kms.Wrapped, epoch uint64) (kms.Wrapped, error) {
	key, err := r.Unwrap(use, w)
	if err != nil {
		return kms.Wrapped{}, err
	}
	defer key.Clear()
	return r.wrapUnder(use, key.Expose(), epoch)
}

// Settle moves a key from transit to the current epoch.
func (r *Ring) Settle(use []byte, w kms.Wrapped) (kms.Wrapped, error) {
	if w.Epoch != transitEpoch {
		return w, nil
	}
	return r.Rewrap(use, w, r.Epoch())
}

// transitEpoch marks keys that are not stored yet.
const transitEpoch = 0

// Epoch is the current one.
func (r *Ring) Epoch() uint64 {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.current
}

func create(path string, root secret.Bytes) ([]byte, error) {
	key, err := newLockedKey()
	if err != nil {
		return nil, err
	}
	defer key.Clear()
	slot, err := newSlot(epochMagic, 1, root, key)
	if err != nil {
		return nil, err
	}
	data := append(slot, make([]byte, 2*slotSize)...)
	return data, secret.WriteFile(path, data)
}
