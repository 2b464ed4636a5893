package peer

import (
	"crypto/aes"
	"crypto/cipher"
	"encoding/binary"
	"fmt"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/kms"
)

// IDKeySize is the length of a link's ID key, bytes (AES-256).
const IDKeySize = 32

// namer makes the key_IDs of one link: a UUIDv8 (RFC 9562 section 5.8) whose
// 122 free bits are AES-CBC-MAC over (generation, number), (first slot, size)
// under the link's ID key. All inputs have two blocks, so that the MAC is a
// pseudo-random function (Bellare, Kilian, Rogaway 2000): an ID says nothing
// about key, order or volume to whoever lacks the ID key, and both KMEs
// compute the same.
type namer struct {
	block cipher.Block
	x     [16]byte // being enciphered; here, so that no key_ID costs an allocation
}

func newNamer(idKey []byte) (*namer, error) {
	b, err := aes.NewCipher(idKey)
	return &namer{block: b}, err
}

// segment is the first block's part, shared by all keys of a segment.
func (n *namer) segment(id kms.SegmentID) [16]byte {
	binary.BigEndian.PutUint64(n.x[:8], id.Generation)
	binary.BigEndian.PutUint64(n.x[8:], id.Number)
	n.block.Encrypt(n.x[:], n.x[:])
	return n.x
}

// key is the key_ID of the key of sizeBits that begins at slot first.
func (n *namer) key(segment [16]byte, first, sizeBits int) etsi014.KeyID {
	binary.BigEndian.PutUint64(n.x[:8], binary.BigEndian.Uint64(segment[:8])^uint64(first))
	binary.BigEndian.PutUint64(n.x[8:], binary.BigEndian.Uint64(segment[8:])^uint64(sizeBits))
	n.block.Encrypt(n.x[:], n.x[:])
	id := etsi014.KeyID(n.x)
	id[6] = id[6]&0x0f | 0x80
	id[8] = id[8]&0x3f | 0x80
	return id
}

// KeyID is the key_ID of the key of sizeBits that begins at slot first of a
// segment, under the link's ID key: how an auditor finds a key in the log.
func KeyID(idKey []byte, segment kms.SegmentID, first, sizeBits int) (etsi014.KeyID, error) {
	n, err := newNamer(idKey)
	if err != nil {
		return etsi014.KeyID{}, fmt.Errorf("make key_ID: %w", err)
	}
	return n.key(n.segment(segment), first, sizeBits), nil
}
