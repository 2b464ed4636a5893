package simulator

import (
	"context"
	"sync"

	"github.com/quietline/quietline/hw"
)

// spool keeps finished blocks in memory until the key manager's side takes
// them, in the order they were made. Safe for concurrent use.
type spool struct {
	limit int // bytes; reached, the end stops distilling

	mu     sync.Mutex
	blocks []hw.Block    // the spool owns their Bits
	bytes  int           // of all Bits
	more   chan struct{} // closed and renewed when a block comes
}

func newSpool(limit int) *spool { return &spool{limit: limit, more: make(chan struct{})} }

// put takes over b and its Bits. It takes blocks above the limit too: the few
// that were under way when the spool became full.
func (s *spool) put(b hw.Block) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.blocks = append(s.blocks, b)
	s.bytes += b.Bits.Len()
	close(s.more)
	s.more = make(chan struct{})
}

// take waits for the oldest block and gives it away. A block is not lost when
// ctx ends.
func (s *spool) take(ctx context.Context) (hw.Block, error) {
	for {
		s.mu.Lock()
		if ctx.Err() == nil && len(s.blocks) > 0 {
			b := s.blocks[0]
			s.blocks[0] = hw.Block{}
			s.blocks = s.blocks[1:]
			s.bytes -= b.Bits.Len()
			s.mu.Unlock()
			return b, nil
		}
		more := s.more
		s.mu.Unlock()
		select {
		case <-more:
		case <-ctx.Done():
			return hw.Block{}, ctx.Err()
		}
	}
}

// size is the number of blocks and of their bytes.
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
	s.blocks, s.bytes = nil, 0
}
