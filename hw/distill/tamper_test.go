package distill

import (
	"bytes"
	"errors"
	"testing"
	"time"
)

// Changes that keep every message well formed reach the tags, and each is
// found by the tag that must find it.
func TestTagsCatchWellFormedChanges(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name   string
		kind   uint8
		at     int // byte from the start, or from the end if negative
		bit    byte
		victim Role
	}{
		{"amplification seed", kindAmplify, 200, 1, Bob},
		{"tag of amplify", kindAmplify, -1, 1, Bob},
		{"tag of accept", kindAccept, -1, 0x80, Alice},
		{"tag of ack", kindAck, -3, 4, Bob},
		{"pad of amplify", kindAmplify, -20, 2, Bob},
		{"shuffle", kindBegin, headBytes + 9, 1, Bob},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := newLink(t, tinyConfig(), clean, 31)
			l.tamper = func(_ Role, raw []byte) [][]byte {
				if raw[0] != c.kind {
					return [][]byte{raw}
				}
				bad := append([]byte(nil), raw...)
				bad[(c.at+len(bad))%len(bad)] ^= c.bit
				return [][]byte{bad}
			}
			l.run(1)
			l.check()
			if c.name == "shuffle" {
				// Different shuffles reconcile nothing: verification finds it.
				if len(l.blocks[Alice])+len(l.blocks[Bob]) > 0 || len(l.alarms[Alice])+len(l.alarms[Bob]) == 0 {
					t.Fatalf("alarms %+v", l.alarms)
				}
				return
			}
			if !errors.Is(l.errs[c.victim], ErrAuthentication) || len(l.blocks[c.victim]) > 0 {
				t.Fatalf("error %v, %d blocks", l.errs[c.victim], len(l.blocks[c.victim]))
			}
			a := l.alarms[c.victim]
			if len(a) != 1 || a[0].Alarm != "authentication failed" {
				t.Fatalf("alarms %+v", a)
			}
			if c.kind != kindAck && len(l.blocks[1-c.victim]) > 0 {
				t.Error("the other end has released")
			}
		})
	}
}

// Somebody in the middle who lets alice believe that decoys were signals, or
// changes bob's slots: nothing in between notices, the tags do.
func TestQuietLiesAreFound(t *testing.T) {
	t.Parallel()
	for name, lie := range map[string]func(to Role, raw []byte){
		"intensities": func(to Role, raw []byte) {
			if raw[0] != kindSifted {
				return
			}
			for i, v := range raw[headBytes+4 : headBytes+1000] { // 01 becomes 10 and back
				used := (v | v>>1) & 0x55
				raw[headBytes+4+i] = v ^ (used | used<<1)
			}
		},
		"test bits": func(to Role, raw []byte) {
			if raw[0] == kindSifted {
				raw[len(raw)-2] ^= 0xff
			}
		},
		"bob's test bits": func(to Role, raw []byte) {
			if raw[0] == kindAnnounce {
				raw[len(raw)-2] ^= 0xff
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			l := newLink(t, tinyConfig(), clean, 32)
			l.tamper = func(to Role, raw []byte) [][]byte {
				bad := append([]byte(nil), raw...)
				lie(to, bad)
				return [][]byte{bad}
			}
			l.run(1)
			l.check()
			if len(l.blocks[Alice])+len(l.blocks[Bob]) > 0 {
				t.Fatal("a block was released")
			}
			// Bob finds that lengths differ before alice sees his tag.
			if !errors.Is(l.errs[Bob], ErrAuthentication) && (len(l.alarms[Bob]) != 1 ||
				l.alarms[Bob][0].Alarm != "lengths differ") {
				t.Errorf("errors %v; alarms %+v", l.errs, l.alarms)
			}
		})
	}
}

// The messages of a finished session, played again to a new one, do nothing.
func TestReplay(t *testing.T) {
	t.Parallel()
	l := newLink(t, tinyConfig(), clean, 33)
	var old [2][][]byte
	l.tamper = func(to Role, raw []byte) [][]byte {
		old[to] = append(old[to], bytes.Clone(raw))
		return [][]byte{raw}
	}
	l.restart(5)
	l.run(1)
	l.quiet()
	for role := range l.ends {
		cfg := tinyConfig()
		cfg.Role, cfg.Auth, cfg.Generation = Role(role), l.auth[role], 5
		cfg.Rand = seeded(5*16 + uint64(role)) // even the same random numbers
		left := l.auth[role].Left()
		m, err := New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		for _, raw := range old[role] {
			out, err := m.Step(l.now, Input{Message: raw})
			if len(out.Blocks) > 0 {
				t.Fatal("a replay made a block")
			}
			if err != nil {
				break
			}
		}
		if got := l.auth[role].Left(); got != left {
			t.Errorf("a replay cost %d bits of authentication key", left-got)
		}
	}
}

// Bytes that are no message end the session for good.
func TestDeadMachineStaysDead(t *testing.T) {
	t.Parallel()
	l := newLink(t, tinyConfig(), clean, 34)
	l.step(Bob, Input{Message: []byte{99}})
	first := l.errs[Bob]
	l.errs[Bob] = nil
	l.step(Bob, Input{})
	if !errors.Is(first, ErrProtocol) || !errors.Is(l.errs[Bob], ErrProtocol) {
		t.Errorf("errors %v, %v", first, l.errs[Bob])
	}
}

// A captured session is fed with one message replaced by the fuzzer's; the
// machine must neither panic nor release.
func FuzzMessage(f *testing.F) {
	l := newLink(f, tinyConfig(), clean, 35)
	var heard [2][][]byte
	l.tamper = func(to Role, raw []byte) [][]byte {
		heard[to] = append(heard[to], bytes.Clone(raw))
		return [][]byte{raw}
	}
	l.restart(7)
	l.run(1)
	l.quiet()
	preps := l.preps
	for role, msgs := range heard {
		kinds := map[uint8]bool{}
		for i, raw := range msgs {
			if !kinds[raw[0]] {
				kinds[raw[0]] = true
				f.Add(uint8(role), uint16(i), raw[:min(len(raw), 300)])
			}
		}
	}
	f.Fuzz(func(t *testing.T, role uint8, at uint16, raw []byte) {
		r := Role(role % 2)
		cfg := tinyConfig()
		cfg.Role, cfg.Auth, cfg.Generation = r, noKeys{}, 7
		cfg.Rand = seeded(7*16 + uint64(r))
		m, err := New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		now := time.Unix(0, 0)
		for i, msg := range heard[r][:min(len(heard[r]), int(at)+1)] {
			if i == int(at) {
				msg = raw
			}
			for in := (Input{Message: msg}); ; {
				out, err := m.Step(now, in)
				if len(out.Blocks) > 0 {
					t.Fatal("released")
				}
				if err != nil {
					return
				}
				if len(out.Prepared) == 0 {
					break
				}
				in = Input{}
				for _, s := range out.Prepared {
					in.Preparations = append(in.Preparations, preps[s])
				}
			}
		}
	})
}

// noKeys is a pool whose every pad has been used.
type noKeys struct{}

func (noKeys) Point(Role) [16]byte              { return [16]byte{1} }
func (noKeys) Segments() []AuthSegment          { return nil }
func (noKeys) Take(PadName) ([16]byte, error)   { return [16]byte{}, ErrPadUsed }
func (noKeys) Peek(PadName) ([16]byte, error)   { return [16]byte{}, ErrPadUsed }
func (noKeys) Add(uint64, uint64, []byte) error { return nil }

func FuzzAnnouncement(f *testing.F) {
	ds := []Detection{{0, Key, 1}, {5, Test, 1}, {1 << 40, Test, 0}}
	f.Add(encodeAnnouncement(1, 0, ds)[headBytes:])
	f.Add([]byte{1, 0, 0, 0})
	f.Fuzz(func(t *testing.T, body []byte) {
		var a announcement
		if !a.decode(&reader{b: body}, 0, true) {
			return
		}
		ds := make([]Detection, len(a.slots))
		tests := 0
		for i := range ds {
			ds[i] = Detection{Slot: a.slots[i], Basis: Basis(a.bases.at(i))}
			if ds[i].Basis == Test {
				ds[i].Bit = a.bits.at(tests)
				tests++
			}
		}
		if again := encodeAnnouncement(0, 0, ds)[headBytes:]; !bytes.Equal(again, body) {
			t.Fatalf("%x becomes %x", body, again)
		}
	})
}

func FuzzHello(f *testing.F) {
	segments := []AuthSegment{{0, 0, 96, [2]uint32{1, 5}}}
	f.Add(hello{Alice, 3, [32]byte{1}, segments}.encode()[headBytes:])
	f.Fuzz(func(t *testing.T, body []byte) {
		var h hello
		if h.decode(&reader{b: body}) && !bytes.Equal(h.encode()[headBytes:], body) {
			t.Fatalf("%x becomes %x", body, h.encode())
		}
	})
}
