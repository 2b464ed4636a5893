package distill

import (
	"encoding/binary"
	"fmt"

	"github.com/quietline/quietline/hw/distill/cascade"
	"github.com/quietline/quietline/hw/distill/finite"
	"github.com/quietline/quietline/hw/distill/gf2"
	"github.com/quietline/quietline/secret"
)

// block is one block on its way, at either end.
type block struct {
	seq       uint64
	expects   uint8     // kind of the peer's next message; 0 = none
	sent, got *gf2.Hash // transcripts of both directions

	detections []Detection // bob: announced, not yet answered
	parts      []int       // bob: lengths of the announcements not yet answered
	told       int         // detections announced so far
	lastSlot   uint64      // alice: of the announcement before
	keyBits    bitString   // sifted bits of the key basis
	level      []uint8     // intensity of each
	test       Counts
	answered   int // detections sifted so far

	party  *cascade.Party
	plan   *cascade.Plan
	secret secret.Bytes // bob: amplified, waiting for alice's ack; alice: for bob's accept
	auth   int          // bytes of it that go to the pool
	report Report
}

// bitString grows by bits.
type bitString struct {
	words []uint64
	n     int
}

func (s *bitString) add(bit uint8) {
	if s.n%64 == 0 {
		s.words = append(s.words, 0)
	}
	s.words[s.n/64] |= uint64(bit) << (s.n % 64)
	s.n++
}

// cut keeps the first n bits, a multiple of 64.
func (s *bitString) cut(n int) {
	clear(s.words[n/64:])
	s.words, s.n = s.words[:n/64], n
}

func (b *block) clear() {
	clear(b.keyBits.words)
	clear(b.detections)
	if b.party != nil {
		b.party.Clear()
	}
	b.secret.Clear()
}

// newBlock opens the next block and starts both transcripts with all that
// names it, so that no tag fits another session, block or direction.
func (m *Machine) newBlock() *block {
	b := &block{seq: m.nextSeq}
	m.heard = m.now
	m.nextSeq++
	b.report = Report{Generation: m.generation, Seq: b.seq,
		Epsilon: m.cfg.EpsSec + m.cfg.EpsCor + padGroup*m.cfg.EpsAuth}
	start := func(sender Role) *gf2.Hash {
		h := gf2.NewHash(m.cfg.Auth.Point(sender))
		_, _ = h.Write(m.digest[:])
		head := binary.LittleEndian.AppendUint64([]byte{byte(sender)}, m.generation)
		_, _ = h.Write(binary.LittleEndian.AppendUint64(head, b.seq))
		return h
	}
	b.sent, b.got = start(m.cfg.Role), start(1-m.cfg.Role)
	b.expects = kindAnnounce
	if m.cfg.Role == Bob {
		b.expects = kindSifted
	}
	m.open = append(m.open, b)
	return b
}

// absorb takes a message into a transcript: its length and its bytes, without
// the tag that some kinds end in.
func absorb(h *gf2.Hash, raw []byte, kind uint8) {
	if kind == kindAmplify || kind == kindAccept || kind == kindAck {
		raw = raw[:max(0, len(raw)-tagBytes)]
	}
	_, _ = h.Write(binary.LittleEndian.AppendUint32(nil, uint32(len(raw))))
	_, _ = h.Write(raw)
}

// Reasons why a block ends without key, by number on the wire.
var outcomes = []string{
	1: "qber above limit",
	2: "too few sifted bits",
	3: "verification failed",
	4: "no secret bits",
	5: "lengths differ",
}

const (
	outcomeSecret = "secret"
	abortQBER     = 1
	abortFew      = 2
	abortVerify   = 3
	abortNoSecret = 4
	abortLength   = 5
)

// abort closes a block at this end and tells the peer. It is not
// authenticated: whoever can forge it can as well cut the channel.
func (m *Machine) abort(b *block, reason uint8) error {
	m.out.Messages = append(m.out.Messages, newMessage(kindAbort, b.seq, []byte{reason}))
	m.giveUp(b, reason)
	if m.cfg.Role == Alice {
		return m.amplifyNext() // the one behind it may have waited for its turn
	}
	return nil
}

func (m *Machine) aborted(b *block, r *reader) error {
	reason := r.u8()
	if !r.end() || reason == 0 || int(reason) >= len(outcomes) {
		return fmt.Errorf("%w: bad abort of block %d", ErrProtocol, b.seq)
	}
	m.giveUp(b, reason)
	if m.cfg.Role == Alice {
		return m.amplifyNext()
	}
	return nil
}

func (m *Machine) giveUp(b *block, reason uint8) {
	q := max(b.report.Key.QBER(), b.report.Test.QBER())
	m.alarm(outcomes[reason], fmt.Sprintf("block %d: qber %.4f, limit %.4f, sifted %d, leak %d",
		b.seq, q, m.cfg.MaxQBER, b.keyBits.n, b.report.Leak))
	m.close(b, outcomes[reason])
}

// planned cuts the sifted bits to what the plan covers and counts them. It is
// a function of what both ends know.
func (b *block) planned(qber float64, seed uint64) {
	b.plan = cascade.NewPlan(b.keyBits.n, qber, seed)
	b.keyBits.cut(b.plan.Bits())
	b.level = b.level[:b.plan.Bits()]
	for _, k := range b.level {
		b.report.Key.N[k]++
	}
}

// reconciled counts the errors found.
func (b *block) reconciled() {
	for _, at := range b.party.Errors() {
		b.report.Key.M[b.level[at]]++
	}
	b.report.Leak = b.party.Leak() + 8*gf2.HashBytes
	n := float64(b.plan.Bits())
	if h := finite.Entropy(b.report.Key.QBER()); h > 0 {
		b.report.Efficiency = float64(b.party.Leak()) / (n * h)
	}
}

// length computes the secret bits of the block, whole bytes, and puts the
// bounds in the report.
func (b *block) length(cfg Config) int {
	count := func(c Counts) (f finite.Counts) {
		for k := range c.N {
			f.N[k], f.M[k] = float64(c.N[k]), float64(c.M[k])
		}
		return f
	}
	r := finite.Wiesemann(finite.Block{Source: cfg.source(),
		Key: count(b.report.Key), Test: count(b.report.Test),
		Leak: float64(b.party.Leak()), Verify: 8 * gf2.HashBytes, EpsSec: cfg.EpsSec})
	b.report.PhaseError = r.Phase
	b.report.SecretBits = r.Bits / 8 * 8
	return b.report.SecretBits
}

// hashOf is the verification hash of the reconciled bits.
func hashOf(key [gf2.HashBytes]byte, words []uint64) [gf2.HashBytes]byte {
	h := gf2.NewHash(key)
	raw := wordBytes(words)
	_, _ = h.Write(raw)
	secret.Wipe(raw)
	return h.Sum()
}

func wordBytes(words []uint64) []byte {
	b := make([]byte, 0, 8*len(words))
	for _, w := range words {
		b = binary.LittleEndian.AppendUint64(b, w)
	}
	return b
}

// toeplitz amplifies the party's bits to so many bits, whole bytes, with the
// seed of the wire.
func (b *block) toeplitz(seed []byte, bits int) secret.Bytes {
	words := make([]uint64, (len(seed)+7)/8)
	for i, v := range seed {
		words[i/8] |= uint64(v) << (i % 8 * 8)
	}
	x := b.party.Bits()
	y := gf2.Toeplitz(x, b.plan.Bits(), words, bits)
	clear(x)
	raw := wordBytes(y)
	clear(y)
	clear(raw[bits/8:])
	return secret.Own(raw[:bits/8])
}

func seedBytesFor(n int) int { return (n - 1 + 7) / 8 }
