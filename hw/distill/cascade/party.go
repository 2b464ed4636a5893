package cascade

import (
	"errors"
	"slices"
)

// ErrLength: a message has not the number of bits its round compares.
var ErrLength = errors.New("parities do not match the round")

// Party is one end of a reconciliation. Not safe for concurrent use.
type Party struct {
	plan   *Plan
	frames []*frame
	leak   int
	rounds int
}

// NewAlice starts alice's end over the plan's bits of own. Own is copied.
func NewAlice(plan *Plan, own []uint64) *Party { return newParty(plan, own, false) }

// NewBob starts bob's end over the plan's bits of own. Own is copied.
func NewBob(plan *Plan, own []uint64) *Party { return newParty(plan, own, true) }

func newParty(plan *Plan, own []uint64, fixing bool) *Party {
	p := &Party{plan: plan}
	words := plan.FrameBits / 64
	for i := range plan.Frames {
		p.frames = append(p.frames, newFrame(plan, own[i*words:(i+1)*words], fixing))
	}
	return p
}

// Done reports whether nothing is left to compare.
func (p *Party) Done() bool { return p.asks() == 0 }

// asks is the number of blocks the current round compares.
func (p *Party) asks() int {
	n := 0
	for _, f := range p.frames {
		n += len(f.active)
	}
	return n
}

// Parities returns the own parities of the round's blocks, packed low bit
// first, unused bits zero.
func (p *Party) Parities() []byte {
	out := make([]byte, (p.asks()+7)/8)
	i := 0
	for _, f := range p.frames {
		for _, n := range f.active {
			if f.parity(f.asked(n)) {
				out[i/8] |= 1 << (i % 8)
			}
			i++
		}
	}
	return out
}

// Check tells whether packed has the form of this round's parities or
// differences; it returns ErrLength if not.
func (p *Party) Check(packed []byte) error {
	n := p.asks()
	if len(packed) != (n+7)/8 || (n%8 > 0 && packed[len(packed)-1]>>(n%8) != 0) {
		return ErrLength
	}
	return nil
}

// Compare ends the round with the differences between alice's and bob's
// parities, packed as Parities packs. On an error nothing has changed.
func (p *Party) Compare(diff []byte) error {
	if err := p.Check(diff); err != nil {
		return err
	}
	p.leak += p.asks()
	p.rounds++
	i := 0
	next := func() bool {
		v := diff[i/8]>>(i%8)&1 == 1
		i++
		return v
	}
	for _, f := range p.frames {
		if len(f.active) > 0 {
			f.step(next)
		}
	}
	return nil
}

// Leak is the number of parity bits alice has told.
func (p *Party) Leak() int { return p.leak }

// Rounds is the number of rounds so far.
func (p *Party) Rounds() int { return p.rounds }

// Errors lists the positions of the errors found so far, rising. The slice is
// the caller's.
func (p *Party) Errors() []int {
	var all []int
	for i, f := range p.frames {
		for _, at := range f.errs {
			all = append(all, i*p.plan.FrameBits+int(at))
		}
	}
	slices.Sort(all)
	return all
}

// Bits returns the own bits; at bob with the errors corrected. The slice is
// the caller's to clear.
func (p *Party) Bits() []uint64 {
	out := make([]uint64, 0, p.plan.Bits()/64)
	for _, f := range p.frames {
		out = append(out, f.order[0]...)
	}
	return out
}

// Clear overwrites the bits; the party is of no use afterwards.
func (p *Party) Clear() {
	for _, f := range p.frames {
		for i := range f.order {
			clear(f.order[i])
		}
		f.active = nil
	}
}
