package distill

import (
	"encoding/binary"
	"fmt"
	"io"
	"math"

	"github.com/quietline/quietline/hw/distill/cascade"
	"github.com/quietline/quietline/hw/distill/gf2"
)

// announce, bob: opens blocks while there are detections for them and tells
// alice. No basis is told before the block's last detection is there.
func (m *Machine) announce() {
	for m.helloGot && len(m.pending) >= m.events && len(m.open) < inFlight {
		b := m.newBlock()
		b.detections = append([]Detection(nil), m.pending[:m.events]...)
		m.pending = append(m.pending[:0], m.pending[m.events:]...)
		b.report.Detections = m.events
		before := uint64(0)
		for rest := b.detections; len(rest) > 0; {
			n := min(len(rest), partDetections)
			raw := encodeAnnouncement(b.seq, before, rest[:n])
			absorb(b.sent, raw, kindAnnounce)
			m.out.Messages = append(m.out.Messages, raw)
			b.parts = append(b.parts, n)
			before = rest[n-1].Slot
			rest = rest[n:]
		}
	}
}

// part is an announcement at alice that waits for her preparations.
type part struct {
	announcement
	block *block
	preps []Preparation
}

// announced, alice: asks her caller what she sent.
func (m *Machine) announced(b *block, r *reader) bool {
	p := &part{block: b}
	if !p.decode(r, b.lastSlot, b.told == 0) || b.told+len(p.slots) > m.events {
		return false
	}
	b.told += len(p.slots)
	b.lastSlot = p.slots[len(p.slots)-1]
	if b.told == m.events {
		b.expects = 0
	}
	b.report.Detections = b.told
	m.stats.Detections += uint64(len(p.slots))
	m.asked = append(m.asked, p)
	m.out.Prepared = append(m.out.Prepared, p.slots...)
	return true
}

// prepared, alice: answers announcements whose preparations are complete.
func (m *Machine) prepared(preps []Preparation) error {
	for len(preps) > 0 {
		if len(m.asked) == 0 {
			return fmt.Errorf("%w: %d preparations were not asked for", ErrInput, len(preps))
		}
		p := m.asked[0]
		n := min(len(p.slots)-len(p.preps), len(preps))
		p.preps = append(p.preps, preps[:n]...)
		preps = preps[n:]
		if len(p.preps) < len(p.slots) {
			return nil
		}
		m.asked = m.asked[1:]
		if m.find(p.block.seq) != p.block {
			continue // bob gave the block up meanwhile
		}
		if err := m.match(p); err != nil {
			return err
		}
	}
	return nil
}

// match, alice: keeps what was measured in the basis she sent and says so.
func (m *Machine) match(p *part) error {
	b := p.block
	codes, bits := packer{width: 2}, packer{width: 1}
	tests := 0
	for i, prep := range p.preps {
		if prep.Basis > Test || prep.Bit > 1 || int(prep.Intensity) >= len(m.cfg.Intensities) {
			return fmt.Errorf("%w: preparation of slot %d", ErrInput, p.slots[i])
		}
		basis := Basis(p.bases.at(i))
		bit := uint8(0)
		if basis == Test {
			bit = p.bits.at(tests)
			tests++
		}
		switch {
		case prep.Basis != basis:
			codes.add(0)
			continue
		case basis == Key:
			b.keyBits.add(prep.Bit)
			b.level = append(b.level, prep.Intensity)
		default:
			b.test.N[prep.Intensity]++
			b.test.M[prep.Intensity] += int(bit ^ prep.Bit)
			bits.add(prep.Bit)
		}
		codes.add(1 + prep.Intensity)
	}
	clear(p.preps)
	b.answered += len(p.slots)
	m.send(b, kindSifted, binary.LittleEndian.AppendUint32(nil, uint32(len(p.slots))), codes.b, bits.b)
	if b.answered == m.events {
		return m.begin(b)
	}
	return nil
}

// sifted, bob: drops what alice drops and compares the test basis.
func (m *Machine) sifted(b *block, r *reader) bool {
	n := int(r.u32())
	if len(b.parts) == 0 || n != b.parts[0] {
		return false
	}
	codes := r.packed(n, 2)
	if r.bad {
		return false
	}
	tests := 0
	for i, d := range b.detections[:n] {
		if c := codes.at(i); c > uint8(len(m.cfg.Intensities)) {
			return false
		} else if c > 0 && d.Basis == Test {
			tests++
		}
	}
	bits := r.packed(tests, 1)
	if !r.end() {
		return false
	}
	tests = 0
	for i, d := range b.detections[:n] {
		c := codes.at(i)
		switch {
		case c == 0:
		case d.Basis == Key:
			b.keyBits.add(d.Bit)
			b.level = append(b.level, c-1)
		default:
			b.test.N[c-1]++
			b.test.M[c-1] += int(bits.at(tests) ^ d.Bit)
			tests++
		}
	}
	clear(b.detections[:n])
	b.detections, b.parts = b.detections[n:], b.parts[1:]
	if len(b.parts) == 0 {
		b.report.Test = b.test
		b.expects = kindBegin
	}
	return true
}

// begin, alice: all is sifted; ends the block if the test basis forbids it,
// else starts reconciliation.
func (m *Machine) begin(b *block) error {
	b.report.Test = b.test
	q := b.test.QBER()
	switch {
	case q > m.cfg.MaxQBER:
		return m.abort(b, abortQBER)
	case b.keyBits.n < cascade.MinBits || b.test.N[0]+b.test.N[1] == 0:
		return m.abort(b, abortFew)
	}
	// The block before tells the key basis' errors exactly; the first block
	// has only the test basis.
	if m.qber > 0 {
		q = m.qber
	}
	var seed [8]byte
	if _, err := io.ReadFull(m.cfg.Rand, seed[:]); err != nil {
		return fmt.Errorf("draw shuffle: %w", err)
	}
	scaled := uint16(math.Round(q * qberScale))
	body := binary.LittleEndian.AppendUint16(nil, scaled)
	m.send(b, kindBegin, append(body, seed[:]...))
	b.planned(float64(scaled)/qberScale, binary.LittleEndian.Uint64(seed[:]))
	b.party = cascade.NewAlice(b.plan, b.keyBits.words)
	m.send(b, kindParities, b.party.Parities())
	b.expects = kindDifferences
	return nil
}

// qberScale makes an error ratio a 16-bit integer.
const qberScale = 1e5

func (m *Machine) begun(b *block, r *reader) bool {
	q, seed := r.u16(), r.u64()
	if !r.end() || q > qberScale/2 || b.keyBits.n < cascade.MinBits {
		return false
	}
	b.planned(float64(q)/qberScale, seed)
	b.party = cascade.NewBob(b.plan, b.keyBits.words)
	b.expects = kindParities
	return true
}

// parities, bob: answers with the differences to his own.
func (m *Machine) parities(b *block, r *reader) bool {
	theirs := r.take(len(r.b))
	if b.party.Check(theirs) != nil {
		return false
	}
	diff := b.party.Parities()
	for i := range diff {
		diff[i] ^= theirs[i]
	}
	if b.party.Compare(diff) != nil {
		return false
	}
	m.stats.Rounds++
	m.send(b, kindDifferences, diff)
	if b.party.Done() {
		b.reconciled()
		b.expects = kindVerify
	}
	return true
}

// differences, alice: goes on with the next round or to verification.
func (m *Machine) differences(b *block, r *reader) (bool, error) {
	if b.party.Compare(r.take(len(r.b))) != nil {
		return false, nil
	}
	m.stats.Rounds++
	if !b.party.Done() {
		m.send(b, kindParities, b.party.Parities())
		return true, nil
	}
	b.reconciled()
	m.qber = b.report.Key.QBER()
	if m.qber > m.cfg.MaxQBER {
		return true, m.abort(b, abortQBER)
	}
	var key [gf2.HashBytes]byte
	if _, err := io.ReadFull(m.cfg.Rand, key[:]); err != nil {
		return true, fmt.Errorf("draw verification key: %w", err)
	}
	x := b.party.Bits()
	sum := hashOf(key, x)
	clear(x)
	m.send(b, kindVerify, key[:], sum[:])
	b.expects = kindVerified
	return true, nil
}

// verify, bob: compares hashes.
func (m *Machine) verify(b *block, r *reader) bool {
	var key [gf2.HashBytes]byte
	copy(key[:], r.take(gf2.HashBytes))
	theirs := r.take(gf2.HashBytes)
	if !r.end() {
		return false
	}
	x := b.party.Bits()
	sum := hashOf(key, x)
	clear(x)
	if string(sum[:]) != string(theirs) {
		return m.abort(b, abortVerify) == nil
	}
	m.send(b, kindVerified)
	b.expects = kindAmplify
	return true
}
