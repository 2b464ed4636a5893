package line

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"testing"
	"time"

	"github.com/quietline/quietline/tunnel"
	"github.com/quietline/quietline/tunnel/pad"
	"github.com/quietline/quietline/tunnel/rekey"
	"github.com/quietline/quietline/tunnel/wire"
)

// tcp4 is an IPv4 packet of a TCP connection.
func tcp4(to string, src, dst uint16, dscp uint8) []byte {
	p := packet(60)
	p[1], p[9] = dscp<<2, protoTCP
	copy(p[12:], []byte{10, 1, 0, 1})
	copy(p[16:], netip.MustParseAddr(to).AsSlice())
	binary.BigEndian.PutUint16(p[20:], src)
	binary.BigEndian.PutUint16(p[22:], dst)
	return p
}

func udp6(to string, dst uint16, dscp uint8) []byte {
	p := make([]byte, 60)
	binary.BigEndian.PutUint32(p, 6<<28|uint32(dscp)<<22)
	binary.BigEndian.PutUint16(p[4:], 20)
	p[6] = protoUDP
	copy(p[8:], netip.MustParseAddr("2001:db8::1").AsSlice())
	copy(p[24:], netip.MustParseAddr(to).AsSlice())
	binary.BigEndian.PutUint16(p[42:], dst)
	return p
}

func padLine(t *testing.T, p *Pad) *Line {
	t.Helper()
	m, err := pad.New(pad.Config{})
	if err != nil {
		t.Fatal(err)
	}
	p.Machine = m
	l, err := New(Config{Device: &sink{}, Conn: &last{}, Machine: &script{}, Pad: p})
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func TestClassify(t *testing.T) {
	hl7 := Class{Name: "hl7", To: []netip.Prefix{netip.MustParsePrefix("10.2.0.0/16"),
		netip.MustParsePrefix("2001:db8:2::/48")}, Ports: []uint16{2575, 2576}}
	voice := Class{Name: "voice", DSCP: []uint8{46}}
	l := padLine(t, &Pad{Classes: []Class{hl7, voice}})
	later := tcp4("10.2.0.1", 1, 2575, 0)
	later[7] = 1
	options := append([]byte{}, tcp4("10.2.0.1", 1, 2575, 0)...)
	options = append(options[:20], append([]byte{1, 1, 1, 1}, options[20:]...)...)
	options[0] = 0x46
	icmp := tcp4("10.2.0.1", 1, 2575, 0)
	icmp[9] = protoICMP
	for name, tt := range map[string]struct {
		p    []byte
		want string
	}{
		"to it":          {tcp4("10.2.3.4", 40000, 2575, 0), "hl7"},
		"from it":        {tcp4("10.2.3.4", 2576, 40000, 0), "hl7"},
		"IPv6":           {udp6("2001:db8:2::7", 2575, 46), "hl7"},
		"elsewhere":      {tcp4("10.3.3.4", 1, 2575, 0), "other"},
		"other port":     {tcp4("10.2.3.4", 1, 2574, 0), "other"},
		"voice":          {tcp4("10.9.9.9", 1, 2, 46), "voice"},
		"voice IPv6":     {udp6("2001:db8:9::7", 1, 46), "voice"},
		"later fragment": {later, "other"},
		"options":        {options, "hl7"},
		"no ports":       {icmp, "other"},
		"short":          {[]byte{0x45, 0}, "other"},
		"empty":          {nil, "other"},
		"bad header":     {append([]byte{0x4f}, make([]byte, 30)...), "other"},
	} {
		if got := l.classify(tt.p).Name; got != tt.want {
			t.Errorf("%s: %s, want %s", name, got, tt.want)
		}
	}
	if c := padLine(t, &Pad{}).classify(tcp4("10.2.3.4", 1, 2, 0)); !c.Pad {
		t.Error("without classes nothing goes under pad")
	}
	for _, c := range padLine(t, &Pad{Strict: true, Classes: []Class{hl7}}).classes {
		if !c.Pad {
			t.Errorf("class %s goes without pad under a strict policy", c.Name)
		}
	}
	for _, bad := range []Class{{}, {Name: "x", DSCP: []uint8{64}}} {
		if err := (&Pad{Machine: &pad.Machine{}, Classes: []Class{bad}}).check(); err == nil {
			t.Errorf("%+v is taken", bad)
		}
	}
}

// TestProhibited: the answer is a whole ICMP packet with right checksums, from
// the far host, and quotes what was refused.
func TestProhibited(t *testing.T) {
	p4 := tcp4("10.2.0.1", 1, 2, 0)
	a := prohibited(p4)
	if !wire.IsPacket(a) || len(a) != 56 || checksum(0, a[:20]) != 0 || checksum(0, a[20:]) != 0 ||
		!bytes.Equal(a[12:16], p4[16:20]) || !bytes.Equal(a[16:20], p4[12:16]) || a[20] != 3 || a[21] != 13 ||
		!bytes.Equal(a[28:], p4[:28]) {
		t.Errorf("IPv4: %x", a)
	}
	p6 := udp6("2001:db8:2::7", 1, 0)
	a = prohibited(p6)
	pseudo := sum(uint32(len(a)-40)+protoICMP6, a[8:40])
	if !wire.IsPacket(a) || checksum(pseudo, a[40:]) != 0 || a[40] != 1 || a[41] != 1 ||
		!bytes.Equal(a[8:24], p6[24:40]) || !bytes.Equal(a[48:], p6) {
		t.Errorf("IPv6: %x", a)
	}
	change := func(p []byte, i int, v byte) []byte { q := bytes.Clone(p); q[i] = v; return q }
	icmpError := change(change(p4, 9, protoICMP), 20, 3)
	for name, p := range map[string][]byte{"no source": change(p4, 12, 0), "multicast source": change(p4, 12, 224),
		"later fragment": change(p4, 7, 1), "ICMP error": icmpError, "multicast IPv6": change(p6, 8, 0xff),
		"ICMPv6 error": change(change(p6, 6, protoICMP6), 40, 1), "no packet": {0x55}} {
		if a := prohibited(p); a != nil {
			t.Errorf("%s is answered: %x", name, a)
		}
	}
	if prohibited(change(change(p4, 9, protoICMP), 20, 8)) == nil {
		t.Error("an echo request is not answered")
	}
}

// TestStrictRefusesUnpadded: the floor holds on arrival too.
func TestStrictRefusesUnpadded(t *testing.T) {
	for _, strict := range []bool{true, false} {
		l := padLine(t, &Pad{Strict: strict})
		dev := l.cfg.Device.(*sink)
		in := newInbound(l, dev)
		in.record(wire.Header{}, append([]byte{byte(wire.Whole)}, packet(60)...))
		if got, want := l.Stats().Drops["not_padded"] == 1, strict; got != want || dev.writes != map[bool]int{false: 1}[strict] {
			t.Errorf("strict %v: drops %v, %d writes", strict, l.Stats().Drops, dev.writes)
		}
		in.record(wire.Header{}, []byte{byte(wire.Control)})
		in.record(wire.Header{}, append([]byte{byte(wire.Pad)}, make([]byte, 200)...))
		if d := l.Stats().Drops; d["bad_record"] != 1 {
			t.Errorf("strict %v: %v", strict, d)
		}
	}
	l := loopback(t, &last{}, &sink{})
	newInbound(l, &sink{}).record(wire.Header{}, append([]byte{byte(wire.Pad)}, make([]byte, 200)...))
	if d := l.Stats().Drops; d["bad_record"] != 1 {
		t.Errorf("a line without pad takes a pad record: %v", d)
	}
}

// TestNoPadNoPacket: without pad a strict line sends nothing, and tells the
// host, but not more often than it may.
func TestNoPadNoPacket(t *testing.T) {
	conn, dev := &last{}, &sink{}
	l := padLine(t, &Pad{Strict: true})
	l.cfg.Conn, l.cfg.Device = conn, dev
	o := &owner{Line: l, ready: map[uint32]*prepared{}}
	if err := o.install(epoch(9)); err != nil {
		t.Fatal(err)
	}
	o.send(9)
	out := newOutbound(l, l.seals[0], 1)
	for _, f := range [][]tunnel.Frame{{{Data: tcp4("10.2.0.1", 1, 2, 0)}}, {superFrame(20000)}} {
		mem := out.reset()
		for i := range f {
			mem[i].Data, mem[i].GSO = append(mem[i].Data, f[i].Data...), f[i].GSO
		}
		out.batch(mem[:len(f)])
	}
	if conn.burst.Data != nil {
		t.Errorf("sent %x", conn.burst.Data)
	}
	if st := l.Stats(); st.Drops["no_pad"] < 2 || st.Pad != nil && st.Pad.Classes[0].Refused != st.Drops["no_pad"] {
		t.Errorf("drops %v", st.Drops)
	}
	if dev.writes != 1 {
		t.Errorf("%d answers to the host, want one within %v", dev.writes, rejectEvery)
	}
}

// TestShow: a level that falls is an alarm, one that rises is not.
func TestShow(t *testing.T) {
	l := padLine(t, &Pad{})
	o := &owner{Line: l}
	o.show(rekey.OTP, "pad")
	since := o.pad.shown.since
	o.show(rekey.OTP, "pad still")
	if l.Stats().Alarms != 0 || o.pad.shown.since != since || o.pad.shown.why != "pad still" {
		t.Errorf("%+v", o.pad.shown)
	}
	o.show(rekey.QKD, "no pad")
	if st := l.Stats(); st.Alarms != 1 || st.LastAlarm != "level fell from OTP to QKD: no pad" ||
		time.Since(o.pad.shown.since) > time.Minute {
		t.Errorf("%+v", st)
	}
}
