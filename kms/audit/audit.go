// Package audit is the form of a KME's tamper-evident log: one entry per
// commit, chained by hash.
//
// [Append] makes the next entry, [Parse] reads one and checks that it follows.
// An entry's hash is SHA-256("quietline audit 1" || hash before || length ||
// body), where length is the number of entries including this one and body is
//
//	unix time in ns (8) || number of changes (4) || changes
//
// A change is its Op (1), the link's name, and the fields of its Op, as in
// appendChange; adjoining claims of one commit are one change. SAEs stand in the body as 32-byte commitments (see [Names]),
// so that an entry may be shown to others, and a name be forgotten by
// deleting its salt while the chain still verifies.
//
// A caller must keep in mind that an entry belongs in the same commit as the
// changes it tells of: no record, no key. And that a log that ends earlier,
// with all that tells of its end, is a whole log again: how far it went is what
// the peers remember.
package audit

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"iter"
	"time"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/kms"
	"github.com/quietline/quietline/kms/codec"
)

// Commitment stands for an SAE's name: SHA-256(salt || name).
type Commitment [32]byte

// Salt hides a name in its commitment.
type Salt [16]byte

// Commit binds a name under a salt.
func Commit(salt Salt, name etsi014.SAEID) Commitment {
	h := sha256.New()
	h.Write(salt[:])
	h.Write([]byte(name))
	return Commitment(h.Sum(nil))
}

// Names turns names into commitments for [Append]. The store draws a salt for
// a name it has not met and keeps it in the same commit.
type Names func(etsi014.SAEID) (Commitment, error)

// Reveal finds the name behind a commitment for [Parse]; false if forgotten.
type Reveal func(Commitment) (etsi014.SAEID, bool)

// domain separates the chain's hash from every other use of SHA-256.
const domain = "quietline audit 1"

// hashSize is the length of the hash behind each stored entry, bytes.
const hashSize = sha256.Size

// Append returns the entry that follows prev, and the position after it.
func Append(prev kms.Position, at time.Time, changes []kms.Change, names Names) ([]byte,
	kms.Position, error) {
	b := make([]byte, 0, 12+min(len(changes), 4)*96+hashSize)
	b = binary.BigEndian.AppendUint64(b, uint64(at.UnixNano()))
	n := 0
	b = binary.BigEndian.AppendUint32(b, 0)
	for c := range merged(changes) {
		var err error
		if b, err = appendChange(b, c, names); err != nil {
			return nil, prev, err
		}
		n++
	}
	binary.BigEndian.PutUint32(b[8:], uint32(n))
	next := kms.Position{Length: prev.Length + 1}
	next.Hash = link(prev.Hash, next.Length, b)
	return append(b, next.Hash[:]...), next, nil
}

// merged yields the changes that stand in the log. Claims that follow each other
// and take adjoining slots for the same SAE are one: calls that share a commit
// share an entry, and each slot of it is accounted for.
func merged(changes []kms.Change) iter.Seq[*kms.Change] {
	return func(yield func(*kms.Change) bool) {
		var c *kms.Change
		var sum kms.Change // of those that adjoin, for the caller's are not to change
		for i := range changes {
			next := &changes[i]
			switch {
			case !Logged(next.Op):
			case c != nil && adjoins(c, next):
				if c != &sum {
					sum = *c
					c = &sum
				}
				sum.Slots += next.Slots
			case c != nil && !yield(c):
				return
			default:
				c = next
			}
		}
		if c != nil {
			yield(c)
		}
	}
}

// adjoins tells whether the claim next goes on where c ends.
func adjoins(c, next *kms.Change) bool {
	return c.Op == next.Op && (c.Op == kms.OpClaim || c.Op == kms.OpExpire) &&
		next.First == c.First+c.Slots && c.Role == next.Role && c.SAE == next.SAE &&
		c.Segment == next.Segment && c.Session == next.Session
}

// Logged tells whether a change stands in the log. What a peer showed of
// itself does not: else two KMEs would answer each other's entries for ever.
func Logged(op kms.Op) bool {
	switch op {
	case kms.OpRemember, kms.OpTally, kms.OpReseal, kms.OpRewrap:
		return false
	}
	return true
}

// Parse reads the entry after prev and checks that it follows it. An empty
// Reveal leaves names empty.
func Parse(prev kms.Position, entry []byte, reveal Reveal) (kms.Record, error) {
	rec := kms.Record{Position: kms.Position{Length: prev.Length + 1}}
	if len(entry) < hashSize {
		return rec, fmt.Errorf("parse record %d: %w", prev.Length+1, kms.ErrCorrupt)
	}
	body, sum := entry[:len(entry)-hashSize], entry[len(entry)-hashSize:]
	rec.Position.Hash = link(prev.Hash, rec.Position.Length, body)
	if string(sum) != string(rec.Position.Hash[:]) {
		return rec, fmt.Errorf("parse record %d: %w: it does not follow the one before",
			rec.Position.Length, kms.ErrCorrupt)
	}
	r := codec.NewReader(body)
	rec.At = time.Unix(0, int64(r.Uint64())).UTC()
	n := int(r.Uint32())
	for i := 0; i < n && r.Err() == nil; i++ {
		rec.Changes = append(rec.Changes, readChange(r, reveal))
	}
	if err := r.End(); err != nil {
		return rec, fmt.Errorf("parse record %d: %w: %w", rec.Position.Length, kms.ErrCorrupt, err)
	}
	return rec, nil
}

// HashOf is the chain hash that a stored entry carries, without checking it.
func HashOf(entry []byte) (hash [32]byte, ok bool) {
	if len(entry) < hashSize {
		return hash, false
	}
	return [32]byte(entry[len(entry)-hashSize:]), true
}

func link(prev [32]byte, length uint64, body []byte) [32]byte {
	h := sha256.New()
	h.Write([]byte(domain))
	h.Write(prev[:])
	h.Write(binary.BigEndian.AppendUint64(nil, length))
	h.Write(body)
	return [32]byte(h.Sum(nil))
}

// fields of a change that an entry carries, by Op.
const (
	fSegment = 1 << iota
	fSession
	fGrant
	fClaim
	fOwner
	fPeer
	fMeta
	fBoot
	fReason
	fNote
	fEpoch
)

var fields = map[kms.Op]int{
	kms.OpBoot:    fBoot | fReason,
	kms.OpLink:    0,
	kms.OpIngest:  fSegment | fMeta,
	kms.OpConfirm: fSegment,
	kms.OpGive:    fSegment | fOwner,
	kms.OpOpen:    fSegment | fSession,
	kms.OpGrant:   fSegment | fSession | fGrant,
	kms.OpClaim:   fSegment | fSession | fClaim,
	kms.OpExpire:  fSegment | fSession | fClaim,
	kms.OpClose:   fSegment,
	kms.OpFinish:  fSegment,
	kms.OpVoid:    fSegment | fReason,
	kms.OpTurn:    fEpoch,
	kms.OpNote:    fPeer | fReason | fNote,
}

func appendChange(b []byte, c *kms.Change, names Names) ([]byte, error) {
	f, ok := fields[c.Op]
	if !ok {
		return nil, fmt.Errorf("append change %d: %w", c.Op, kms.ErrChange)
	}
	b = append(b, byte(c.Op))
	b = codec.AppendString(b, c.Segment.Link)
	if f&fSegment != 0 {
		b = binary.BigEndian.AppendUint64(b, c.Segment.Generation)
		b = binary.BigEndian.AppendUint64(b, c.Segment.Number)
	}
	if f&fSession != 0 {
		b = append(b, c.Session[:]...)
	}
	var err error
	if f&fGrant != 0 {
		if b, err = appendGrant(b, &c.Grant, names); err != nil {
			return nil, err
		}
	}
	if f&fClaim != 0 {
		b = binary.BigEndian.AppendUint32(b, uint32(c.First))
		b = binary.BigEndian.AppendUint32(b, uint32(c.Slots))
		b = append(b, byte(c.Role+1))
		if b, err = appendName(b, c.SAE, names); err != nil {
			return nil, err
		}
	}
	if f&fOwner != 0 {
		b = codec.AppendString(b, c.Owner)
	}
	if f&fPeer != 0 {
		b = codec.AppendString(b, c.Memory.Peer)
	}
	if f&fMeta != 0 {
		b = appendMeta(b, &c.Meta)
	}
	if f&fBoot != 0 {
		b = binary.BigEndian.AppendUint64(b, c.Incarnation)
	}
	if f&fEpoch != 0 {
		b = binary.BigEndian.AppendUint64(b, c.Epoch)
	}
	if f&fReason != 0 {
		b = codec.AppendString(b, c.Reason)
	}
	if f&fNote != 0 {
		b = binary.BigEndian.AppendUint64(b, c.Count)
		b, err = appendName(b, c.SAE, names)
	}
	return b, err
}

func readChange(r *codec.Reader, reveal Reveal) kms.Change {
	c := kms.Change{Op: kms.Op(r.Uint8())}
	f, ok := fields[c.Op]
	if !ok {
		r.Fail()
		return c
	}
	c.Segment.Link = kms.LinkID(r.String())
	if f&fSegment != 0 {
		c.Segment.Generation, c.Segment.Number = r.Uint64(), r.Uint64()
	}
	if f&fSession != 0 {
		r.Copy(c.Session[:])
	}
	if f&fGrant != 0 {
		c.Grant = readGrant(r, reveal)
	}
	if f&fClaim != 0 {
		c.First, c.Slots = int(r.Uint32()), int(r.Uint32())
		c.Role = int(r.Uint8()) - 1
		c.SAE = readName(r, reveal)
	}
	if f&fOwner != 0 {
		c.Owner = etsi014.KMEID(r.String())
	}
	if f&fPeer != 0 {
		c.Memory.Peer = etsi014.KMEID(r.String())
	}
	if f&fMeta != 0 {
		c.Meta = readMeta(r, c.Segment)
	}
	if f&fBoot != 0 {
		c.Incarnation = r.Uint64()
	}
	if f&fEpoch != 0 {
		c.Epoch = r.Uint64()
	}
	if f&fReason != 0 {
		c.Reason = r.String()
	}
	if f&fNote != 0 {
		c.Count = r.Uint64()
		c.SAE = readName(r, reveal)
	}
	return c
}

func appendMeta(b []byte, m *kms.Segment) []byte {
	b = binary.BigEndian.AppendUint32(b, uint32(m.BlockBytes))
	b = binary.BigEndian.AppendUint32(b, uint32(m.SlotBytes))
	b = binary.BigEndian.AppendUint32(b, uint32(m.Slots))
	b = codec.AppendString(b, m.Owner)
	return codec.AppendBool(b, m.Simulated)
}

func readMeta(r *codec.Reader, id kms.SegmentID) kms.Segment {
	return kms.Segment{
		ID: id, State: kms.StateNew,
		BlockBytes: int(r.Uint32()), SlotBytes: int(r.Uint32()), Slots: int(r.Uint32()),
		Owner: etsi014.KMEID(r.String()), Simulated: r.Bool(),
	}
}

func appendGrant(b []byte, g *kms.Grant, names Names) ([]byte, error) {
	b = binary.BigEndian.AppendUint32(b, uint32(g.First))
	b = binary.BigEndian.AppendUint32(b, uint32(g.Slots))
	b = binary.BigEndian.AppendUint32(b, uint32(g.SizeBits))
	b, err := appendName(b, g.Initiator, names)
	b = append(b, byte(len(g.Targets)))
	for i := 0; err == nil && i < len(g.Targets); i++ {
		b, err = appendName(b, g.Targets[i], names)
	}
	return b, err
}

func readGrant(r *codec.Reader, reveal Reveal) kms.Grant {
	g := kms.Grant{
		First: int(r.Uint32()), Slots: int(r.Uint32()), SizeBits: int(r.Uint32()),
		Initiator: readName(r, reveal),
	}
	for n := int(r.Uint8()); n > 0 && r.Err() == nil; n-- {
		g.Targets = append(g.Targets, readName(r, reveal))
	}
	return g
}

func appendName(b []byte, name etsi014.SAEID, names Names) ([]byte, error) {
	if name == "" {
		return append(b, make([]byte, len(Commitment{}))...), nil
	}
	c, err := names(name)
	return append(b, c[:]...), err
}

func readName(r *codec.Reader, reveal Reveal) etsi014.SAEID {
	var c Commitment
	r.Copy(c[:])
	if reveal == nil || c == (Commitment{}) {
		return ""
	}
	name, _ := reveal(c)
	return name
}
