package peer

import (
	"encoding/binary"
	"fmt"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/kms"
	"github.com/quietline/quietline/kms/codec"
)

// Version of the messages. Another is refused in HELLO.
const Version = 1

// MaxMessage is the longest message, bytes.
const MaxMessage = 1 << 18

// Bounds of lists within a message: they keep the longest below MaxMessage.
const (
	maxRuns    = 4096
	maxMarks   = 4096
	maxLinks   = 1024
	maxTargets = 16
)

// kind is a message's first byte but one.
type kind uint8

// The messages. All but HELLO carry the session they were sent in, which
// names both incarnations; a message of another session is not acted on.
//
//	HELLO      who I am, what I know of you; see hello
//	IDKEY      link, key               the ID key, from the KME whose ID sorts first
//	IDKEY-ACK  link                    stored
//	INVENTORY  link, generation, runs  what I hold NEW, CONFIRMED or OPEN
//	OFFER      segment, sizes, owner, tag, have
//	CONFIRMED  segment                 I hold it CONFIRMED
//	GIVE       segment                 it is yours now
//	GIVE-ACK   segment
//	OPEN       segment
//	OPEN-ACK   segment
//	GRANT      segment, grant
//	GRANT-ACK  segment, first slot
//	MARKS      segment, marks          how far each grant is drawn
//	CLOSE      segment, marks          the last of them
//	CLOSE-ACK  segment
//	REFUSE     kind, segment, first slot, reason
//	WANT       link, count             give me segments: I have nothing to draw
//	BEAT       position                I live; my log stands here
const (
	kHello kind = 1 + iota
	kIDKey
	kIDKeyAck
	kInventory
	kOffer
	kConfirmed
	kGive
	kGiveAck
	kOpen
	kOpenAck
	kGrant
	kGrantAck
	kMarks
	kClose
	kCloseAck
	kRefuse
	kWant
	kBeat
	kEnd
)

// String is the message's name.
func (k kind) String() string {
	names := [...]string{"?", "HELLO", "IDKEY", "IDKEY-ACK", "INVENTORY", "OFFER", "CONFIRMED",
		"GIVE", "GIVE-ACK", "OPEN", "OPEN-ACK", "GRANT", "GRANT-ACK", "MARKS", "CLOSE",
		"CLOSE-ACK", "REFUSE", "WANT", "BEAT"}
	if int(k) >= len(names) {
		return names[0]
	}
	return names[k]
}

// reason is why a message was refused.
type reason uint8

const (
	notYet   reason = 1 + iota // the segment is not CONFIRMED here: confirm, then retry
	dead                       // the segment is finished or void here: destroy yours
	notOwner                   // the segment is not yours here: destroy yours
	conflict                   // the grant contradicts another: the segment is void
	differs                    // the blocks differ: destroy yours
	stranger                   // an SAE is not served where you think
)

func (r reason) String() string {
	names := [...]string{"?", "not yet", "dead", "not owner", "conflict", "blocks differ", "stranger"}
	if int(r) >= len(names) {
		return names[0]
	}
	return names[r]
}

// hello is the HELLO message.
type hello struct {
	kme         etsi014.KMEID
	self        Incarnation
	echo        Incarnation  // of the receiver, as adopted; zero if none
	position    kms.Position // of the sender's durable log
	known       kms.Memory   // what the sender remembers of the receiver (Peer unset)
	proofLength uint64       // length at which proof was taken; 0 = no proof
	proof       [32]byte     // hash of the sender's own log at that length
	witness     bool         // had a session with an earlier incarnation of the receiver
	trustDisks  bool
	settled     bool         // the session stands for the sender
	forsaken    kms.Position // of the sender's log as the receiver remembered it: lost
	refusal     string       // why there is no session, as far as the sender knows
	links       []linkTerms
}

// linkTerms must be equal at both KMEs.
type linkTerms struct {
	id         kms.LinkID
	weights    Weights
	generation uint64 // told, not compared
}

// run is a run of consecutive segments in one standing.
type run struct {
	number, count uint64
	state         kms.State
	mine          bool // the sender owns them
}

// mark says that the grant that begins at slot first is drawn up to slots.
type mark struct{ first, slots int }

// message is any message; which fields count follows from kind.
type message struct {
	kind    kind
	session kms.Session
	hello   *hello
	id      kms.SegmentID // Link and Generation alone where there is no segment
	key     []byte
	runs    []run
	offer   kms.Segment
	have    bool
	grant   kms.Grant
	first   int
	marks   []mark
	refused kind
	reason  reason
	count   uint64
	at      kms.Position
}

func appendID(b []byte, id kms.SegmentID) []byte {
	b = codec.AppendString(b, id.Link)
	b = binary.BigEndian.AppendUint64(b, id.Generation)
	return binary.BigEndian.AppendUint64(b, id.Number)
}

func readID(r *codec.Reader) kms.SegmentID {
	return kms.SegmentID{Link: kms.LinkID(r.String()), Generation: r.Uint64(), Number: r.Uint64()}
}

// usual is how long most messages are, bytes: a GRANT with short names.
const usual = 128

// encode is the message's bytes.
func (m *message) encode() []byte {
	b := append(make([]byte, 0, usual), Version, byte(m.kind))
	if m.kind == kHello {
		return m.hello.append(b)
	}
	b = append(b, m.session[:]...)
	switch m.kind {
	case kBeat:
		return appendPosition(b, m.at)
	case kIDKey:
		b = codec.AppendString(b, m.id.Link)
		return append(b, m.key...)
	case kIDKeyAck:
		return codec.AppendString(b, m.id.Link)
	case kWant:
		b = codec.AppendString(b, m.id.Link)
		return binary.BigEndian.AppendUint64(b, m.count)
	case kInventory:
		return m.appendRuns(b)
	case kOffer:
		b = offerFields(b, &m.offer)
		b = append(b, m.offer.Sent[:]...)
		return codec.AppendBool(b, m.have)
	}
	b = appendID(b, m.id)
	switch m.kind {
	case kGrant:
		b = appendGrant(b, &m.grant)
	case kGrantAck:
		b = binary.BigEndian.AppendUint32(b, uint32(m.first))
	case kMarks, kClose:
		b = binary.BigEndian.AppendUint32(b, uint32(len(m.marks)))
		for _, k := range m.marks {
			b = binary.BigEndian.AppendUint32(b, uint32(k.first))
			b = binary.BigEndian.AppendUint32(b, uint32(k.slots))
		}
	case kRefuse:
		b = append(b, byte(m.refused), byte(m.reason))
		b = binary.BigEndian.AppendUint32(b, uint32(m.first))
	}
	return b
}

func (m *message) appendRuns(b []byte) []byte {
	b = codec.AppendString(b, m.id.Link)
	b = binary.BigEndian.AppendUint64(b, m.id.Generation)
	b = binary.BigEndian.AppendUint32(b, uint32(len(m.runs)))
	for _, r := range m.runs {
		b = binary.BigEndian.AppendUint64(b, r.number)
		b = binary.BigEndian.AppendUint64(b, r.count)
		b = append(b, byte(r.state))
		b = codec.AppendBool(b, r.mine)
	}
	return b
}

// decode reads a message. It is strict: unknown versions, kinds, values out of
// range and bytes left over are errors. Nothing points into data but key; lists
// are good until the next message is read, but for targets, which are its own.
func (m *message) decode(data []byte) error {
	r := codec.NewReader(data)
	version := r.Uint8()
	*m = message{kind: kind(r.Uint8()), runs: m.runs[:0], marks: m.marks[:0]}
	if version != Version {
		return fmt.Errorf("decode message: %w: version %d, this program speaks %d",
			codec.ErrFormat, version, Version)
	}
	if len(data) > MaxMessage {
		return fmt.Errorf("decode message: %w: %d bytes", codec.ErrFormat, len(data))
	}
	if m.kind == kHello {
		m.hello = readHello(r)
	} else {
		r.Copy(m.session[:])
		m.readBody(r)
	}
	if err := r.End(); err != nil {
		return fmt.Errorf("decode %s: %w", m.kind, err)
	}
	return nil
}

func (m *message) readBody(r *codec.Reader) {
	switch m.kind {
	case kBeat:
		m.at = readPosition(r)
	case kIDKey:
		m.id.Link = kms.LinkID(r.String())
		m.key = r.Take(IDKeySize)
	case kIDKeyAck:
		m.id.Link = kms.LinkID(r.String())
	case kWant:
		m.id.Link = kms.LinkID(r.String())
		m.count = r.Uint64()
	case kInventory:
		m.readRuns(r)
	case kOffer:
		m.readOffer(r)
	case kConfirmed, kGive, kGiveAck, kOpen, kOpenAck, kCloseAck:
		m.id = readID(r)
	case kGrant:
		m.id = readID(r)
		m.grant = readGrant(r)
	case kGrantAck:
		m.id = readID(r)
		m.first = readSlots(r)
	case kMarks, kClose:
		m.id = readID(r)
		m.readMarks(r)
	case kRefuse:
		m.id = readID(r)
		m.refused, m.reason = kind(r.Uint8()), reason(r.Uint8())
		m.first = readSlots(r)
		if m.refused == 0 || m.refused >= kEnd || m.reason == 0 || m.reason > stranger {
			r.Fail()
		}
	default:
		r.Fail()
	}
}

func (m *message) readRuns(r *codec.Reader) {
	m.id.Link = kms.LinkID(r.String())
	m.id.Generation = r.Uint64()
	n := r.Uint32()
	if n > maxRuns {
		r.Fail()
	}
	for ; n > 0 && r.Err() == nil; n-- {
		run := run{r.Uint64(), r.Uint64(), kms.State(r.Uint8()), r.Bool()}
		if run.count == 0 || run.number+run.count < run.number ||
			run.state < kms.StateNew || run.state > kms.StateOpen {
			r.Fail()
		}
		m.runs = append(m.runs, run)
	}
}

func (m *message) readOffer(r *codec.Reader) {
	m.id = readID(r)
	m.offer = kms.Segment{
		ID: m.id, BlockBytes: int(r.Uint32()), SlotBytes: int(r.Uint32()), Slots: int(r.Uint32()),
		Owner: etsi014.KMEID(r.String()), Simulated: r.Bool(),
	}
	r.Copy(m.offer.Sent[:])
	m.have = r.Bool()
}

func (m *message) readMarks(r *codec.Reader) {
	n := r.Uint32()
	if n > maxMarks {
		r.Fail()
	}
	for ; n > 0 && r.Err() == nil; n-- {
		m.marks = append(m.marks, mark{readSlots(r), readSlots(r)})
	}
}

// readSlots reads a number of slots: no block is so long that it needs more
// than 31 bits.
func readSlots(r *codec.Reader) int {
	v := r.Uint32()
	if v > 1<<31-1 {
		r.Fail()
		return 0
	}
	return int(v)
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

func readGrant(r *codec.Reader) kms.Grant {
	g := kms.Grant{First: readSlots(r), Slots: readSlots(r), SizeBits: readSlots(r),
		Initiator: etsi014.SAEID(r.String())}
	n := int(r.Uint8())
	if n == 0 || n > maxTargets || g.Slots == 0 || g.SizeBits == 0 {
		r.Fail()
	}
	for ; n > 0 && r.Err() == nil; n-- {
		g.Targets = append(g.Targets, etsi014.SAEID(r.String()))
	}
	return g
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

func appendIncarnation(b []byte, i Incarnation) []byte {
	b = binary.BigEndian.AppendUint64(b, i.Counter)
	return append(b, i.Nonce[:]...)
}

func readIncarnation(r *codec.Reader) Incarnation {
	i := Incarnation{Counter: r.Uint64()}
	r.Copy(i.Nonce[:])
	return i
}

func (h *hello) append(b []byte) []byte {
	b = codec.AppendString(b, h.kme)
	b = appendIncarnation(b, h.self)
	b = appendIncarnation(b, h.echo)
	b = appendPosition(b, h.position)
	b = binary.BigEndian.AppendUint64(b, h.known.Incarnation)
	b = appendPosition(b, h.known.Position)
	b = binary.BigEndian.AppendUint64(b, h.proofLength)
	b = append(b, h.proof[:]...)
	b = codec.AppendBool(b, h.witness)
	b = codec.AppendBool(b, h.trustDisks)
	b = codec.AppendBool(b, h.settled)
	b = appendPosition(b, h.forsaken)
	b = codec.AppendString(b, h.refusal)
	b = binary.BigEndian.AppendUint16(b, uint16(len(h.links)))
	for _, l := range h.links {
		b = codec.AppendString(b, l.id)
		b = append(b, l.weights.Low, l.weights.High)
		b = binary.BigEndian.AppendUint64(b, l.generation)
	}
	return b
}

func readHello(r *codec.Reader) *hello {
	h := &hello{kme: etsi014.KMEID(r.String()), self: readIncarnation(r), echo: readIncarnation(r),
		position: readPosition(r)}
	h.known.Incarnation, h.known.Position = r.Uint64(), readPosition(r)
	h.proofLength = r.Uint64()
	r.Copy(h.proof[:])
	h.witness, h.trustDisks, h.settled = r.Bool(), r.Bool(), r.Bool()
	h.forsaken, h.refusal = readPosition(r), r.String()
	n := r.Uint16()
	if n > maxLinks || h.self.Counter == 0 {
		r.Fail()
	}
	for ; n > 0 && r.Err() == nil; n-- {
		h.links = append(h.links, linkTerms{kms.LinkID(r.String()),
			Weights{r.Uint8(), r.Uint8()}, r.Uint64()})
	}
	return h
}
