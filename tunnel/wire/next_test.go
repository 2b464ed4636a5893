package wire

import (
	"testing"

	"github.com/quietline/quietline/tunnel"
)

// What continues a slice differs from it in the index and in nothing else of
// the prefix.
func TestContinues(t *testing.T) {
	piece := Piece{Index: 3, Count: 47, GSO: tunnel.GSO{Type: 1, Flags: 1, HeaderLen: 52,
		Size: 1372, CsumStart: 20, CsumOffset: 16}}
	record := make([]byte, PrefixLen+100)
	piece.Put(record)
	p := PrefixOf(record[1:])
	piece.Index++
	piece.Put(record)
	if !p.Continues(record, 4) || p.Continues(record, 5) || p.Continues(record[:PrefixLen-1], 4) {
		t.Error("the next slice is not told from others")
	}
	for i := range PrefixLen {
		record[i] ^= 1
		if p.Continues(record, 4) {
			t.Errorf("byte %d is not looked at", i)
		}
		record[i] ^= 1
	}
}
