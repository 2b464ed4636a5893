package keyring

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"io"
	"os"

	"github.com/quietline/quietline/kms"
	"github.com/quietline/quietline/secret"
)

const (
	slotSize  = 4096 // a page: one sector-aligned write
	nonceSize = 12
	recordLen = 8 + 8 + nonceSize + KeySize + TagSize
	// bridgeAt is the place of the bridge, behind the two epoch slots.
	bridgeAt = 2
)

// magic is a slot's kind and version.
type magic [8]byte

var (
	epochMagic  = magic{'Q', 'L', 'e', 'p', 'o', 'c', 'h', '1'}
	bridgeMagic = magic{'Q', 'L', 'b', 'r', 'i', 'd', 'g', '1'}
)

// file is what the ring needs of the epoch file.
type file interface {
	io.WriterAt
	Sync() error
	Close() error
}

// openFile opens the epoch file for writing. It does not make one.
func openFile(path string) (file, error) { return os.OpenFile(path, os.O_WRONLY, 0) }

// slotAt is the place of an epoch's slot: the two take turns.
func slotAt(epoch uint64) int64 { return int64((epoch + 1) % 2) }

// writeSlot overwrites a slot in place and waits for the disk.
func (r *Ring) writeSlot(at int64, slot []byte) (err error) {
	f, err := r.open(r.path)
	if err != nil {
		return err
	}
	defer func() {
		if cerr := f.Close(); err == nil {
			err = cerr
		}
	}()
	if _, err := f.WriteAt(slot, at*slotSize); err != nil {
		return err
	}
	return f.Sync()
}

// newSlot seals a key of the given number under another.
func newSlot(kind magic, number uint64, under, key secret.Bytes) ([]byte, error) {
	slot := make([]byte, 16+nonceSize, slotSize)
	copy(slot, kind[:])
	binary.BigEndian.PutUint64(slot[8:], number)
	if _, err := rand.Read(slot[16:]); err != nil {
		return nil, err
	}
	wrap, err := newAEAD(under.Expose())
	if err != nil {
		return nil, err
	}
	defer wrap.wipe()
	slot = wrap.Seal(slot, slot[16:16+nonceSize], key.Expose(), slot[:16])
	sum := sha256.Sum256(slot)
	return append(slot, sum[:]...)[:slotSize], nil
}

// slots are the sound slots of an epoch file; nil where none is.
type slots [3][]byte

func readSlots(data []byte) (s slots) {
	for i := range s {
		kind := epochMagic
		if i == bridgeAt {
			kind = bridgeMagic
		}
		if len(data) >= (i+1)*slotSize && sound(kind, data[i*slotSize:]) {
			s[i] = data[i*slotSize : (i+1)*slotSize]
		}
	}
	return s
}

func sound(kind magic, slot []byte) bool {
	sum := sha256.Sum256(slot[:recordLen])
	return bytes.HasPrefix(slot, kind[:]) && bytes.HasPrefix(slot[recordLen:], sum[:])
}

// openSlot unwraps a sound slot into locked memory; another key's is
// kms.ErrRootKey.
func openSlot(under secret.Bytes, slot []byte) (number uint64, key secret.Bytes, err error) {
	wrap, err := newAEAD(under.Expose())
	if err != nil {
		return 0, secret.Bytes{}, err
	}
	defer wrap.wipe()
	if key, err = secret.NewLocked(KeySize); err != nil {
		return 0, key, err
	}
	if _, err := wrap.Open(key.Expose()[:0], slot[16:16+nonceSize], slot[16+nonceSize:recordLen],
		slot[:16]); err != nil {
		key.Clear()
		return 0, secret.Bytes{}, kms.ErrRootKey
	}
	return binary.BigEndian.Uint64(slot[8:]), key, nil
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

// locked copies a key into locked memory.
func locked(key secret.Bytes) (secret.Bytes, error) {
	c, err := secret.NewLocked(KeySize)
	if err == nil {
		copy(c.Expose(), key.Expose())
	}
	return c, err
}
