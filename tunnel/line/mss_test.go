package line

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"testing"

	"github.com/quietline/quietline/tunnel"
)

// keeper is a device whose MTU a test changes and that keeps what is written.
type keeper struct {
	sink
	mtu int
	got [][]byte
}

func (k *keeper) Queues() []tunnel.Queue { return []tunnel.Queue{k} }
func (k *keeper) Caps() tunnel.Caps      { return tunnel.Caps{MTU: k.mtu} }

func (k *keeper) WriteBatch(f []tunnel.Frame) (int, error) {
	for _, f := range f {
		k.got = append(k.got, bytes.Clone(f.Data))
	}
	return len(f), nil
}

// syn is an IPv4 SYN that offers segments of so many bytes.
func syn(mss uint16) []byte {
	p := packet(44)
	p[9], p[32], p[33], p[40], p[41] = 6, 6<<4, 2, 2, 4
	binary.BigEndian.PutUint16(p[42:], mss)
	return p
}

// Either end alone keeps hosts from sending what does not fit: the one that a
// SYN goes into and the one that it comes out of, whether it travels alone, in
// a pack, or has data.
func TestSegmentSizeIsClampedAtBothEnds(t *testing.T) {
	const wide, narrow, offer = 8924, 1424, 8960
	for _, mtu := range []struct{ out, in int }{{narrow, wide}, {wide, narrow}, {wide, wide}} {
		for name, frames := range map[string][]tunnel.Frame{
			"alone":     {{Data: syn(offer)}},
			"in a pack": {{Data: packet(60)}, {Data: syn(offer)}},
			"with data": {{Data: append(syn(offer), make([]byte, 1300)...)}},
		} {
			t.Run(fmt.Sprint(mtu, " ", name), func(t *testing.T) {
				dev, conn := &keeper{mtu: mtu.out}, &last{}
				l := loopback(t, conn, dev)
				o, in := newOutbound(l, l.seals[0], 1), newInbound(l, dev)
				mem := o.reset()
				for i, f := range frames {
					p := append(mem[i].Data, f.Data...)
					binary.BigEndian.PutUint16(p[2:], uint16(len(p)))
					mem[i].Data = p
				}
				o.batch(mem[:len(frames)])
				dev.mtu = mtu.in
				in.burst(conn.burst)
				if len(dev.got) != len(frames) {
					t.Fatalf("%d packets came, want %d", len(dev.got), len(frames))
				}
				wanted := min(min(mtu.out, mtu.in)-40, offer)
				p := dev.got[len(frames)-1]
				if got := int(binary.BigEndian.Uint16(p[42:])); got != wanted {
					t.Errorf("offers %d, want %d", got, wanted)
				}
			})
		}
	}
}
