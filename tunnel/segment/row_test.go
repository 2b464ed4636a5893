package segment

import (
	"bytes"
	"encoding/binary"
	"testing"

	"pgregory.net/rapid"

	"github.com/quietline/quietline/tunnel"
)

// datagram is a finished UDP packet of a flow, as a kernel sends it.
func datagram(v6 bool, id uint16, flow byte, payload []byte) []byte {
	ip := ipv4Len
	if v6 {
		ip = ipv6Len
	}
	p := make([]byte, ip+udpLen, ip+udpLen+len(payload))
	p = append(p, payload...)
	if v6 {
		p[0], p[6], p[7], p[8], p[24] = 0x60, 17, 64, 0x20, 0x20
		binary.BigEndian.PutUint16(p[4:], uint16(len(p)-40))
	} else {
		p[0], p[8], p[9], p[12], p[16] = 0x45, 64, 17, 10, 10
		binary.BigEndian.PutUint16(p[4:], id)
		setLength(p, 0)
	}
	t := p[ip:]
	t[1], t[3] = flow, 7
	binary.BigEndian.PutUint16(t[4:], uint16(len(t)))
	binary.BigEndian.PutUint16(t[6:], pseudo(p, ip, 17))
	f := tunnel.Frame{Data: p, GSO: tunnel.GSO{CsumStart: uint16(ip), CsumOffset: udpChecksum}}
	Finish(&f)
	return p
}

// Whatever packets come, rows split give the same packets again, in order.
func TestRowsSplitAsTheyCame(t *testing.T) {
	joined := 0
	rapid.Check(t, func(t *rapid.T) {
		var sent, got [][]byte
		var row Row
		flush := func() {
			if row.Len() == 0 {
				return
			}
			if row.Len() > 1 {
				joined++
				if _, err := Check(row.Frame()); err != nil {
					t.Fatal(err)
				}
			}
			got = append(got, split(t, row.Frame())...)
			row.Reset()
		}
		id, size := uint16(rapid.IntRange(0, 65535).Draw(t, "id")), 64
		v6, flow := false, byte(1)
		for range rapid.IntRange(1, 150).Draw(t, "packets") {
			id++
			p := datagram(v6, id, flow, bytes.Repeat([]byte{byte(id)}, size))
			switch rapid.IntRange(0, 40).Draw(t, "event") {
			case 0:
				size = rapid.IntRange(0, 1300).Draw(t, "size")
			case 1:
				v6 = !v6
			case 2:
				flow++
			case 3:
				id += 5
			case 4: // any byte but those that say how long the packet is
				at := rapid.IntRange(6, len(p)-1).Draw(t, "at")
				p[at] ^= 1 << rapid.IntRange(0, 7).Draw(t, "bit")
			case 5:
				clear(p[len(p)-size-2 : len(p)-size]) // no checksum
			}
			sent = append(sent, p)
			if !row.Add(p) {
				flush()
				if !row.Add(p) {
					t.Fatal("an empty row refuses a packet")
				}
			}
		}
		flush()
		if len(got) != len(sent) {
			t.Fatalf("%d packets, want %d", len(got), len(sent))
		}
		for i := range sent {
			if !bytes.Equal(sent[i], got[i]) {
				t.Fatalf("packet %d:\n%x\nwant\n%x", i, got[i], sent[i])
			}
		}
	})
	if joined == 0 {
		t.Error("nothing was joined")
	}
}

func TestRowLimits(t *testing.T) {
	var row Row
	n := 0
	for ; row.Add(datagram(false, uint16(n), 1, make([]byte, 64))); n++ {
	}
	if n != maxRow {
		t.Errorf("a row of %d datagrams, want %d", n, maxRow)
	}
	row.Reset()
	for n = 0; row.Add(datagram(true, 0, 1, make([]byte, 1400))); n++ {
	}
	if f := row.Frame(); len(f.Data) > 65535 || n < 45 {
		t.Errorf("a row of %d bytes in %d datagrams", len(f.Data), n)
	}
}

func FuzzRow(f *testing.F) {
	f.Add(datagram(false, 1, 1, make([]byte, 10)), datagram(false, 2, 1, make([]byte, 10)))
	f.Add(datagram(true, 1, 1, make([]byte, 10)), datagram(true, 2, 1, make([]byte, 3)))
	f.Fuzz(func(t *testing.T, a, b []byte) {
		var row Row
		row.Add(a)
		if !row.Add(b) {
			return
		}
		want := [][]byte{a, b}
		err := Split(row.Frame(), nil, func(p []byte) error {
			if !bytes.Equal(p, want[0]) {
				t.Errorf("%x comes back as %x", want[0], p)
			}
			want = want[1:]
			return nil
		})
		if err != nil || len(want) != 0 {
			t.Errorf("%d packets are missing, %v", len(want), err)
		}
	})
}
