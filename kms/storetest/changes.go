package storetest

import (
	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/kms"
)

func id(n uint64) kms.SegmentID { return kms.SegmentID{Link: link, Generation: 1, Number: n} }

func ingest(n uint64) kms.Change {
	sealed := make([]byte, slots*(slotBytes+16))
	for i := range sealed {
		sealed[i] = byte(n) + byte(i)
	}
	return kms.Change{Op: kms.OpIngest, Segment: id(n),
		Meta: kms.Segment{ID: id(n), State: kms.StateNew, BlockBytes: 600, SlotBytes: slotBytes,
			Slots: slots, Owner: Self, Sent: kms.Tag{1}, Expected: kms.Tag{2}, Simulated: n%2 == 0},
		Sealed: kms.Sealed{Key: kms.Wrapped{Epoch: 3, Bytes: []byte{byte(n), 9}}, Slots: sealed}}
}

func confirm(n uint64) kms.Change { return kms.Change{Op: kms.OpConfirm, Segment: id(n)} }

func open(n uint64, s kms.Session) kms.Change {
	return kms.Change{Op: kms.OpOpen, Segment: id(n), Session: s}
}

func grant(n uint64, first, count, bits int, from etsi014.SAEID, to ...etsi014.SAEID) kms.Change {
	return kms.Change{Op: kms.OpGrant, Segment: id(n), Session: session, Grant: kms.Grant{
		First: first, Slots: count, SizeBits: bits, Initiator: from, Targets: to}}
}

func claim(n uint64, first, count, role int, sae etsi014.SAEID) kms.Change {
	return kms.Change{Op: kms.OpClaim, Segment: id(n), Session: session, First: first, Slots: count,
		Role: role, SAE: sae}
}

func op(o kms.Op, n uint64) kms.Change { return kms.Change{Op: o, Segment: id(n)} }

// opened is a segment with grants [0,8) of 256 bits a to b and c, and [8,12)
// of 512 bits c to a.
func opened(n uint64) []kms.Change {
	return []kms.Change{ingest(n), confirm(n), open(n, session),
		grant(n, 0, 8, 256, "a", "b", "c"), grant(n, 8, 4, 512, "c", "a")}
}
