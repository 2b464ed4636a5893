package keyring

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"fmt"
	"reflect"

	"github.com/quietline/quietline/kms"
	"github.com/quietline/quietline/secret"
)

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
	lock, key := &r.mu, func() secret.Bytes { return r.epochs[epoch] }
	if epoch == transitEpoch { // never waits for a turn, which waits for the disk
		lock, key = &r.transitMu, func() secret.Bytes { return r.transit }
	}
	lock.RLock()
	defer lock.RUnlock()
	k := key()
	if k.Len() == 0 {
		return fmt.Errorf("%w: the key of epoch %d is gone", kms.ErrCorrupt, epoch)
	}
	a, err := newAEAD(k.Expose())
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
