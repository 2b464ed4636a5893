package node

import (
	"sync"
	"testing"

	"github.com/quietline/quietline/etsi014"
)

// BenchmarkDeliver draws at one KME and fetches at the other, each with its
// store and the channel between them: one key an operation. Allocations are
// those of both KMEs together.
func BenchmarkDeliver(b *testing.B) {
	for _, c := range []struct {
		name            string
		callers, number int
	}{{"1 caller", 1, 1}, {"64 callers", 64, 1}, {"8 callers, 100 keys", 8, 100}} {
		b.Run(c.name, func(b *testing.B) {
			left, right := newPair(b, 1<<17)
			startPair(b, left, right)
			const blocks = 300 // of 4,094 keys
			left.driver.allow(blocks)
			right.driver.allow(blocks)
			left.stored(b, "sae-a", "sae-b", blocks/2*4000)
			work := make(chan struct{})
			var wg sync.WaitGroup
			for range c.callers {
				wg.Go(func() {
					for range work {
						deliver(b, left, right, c.number)
					}
				})
			}
			b.ReportAllocs()
			n := 0
			for b.Loop() {
				if n++; n%c.number == 0 {
					work <- struct{}{}
				}
			}
			close(work)
			wg.Wait()
		})
	}
}

func deliver(b *testing.B, from, to *site, number int) {
	got, err := from.KME().Keys(b.Context(), etsi014.Caller{SAE: "sae-a"},
		etsi014.KeyRequest{Targets: []etsi014.SAEID{"sae-b"}, Number: number})
	if err != nil {
		b.Error(err)
		return
	}
	req := etsi014.IDRequest{Initiator: "sae-a", IDs: make([]etsi014.KeyID, 0, number)}
	for _, k := range got.Keys {
		req.IDs = append(req.IDs, k.ID)
	}
	twin, err := to.KME().KeysByID(b.Context(), etsi014.Caller{SAE: "sae-b"}, req)
	if err != nil {
		b.Error(err)
	}
	got.Clear()
	twin.Clear()
}
