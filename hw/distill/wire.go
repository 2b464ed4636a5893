package distill

import "encoding/binary"

// Kinds of messages, the first byte. The package comment has the layouts.
const (
	kindHello       = 1
	kindAnnounce    = 2
	kindSifted      = 3
	kindBegin       = 4
	kindParities    = 5
	kindDifferences = 6
	kindVerify      = 7
	kindVerified    = 8
	kindAmplify     = 9
	kindAccept      = 10
	kindAck         = 11
	kindAbort       = 12

	headBytes    = 9       // kind, seq
	tagBytes     = 20 + 16 // name of a pad, tag
	helloVersion = 1
	// partDetections bounds the detections of one announcement, so that no
	// message comes near MaxMessage (10 bytes a slot at most).
	partDetections = 1 << 16
)

// reader takes a message apart. After a short read it is bad and yields zeros.
type reader struct {
	b   []byte
	bad bool
}

func (r *reader) take(n int) []byte {
	if n < 0 || n > len(r.b) {
		r.bad = true
		r.b = nil
		return nil
	}
	p := r.b[:n]
	r.b = r.b[n:]
	return p
}

func (r *reader) u8() uint8 {
	if p := r.take(1); p != nil {
		return p[0]
	}
	return 0
}

func (r *reader) u16() uint16 {
	if p := r.take(2); p != nil {
		return binary.LittleEndian.Uint16(p)
	}
	return 0
}

func (r *reader) u32() uint32 {
	if p := r.take(4); p != nil {
		return binary.LittleEndian.Uint32(p)
	}
	return 0
}

func (r *reader) u64() uint64 {
	if p := r.take(8); p != nil {
		return binary.LittleEndian.Uint64(p)
	}
	return 0
}

// uvarint reads an integer in the shortest form only, so that a message has
// one encoding.
func (r *reader) uvarint() uint64 {
	v, n := binary.Uvarint(r.b)
	if n <= 0 || (n > 1 && r.b[n-1] == 0) {
		r.bad = true
		r.b = nil
		return 0
	}
	r.b = r.b[n:]
	return v
}

// packed reads n values of the given width, 1 or 2 bits, low bits first;
// unused bits must be zero.
func (r *reader) packed(n, width int) packed {
	p := r.take((n*width + 7) / 8)
	if used := n * width % 8; used > 0 && len(p) > 0 && p[len(p)-1]>>used != 0 {
		r.bad = true
	}
	return packed{p, width}
}

// end reports whether all was read and well formed.
func (r *reader) end() bool { return !r.bad && len(r.b) == 0 }

type packed struct {
	b     []byte
	width int
}

func (p packed) at(i int) uint8 {
	i *= p.width
	return p.b[i/8] >> (i % 8) & (1<<p.width - 1)
}

// packer collects values of one width.
type packer struct {
	b     []byte
	n     int
	width int
}

func (p *packer) add(v uint8) {
	at := p.n * p.width
	if at%8 == 0 {
		p.b = append(p.b, 0)
	}
	p.b[at/8] |= v << (at % 8)
	p.n++
}

func newMessage(kind uint8, seq uint64, parts ...[]byte) []byte {
	b := binary.LittleEndian.AppendUint64([]byte{kind}, seq)
	for _, p := range parts {
		b = append(b, p...)
	}
	return b
}

// hello is the first message of each end; its layout is in the package comment.
type hello struct {
	role       Role
	generation uint64
	digest     [32]byte
	segments   []AuthSegment
}

func (h hello) encode() []byte {
	b := newMessage(kindHello, 0, []byte{helloVersion, byte(h.role)})
	b = binary.LittleEndian.AppendUint64(b, h.generation)
	b = append(b, h.digest[:]...)
	b = binary.LittleEndian.AppendUint16(b, uint16(len(h.segments)))
	for _, s := range h.segments {
		b = appendSegment(b, s)
	}
	return b
}

func (h *hello) decode(r *reader) bool {
	if r.u8() != helloVersion {
		return false
	}
	h.role = Role(r.u8())
	h.generation = r.u64()
	copy(h.digest[:], r.take(32))
	n := int(r.u16())
	for ; n > 0 && !r.bad; n-- {
		h.segments = append(h.segments, r.segment())
	}
	return r.end() && h.role <= Bob
}

// announcement is a run of a block's detections as alice is told: slots and
// bases of all, bits of those in the test basis.
type announcement struct {
	slots []uint64
	bases packed
	bits  packed // of the detections in the test basis, in order
}

// encodeAnnouncement follows the slot before, 0 at the block's start.
func encodeAnnouncement(seq, before uint64, ds []Detection) []byte {
	b := newMessage(kindAnnounce, seq)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(ds)))
	bases, bits := packer{width: 1}, packer{width: 1}
	for _, d := range ds {
		b = binary.AppendUvarint(b, d.Slot-before)
		before = d.Slot
		bases.add(uint8(d.Basis))
		if d.Basis == Test {
			bits.add(d.Bit)
		}
	}
	b = append(b, bases.b...)
	return append(b, bits.b...)
}

func (a *announcement) decode(r *reader, before uint64, first bool) bool {
	n := int(r.u32())
	if n < 1 || n > partDetections || n > len(r.b) {
		return false
	}
	a.slots = make([]uint64, n)
	for i := range a.slots {
		gap := r.uvarint()
		at := before + gap
		if at < before || (gap == 0 && !(first && i == 0)) {
			return false
		}
		a.slots[i], before = at, at
	}
	a.bases = r.packed(n, 1)
	if r.bad {
		return false
	}
	tests := 0
	for i := range n {
		tests += int(a.bases.at(i))
	}
	a.bits = r.packed(tests, 1)
	return r.end()
}

func appendPad(b []byte, name PadName) []byte {
	b = binary.LittleEndian.AppendUint64(b, name.Generation)
	b = binary.LittleEndian.AppendUint64(b, name.Seq)
	return binary.LittleEndian.AppendUint32(b, name.Index)
}

func (r *reader) pad() PadName {
	return PadName{Generation: r.u64(), Seq: r.u64(), Index: r.u32()}
}
