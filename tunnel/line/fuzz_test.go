package line

import (
	"testing"

	"github.com/quietline/quietline/tunnel"
	"github.com/quietline/quietline/tunnel/segment"
	"github.com/quietline/quietline/tunnel/wire"
)

// checked is a device that wants what a kernel wants.
type checked struct {
	sink
	t *testing.T
}

func (c *checked) WriteBatch(frames []tunnel.Frame) (int, error) {
	for _, f := range frames {
		if f.GSO == (tunnel.GSO{}) && !wire.IsPacket(f.Data) {
			c.t.Errorf("no packet goes to the host: %x", f.Data)
		}
		if f.GSO != (tunnel.GSO{}) {
			if _, err := segment.Check(f); err != nil {
				c.t.Errorf("%+v of %d bytes: %v", f.GSO, len(f.Data), err)
			}
		}
	}
	return len(frames), nil
}

// FuzzRecords gives the opening direction three records of an authentic peer
// that says what it likes, in a row or with a gap, under any outer TOS.
func FuzzRecords(f *testing.F) {
	slice := func(index, count, payload int) []byte {
		s := superFrame(payload)
		s.GSO.HeaderLen = 40
		record := make([]byte, wire.PrefixLen+len(s.Data))
		copy(record[wire.PrefixLen:], s.Data)
		wire.Piece{Index: index, Count: count, GSO: s.GSO}.Put(record)
		return record
	}
	whole := append([]byte{byte(wire.Whole)}, packet(60)...)
	pack := append([]byte{byte(wire.Pack)}, append(packet(60), packet(80)...)...)
	f.Add(slice(0, 3, 1384), slice(1, 3, 1384), slice(2, 3, 10), uint8(0), false)
	f.Add(slice(0, 3, 1384), slice(2, 3, 10), whole, uint8(ce), true)
	f.Add(pack, pack, slice(0, 2, 1384), uint8(ect1), false)
	f.Add(wire.AppendProbe(nil, 1, 100), wire.AppendAnswer(nil, 1), []byte{}, uint8(ect0), false)
	f.Fuzz(func(t *testing.T, a, b, c []byte, tos uint8, gap bool) {
		dev := &checked{t: t}
		l, err := New(Config{Device: dev, Conn: &last{}, Machine: &script{}})
		if err != nil {
			t.Fatal(err)
		}
		in := newInbound(l, dev)
		in.mtu, in.outer = 1424, tos
		h := wire.Header{Queue: 1, Index: 9}
		for i, record := range [][]byte{a, b, c} {
			if gap && i == 2 {
				h.Counter++
			}
			if !in.goesOn(h, record) {
				in.record(h, record)
			}
			h.Counter++
		}
		in.burst(Burst{})
		if in.pending() {
			t.Error("something is held when nothing more comes")
		}
	})
}
