package cascade

import "math/bits"

// node is the block [index<<level, (index+1)<<level) of a pass, in the order
// of that pass, cut at the frame's end.
type node struct {
	pass, level int
	index       int
}

// frame is the state of one frame. At every moment the known blocks of an
// opened pass that are not split make a partition of the frame; only for them
// is the parity of the remaining errors kept.
type frame struct {
	plan   *Plan
	stage  int              // stage opened last
	odd    bool             // parity of all remaining errors
	order  [passes][]uint64 // own bits in the order of each pass
	split  [passes]bitmap   // nodes whose halves are known
	isOdd  [passes]bitmap   // unsplit nodes with an odd number of errors
	worth  [passes][]node   // odd nodes to bisect; may hold stale ones
	tops   bool             // the round compares top blocks, not halves
	active []node           // what the round compares
	errs   []uint32         // positions of errors found
	fixing bool             // bob: own bits follow the errors found
	broken bool             // differences contradicted each other
}

// bitmap holds a bit for each node of a pass: levels one after the other.
type bitmap struct {
	words  []uint64
	offset []int
}

func newBitmap(n, top int) bitmap {
	b := bitmap{offset: make([]int, top+1)}
	at := 0
	for level := range b.offset {
		b.offset[level] = at
		at += (n-1)>>level + 1
	}
	b.words = make([]uint64, (at+63)/64)
	return b
}

func (b *bitmap) get(n node) bool {
	i := b.offset[n.level] + n.index
	return b.words[i/64]>>(i%64)&1 == 1
}

func (b *bitmap) set(n node, v bool) {
	i := b.offset[n.level] + n.index
	b.words[i/64] &^= 1 << (i % 64)
	if v {
		b.words[i/64] |= 1 << (i % 64)
	}
}

func newFrame(plan *Plan, own []uint64, fixing bool) *frame {
	f := &frame{plan: plan, fixing: fixing, tops: true}
	for p := range passes {
		f.split[p] = newBitmap(plan.FrameBits, plan.log[p])
		f.isOdd[p] = newBitmap(plan.FrameBits, plan.log[p])
		f.order[p] = make([]uint64, len(own))
		if p == 0 {
			copy(f.order[p], own)
			continue
		}
		for i, at := range plan.perm[p] {
			f.order[p][i/64] |= own[at/64] >> (at % 64) & 1 << (i % 64)
		}
	}
	f.open()
	return f
}

// topBlocks is the number of top blocks of a pass.
func (f *frame) topBlocks(pass int) int {
	return (f.plan.FrameBits-1)>>f.plan.log[pass] + 1
}

// open lists the top blocks of the current stage. From the second pass on the
// last block of a pass follows from the frame's parity.
func (f *frame) open() {
	f.tops = true
	for p := stages[f.stage][0]; p < stages[f.stage][1]; p++ {
		n := f.topBlocks(p)
		if p > 0 {
			n--
		}
		for i := range n {
			f.active = append(f.active, node{p, f.plan.log[p], i})
		}
	}
}

// asked is the block whose parity the round compares for an active node: the
// node itself when tops are opened, else its lower half.
func (f *frame) asked(n node) node {
	if f.tops {
		return n
	}
	return node{n.pass, n.level - 1, 2 * n.index}
}

// parity is that of the own bits in a block.
func (f *frame) parity(n node) bool {
	from := n.index << n.level
	to := min((n.index+1)<<n.level, f.plan.FrameBits)
	w := f.order[n.pass]
	if n.level < 6 {
		v := w[from/64] >> (from % 64) & (1<<(to-from) - 1)
		return bits.OnesCount64(v)&1 == 1
	}
	var v uint64 // to is a multiple of 64, as the frame's length is
	for _, x := range w[from/64 : to/64] {
		v ^= x
	}
	return bits.OnesCount64(v)&1 == 1
}

// step takes the differences of the round's blocks, in order, and prepares the
// next round. It leaves active empty when the frame is done.
func (f *frame) step(diff func() bool) {
	if f.tops {
		f.stepTops(diff)
	} else {
		f.stepHalves(diff)
	}
	f.active = f.active[:0]
	if !f.broken {
		f.choose()
	}
	if !f.broken && len(f.active) == 0 && f.stage+1 < len(stages) {
		f.stage++
		f.open()
	}
}

func (f *frame) stepTops(diff func() bool) {
	var sum [passes]bool
	for _, n := range f.active {
		if diff() {
			sum[n.pass] = !sum[n.pass]
			f.toggle(n)
		}
	}
	if f.stage == 0 {
		f.odd = sum[0]
	} else {
		for p := stages[f.stage][0]; p < stages[f.stage][1]; p++ {
			if sum[p] != f.odd {
				f.toggle(node{p, f.plan.log[p], f.topBlocks(p) - 1})
			}
		}
	}
	f.tops = false
}

// stepHalves splits the active nodes, each of which was odd, and corrects the
// errors that are pinned down.
func (f *frame) stepHalves(diff func() bool) {
	var leaves []node
	for _, n := range f.active {
		lower := diff()
		f.split[n.pass].set(n, true)
		half := node{n.pass, n.level - 1, 2 * n.index}
		f.isOdd[n.pass].set(half, lower)
		if !lower {
			half.index++
			f.isOdd[n.pass].set(half, true)
		} else if up := (node{half.pass, half.level, half.index + 1}); f.within(up) {
			f.isOdd[n.pass].set(up, false)
		}
		if half = f.narrow(half); half.level == 0 {
			leaves = append(leaves, half)
		} else {
			f.worth[n.pass] = append(f.worth[n.pass], half)
		}
	}
	for _, n := range leaves {
		// Two passes may have come to the same error in one round: the first
		// correction makes the other leaf even.
		if f.isOdd[n.pass].get(n) {
			f.found(n)
		}
	}
}

// within reports whether a node has bits within the frame.
func (f *frame) within(n node) bool { return n.index<<n.level < f.plan.FrameBits }

// narrow splits, without asking, an odd node that has no upper half within the
// frame.
func (f *frame) narrow(n node) node {
	for n.level > 0 && !f.within(node{n.pass, n.level - 1, 2*n.index + 1}) {
		f.split[n.pass].set(n, true)
		n.level--
		n.index *= 2
		f.isOdd[n.pass].set(n, true)
	}
	return n
}

// found records an error: the known block around it in every opened pass
// changes its parity.
func (f *frame) found(leaf node) {
	at := uint32(leaf.index)
	if leaf.pass > 0 {
		at = f.plan.perm[leaf.pass][leaf.index]
	}
	f.errs = append(f.errs, at)
	f.odd = !f.odd
	for p := range passes {
		i := at
		if p > 0 {
			i = f.plan.inv[p][at]
		}
		if f.fixing {
			f.order[p][i/64] ^= 1 << (i % 64)
		}
		if p < stages[f.stage][1] {
			n := node{p, f.plan.log[p], int(i) >> f.plan.log[p]}
			for f.split[p].get(n) {
				n.level--
				n.index = int(i) >> n.level
			}
			f.toggle(n)
		}
	}
}

// toggle changes the parity of an unsplit node. A single bit that was known to
// be right and turns wrong says that the differences contradict each other:
// somebody made them up. The frame is given up; verification will tell.
func (f *frame) toggle(n node) {
	odd := !f.isOdd[n.pass].get(n)
	f.isOdd[n.pass].set(n, odd)
	if !odd {
		return
	}
	if n = f.narrow(n); n.level == 0 {
		f.broken = true
	}
	f.worth[n.pass] = append(f.worth[n.pass], n)
}

// choose makes odd blocks active. Blocks of one pass are disjoint, so each
// leads to another error; blocks of different passes may lead to the same one,
// which wastes bits but, for small blocks, is rare and saves rounds. So all of
// the pass with the smallest block are taken, and small ones of the others.
func (f *frame) choose() {
	best, least := -1, 64
	for p := range stages[f.stage][1] {
		f.tidy(p)
		for _, n := range f.worth[p] {
			if n.level < least {
				best, least = p, n.level
			}
		}
	}
	for p := range stages[f.stage][1] {
		later := f.worth[p][:0]
		for _, n := range f.worth[p] {
			if p == best || n.level <= smallBlock {
				f.active = append(f.active, n)
			} else {
				later = append(later, n)
			}
		}
		f.worth[p] = later
	}
}

// tidy drops what is no longer odd or unsplit, and what is listed twice
// because it was odd, even and odd again.
func (f *frame) tidy(p int) {
	live := f.worth[p][:0]
	for _, n := range f.worth[p] {
		if f.isOdd[p].get(n) && !f.split[p].get(n) {
			f.isOdd[p].set(n, false)
			live = append(live, n)
		}
	}
	for _, n := range live {
		f.isOdd[p].set(n, true)
	}
	f.worth[p] = live
}
