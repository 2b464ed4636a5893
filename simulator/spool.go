package simulator

import (
	"context"
	"sync"

	"github.com/quietline/quietline/hw"
	"github.com/quietline/quietline/secret"
)

// spool keeps finished blocks in memory until they are acknowledged, in the
// order they were made. Safe for concurrent use.
type spool struct {
	limit int // bytes; reached, the end stops distilling

	mu     sync.Mutex
	blocks []hw.Block    // unacknowledged; the spool owns their Bits
	next   int           // index of the first block not yet read
	bytes  int           // of all Bits
	more   chan struct{} // closed and renewed when a block comes or next goes back
}

func newSpool(limit int) *spool { return &spool{limit: limit, more: make(chan struct{})} }

// put takes over b and its Bits. It takes blocks above the limit too: the few
// that were under way when the spool became full.
func (s *spool) put(b hw.Block) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.blocks = append(s.blocks, b)
	s.bytes += b.Bits.Len()
	s.wake()
}

func (s *spool) wake() {
	close(s.more)
	s.more = make(chan struct{})
}

// read waits for a block that was not read since the last rewind and fills b
// with a copy, whose Bits the caller owns.
func (s *spool) read(ctx context.Context, b *hw.Block) error {
	for {
		s.mu.Lock()
		if s.next < len(s.blocks) {
			*b = s.blocks[s.next]
			b.Bits = secret.Copy(b.Bits.Expose())
			s.next++
			s.mu.Unlock()
			return nil
		}
		more := s.more
		s.mu.Unlock()
		select {
		case <-more:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// ack forgets a block; one that is not there was acknowledged before.
func (s *spool) ack(generation, seq uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, b := range s.blocks {
		if b.Generation != generation || b.Seq != seq {
			continue
		}
		s.bytes -= b.Bits.Len()
		b.Bits.Clear()
		s.blocks = append(s.blocks[:i], s.blocks[i+1:]...)
		if i < s.next {
			s.next--
		}
		return
	}
}

// rewind offers every unacknowledged block again.
func (s *spool) rewind() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.next = 0
	s.wake()
}

// size is the number of unacknowledged blocks and of their bytes.
func (s *spool) size() (blocks, bytes int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.blocks), s.bytes
}

func (s *spool) full() bool {
	_, n := s.size()
	return n >= s.limit
}

// clear wipes all blocks.
func (s *spool) clear() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, b := range s.blocks {
		b.Bits.Clear()
	}
	s.blocks, s.next, s.bytes = nil, 0, 0
}
