package bench

import (
	"bytes"
	"errors"
	"testing"

	"github.com/quietline/quietline/tunnel"
)

// What one end draws the other collects, no key_ID is drawn twice, and neither
// end collects its own.
func TestPrinter(t *testing.T) {
	var ends [2]*printer
	for i := range ends {
		p, err := newPrinter(make([]byte, 32), byte(i))
		if err != nil {
			t.Fatal(err)
		}
		ends[i] = p
	}
	seen := map[tunnel.KeyID]bool{}
	for _, bits := range []int{256, printedBits} {
		for i, p := range ends {
			keys, err := p.New(t.Context(), tunnel.UsePad, 3, bits)
			if err != nil {
				t.Fatal(err)
			}
			for _, k := range keys {
				ids := []tunnel.KeyID{k.ID}
				got, err := ends[1-i].ByID(t.Context(), tunnel.UsePad, ids)
				if err != nil || !bytes.Equal(got[0].Bits.Expose(), k.Bits.Expose()) ||
					k.Bits.Len()*8 != bits || bytes.Count(k.Bits.Expose(), []byte{0}) > bits/64 {
					t.Errorf("key of %d bits: %v", bits, err)
				}
				if _, err := p.ByID(t.Context(), tunnel.UsePad, ids); !errors.Is(err, tunnel.ErrKeyUnknown) {
					t.Errorf("own key: %v", err)
				}
				if _, err := ends[1-i].ByID(t.Context(), tunnel.UseEpoch, ids); err == nil {
					t.Error("pad is given out as an epoch key")
				}
				if seen[k.ID] {
					t.Error("a key_ID is drawn twice")
				}
				seen[k.ID] = true
			}
		}
	}
}
