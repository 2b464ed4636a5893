// Package keyring seals what a KME keeps on disk: root key → epoch key → data
// key of a segment → slots.
//
// The main type is [Ring]. Every slot is sealed with AES-256-GCM under its
// segment's data key with the slot's number as nonce (a data key seals each
// number once) and the segment's name as associated data. Data keys and ID
// keys are wrapped under the epoch key with a random nonce. Epoch keys stand
// wrapped under the root key in a file of their own with two slots, so that
// the key of the epoch before can be destroyed in place:
//
//	slot (4096 bytes): magic (8) || epoch (8) || nonce (12) || sealed epoch key (48)
//	                   || SHA-256 of all before (32) || zeros
//
// A caller must keep in mind that databases keep old pages: only the
// destruction of an epoch key makes what was wrapped under it unreadable.
package keyring

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"reflect"
	"sync"

	"github.com/quietline/quietline/kms"
	"github.com/quietline/quietline/secret"
)

// KeySize is the length of root, epoch and data keys, bytes: AES-256.
const KeySize = 32

// TagSize is what sealing adds to a slot, bytes.
const TagSize = 16

const (
	slotSize  = 4096 // a page: one sector-aligned write
	nonceSize = 12
	recordLen = 8 + 8 + nonceSize + KeySize + TagSize
)

var magic = [8]byte{'Q', 'L', 'e', 'p', 'o', 'c', 'h', '1'}

// Ring holds the root key and the epoch key of one KME; between Next and Finish
// of a turn, two of these. They lie in locked memory (secret.NewLocked) until
// Close, and are spread out for AES only while they are used. Its methods may
// be called from several goroutines.
type Ring struct {
	path string

	mu      sync.RWMutex
	root    secret.Bytes
	epochs  map[uint64]secret.Bytes
	current uint64
	// transit wraps data keys between Seal and the commit that stores them,
	// when the epoch that will be theirs is known.
	transit secret.Bytes
}

// NewRootKey makes a root key file of 32 random bytes with mode 0600. It does
// not replace a file.
func NewRootKey(path string) error {
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		if err == nil {
			err = fs.ErrExist
		}
		return fmt.Errorf("make root key %s: %w", path, err)
	}
	key := secret.New(KeySize)
	defer key.Clear()
	if _, err := rand.Read(key.Expose()); err != nil {
		return fmt.Errorf("make root key: %w", err)
	}
	return secret.WriteFile(path, key.Expose())
}

// ReadRootKey reads a root key file. The caller clears the key.
func ReadRootKey(path string) (secret.Bytes, error) {
	key, err := secret.ReadFile(path, KeySize)
	if err != nil {
		return key, fmt.Errorf("read root key: %w", err)
	}
	if n := key.Len(); n != KeySize {
		key.Clear()
		return key, fmt.Errorf("read root key %s: %d bytes, want %d", path, n, KeySize)
	}
	return key, nil
}

// Open unwraps the epoch key that the store's keys are wrapped under: epoch as
// the store tells it, 0 for one that never turned. The other half of a turn
// that a crash cut short is destroyed. Without a file a fresh KME gets one.
// The root key stays the caller's. Errors: kms.ErrRootKey, kms.ErrCorrupt,
// secret.ErrNotLocked, or the file system's.
func Open(path string, root secret.Bytes, epoch uint64, fresh bool) (*Ring, error) {
	r := &Ring{path: path, epochs: map[uint64]secret.Bytes{}, current: max(epoch, 1)}
	if err := r.open(root, r.current, fresh); err != nil {
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
	r.transit.Clear()
	for epoch, key := range r.epochs {
		key.Clear()
		delete(r.epochs, epoch)
	}
}

func (r *Ring) open(root secret.Bytes, epoch uint64, fresh bool) (err error) {
	if r.transit, err = newLockedKey(); err != nil {
		return err
	}
	if r.root, err = secret.NewLocked(KeySize); err != nil {
		return err
	}
	if copy(r.root.Expose(), root.Expose()) != KeySize || root.Len() != KeySize {
		return fmt.Errorf("root key: %w", aes.KeySizeError(root.Len()))
	}
	data, err := os.ReadFile(r.path)
	if errors.Is(err, fs.ErrNotExist) && fresh {
		data, err = create(r.path, r.root)
	}
	if err != nil {
		return err
	}
	whole, other, err := r.unwrapSlots(data)
	switch {
	case err != nil:
		return err
	case r.epochs[epoch].Len() != 0:
		return r.forgetOthers(epoch)
	case whole == 0:
		return fmt.Errorf("%w: neither slot is whole", kms.ErrCorrupt)
	case len(r.epochs) == 0:
		return fmt.Errorf("%w; give the root key that this KME was set up with", kms.ErrRootKey)
	}
	return fmt.Errorf("%w: the store is of epoch %d, the keys are of epoch %d: one of the two "+
		"files is an older copy; what was stored cannot be read any more", kms.ErrCorrupt, epoch, other)
}

// unwrapSlots fills epochs with what the root key opens.
func (r *Ring) unwrapSlots(data []byte) (whole int, newest uint64, err error) {
	for i := 0; i+slotSize <= len(data) && i < 2*slotSize; i += slotSize {
		slot := data[i : i+slotSize]
		if !sound(slot) {
			continue
		}
		whole++
		epoch, key, err := unwrapEpoch(r.root, slot)
		switch {
		case err == nil:
			r.epochs[epoch] = key
			newest = max(newest, epoch)
		case !errors.Is(err, kms.ErrRootKey):
			return whole, newest, err
		}
	}
	return whole, newest, nil
}

// forgetOthers destroys every epoch key but one, on disk and in memory.
func (r *Ring) forgetOthers(keep uint64) error {
	for epoch, key := range r.epochs {
		if epoch != keep {
			if err := r.writeSlot(epoch, make([]byte, slotSize)); err != nil {
				return fmt.Errorf("destroy epoch key %d: %w", epoch, err)
			}
			key.Clear()
			delete(r.epochs, epoch)
		}
	}
	return nil
}

// writeSlot overwrites the slot of an epoch in place and waits for the disk.
func (r *Ring) writeSlot(epoch uint64, slot []byte) (err error) {
	f, err := os.OpenFile(r.path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer func() {
		if cerr := f.Close(); err == nil {
			err = cerr
		}
	}()
	if _, err := f.WriteAt(slot, int64(epoch+1)%2*slotSize); err != nil {
		return err
	}
	return f.Sync()
}

// Next begins a turn: the next epoch's key is on disk when it returns. Keys
// are wrapped under it by [Ring.Rewrap] and [Ring.Reseal]; until Finish
// everything else still uses the epoch before. After an error the ring must
// not be used: the KME stops.
func (r *Ring) Next() (uint64, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	next := r.current + 1
	slot, key, err := newEpoch(r.root, next)
	if err == nil {
		r.epochs[next] = key
		err = r.writeSlot(next, slot)
	}
	if err != nil {
		return 0, fmt.Errorf("begin epoch %d: %w", next, err)
	}
	return next, nil
}

// Finish ends a turn after the commit that names the new epoch: the key before
// is destroyed, and with it all that was wrapped under it only.
func (r *Ring) Finish(epoch uint64) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.current = epoch
	if err := r.forgetOthers(epoch); err != nil {
		return fmt.Errorf("end turn: %w", err)
	}
	return nil
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
	r.mu.RLock()
	current := r.current
	r.mu.RUnlock()
	return r.Rewrap(use, w, current)
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
	slot, key, err := newEpoch(root, 1)
	if err != nil {
		return nil, err
	}
	key.Clear()
	data := append(slot, make([]byte, slotSize)...)
	return data, secret.WriteFile(path, data)
}

// newLockedKey is a random key that lives long.
func newLockedKey() (secret.Bytes, error) {
	key, err := secret.NewLocked(KeySize)
	if err != nil {
		return key, err
	}
	_, err = rand.Read(key.Expose())
	return key, err
}

// newEpoch makes an epoch's key and its slot.
func newEpoch(root secret.Bytes, epoch uint64) ([]byte, secret.Bytes, error) {
	slot := make([]byte, 16+nonceSize, slotSize)
	copy(slot, magic[:])
	binary.BigEndian.PutUint64(slot[8:], epoch)
	if _, err := rand.Read(slot[16:]); err != nil {
		return nil, secret.Bytes{}, err
	}
	wrap, err := newAEAD(root.Expose())
	if err != nil {
		return nil, secret.Bytes{}, err
	}
	defer wrap.wipe()
	key, err := newLockedKey()
	if err != nil {
		return nil, key, err
	}
	slot = wrap.Seal(slot, slot[16:16+nonceSize], key.Expose(), slot[:16])
	sum := sha256.Sum256(slot)
	return append(slot, sum[:]...)[:slotSize], key, nil
}

func sound(slot []byte) bool {
	sum := sha256.Sum256(slot[:recordLen])
	return string(slot[:8]) == string(magic[:]) &&
		string(slot[recordLen:recordLen+len(sum)]) == string(sum[:])
}

// unwrapEpoch opens a slot; another root's is kms.ErrRootKey.
func unwrapEpoch(root secret.Bytes, slot []byte) (uint64, secret.Bytes, error) {
	wrap, err := newAEAD(root.Expose())
	if err != nil {
		return 0, secret.Bytes{}, err
	}
	defer wrap.wipe()
	key, err := secret.NewLocked(KeySize)
	if err != nil {
		return 0, key, err
	}
	if _, err := wrap.Open(key.Expose()[:0], slot[16:16+nonceSize], slot[16+nonceSize:recordLen],
		slot[:16]); err != nil {
		key.Clear()
		return 0, secret.Bytes{}, kms.ErrRootKey
	}
	return binary.BigEndian.Uint64(slot[8:]), key, nil
}

// aead is AES-256-GCM under one key, which its expanded form begins with.
type aead struct {
	cipher.AEAD
	block cipher.Block
}

func newAEAD(key []byte) (aead, error) {
	b, err := aes.NewCipher(key)
	if err != nil {
		return aead{}, err
	}
	g, err := cipher.NewGCM(b)
	return aead{g, b}, err
}

// wipe sets the expanded key to zero, in both copies that the standard library
// makes and does not wipe. The aead must not be used afterwards.
func (a aead) wipe() {
	for _, v := range []any{a.AEAD, a.block} {
		if p := reflect.ValueOf(v); p.Kind() == reflect.Pointer {
			p.Elem().SetZero()
		}
	}
}

// Wrap seals a key under the current epoch for the given use: what names it.
func (r *Ring) Wrap(use, key []byte) (kms.Wrapped, error) { return r.wrapUnder(use, key, r.Epoch()) }

// under runs use with the key of an epoch spread out, which is wiped after.
func (r *Ring) under(epoch uint64, use func(aead) error) error {
	r.mu.RLock()
	defer r.mu.RUnlock()
	key := r.epochs[epoch]
	if epoch == transitEpoch {
		key = r.transit
	}
	if key.Len() == 0 {
		return fmt.Errorf("%w: epoch %d is gone, this is %d", kms.ErrCorrupt, epoch, r.current)
	}
	a, err := newAEAD(key.Expose())
	if err != nil {
		return err
	}
	defer a.wipe()
	return use(a)
}

func (r *Ring) wrapUnder(use, key []byte, epoch uint64) (kms.Wrapped, error) {
	w := kms.Wrapped{Epoch: epoch, Bytes: make([]byte, nonceSize, nonceSize+len(key)+TagSize)}
	_, err := rand.Read(w.Bytes)
	if err == nil {
		err = r.under(epoch, func(a aead) error {
			w.Bytes = a.Seal(w.Bytes, w.Bytes, key, use)
			return nil
		})
	}
	if err != nil {
		return kms.Wrapped{}, fmt.Errorf("wrap key: %w", err)
	}
	return w, nil
}

// Unwrap opens a wrapped key; the caller clears it.
func (r *Ring) Unwrap(use []byte, w kms.Wrapped) (key secret.Bytes, err error) {
	if len(w.Bytes) < nonceSize {
		return key, fmt.Errorf("unwrap key: %w: %d bytes", kms.ErrCorrupt, len(w.Bytes))
	}
	err = r.under(w.Epoch, func(a aead) error {
		b, err := a.Open(nil, w.Bytes[:nonceSize], w.Bytes[nonceSize:], use)
		if err != nil {
			return kms.ErrCorrupt
		}
		key = secret.Own(b)
		return nil
	})
	if err != nil {
		return key, fmt.Errorf("unwrap key: %w", err)
	}
	return key, nil
}
