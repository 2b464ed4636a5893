package storetest

import (
	"context"
	"iter"
	"sync"
	"testing"

	"github.com/quietline/quietline/kms"
)

func TestMemory(t *testing.T) {
	stores := map[*testing.T]*Memory{}
	Run(t, func(t *testing.T, fresh bool) kms.Store {
		if fresh || stores[t] == nil {
			stores[t] = NewMemory(Self)
		} else {
			stores[t] = stores[t].Clone()
			stores[t].closed = false
		}
		return &locked{Memory: stores[t]}
	})
}

// locked is a Memory for several goroutines.
type locked struct {
	mu sync.Mutex
	*Memory
}

func (l *locked) Commit(ctx context.Context, f kms.Fence, c []kms.Change) (kms.Position, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.Memory.Commit(ctx, f, c)
}

func (l *locked) Lease(ctx context.Context, link kms.LinkID, n int) (kms.Lease, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.Memory.Lease(ctx, link, n)
}

func (l *locked) Load(ctx context.Context, id kms.SegmentID) (kms.Sealed, []kms.Bitmap, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.Memory.Load(ctx, id)
}

// Scan reads a clone, for its reader may commit.
func (l *locked) Scan(ctx context.Context, from uint64) iter.Seq2[kms.Record, error] {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.Memory.Clone().Scan(ctx, from)
}

func TestCloneSharesNothing(t *testing.T) {
	s := NewMemory(Self)
	h := lease(t, s)
	h.must(opened(1)...)
	c := lease(t, s.Clone())
	before := state(t, h)
	c.must(claim(1, 0, 1, kms.RoleInitiator, "a"), ingest(4), op(kms.OpVoid, 1))
	h.must(claim(1, 0, 1, kms.RoleInitiator, "a"))
	if got := state(t, h); len(got.Link.Segments) != len(before.Link.Segments) ||
		len(got.Records) != len(before.Records)+1 {
		t.Errorf("a change of the clone shows in the original: %+v", got)
	}
}
