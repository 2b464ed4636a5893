package boltstore

import (
	"encoding/binary"
	"fmt"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/kms"
	"github.com/quietline/quietline/kms/codec"
)

// The records' forms. Each reader is strict: a record that does not have its
// form is ErrCorrupt.

func segmentKey(id kms.SegmentID) []byte {
	b := make([]byte, 0, 2+len(id.Link)+16+4)
	b = codec.AppendString(b, id.Link)
	b = binary.BigEndian.AppendUint64(b, id.Generation)
	return binary.BigEndian.AppendUint64(b, id.Number)
}

func parseSegmentKey(k []byte) (kms.SegmentID, error) {
	r := codec.NewReader(k)
	id := kms.SegmentID{Link: kms.LinkID(r.String()), Generation: r.Uint64(), Number: r.Uint64()}
	return id, corrupt("segment key", r)
}

// grantKey is under the slot where the grant ends, so that a forward seek finds
// the grant that covers a slot. (The engine's backward step trips over leaves
// that deletes of the same transaction emptied.)
func grantKey(segment []byte, end int) []byte {
	return binary.BigEndian.AppendUint32(segment[:len(segment):len(segment)], uint32(end))
}

func claimKey(segment []byte, role int) []byte {
	return append(segment[:len(segment):len(segment)], byte(role+1))
}

func appendSegment(b []byte, s *kms.Segment) []byte {
	b = codec.AppendString(b, s.ID.Link)
	b = binary.BigEndian.AppendUint64(b, s.ID.Generation)
	b = binary.BigEndian.AppendUint64(b, s.ID.Number)
	b = append(b, byte(s.State))
	b = binary.BigEndian.AppendUint32(b, uint32(s.BlockBytes))
	b = binary.BigEndian.AppendUint32(b, uint32(s.SlotBytes))
	b = binary.BigEndian.AppendUint32(b, uint32(s.Slots))
	b = codec.AppendString(b, s.Owner)
	b = append(b, s.Session[:]...)
	b = append(b, s.Sent[:]...)
	b = append(b, s.Expected[:]...)
	b = codec.AppendBool(b, s.Simulated)
	return codec.AppendBool(b, s.Given)
}

func parseSegment(v []byte) (kms.Segment, error) {
	r := codec.NewReader(v)
	s := kms.Segment{
		ID:         kms.SegmentID{Link: kms.LinkID(r.String()), Generation: r.Uint64(), Number: r.Uint64()},
		State:      kms.State(r.Uint8()),
		BlockBytes: int(r.Uint32()), SlotBytes: int(r.Uint32()), Slots: int(r.Uint32()),
		Owner: etsi014.KMEID(r.String()),
	}
	r.Copy(s.Session[:])
	r.Copy(s.Sent[:])
	r.Copy(s.Expected[:])
	s.Simulated, s.Given = r.Bool(), r.Bool()
	return s, corrupt("segment", r)
}

func appendGrant(b []byte, g *kms.Grant) []byte {
	b = binary.BigEndian.AppendUint32(b, uint32(g.First))
	b = binary.BigEndian.AppendUint32(b, uint32(g.Slots))
	b = binary.BigEndian.AppendUint32(b, uint32(g.SizeBits))
	b = codec.AppendString(b, g.Initiator)
	b = append(b, byte(len(g.Targets)))
	for _, t := range g.Targets {
		b = codec.AppendString(b, t)
	}
	return b
}

func parseGrant(v []byte) (kms.Grant, error) {
	r := codec.NewReader(v)
	g := kms.Grant{
		First: int(r.Uint32()), Slots: int(r.Uint32()), SizeBits: int(r.Uint32()),
		Initiator: etsi014.SAEID(r.String()),
	}
	for n := int(r.Uint8()); n > 0 && r.Err() == nil; n-- {
		g.Targets = append(g.Targets, etsi014.SAEID(r.String()))
	}
	return g, corrupt("grant", r)
}

func appendWrapped(b []byte, w kms.Wrapped) []byte {
	b = binary.BigEndian.AppendUint64(b, w.Epoch)
	return codec.AppendString(b, w.Bytes)
}

func readWrapped(r *codec.Reader) kms.Wrapped {
	return kms.Wrapped{Epoch: r.Uint64(), Bytes: append([]byte(nil), r.Bytes()...)}
}

func parseWrapped(v []byte) (kms.Wrapped, error) {
	r := codec.NewReader(v)
	w := readWrapped(r)
	return w, corrupt("wrapped key", r)
}

// linkRecord is what is kept of a link.
type linkRecord struct {
	generation, floor uint64
	idKey             kms.Wrapped
	ledger            kms.Ledger
}

func (l *linkRecord) append(b []byte) []byte {
	b = binary.BigEndian.AppendUint64(b, l.generation)
	b = binary.BigEndian.AppendUint64(b, l.floor)
	b = appendWrapped(b, l.idKey)
	for _, v := range []uint64{l.ledger.Ingested, l.ledger.Delivered, l.ledger.Void,
		l.ledger.Expired, l.ledger.Burnt, l.ledger.Tag, l.ledger.Stored} {
		b = binary.BigEndian.AppendUint64(b, v)
	}
	return b
}

func parseLink(v []byte) (linkRecord, error) {
	if v == nil {
		return linkRecord{}, nil
	}
	r := codec.NewReader(v)
	l := linkRecord{generation: r.Uint64(), floor: r.Uint64(), idKey: readWrapped(r)}
	l.ledger = kms.Ledger{Ingested: r.Uint64(), Delivered: r.Uint64(), Void: r.Uint64(),
		Expired: r.Uint64(), Burnt: r.Uint64(), Tag: r.Uint64(), Stored: r.Uint64()}
	return l, corrupt("link", r)
}

func appendPosition(b []byte, p kms.Position) []byte {
	b = binary.BigEndian.AppendUint64(b, p.Length)
	return append(b, p.Hash[:]...)
}

func readPosition(r *codec.Reader) kms.Position {
	p := kms.Position{Length: r.Uint64()}
	r.Copy(p.Hash[:])
	return p
}

func parsePosition(v []byte) (kms.Position, error) {
	if v == nil {
		return kms.Position{}, nil
	}
	r := codec.NewReader(v)
	p := readPosition(r)
	return p, corrupt("position", r)
}

func appendMemory(b []byte, m kms.Memory) []byte {
	b = binary.BigEndian.AppendUint64(b, m.Incarnation)
	return appendPosition(b, m.Position)
}

func parseMemory(peer etsi014.KMEID, v []byte) (kms.Memory, error) {
	r := codec.NewReader(v)
	m := kms.Memory{Peer: peer, Incarnation: r.Uint64(), Position: readPosition(r)}
	return m, corrupt("memory of a peer", r)
}

func corrupt(what string, r *codec.Reader) error {
	if err := r.End(); err != nil {
		return fmt.Errorf("parse %s record: %w: %w", what, kms.ErrCorrupt, err)
	}
	return nil
}
