package boltstore

import (
	"fmt"
	"path/filepath"
	"testing"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/kms"
	"github.com/quietline/quietline/kms/storetest"
)

// BenchmarkCommit is a commit of 64 claims: of one pair of SAEs, whose slots
// adjoin, and of 64 pairs that share a segment.
func BenchmarkCommit(b *testing.B) {
	for _, pairs := range []int{1, 64} {
		b.Run(fmt.Sprint(pairs, "-pairs"), func(b *testing.B) {
			s, err := Open(filepath.Join(b.TempDir(), "kms.db"), storetest.Self, Options{})
			if err != nil {
				b.Fatal(err)
			}
			defer s.Close()
			l, err := s.Lease(b.Context(), "", 0)
			if err != nil {
				b.Fatal(err)
			}
			per := 1024 / pairs
			id := kms.SegmentID{Link: drawn, Generation: 1}
			b.ReportAllocs()
			for n := 0; b.Loop(); n++ {
				if n%16 == 0 {
					b.StopTimer()
					id.Number++
					changes := openedSegment(id)[:3]
					for p := range pairs {
						changes = append(changes, kms.Change{Op: kms.OpGrant, Segment: id, Session: session,
							Grant: kms.Grant{First: p * per, Slots: per, SizeBits: 256,
								Initiator: etsi014.SAEID(fmt.Sprint("a", p)), Targets: []etsi014.SAEID{"b"}}})
					}
					if _, err := s.Commit(b.Context(), l.Fence, changes); err != nil {
						b.Fatal(err)
					}
					b.StartTimer()
				}
				claims := make([]kms.Change, 64)
				for i := range claims {
					p := i % pairs
					claims[i] = drawOf(id, p*per+n%16*64/pairs+i/pairs)
					claims[i].SAE = etsi014.SAEID(fmt.Sprint("a", p))
				}
				if _, err := s.Commit(b.Context(), l.Fence, claims); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
