package keyring

import (
	"crypto/rand"
	"encoding/binary"
	"fmt"

	"github.com/quietline/quietline/kms"
	"github.com/quietline/quietline/kms/codec"
	"github.com/quietline/quietline/secret"
)

// Seal seals the slots of a segment under a fresh data key, which is left in
// transit: Settle it in the commit that stores the segment, for the epoch may
// turn before. The slots stay the caller's to clear.
func (r *Ring) Seal(id kms.SegmentID, slots []byte, slotBytes int) (kms.Sealed, error) {
	return r.seal(id, slots, slotBytes, transitEpoch, nil)
}

// Reseal seals a segment's slots anew under a fresh data key of an epoch, all
// but those in gone: in their place stand zeros.
func (r *Ring) Reseal(id kms.SegmentID, old kms.Sealed, slotBytes int, gone kms.Bitmap,
	epoch uint64) (kms.Sealed, error) {
	from, err := r.Opener(id, old, slotBytes)
	if err != nil {
		return kms.Sealed{}, err
	}
	o, err := from.Open()
	if err != nil {
		return kms.Sealed{}, err
	}
	defer o.Close()
	n := len(old.Slots) / (slotBytes + TagSize)
	plain := make([]byte, n*slotBytes)
	defer secret.Wipe(plain)
	for i := range n {
		if gone.Get(i) {
			continue
		}
		if _, err := o.slot(plain[i*slotBytes:i*slotBytes], i); err != nil {
			return kms.Sealed{}, fmt.Errorf("reseal segment %s: %w", id, err)
		}
	}
	return r.seal(id, plain, slotBytes, epoch, gone)
}

func (r *Ring) seal(id kms.SegmentID, slots []byte, slotBytes int, epoch uint64,
	gone kms.Bitmap) (kms.Sealed, error) {
	var key [KeySize]byte
	defer secret.Wipe(key[:])
	if _, err := rand.Read(key[:]); err != nil {
		return kms.Sealed{}, fmt.Errorf("seal segment: %w", err)
	}
	data, err := newAEAD(key[:])
	if err != nil {
		return kms.Sealed{}, fmt.Errorf("seal segment: %w", err)
	}
	defer data.wipe()
	name := Name(id)
	wrapped, err := r.wrapUnder(name, key[:], epoch)
	if err != nil {
		return kms.Sealed{}, err
	}
	n := len(slots) / slotBytes
	s := kms.Sealed{Key: wrapped, Slots: make([]byte, 0, n*(slotBytes+TagSize))}
	var nonce [nonceSize]byte
	for i := range n {
		if gone.Get(i) {
			s.Slots = append(s.Slots, make([]byte, slotBytes+TagSize)...)
			continue
		}
		binary.BigEndian.PutUint64(nonce[4:], uint64(i))
		s.Slots = data.Seal(s.Slots, nonce[:], slots[i*slotBytes:(i+1)*slotBytes], name)
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

// Opener opens the slots of one segment. It holds no key in clear: its data
// key is wrapped under one in locked memory that never reaches a disk. Its
// methods may be called from several goroutines, also after the epoch turned.
type Opener struct {
	ring      *Ring
	key       kms.Wrapped // in transit
	name      []byte
	slots     []byte
	slotBytes int
}

// Opener unwraps a segment's data key. It keeps s.Slots.
func (r *Ring) Opener(id kms.SegmentID, s kms.Sealed, slotBytes int) (*Opener, error) {
	name := Name(id)
	key, err := r.Rewrap(name, s.Key, transitEpoch)
	if err != nil {
		return nil, fmt.Errorf("open segment %s: %w", id, err)
	}
	return &Opener{ring: r, key: key, name: name, slots: s.Slots, slotBytes: slotBytes}, nil
}

// Open spreads the data key out for the keys of one answer; the caller closes
// what it gets.
func (o *Opener) Open() (*Opened, error) {
	key, err := o.ring.Unwrap(o.name, o.key)
	if err != nil {
		return nil, err
	}
	defer key.Clear()
	data, err := newAEAD(key.Expose())
	if err != nil {
		return nil, fmt.Errorf("open segment: %w", err)
	}
	return &Opened{aead: data, Opener: o}, nil
}

// Key is Open for a single key: n slots from first on, cut to sizeBits, a
// multiple of 8. The caller clears it.
func (o *Opener) Key(first, n, sizeBits int) (secret.Bytes, error) {
	open, err := o.Open()
	if err != nil {
		return secret.Bytes{}, err
	}
	defer open.Close()
	return open.Key(first, n, sizeBits)
}

// Opened is an [Opener] with its data key in memory, until Close. It is used
// by one goroutine.
type Opened struct {
	*Opener
	aead aead
}

// Close wipes the data key. A nil one is fine.
func (o *Opened) Close() {
	if o != nil {
		o.aead.wipe()
	}
}

// Key opens n slots from first on, and cuts them to sizeBits, a multiple of 8.
// The caller clears the key.
func (o *Opened) Key(first, n, sizeBits int) (secret.Bytes, error) {
	sealed := o.slotBytes + TagSize
	if first < 0 || n < 1 || (first+n)*sealed > len(o.slots) || sizeBits > 8*n*o.slotBytes {
		return secret.Bytes{}, fmt.Errorf("open slots %d+%d: %w", first, n, kms.ErrCorrupt)
	}
	buf := make([]byte, 0, n*o.slotBytes)
	for i := first; i < first+n; i++ {
		var err error
		if buf, err = o.slot(buf, i); err != nil {
			secret.Wipe(buf[:cap(buf)])
			return secret.Bytes{}, err
		}
	}
	secret.Wipe(buf[sizeBits/8:])
	return secret.Own(buf[:sizeBits/8]), nil
}

// slot appends slot i to buf, which has room for it.
func (o *Opened) slot(buf []byte, i int) ([]byte, error) {
	var nonce [nonceSize]byte
	binary.BigEndian.PutUint64(nonce[4:], uint64(i))
	sealed := o.slotBytes + TagSize
	out, err := o.aead.Open(buf, nonce[:], o.slots[i*sealed:(i+1)*sealed], o.name)
	if err != nil {
		return buf, fmt.Errorf("open slot %d: %w", i, kms.ErrCorrupt)
	}
	return out, nil
}
