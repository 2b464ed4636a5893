package distill

import (
	"crypto/subtle"
	"encoding/binary"
	"fmt"
	"io"
	"slices"

	"github.com/quietline/quietline/hw"
	"github.com/quietline/quietline/secret"
)

// share finds the segments of authentication key both ends hold. The list is
// not authenticated: a forged one can stop the session, but nothing is taken
// for it, and no pad serves twice, which each end's pool sees to.
func (m *Machine) share(theirs []AuthSegment) error {
	for _, mine := range m.cfg.Auth.Segments() {
		for _, s := range theirs {
			if s.Generation != mine.Generation || s.Seq != mine.Seq || s.Pads != mine.Pads {
				continue
			}
			// A mark is durable before its tag is sent, so the peer cannot
			// have seen more of our pads than we have used.
			if s.Next[m.cfg.Role] > mine.Next[m.cfg.Role] {
				return fmt.Errorf("%w: segment %d/%d", ErrRolledBack, mine.Generation, mine.Seq)
			}
			m.shared = append(m.shared, segmentID{mine.Generation, mine.Seq})
			break
		}
	}
	return nil
}

// nextPad is the pad for this end's next tag: from the newest shared segment,
// so that the seed stays as the reserve.
func (m *Machine) nextPad() (PadName, error) {
	segments := m.cfg.Auth.Segments()
	for _, id := range slices.Backward(m.shared) {
		for _, s := range segments {
			next := s.Next[m.cfg.Role]
			if s.Generation == id.generation && s.Seq == id.seq && next < s.Pads {
				return PadName{id.generation, id.seq, next}, nil
			}
		}
	}
	return PadName{}, ErrAuthEmpty
}

// sendTagged sends the last message of a batch: the tag is over everything
// this end has sent in the block, this message included.
func (m *Machine) sendTagged(b *block, kind uint8, parts ...[]byte) error {
	name, err := m.nextPad()
	if err != nil {
		return err
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

// checkTag reads the pad's name and the tag and compares. Only a tag that is
// right uses its pad up.
func (m *Machine) checkTag(b *block, r *reader) (bool, error) {
	name := r.pad()
	theirs := r.take(16)
	if !r.end() {
		return false, nil
	}
	if sender(name.Index) == m.cfg.Role {
		return true, fmt.Errorf("%w: tag with a pad of our own", ErrAuthentication)
	}
	pad, err := m.cfg.Auth.Peek(name)
	if err != nil {
		return true, fmt.Errorf("%w: look at pad: %w", ErrAuthentication, err)
	}
	tag := b.got.Sum()
	subtle.XORBytes(tag[:], tag[:], pad[:])
	clear(pad[:])
	if subtle.ConstantTimeCompare(tag[:], theirs) != 1 {
		return true, fmt.Errorf("%w: block %d", ErrAuthentication, b.seq)
	}
	m.stats.AuthUsed += 8 * padBytes
	pad, err = m.cfg.Auth.Take(name)
	clear(pad[:])
	if err != nil {
		return true, fmt.Errorf("take authentication pad: %w", err)
	}
	return true, nil
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
