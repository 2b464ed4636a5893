package storetest

import (
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
		return stores[t]
	})
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
