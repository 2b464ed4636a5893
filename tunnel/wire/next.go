package wire

import "encoding/binary"

// Prefix is what stands before the packet in a SLICE record.
type Prefix [PrefixLen]byte

// PrefixOf is the prefix of a SLICE record whose body [ParsePiece] has passed.
func PrefixOf(body []byte) (p Prefix) {
	p[0] = byte(Slice)
	copy(p[1:], body)
	return p
}

// Continues tells whether a record is the slice number index of the same
// super-frame shape as the slice with prefix p: such a one needs no parsing, for
// its headers are of no use. Header, as the super-frame has it, and slice follow
// the prefix.
func (p *Prefix) Continues(record []byte, index int) bool {
	if len(record) < PrefixLen {
		return false
	}
	return binary.BigEndian.Uint32(p[:]) == binary.BigEndian.Uint32(record) &&
		binary.BigEndian.Uint16(record[4:]) == uint16(index) &&
		binary.BigEndian.Uint16(p[6:]) == binary.BigEndian.Uint16(record[6:]) &&
		binary.BigEndian.Uint64(p[8:]) == binary.BigEndian.Uint64(record[8:])
}
