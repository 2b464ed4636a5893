package pad

import (
	"encoding/binary"
	"fmt"

	"github.com/quietline/quietline/tunnel"
)

// Messages travel as CONTROL records of the line. The first byte is the type;
// those below 16 are of package wire.
//
//	16 ANNOUNCE  parts 1, part 1, keys 1, boot 16, block 4, bytes per key 2,
//	             0 (2), key_ID 16 each: the block is the keys of all parts in order
//	17 READY     0 (3), boot 16, boot of the block's sender 16, block 4
//	18 REFUSE    as READY, its third zero is the reason: 1 = keys are not to be
//	             had, 2 = too many blocks, or this number has been
//	19 HELLO     0 (3), boot 16: whatever you hold of an earlier boot is void
//
// boot is drawn at random when an end starts, or voids all its pad.
const (
	kindAnnounce = 16
	kindReady    = 17
	kindRefuse   = 18
	kindHello    = 19
)

const (
	// maxIDs keeps an ANNOUNCE in one record on a path of 1280 bytes: 28 bytes
	// and 64 key_IDs.
	maxIDs   = 64
	maxParts = 64
	// maxKeyLen is the largest key that is drawn, bytes.
	maxKeyLen = 4096

	noKeys  = 1
	noPlace = 2
)

type boot [16]byte

// message is any of them.
type message struct {
	kind   byte
	boot   boot // of who wrote it
	of     boot // READY, REFUSE: whose block
	block  uint32
	reason byte
	// ANNOUNCE:
	part, parts byte
	keyLen      uint16
	ids         []tunnel.KeyID
}

const (
	helloLen  = 4 + 16
	answerLen = helloLen + 16 + 4
	announce  = helloLen + 4 + 4
)

// append appends the body of the CONTROL record.
func (m *message) append(b []byte) []byte {
	switch m.kind {
	case kindAnnounce:
		b = append(b, m.kind, m.parts, m.part, byte(len(m.ids)))
		b = append(b, m.boot[:]...)
		b = binary.BigEndian.AppendUint32(b, m.block)
		b = binary.BigEndian.AppendUint16(b, m.keyLen)
		b = append(b, 0, 0)
		for _, id := range m.ids {
			b = append(b, id[:]...)
		}
		return b
	case kindHello:
		return append(append(b, m.kind, 0, 0, 0), m.boot[:]...)
	}
	b = append(append(b, m.kind, 0, 0, m.reason), m.boot[:]...)
	return binary.BigEndian.AppendUint32(append(b, m.of[:]...), m.block)
}

// parse reads the body of a CONTROL record.
func (m *message) parse(b []byte) error {
	bad := func() error { return fmt.Errorf("%w: %d bytes", ErrMessage, len(b)) }
	if len(b) < helloLen {
		return bad()
	}
	*m = message{kind: b[0], boot: boot(b[4:])}
	switch {
	case m.boot == boot{}:
		return bad()
	case m.kind == kindAnnounce:
		return m.parseAnnounce(b, bad)
	case m.kind == kindHello:
		if len(b) != helloLen || b[1]|b[2]|b[3] != 0 {
			return bad()
		}
		return nil
	case m.kind != kindReady && m.kind != kindRefuse, len(b) != answerLen, b[1]|b[2] != 0:
		return bad()
	}
	m.reason, m.of, m.block = b[3], boot(b[20:]), binary.BigEndian.Uint32(b[36:])
	if m.kind == kindReady && m.reason != 0 ||
		m.kind == kindRefuse && (m.reason < noKeys || m.reason > noPlace) || m.block == 0 {
		return bad()
	}
	return nil
}

func (m *message) parseAnnounce(b []byte, bad func() error) error {
	n := int(b[3])
	if n == 0 || n > maxIDs || len(b) != announce+16*n || b[26]|b[27] != 0 {
		return bad()
	}
	m.parts, m.part, m.block = b[1], b[2], binary.BigEndian.Uint32(b[20:])
	m.keyLen = binary.BigEndian.Uint16(b[24:])
	if m.parts == 0 || m.parts > maxParts || m.part >= m.parts || m.block == 0 ||
		m.keyLen == 0 || m.keyLen > maxKeyLen {
		return bad()
	}
	for i := range n {
		m.ids = append(m.ids, tunnel.KeyID(b[announce+16*i:]))
	}
	return nil
}
