package tunneltest

import (
	"bytes"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/quietline/quietline/tunnel/line"
	"github.com/quietline/quietline/tunnel/rekey"
	"github.com/quietline/quietline/tunnel/wire"
)

// TestPadTraffic: under otp-strict all payload goes under pad, both ways, with
// nothing lost over rekeys, and the datagrams show bucket sizes only.
func TestPadTraffic(t *testing.T) {
	opt := Options{Policy: rekey.OTPStrict, Keys: 10_000, EpochLife: 5 * time.Second, Hold: 1 << 20}
	bubble(t, opt, func(t *testing.T, p *Pair) {
		p.levels(t, rekey.OTP, 20*time.Second)
		var odd atomic.Int64
		sizes := map[int]bool{}
		for _, n := range []int{128, 512, 1408} {
			sizes[wire.HeaderLen+12+n+16+wire.TagLen] = true
		}
		p.Net.Tap(func(_ int, d []byte) []byte {
			if h, err := wire.ParseHeader(d); err == nil && h.Queue != wire.ControlQueue && !sizes[len(d)] {
				odd.Add(1)
			}
			return d
		})
		out, back := newSource(p.Tokyo, 1), newSource(p.Kochi, 2)
		atKochi, atTokyo := p.Kochi.Receive(), p.Tokyo.Receive()
		for range 10 {
			out.send(t, 20, 10*time.Millisecond)
			back.send(t, 20, 10*time.Millisecond)
			time.Sleep(2 * time.Second)
		}
		if n := out.check(t, atKochi.Packets()) + back.check(t, atTokyo.Packets()); n != 0 {
			t.Errorf("%d packets are missing", n)
		}
		if odd.Load() != 0 {
			t.Errorf("%d datagrams show other sizes than buckets", odd.Load())
		}
		for _, s := range []*Site{p.Tokyo, p.Kochi} {
			st := s.Line.Stats()
			c := st.Pad.Classes[0]
			if c.Padded != 200 || c.Demoted+c.Refused+c.Plain != 0 || st.Pad.Sealed == 0 ||
				st.Pad.Opened == 0 || st.Level != rekey.OTP || st.Peer.Level != rekey.OTP ||
				st.Handshakes.Epochs < 4 || !st.Pad.Simulated {
				t.Errorf("%s: %+v %+v", s.name, c, st)
			}
		}
	})
}

// TestPadRunsOut: otp-preferred goes on under the epoch's keys, counted and
// alarmed; otp-strict drops and tells the host. Both are at OTP again with the
// keys, and no packet is lost where the policy lets it go.
func TestPadRunsOut(t *testing.T) {
	for policy, want := range map[rekey.Policy]rekey.Level{
		rekey.OTPPreferred: rekey.QKD, rekey.OTPStrict: rekey.Blocked,
	} {
		var log syncBuffer
		opt := Options{Policy: policy, Keys: 10_000, Log: &log, Keepalive: time.Second}
		bubble(t, opt, func(t *testing.T, p *Pair) {
			p.levels(t, rekey.OTP, 20*time.Second)
			p.Keys.Pads(0)
			out, atKochi, atTokyo := newSource(p.Tokyo, 1), p.Kochi.Receive(), p.Tokyo.Receive()
			for i := 0; p.Tokyo.Line.Stats().Level != want; i++ {
				if i == 100 {
					t.Fatalf("%+v", p.Tokyo.Line.Stats())
				}
				out.send(t, 5, 50*time.Millisecond)
			}
			time.Sleep(2 * time.Second)
			missing := out.check(t, atKochi.Packets())
			last := packet(0, 1000)
			copy(last[12:], []byte{10, 1, 1, 1, 10, 2, 2, 2})
			if err := p.Tokyo.Device.Inject(0, last); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Second)
			st := p.Tokyo.Line.Stats()
			c := st.Pad.Classes[0]
			if policy == rekey.OTPPreferred {
				if missing != 0 || c.Demoted == 0 || c.Refused != 0 {
					t.Errorf("%d missing, %+v", missing, c)
				}
			} else if missing == 0 || c.Demoted != 0 || c.Refused != uint64(missing)+1 ||
				st.Drops["no_pad"] != c.Refused || !anyICMP(atTokyo.Packets()) {
				t.Errorf("%d missing, %+v, drops %v", missing, c, st.Drops)
			}
			if !strings.Contains(st.Why, "pad is") || st.Alarms == 0 || len(st.State.Alarms) == 0 {
				t.Errorf("%+v", st.State)
			}
			if peer := p.Kochi.Line.Stats().Peer; peer.Level != want || !strings.Contains(peer.Reason, "pad is") {
				t.Errorf("the peer was told %+v", peer)
			}
			p.Keys.Pads(1 << 30)
			p.levels(t, rekey.OTP, time.Minute)
		})
		for _, say := range []string{"one-time pad is low", "level fell from OTP to " + want.String()} {
			if !strings.Contains(log.String(), say) {
				t.Errorf("%v: the log does not say %q", policy, say)
			}
		}
	}
}

// anyICMP finds "administratively prohibited" for a packet of ours.
func anyICMP(packets [][]byte) bool {
	for _, p := range packets {
		if len(p) > 28 && p[9] == 1 && p[20] == 3 && p[21] == 13 && p[28]>>4 == 4 {
			return true
		}
	}
	return false
}

// TestPadClasses: DSCP chooses what goes under pad inside one line.
func TestPadClasses(t *testing.T) {
	opt := Options{Policy: rekey.OTPPreferred, Keys: 10_000,
		Classes: []line.Class{{Name: "alarms", DSCP: []uint8{46}, Pad: true, Urgent: true}}}
	bubble(t, opt, func(t *testing.T, p *Pair) {
		p.levels(t, rekey.OTP, 20*time.Second)
		atKochi := p.Kochi.Receive()
		for i := range 20 {
			pk := packet(uint64(i), 100)
			if i%2 == 0 {
				pk[1] = 46 << 2
			}
			if err := p.Tokyo.Device.Inject(0, pk); err != nil {
				t.Fatal(err)
			}
		}
		time.Sleep(time.Second)
		cs := p.Tokyo.Line.Stats().Pad.Classes
		if cs[0].Padded != 10 || cs[1].Plain != 10 || cs[0].Name != "alarms" || len(atKochi.Packets()) != 20 {
			t.Errorf("%+v, %d came", cs, len(atKochi.Packets()))
		}
		urgent := 0
		for _, pk := range atKochi.Packets() {
			if bytes.Equal(pk[1:2], []byte{46 << 2}) {
				urgent++
			}
		}
		if urgent != 10 {
			t.Errorf("%d urgent packets", urgent)
		}
	})
}

// TestPadRestart: pad is void when either end begins anew, and comes back.
func TestPadRestart(t *testing.T) {
	for end := range 3 {
		opt := Options{Policy: rekey.OTPStrict, Keys: 10_000, Hold: 1 << 20}
		bubble(t, opt, func(t *testing.T, p *Pair) {
			p.levels(t, rekey.OTP, 20*time.Second)
			switch end {
			case 2:
				p.Tokyo.Line.Restored()
			default:
				s := []*Site{p.Tokyo, p.Kochi}[end]
				s.Stop()
				s.Start()
			}
			time.Sleep(time.Second)
			p.levels(t, rekey.OTP, time.Minute)
			out, atKochi := newSource(p.Tokyo, 1), p.Kochi.Receive()
			back, atTokyo := newSource(p.Kochi, 2), p.Tokyo.Receive()
			out.send(t, 50, 20*time.Millisecond)
			back.send(t, 50, 20*time.Millisecond)
			time.Sleep(time.Second)
			if n := out.check(t, atKochi.Packets()) + back.check(t, atTokyo.Packets()); n != 0 {
				t.Errorf("case %d: %d packets are missing: %+v\n%+v", end, n, p.Tokyo.Line.Stats(), p.Kochi.Line.Stats())
			}
		})
	}
}

// TestPadWithAPeerWithout: an end that prefers pad takes a peer that has none,
// and says so; an end that insists does not.
func TestPadWithAPeerWithout(t *testing.T) {
	bubble(t, Options{Policy: rekey.OTPPreferred, PeerPolicy: rekey.QKDRequired, Keys: 100},
		func(t *testing.T, p *Pair) {
			p.levels(t, rekey.QKD, 20*time.Second)
			out, atKochi := newSource(p.Tokyo, 1), p.Kochi.Receive()
			out.send(t, 20, 20*time.Millisecond)
			time.Sleep(time.Second)
			st := p.Tokyo.Line.Stats()
			if n := out.check(t, atKochi.Packets()); n != 0 || st.Pad.Classes[0].Demoted != 20 ||
				!strings.Contains(st.Why, "the peer's policy is qkd-required") {
				t.Errorf("%d missing, %+v", n, st)
			}
		})
	bubble(t, Options{Policy: rekey.OTPStrict, PeerPolicy: rekey.QKDStrict, Keys: 100},
		func(t *testing.T, p *Pair) {
			time.Sleep(30 * time.Second)
			if st := p.Tokyo.Line.Stats(); st.Level != rekey.Blocked || len(st.State.Alarms) == 0 {
				t.Errorf("%+v", st.State)
			}
		})
}
