package distill

import (
	"crypto/subtle"
	"encoding/binary"
	"fmt"
	"io"

	"github.com/quietline/quietline/hw"
	"github.com/quietline/quietline/secret"
)

// share finds the segments of authentication key both ends hold and the
// marks from which on to use them. The list is not authenticated: a forged one
// can stop the session, but it cannot make a pad serve twice, because each
// end's pool refuses that by itself, nor burn pads, because nothing is taken.
func (m *Machine) share(theirs []AuthSegment) error {
	for _, mine := range m.cfg.Auth.Segments() {
		for _, s := range theirs {
			if s.Generation != mine.Generation || s.Seq != mine.Seq || s.Pads != mine.Pads {
				continue
			}
			role := m.cfg.Role
			if s.Next[role] > mine.Next[role]+maxGap {
				return fmt.Errorf("%w: segment %d/%d", ErrRolledBack, mine.Generation, mine.Seq)
			}
			m.shared = append(m.shared, segmentID{mine.Generation, mine.Seq})
			m.seen = append(m.seen, s.Next[role])
			break
		}
	}
	return nil
}

// nextPad is the pad for the next tag of the given sender: from the newest
// shared segment, so that the seed stays as the reserve.
func (m *Machine) nextPad(role Role) (PadName, bool) {
	segments := m.cfg.Auth.Segments()
	for i := len(m.shared) - 1; i >= 0; i-- {
		id := m.shared[i]
		for _, s := range segments {
			if s.Generation != id.generation || s.Seq != id.seq {
				continue
			}
			next := s.Next[role]
			if role == m.cfg.Role {
				next = max(next, m.seen[i])
			}
			if next < s.Pads {
				return PadName{id.generation, id.seq, next}, true
			}
		}
	}
	return PadName{}, false
}

// sendTagged sends the last message of a batch: the tag is over everything
// this end has sent in the block, this message included.
func (m *Machine) sendTagged(b *block, kind uint8, parts ...[]byte) error {
	name, ok := m.nextPad(m.cfg.Role)
	if !ok {
		return ErrAuthEmpty
	}
	pad, err := m.cfg.Auth.Take(name)
	if err != nil {
		return fmt.Errorf("take authentication pad: %w", err)
	}
	m.stats.AuthUsed += 8 * padBytes
	raw := newMessage(kind, b.seq, parts...)
	raw = appendPad(raw, name)
	absorb(b.sent, append(raw, make([]byte, 16)...), kind)
	tag := b.sent.Sum()
	subtle.XORBytes(tag[:], tag[:], pad[:])
	clear(pad[:])
	m.out.Messages = append(m.out.Messages, append(raw, tag[:]...))
	return nil
}

// checkTag reads the pad's name and the tag and compares. The pad is used up
// whatever the outcome; a name out of range uses nothing.
func (m *Machine) checkTag(b *block, r *reader) (bool, error) {
	name := r.pad()
	theirs := r.take(16)
	if !r.end() {
		return false, nil
	}
	if !m.plausible(name) {
		return true, fmt.Errorf("%w: pad %d of segment %d/%d is not the next one",
			ErrAuthentication, name.Index, name.Generation, name.Seq)
	}
	pad, err := m.cfg.Auth.Take(name)
	if err != nil {
		return true, fmt.Errorf("%w: take pad: %w", ErrAuthentication, err)
	}
	m.stats.AuthUsed += 8 * padBytes
	tag := b.got.Sum()
	subtle.XORBytes(tag[:], tag[:], pad[:])
	clear(pad[:])
	if subtle.ConstantTimeCompare(tag[:], theirs) != 1 {
		return true, fmt.Errorf("%w: block %d", ErrAuthentication, b.seq)
	}
	return true, nil
}

// plausible: the pad is the peer's, in a shared segment, and at most maxGap
// beyond the mark, so that a forged name cannot burn a whole segment.
func (m *Machine) plausible(name PadName) bool {
	role := 1 - m.cfg.Role
	if sender(name.Index) != role {
		return false
	}
	for _, id := range m.shared {
		if id.generation != name.Generation || id.seq != name.Seq {
			continue
		}
		for _, s := range m.cfg.Auth.Segments() {
			if s.Generation == id.generation && s.Seq == id.seq {
				return name.Index >= s.Next[role] && name.Index <= s.Next[role]+maxGap
			}
		}
	}
	return false
}

// amplifyNext, alice: amplifies the oldest block if it is verified. Blocks
// are finished in their order, so that Seq only rises.
func (m *Machine) amplifyNext() error {
	if len(m.open) == 0 || m.open[0].expects != 0 || m.open[0].party == nil {
		return nil
	}
	b := m.open[0]
	bits := b.length(m.cfg)
	b.auth = m.give(bits / 8)
	if bits/8 <= b.auth {
		b.report.SecretBits = 0
		return m.abort(b, abortNoSecret)
	}
	seed := make([]byte, seedBytesFor(b.plan.Bits()))
	if _, err := io.ReadFull(m.cfg.Rand, seed); err != nil {
		return fmt.Errorf("draw amplification seed: %w", err)
	}
	head := binary.LittleEndian.AppendUint32(nil, uint32(bits))
	head = binary.LittleEndian.AppendUint32(head, uint32(b.auth))
	if err := m.sendTagged(b, kindAmplify, head, seed); err != nil {
		return err
	}
	b.secret = b.toeplitz(seed, bits)
	b.expects = kindAccept
	return nil
}

// give is how many bytes of a block of so many go to the pool: what it costs,
// and while the reserve is low more, but no more than a quarter.
func (m *Machine) give(blockBytes int) int {
	const cost = padGroup * padBytes
	if authLeft(m.cfg.Auth.Segments()) < authLow {
		return max(cost, min(authGroups*cost, blockBytes/4/cost*cost))
	}
	return cost
}

// amplify, bob: checks alice's tag over all she said, then computes the key.
func (m *Machine) amplify(b *block, r *reader) (bool, error) {
	if m.open[0] != b {
		return false, nil // alice finishes blocks in their order
	}
	bits, auth := int(r.u32()), int(r.u32())
	seed := r.take(seedBytesFor(b.plan.Bits()))
	if ok, err := m.checkTag(b, r); !ok || err != nil {
		return ok, err
	}
	// From here on alice said it.
	if bits != b.length(m.cfg) || auth%(padGroup*padBytes) != 0 || auth < 1 || bits/8 <= auth ||
		b.report.Key.QBER() > m.cfg.MaxQBER || b.report.Test.QBER() > m.cfg.MaxQBER {
		return true, m.abort(b, abortLength)
	}
	b.auth = auth
	b.secret = b.toeplitz(seed, bits)
	b.expects = kindAck
	return true, m.sendTagged(b, kindAccept)
}

// accepted, alice: bob has all; she releases and says so.
func (m *Machine) accepted(b *block, r *reader) (bool, error) {
	if ok, err := m.checkTag(b, r); !ok || err != nil {
		return ok, err
	}
	if err := m.sendTagged(b, kindAck); err != nil {
		return true, err
	}
	if err := m.release(b); err != nil {
		return true, err
	}
	return true, m.amplifyNext()
}

// acked, bob: alice has released, so does he. If this message is lost alice
// alone has the block; the key managers find out.
func (m *Machine) acked(b *block, r *reader) (bool, error) {
	if ok, err := m.checkTag(b, r); !ok || err != nil {
		return ok, err
	}
	return true, m.release(b)
}

// release puts the first bytes into the pool and hands out the rest.
func (m *Machine) release(b *block) error {
	raw := b.secret.Expose()
	if err := m.cfg.Auth.Add(m.generation, b.seq, raw[:b.auth]); err != nil {
		return fmt.Errorf("replenish authentication key: %w", err)
	}
	m.shared = append(m.shared, segmentID{m.generation, b.seq})
	m.seen = append(m.seen, 0)
	m.stats.AuthAdded += uint64(8 * b.auth)
	b.report.AuthBits = 8 * b.auth
	bits := secret.Copy(raw[b.auth:])
	m.stats.SecretBits += uint64(8 * bits.Len())
	m.out.Blocks = append(m.out.Blocks, hw.Block{
		Generation: m.generation, Seq: b.seq, Bits: bits,
		QBER: b.report.Key.QBER(), Epsilon: b.report.Epsilon,
		Simulated: m.cfg.Simulated, Made: m.now,
	})
	m.close(b, outcomeSecret)
	return nil
}
