package tunneltest

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/quietline/quietline/tunnel"
	"github.com/quietline/quietline/tunnel/lab"
	"github.com/quietline/quietline/tunnel/rekey"
)

// inLab runs the tests inside a lab; goleak looks at what they leave.
type inLab struct{ m *testing.M }

func (l inLab) Run() int { return lab.Main(l.m) }

func TestMain(m *testing.M) { goleak.VerifyTestMain(inLab{m}) }

// packet is an IP packet of n bytes, IPv4 or IPv6 by turns, with a number and
// a body that follows from it.
func packet(serial uint64, n int) []byte {
	p := make([]byte, n)
	at := 20
	if serial%2 == 0 {
		p[0] = 0x45
		binary.BigEndian.PutUint16(p[2:], uint16(n))
	} else {
		p[0] = 0x60
		at = 40
		binary.BigEndian.PutUint16(p[4:], uint16(n-40))
	}
	binary.BigEndian.PutUint64(p[at:], serial)
	body := p[at+8:]
	rng := rand.NewPCG(serial, 99)
	for i := 0; i+8 <= len(body); i += 8 {
		binary.LittleEndian.PutUint64(body[i:], rng.Uint64())
	}
	return p
}

// serial reads a packet's number.
func serial(p []byte) uint64 {
	if p[0]>>4 == 4 {
		return binary.BigEndian.Uint64(p[20:])
	}
	return binary.BigEndian.Uint64(p[40:])
}

// source sends numbered packets of odd sizes from a site, paced.
type source struct {
	site *Site
	sent map[uint64][]byte
	next uint64
	rng  *rand.Rand
}

func newSource(s *Site, seed uint64) *source {
	return &source{site: s, sent: map[uint64][]byte{}, rng: rand.New(rand.NewPCG(seed, 1))}
}

func (s *source) send(t *testing.T, n int, pause time.Duration) {
	t.Helper()
	for range n {
		p := packet(s.next, 48+s.rng.IntN(s.site.opt.MTU-48+1))
		s.sent[s.next] = p
		s.next++
		queue := s.rng.IntN(s.site.opt.Queues)
		if err := s.site.Device.Inject(queue, p); err != nil {
			t.Fatal(err)
		}
		time.Sleep(pause)
	}
}

// check compares what came with what was sent: each packet as it was, at most
// once. It returns how many are missing.
func (s *source) check(t *testing.T, got [][]byte) (missing int) {
	t.Helper()
	seen := map[uint64]bool{}
	for _, p := range got {
		n := serial(p)
		if seen[n] {
			t.Errorf("packet %d came twice", n)
		}
		seen[n] = true
		if !bytes.Equal(p, s.sent[n]) {
			t.Errorf("packet %d came changed", n)
		}
	}
	return len(s.sent) - len(seen)
}

// bubble runs f with a pair in fake time.
func bubble(t *testing.T, opt Options, f func(t *testing.T, p *Pair)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		p := New(t, opt)
		defer p.Close()
		f(t, p)
	})
}

func TestTrafficBothWays(t *testing.T) {
	for _, opt := range []Options{
		{},
		{Policy: rekey.QKDStrict, Keys: 5},
		{Coalesce: true, Queues: 3, Weather: lab.Weather{Delay: 10 * time.Millisecond}},
		{MTU: 8904},
	} {
		bubble(t, opt, func(t *testing.T, p *Pair) {
			p.Up(10 * time.Second)
			out, back := newSource(p.Tokyo, 1), newSource(p.Kochi, 2)
			atKochi, atTokyo := p.Kochi.Receive(), p.Tokyo.Receive()
			for range 30 {
				out.send(t, 40, 0)
				back.send(t, 40, 0)
				time.Sleep(20 * time.Millisecond)
			}
			time.Sleep(time.Second)
			if n := out.check(t, atKochi.Packets()); n != 0 {
				t.Errorf("%d packets to kochi are missing", n)
			}
			if n := back.check(t, atTokyo.Packets()); n != 0 {
				t.Errorf("%d packets to tokyo are missing", n)
			}
			checkCounts(t, p, out, back)
		})
	}
}

// checkCounts compares the statistics of both ends with what was sent.
func checkCounts(t *testing.T, p *Pair, out, back *source) {
	t.Helper()
	// What a line says of itself may be on its way just now.
	p.Wait(time.Second, func() bool {
		return p.Tokyo.Line.Stats().Sent.Datagrams == p.Kochi.Line.Stats().Received.Datagrams
	})
	a, b := p.Tokyo.Line.Stats(), p.Kochi.Line.Stats()
	bytesOf := func(s *source) (n uint64) {
		for _, p := range s.sent {
			n += uint64(len(p))
		}
		return n
	}
	if n := uint64(len(out.sent)); a.Sent.Packets != n || b.Received.Packets != n {
		t.Errorf("tokyo sent %d, kochi received %d, want %d", a.Sent.Packets, b.Received.Packets, n)
	}
	if n := bytesOf(back); b.Sent.Bytes != n || a.Received.Bytes != n {
		t.Errorf("kochi sent %d bytes, tokyo received %d, want %d", b.Sent.Bytes, a.Received.Bytes, n)
	}
	if a.Sent.OuterBytes != b.Received.OuterBytes || a.Sent.Datagrams != b.Received.Datagrams {
		t.Errorf("outside: tokyo sent %+v, kochi received %+v", a.Sent, b.Received)
	}
	if a.EpochSent == 0 || a.EpochSent > a.Sent.OuterBytes {
		t.Errorf("epoch volume %d of %d bytes", a.EpochSent, a.Sent.OuterBytes)
	}
	for name, n := range b.Drops {
		if n != 0 {
			t.Errorf("kochi dropped %d: %s", n, name)
		}
	}
}

// In bad weather what arrives is whole and comes once, and nothing is lost
// beyond what the network lost.
func TestBadWeather(t *testing.T) {
	for _, coalesce := range []bool{false, true} {
		opt := Options{Coalesce: coalesce, EpochLife: 2 * time.Second, Weather: lab.Weather{
			Loss: 0.02, Duplicate: 0.02, Reorder: 0.05, Delay: 5 * time.Millisecond,
			Jitter: 3 * time.Millisecond, Seed: 42}}
		bubble(t, opt, func(t *testing.T, p *Pair) {
			p.Up(30 * time.Second)
			out, atKochi := newSource(p.Tokyo, 1), p.Kochi.Receive()
			out.send(t, 20000, time.Millisecond)
			time.Sleep(time.Second)
			missing := out.check(t, atKochi.Packets())
			lost, _ := p.Net.Counts()
			s := p.Kochi.Line.Stats()
			if uint64(missing) > lost.Lost || missing == 0 {
				t.Errorf("%d packets are missing, the network lost %d datagrams (seed 42)",
					missing, lost.Lost)
			}
			if s.Drops["replayed"] == 0 || s.Drops["replayed"] > lost.Duplicated {
				t.Errorf("%d replayed of %d duplicated", s.Drops["replayed"], lost.Duplicated)
			}
			if n := s.Drops["forged"] + s.Drops["too_old"] + s.Drops["unknown_epoch"]; n != 0 {
				t.Errorf("good datagrams dropped: %v", s.Drops)
			}
		})
	}
}

// Make before break: paced load over a network with delay, jitter and
// reordering loses nothing over 100 rekeys, or 1,000 with QUIETLINE_LONG=1.
func TestHundredRekeys(t *testing.T) {
	rekeys := uint64(100)
	if os.Getenv("QUIETLINE_LONG") == "1" {
		rekeys = 1000
	}
	for _, policy := range []rekey.Policy{rekey.PQCOnly, rekey.QKDStrict} {
		opt := Options{Policy: policy, Keys: 10_000, EpochLife: time.Second,
			Weather: lab.Weather{Delay: 10 * time.Millisecond, Jitter: 2 * time.Millisecond,
				Reorder: 0.01, Seed: 5}}
		bubble(t, opt, func(t *testing.T, p *Pair) {
			p.Up(10 * time.Second)
			first := p.Tokyo.Line.Stats().Handshakes.Epochs
			out, back := newSource(p.Tokyo, 1), newSource(p.Kochi, 2)
			atKochi, atTokyo := p.Kochi.Receive(), p.Tokyo.Receive()
			for p.Tokyo.Line.Stats().Handshakes.Epochs < first+rekeys {
				out.send(t, 100, 2*time.Millisecond)
				back.send(t, 10, 2*time.Millisecond)
			}
			time.Sleep(time.Second)
			if n := out.check(t, atKochi.Packets()); n != 0 {
				t.Errorf("%v: %d of %d packets to kochi are missing", policy, n, len(out.sent))
			}
			if n := back.check(t, atTokyo.Packets()); n != 0 {
				t.Errorf("%v: %d of %d packets to tokyo are missing", policy, n, len(back.sent))
			}
			for _, s := range []*Site{p.Tokyo, p.Kochi} {
				st := s.Line.Stats()
				if st.Drops["blocked"]+st.Drops["unknown_epoch"]+st.Drops["forged"] != 0 {
					t.Errorf("%v %s: drops %v", policy, s.name, st.Drops)
				}
			}
		})
	}
}

func TestOperatorRekeys(t *testing.T) {
	bubble(t, Options{Policy: rekey.QKDStrict, Keys: 10}, func(t *testing.T, p *Pair) {
		p.Up(10 * time.Second)
		for _, s := range []*Site{p.Tokyo, p.Kochi} {
			time.Sleep(30 * time.Second) // until the epoch before has been retired
			before := s.Line.Stats()
			s.Line.Rekey()
			if !p.Wait(5*time.Second, func() bool { return s.Line.Stats().Epoch > before.Epoch }) {
				t.Errorf("%s: no new epoch: %+v", s.name, s.Line.Stats().State)
			}
		}
		st := p.Tokyo.Line.Stats()
		if st.EpochKeys != 1 || st.LastKey.IsZero() || st.Level != rekey.QKD {
			t.Errorf("%d keys in the epoch, last %v, level %v", st.EpochKeys, st.LastKey, st.Level)
		}
	})
}

// qkd-strict without keys holds, then blocks, drops all, and comes back.
func TestBlocksWithoutKeysAndRecovers(t *testing.T) {
	opt := Options{Policy: rekey.QKDStrict, Keys: 1, EpochLife: 2 * time.Second,
		HoldMax: 20 * time.Second}
	bubble(t, opt, func(t *testing.T, p *Pair) {
		p.Up(10 * time.Second)
		if !p.Wait(time.Minute, func() bool {
			return p.Tokyo.Line.Stats().Level == rekey.Blocked &&
				p.Kochi.Line.Stats().Level == rekey.Blocked
		}) {
			t.Fatalf("not blocked: %+v", p.Tokyo.Line.Stats().State)
		}
		out, atKochi := newSource(p.Tokyo, 1), p.Kochi.Receive()
		var leaked sync.Map
		p.Net.Tap(func(_ int, d []byte) []byte {
			if d[0] >= 0x10 {
				leaked.Store(fmt.Sprintf("%x", d[:16]), true)
			}
			return d
		})
		out.send(t, 50, time.Millisecond)
		time.Sleep(5 * time.Second)
		if n := len(atKochi.Packets()); n != 0 {
			t.Errorf("%d packets came through a blocked line", n)
		}
		leaked.Range(func(k, _ any) bool { t.Errorf("blocked line sent %v", k); return true })
		st := p.Tokyo.Line.Stats()
		if st.Drops["blocked"] != 50 || st.Why == "" || st.Keys.Failures["empty"]+
			p.Kochi.Line.Stats().Keys.Failures["empty"] == 0 {
			t.Errorf("drops %v, why %q, key failures %v", st.Drops, st.Why, st.Keys.Failures)
		}
		p.Keys.Add(100)
		p.Up(time.Minute)
		*out = *newSource(p.Tokyo, 3)
		out.send(t, 50, time.Millisecond)
		time.Sleep(time.Second)
		if n := out.check(t, atKochi.Packets()); n != 0 {
			t.Errorf("%d packets are missing after the keys came back", n)
		}
	})
}

// Each error of a key manager keeps a strict line from coming up, is counted
// under its name, and ends when the key manager does well again.
func TestKeyManagerFaults(t *testing.T) {
	other := errors.New("connection refused")
	for err, name := range map[error]string{
		tunnel.ErrKeyEmpty: "empty", tunnel.ErrKeyUnknown: "unknown",
		tunnel.ErrKeyDenied: "denied", tunnel.ErrKeyDown: "down", other: "down",
	} {
		for end := range 2 {
			opt := Options{Policy: rekey.QKDStrict, Keys: 100}
			synctest.Test(t, func(t *testing.T) {
				p := New(t, opt)
				defer p.Close()
				p.Keys.Fail(end, err)
				p.Tokyo.Stop()
				p.Kochi.Stop()
				p.Tokyo.Start() // both lines begin with the fault in place
				p.Kochi.Start()
				time.Sleep(30 * time.Second)
				site := []*Site{p.Tokyo, p.Kochi}[end]
				st := site.Line.Stats()
				if st.Level != rekey.Blocked || st.Keys.Failures[name] == 0 {
					t.Errorf("%v at %s: level %v, failures %v", err, site.name, st.Level,
						st.Keys.Failures)
				}
				p.Keys.Fail(end, nil)
				p.Up(2 * time.Minute)
			})
		}
	}
}

// A key manager slower than its budget delays no traffic.
func TestSlowKeyManager(t *testing.T) {
	opt := Options{Policy: rekey.QKDStrict, Keys: 1000, EpochLife: 2 * time.Second,
		HoldMax: 10 * time.Minute}
	bubble(t, opt, func(t *testing.T, p *Pair) {
		p.Up(10 * time.Second)
		p.Keys.Slow(0, time.Hour)
		p.Keys.Slow(1, time.Hour)
		out, atKochi := newSource(p.Tokyo, 1), p.Kochi.Receive()
		out.send(t, 20000, time.Millisecond)
		time.Sleep(time.Second)
		if n := out.check(t, atKochi.Packets()); n != 0 {
			t.Errorf("%d packets are missing", n)
		}
		if p.Keys.Calls(0) < 3 && p.Keys.Calls(1) < 3 {
			t.Errorf("%d and %d calls: the key managers were not asked", p.Keys.Calls(0), p.Keys.Calls(1))
		}
	})
}

// A replayed datagram is dropped; a changed one too, whatever the change.
func TestReplayAndTampering(t *testing.T) {
	bubble(t, Options{}, func(t *testing.T, p *Pair) {
		p.Up(10 * time.Second)
		var mu sync.Mutex
		var seen [][]byte
		p.Net.Tap(func(from int, d []byte) []byte {
			mu.Lock()
			defer mu.Unlock()
			if from == 0 && d[0] == 0x10 {
				seen = append(seen, slices.Clone(d))
			}
			return d
		})
		out, atKochi := newSource(p.Tokyo, 1), p.Kochi.Receive()
		out.send(t, 100, time.Millisecond)
		time.Sleep(time.Second)
		mu.Lock()
		recorded := slices.Clone(seen)
		mu.Unlock()
		before := p.Kochi.Line.Stats()
		for _, d := range recorded {
			p.Net.Inject(1, slices.Clone(d))
		}
		rng := rand.New(rand.NewPCG(3, 4))
		for _, d := range recorded {
			bad := slices.Clone(d)
			bad[rng.IntN(len(bad))] ^= 1 << rng.IntN(8)
			p.Net.Inject(1, bad)
		}
		time.Sleep(time.Second)
		if n := out.check(t, atKochi.Packets()); n != 0 {
			t.Errorf("%d packets are missing", n)
		}
		after := p.Kochi.Line.Stats()
		if got := after.Drops["replayed"] - before.Drops["replayed"]; got < uint64(len(recorded)) {
			t.Errorf("%d replayed of %d", got, len(recorded))
		}
		var dropped uint64
		for name := range after.Drops {
			dropped += after.Drops[name] - before.Drops[name]
		}
		if dropped+after.Handshakes.BadForm+after.Handshakes.BadMAC < 2*uint64(len(recorded)) {
			t.Errorf("%d injected, %d dropped: %v", 2*len(recorded), dropped, after.Drops)
		}
		if after.Drops["forged"] == 0 {
			t.Errorf("no forgery was seen: %v", after.Drops)
		}
	})
}

// Junk from the peer's address, in any shape, changes nothing.
func TestStrangers(t *testing.T) {
	bubble(t, Options{EpochLife: 2 * time.Second}, func(t *testing.T, p *Pair) {
		p.Up(10 * time.Second)
		rng := rand.New(rand.NewPCG(8, 9))
		out, atKochi := newSource(p.Tokyo, 1), p.Kochi.Receive()
		for range 500 {
			for range 20 {
				junk := make([]byte, rng.IntN(1300))
				for i := range junk {
					junk[i] = byte(rng.Uint32())
				}
				if len(junk) > 4 {
					junk[0] = []byte{0, 1, 2, 0x10, 0x10, 0x11, 0xff}[rng.IntN(7)]
					if rng.IntN(2) == 0 {
						junk[1], junk[2], junk[3] = 0, 0, 1 // a header as it should be
					}
				}
				p.Net.Inject(1, junk)
			}
			out.send(t, 5, time.Millisecond)
		}
		time.Sleep(time.Second)
		if n := out.check(t, atKochi.Packets()); n != 0 {
			t.Errorf("%d packets are missing", n)
		}
		st := p.Kochi.Line.Stats()
		if st.Drops["malformed"] == 0 || st.Drops["unknown_epoch"] == 0 {
			t.Errorf("drops %v", st.Drops)
		}
	})
}

func TestRestartOfEitherEnd(t *testing.T) {
	opt := Options{Policy: rekey.QKDStrict, Keys: 100}
	for end := range 2 {
		bubble(t, opt, func(t *testing.T, p *Pair) {
			p.Up(10 * time.Second)
			site := []*Site{p.Tokyo, p.Kochi}[end]
			time.Sleep(time.Minute)
			site.Stop()
			time.Sleep(3 * time.Second)
			site.Start()
			p.Up(time.Minute)
			out, back := newSource(p.Tokyo, 1), newSource(p.Kochi, 2)
			atKochi, atTokyo := p.Kochi.Receive(), p.Tokyo.Receive()
			out.send(t, 100, time.Millisecond)
			back.send(t, 100, time.Millisecond)
			time.Sleep(time.Second)
			if a, b := out.check(t, atKochi.Packets()), back.check(t, atTokyo.Packets()); a+b != 0 {
				t.Errorf("after the restart of %s %d and %d packets are missing", site.name, a, b)
			}
		})
	}
}

// An idle line stays known as alive; a dead peer is shown and comes back.
func TestKeepaliveAndDeadPeer(t *testing.T) {
	bubble(t, Options{}, func(t *testing.T, p *Pair) {
		p.Up(10 * time.Second)
		for range 100 {
			time.Sleep(time.Second)
			a, b := p.Tokyo.Line.Stats(), p.Kochi.Line.Stats()
			if !a.PeerAlive || !b.PeerAlive || time.Since(a.LastHeard) > 12*time.Second {
				t.Fatalf("idle: %v, %v, last heard %v", a.PeerAlive, b.PeerAlive, a.LastHeard)
			}
		}
		if a := p.Tokyo.Line.Stats(); a.Sent.Packets != 0 || a.Sent.Datagrams > 30 {
			t.Errorf("an idle line has sent %+v in 100 s", a.Sent)
		}
		p.Net.SetWeather(lab.Weather{Loss: 1})
		time.Sleep(45 * time.Second)
		if p.Tokyo.Line.Stats().PeerAlive || p.Kochi.Line.Stats().PeerAlive {
			t.Error("a peer that is cut off is shown as alive")
		}
		p.Net.SetWeather(lab.Weather{})
		p.Up(time.Minute)
	})
}

// Nothing that the host sends is on the network, at any offset.
func TestNothingInClear(t *testing.T) {
	bubble(t, Options{Policy: rekey.QKDStrict, Keys: 10}, func(t *testing.T, p *Pair) {
		p.Up(10 * time.Second)
		var mu sync.Mutex
		var wan []byte
		p.Net.Tap(func(_ int, d []byte) []byte {
			mu.Lock()
			defer mu.Unlock()
			wan = append(wan, d...)
			return d
		})
		out, atKochi := newSource(p.Tokyo, 1), p.Kochi.Receive()
		out.send(t, 200, time.Millisecond)
		time.Sleep(time.Second)
		if n := out.check(t, atKochi.Packets()); n != 0 {
			t.Fatalf("%d packets are missing", n)
		}
		mu.Lock()
		defer mu.Unlock()
		for n, sent := range out.sent {
			body := sent[len(sent)/2:]
			if len(body) >= 16 && bytes.Contains(wan, body[:16]) {
				t.Errorf("packet %d is on the network in clear", n)
			}
		}
	})
}
