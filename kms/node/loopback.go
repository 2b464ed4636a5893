package node

import (
	"crypto/rand"
	"fmt"

	"github.com/quietline/quietline/kms"
	"github.com/quietline/quietline/kms/peer"
	"github.com/quietline/quietline/secret"
)

// fill makes the segments that the machine's loopback pool asks for: random
// bits of this KME, for keys between two of its own SAEs. They leave this
// process only sealed, or as a key to an SAE that it serves.
func (o *owner) fill(segments []kms.Segment) ([]peer.Input, error) {
	var inputs []peer.Input
	for _, seg := range segments {
		slots := make([]byte, seg.Slots*seg.SlotBytes)
		if _, err := rand.Read(slots); err != nil {
			return nil, fmt.Errorf("fill loopback pool: %w", err)
		}
		sealed, err := o.ring.Seal(seg.ID, slots, seg.SlotBytes)
		secret.Wipe(slots)
		if err != nil {
			return nil, fmt.Errorf("fill loopback pool: %w", err)
		}
		// The first keys leave with the commit that stores the segment.
		if o.openers[seg.ID], err = o.ring.Opener(seg.ID, sealed, seg.SlotBytes); err != nil {
			return nil, fmt.Errorf("fill loopback pool: %w", err)
		}
		inputs = append(inputs, peer.Ingested{Segment: seg, Sealed: sealed})
	}
	return inputs, nil
}
