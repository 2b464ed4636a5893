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
	"sync"

	"github.com/quietline/quietline/kms"
	"github.com/quietline/quietline/kms/codec"
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

// Ring holds the epoch keys of one KME, unwrapped. Its methods may be called
// from several goroutines.
type Ring struct {
	mu      sync.RWMutex
	epochs  map[uint64]cipher.AEAD
	current uint64
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
	if key.Len() != KeySize {
		key.Clear()
		return key, fmt.Errorf("read root key %s: %d bytes, want %d", path, key.Len(), KeySize)
	}
	return key, nil
}

// Open unwraps the epoch keys of the file at path; if there is no file and
// fresh is true, it makes one. The root key stays the caller's. Errors:
// kms.ErrRootKey, kms.ErrCorrupt, or the file system's.
func Open(path string, root secret.Bytes, fresh bool) (*Ring, error) {
	wrap, err := newAEAD(root.Expose())
	if err != nil {
		return nil, fmt.Errorf("open epoch keys: %w", err)
	}
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) && fresh {
		data, err = create(path, wrap)
	}
	if err != nil {
		return nil, fmt.Errorf("open epoch keys: %w", err)
	}
	r := &Ring{epochs: map[uint64]cipher.AEAD{}}
	whole, opened := 0, 0
	for i := 0; i+slotSize <= len(data) && i < 2*slotSize; i += slotSize {
		slot := data[i : i+slotSize]
		if !sound(slot) {
			continue
		}
		whole++
		epoch, key, err := unwrapEpoch(wrap, slot)
		if err != nil {
			continue
		}
		opened++
		r.epochs[epoch] = key
		r.current = max(r.current, epoch)
	}
	switch {
	case opened > 0:
		return r, nil
	case whole > 0:
		return nil, fmt.Errorf("open epoch keys %s: %w; give the root key that this KME was set up with",
			path, kms.ErrRootKey)
	}
	return nil, fmt.Errorf("open epoch keys %s: %w: neither slot is whole", path, kms.ErrCorrupt)
}

func create(path string, wrap cipher.AEAD) ([]byte, error) {
	slot, err := wrapEpoch(wrap, 1)
	if err != nil {
		return nil, err
	}
	data := append(slot, make([]byte, slotSize)...)
	return data, secret.WriteFile(path, data)
}

// wrapEpoch makes the slot of a new epoch with a random key.
func wrapEpoch(wrap cipher.AEAD, epoch uint64) ([]byte, error) {
	var key [KeySize]byte
	defer secret.Wipe(key[:])
	slot := make([]byte, 16+nonceSize, slotSize)
	copy(slot, magic[:])
	binary.BigEndian.PutUint64(slot[8:], epoch)
	if _, err := rand.Read(slot[16:]); err != nil {
		return nil, err
	}
	if _, err := rand.Read(key[:]); err != nil {
		return nil, err
	}
	slot = wrap.Seal(slot, slot[16:16+nonceSize], key[:], slot[:16])
	sum := sha256.Sum256(slot)
	return append(slot, sum[:]...)[:slotSize], nil
}

func sound(slot []byte) bool {
	sum := sha256.Sum256(slot[:recordLen])
	return string(slot[:8]) == string(magic[:]) &&
		string(slot[recordLen:recordLen+len(sum)]) == string(sum[:])
}

func unwrapEpoch(wrap cipher.AEAD, slot []byte) (uint64, cipher.AEAD, error) {
	key, err := wrap.Open(nil, slot[16:16+nonceSize], slot[16+nonceSize:recordLen], slot[:16])
	if err != nil {
		return 0, nil, err
	}
	defer secret.Wipe(key)
	aead, err := newAEAD(key)
	return binary.BigEndian.Uint64(slot[8:]), aead, err
}

func newAEAD(key []byte) (cipher.AEAD, error) {
	b, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(b)
}

// Wrap seals a key under the current epoch for the given use: what names it.
func (r *Ring) Wrap(use, key []byte) (kms.Wrapped, error) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	w := kms.Wrapped{Epoch: r.current, Bytes: make([]byte, nonceSize, nonceSize+len(key)+TagSize)}
	if _, err := rand.Read(w.Bytes); err != nil {
		return w, fmt.Errorf("wrap key: %w", err)
	}
	w.Bytes = r.epochs[r.current].Seal(w.Bytes, w.Bytes, key, use)
	return w, nil
}

// Unwrap opens a wrapped key; the caller clears it.
func (r *Ring) Unwrap(use []byte, w kms.Wrapped) (secret.Bytes, error) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	epoch := r.epochs[w.Epoch]
	if epoch == nil {
		return secret.Bytes{}, fmt.Errorf("unwrap key: %w: epoch %d is gone, this is %d",
			kms.ErrCorrupt, w.Epoch, r.current)
	}
	if len(w.Bytes) < nonceSize {
		return secret.Bytes{}, fmt.Errorf("unwrap key: %w: %d bytes", kms.ErrCorrupt, len(w.Bytes))
	}
	key, err := epoch.Open(nil, w.Bytes[:nonceSize], w.Bytes[nonceSize:], use)
	if err != nil {
		return secret.Bytes{}, fmt.Errorf("unwrap key: %w", kms.ErrCorrupt)
	}
	return secret.Own(key), nil
}

// Seal seals the slots of a segment under a fresh data key. The slots stay the
// caller's to clear.
func (r *Ring) Seal(id kms.SegmentID, slots []byte, slotBytes int) (kms.Sealed, error) {
	var key [KeySize]byte
	defer secret.Wipe(key[:])
	if _, err := rand.Read(key[:]); err != nil {
		return kms.Sealed{}, fmt.Errorf("seal segment: %w", err)
	}
	aead, err := newAEAD(key[:])
	if err != nil {
		return kms.Sealed{}, fmt.Errorf("seal segment: %w", err)
	}
	name := Name(id)
	wrapped, err := r.Wrap(name, key[:])
	if err != nil {
		return kms.Sealed{}, err
	}
	n := len(slots) / slotBytes
	s := kms.Sealed{Key: wrapped, Slots: make([]byte, 0, n*(slotBytes+TagSize))}
	var nonce [nonceSize]byte
	for i := range n {
		binary.BigEndian.PutUint64(nonce[4:], uint64(i))
		s.Slots = aead.Seal(s.Slots, nonce[:], slots[i*slotBytes:(i+1)*slotBytes], name)
	}
	return s, nil
}

// Name is what a segment's data key and slots are bound to.
func Name(id kms.SegmentID) []byte {
	b := codec.AppendString([]byte("segment "), id.Link)
	b = binary.BigEndian.AppendUint64(b, id.Generation)
	return binary.BigEndian.AppendUint64(b, id.Number)
}

// IDKeyName is what a link's ID key is bound to.
func IDKeyName(link kms.LinkID) []byte { return append([]byte("id key "), link...) }

// Opener opens the slots of one segment. Its methods may be called from
// several goroutines.
type Opener struct {
	aead      cipher.AEAD
	name      []byte
	slots     []byte
	slotBytes int
}

// Opener unwraps a segment's data key. It keeps s.Slots.
func (r *Ring) Opener(id kms.SegmentID, s kms.Sealed, slotBytes int) (*Opener, error) {
	name := Name(id)
	key, err := r.Unwrap(name, s.Key)
	if err != nil {
		return nil, fmt.Errorf("open segment %s: %w", id, err)
	}
	defer key.Clear()
	aead, err := newAEAD(key.Expose())
	if err != nil {
		return nil, fmt.Errorf("open segment %s: %w", id, err)
	}
	return &Opener{aead: aead, name: name, slots: s.Slots, slotBytes: slotBytes}, nil
}

// Key opens n slots from first on, and cuts them to sizeBits, a multiple of 8.
// The caller clears the key.
func (o *Opener) Key(first, n, sizeBits int) (secret.Bytes, error) {
	sealed := o.slotBytes + TagSize
	if first < 0 || n < 1 || (first+n)*sealed > len(o.slots) || sizeBits > 8*n*o.slotBytes {
		return secret.Bytes{}, fmt.Errorf("open slots %d+%d: %w", first, n, kms.ErrCorrupt)
	}
	buf := make([]byte, 0, n*o.slotBytes)
	var nonce [nonceSize]byte
	for i := first; i < first+n; i++ {
		binary.BigEndian.PutUint64(nonce[4:], uint64(i))
		var err error
		buf, err = o.aead.Open(buf, nonce[:], o.slots[i*sealed:(i+1)*sealed], o.name)
		if err != nil {
			secret.Wipe(buf[:cap(buf)])
			return secret.Bytes{}, fmt.Errorf("open slot %d: %w", i, kms.ErrCorrupt)
		}
	}
	secret.Wipe(buf[sizeBits/8:])
	return secret.Own(buf[:sizeBits/8]), nil
}
