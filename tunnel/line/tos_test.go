package line

import (
	"encoding/binary"
	"testing"

	"github.com/quietline/quietline/tunnel"
	"github.com/quietline/quietline/tunnel/segment"
)

// with is a packet of n bytes with this TOS, its IPv4 header checksum right.
func with(six bool, tos uint8, n int) []byte {
	p := packet(n)
	if six {
		p[0], p[1] = 0x60|tos>>4, tos<<4
		binary.BigEndian.PutUint16(p[4:], uint16(n-40))
		return p
	}
	p[1] = tos
	binary.BigEndian.PutUint16(p[10:], ^headerSum(p))
	return p
}

// headerSum is the sum of an IPv4 header of 20 bytes, RFC 1071.
func headerSum(p []byte) uint16 {
	var sum uint32
	for i := 0; i < 20; i += 2 {
		sum += uint32(binary.BigEndian.Uint16(p[i:]))
	}
	sum = sum>>16 + sum&0xffff
	return uint16(sum>>16 + sum)
}

// The table of RFC 6040, figure 4: rows are what is inside, columns outside.
func TestMergeECN(t *testing.T) {
	const drop = 0xff
	table := map[uint8]map[uint8]uint8{
		notECT: {notECT: notECT, ect0: notECT, ect1: notECT, ce: drop},
		ect0:   {notECT: ect0, ect0: ect0, ect1: ect1, ce: ce},
		ect1:   {notECT: ect1, ect0: ect1, ect1: ect1, ce: ce},
		ce:     {notECT: ce, ect0: ce, ect1: ce, ce: ce},
	}
	for inner, row := range table {
		for outer, want := range row {
			for _, six := range []bool{false, true} {
				const class = 46 << 2 // expedited forwarding, which must not change
				p := with(six, class|inner, 60)
				kept := mergeECN(p, outer)
				if kept != (want != drop) || kept && tosOf(p) != class|want {
					t.Errorf("inside %d, outside %d: kept %v, %#x; want %d", inner, outer, kept,
						tosOf(p), want)
				}
				if !six && headerSum(p) != 0xffff {
					t.Errorf("inside %d, outside %d: the header checksum is wrong", inner, outer)
				}
			}
		}
	}
}

func TestOuterTOS(t *testing.T) {
	const inner = 46<<2 | ect0
	for name, test := range map[string]struct {
		cfg  Config
		want uint8
	}{
		"no class, ECN":      {Config{}, ect0},
		"class copied":       {Config{DSCP: DSCP{Copy: true}}, inner},
		"class fixed":        {Config{DSCP: DSCP{Value: 10}}, 10<<2 | ect0},
		"nothing":            {Config{NoECN: true}, 0},
		"class copied alone": {Config{DSCP: DSCP{Copy: true}, NoECN: true}, 46 << 2},
	} {
		if got := test.cfg.outerTOS(inner); got != test.want {
			t.Errorf("%s: %#x, want %#x", name, got, test.want)
		}
	}
}

// bursts keeps what a line sends.
type bursts struct {
	last
	all []Burst
}

func (b *bursts) Write(burst Burst) error {
	burst.Data = append([]byte(nil), burst.Data...)
	b.all = append(b.all, burst)
	return nil
}

// keep is a sink that keeps what it is given.
type keep struct {
	sink
	frames []tunnel.Frame
}

func (k *keep) WriteBatch(f []tunnel.Frame) (int, error) {
	for _, f := range f {
		k.frames = append(k.frames, tunnel.Frame{Data: append([]byte(nil), f.Data...), GSO: f.GSO})
	}
	return len(f), nil
}

// Packets of one class and mark travel together, others by themselves, and all
// say outside what they are.
func TestOneBurstOneClass(t *testing.T) {
	conn, dev := &bursts{}, &keep{}
	l := loopback(t, conn, dev)
	o := newOutbound(l, l.seals[0], 1)
	mem := o.reset()
	tos := []uint8{0, 0, ect0, ect0, ce, 0}
	for i, v := range tos {
		mem[i].Data = append(mem[i].Data, with(false, v, 100)...)
	}
	mem[len(tos)].Data = append(mem[len(tos)].Data, with(true, ect1, 1300)...)
	o.batch(mem[:len(tos)+1])
	var got []uint8
	for _, b := range conn.all {
		got = append(got, b.TOS)
	}
	if want := []uint8{0, ect0, ce, 0, ect1}; string(got) != string(want) {
		t.Errorf("bursts say %v, want %v", got, want)
	}
	in := newInbound(l, dev)
	for i, b := range conn.all {
		if i == 0 || i == 1 {
			b.TOS |= ce // the network is congested
		}
		in.burst(b)
	}
	in.burst(Burst{})
	marks := map[uint8]int{}
	for _, f := range dev.frames {
		marks[tosOf(f.Data)]++
	}
	if d := l.Stats().Drops["congested"]; d != 2 || marks[ce] != 3 || marks[0] != 1 || marks[ect1] != 1 {
		t.Errorf("%d dropped, want the 2 that cannot be marked; marks %v", d, marks)
	}
}

// A mark in the middle of a super-frame parts it: each part says what it met.
func TestMarkPartsRun(t *testing.T) {
	conn, dev := &last{}, &keep{}
	l := loopback(t, conn, dev)
	o, in := newOutbound(l, l.seals[0], 1), newInbound(l, dev)
	f := superFrame(20000)
	setECN(f.Data, ect0)
	binary.BigEndian.PutUint16(f.Data[10:], 0)
	binary.BigEndian.PutUint16(f.Data[10:], ^headerSum(f.Data))
	mem := o.reset()
	mem[0].Data, mem[0].GSO = append(mem[0].Data, f.Data...), f.GSO
	o.batch(mem[:1])
	n := segment.Count(f)
	for i, data := 0, conn.burst.Data; len(data) > 0; i++ {
		size := min(conn.burst.Size, len(data))
		b := Burst{Data: data[:size:size], Size: size, TOS: ect0}
		if i == 5 {
			b.TOS = ce
		}
		in.burst(b)
		data = data[size:]
	}
	in.burst(Burst{})
	var got []uint8
	segments := 0
	for _, f := range dev.frames {
		got = append(got, tosOf(f.Data))
		segments += segment.Count(f)
		if f.Data[0]>>4 == 4 && headerSum(f.Data) != 0xffff {
			t.Error("a header checksum is wrong")
		}
	}
	if want := []uint8{ect0, ce, ect0}; string(got) != string(want) || segments != n {
		t.Errorf("frames say %v with %d segments, want %v with %d", got, segments, want, n)
	}
}
