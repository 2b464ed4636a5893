package seal

import "math"

// WindowLen is how many records back a late one is still taken: 75 ms at
// 10 Gbit/s in full datagrams, where the windows of common IPsec stacks (32 to
// 1024) drop good packets after reordering.
const WindowLen = 65536

const (
	wordBits = 64
	// One word more than the window needs: the newest word is filled while the
	// oldest still counts (RFC 6479 section 3).
	ringWords = WindowLen/wordBits + 1
)

// window remembers which of the last WindowLen counters have been seen: a ring
// of words in which advancing clears whole words instead of shifting, as in
// RFC 6479. The zero value has seen nothing. One goroutine at a time.
type window struct {
	ring [ringWords]uint64
	next uint64 // one above the highest counter seen; 0 = none
}

// check tells whether counter is new. It changes nothing, so that a forged
// record leaves no trace.
func (w *window) check(counter uint64) error {
	if counter == math.MaxUint64 {
		return ErrTooOld // no sealer gets there, and next would wrap
	}
	if counter >= w.next {
		return nil
	}
	if w.next-counter > WindowLen {
		return ErrTooOld
	}
	if w.ring[counter/wordBits%ringWords]&(1<<(counter%wordBits)) != 0 {
		return ErrReplayed
	}
	return nil
}

// mark records a counter that check has passed and whose record is authentic.
func (w *window) mark(counter uint64) {
	word := counter / wordBits
	if counter >= w.next {
		w.clear(word)
		w.next = counter + 1
	}
	w.ring[word%ringWords] |= 1 << (counter % wordBits)
}

// clear empties the words between the newest one in use and word, which is to
// become the newest.
func (w *window) clear(word uint64) {
	if w.next == 0 {
		return // nothing is set
	}
	newest := (w.next - 1) / wordBits
	for n := min(word-newest, ringWords); n > 0; n-- {
		w.ring[word%ringWords] = 0
		word--
	}
}
