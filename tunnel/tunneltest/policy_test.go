package tunneltest

import (
	"bytes"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/quietline/quietline/tunnel"
	"github.com/quietline/quietline/tunnel/rekey"
)

// syncBuffer takes the log of both lines.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// levels waits until both ends show a level.
func (p *Pair) levels(t *testing.T, want rekey.Level, within time.Duration) {
	t.Helper()
	if !p.Wait(within, func() bool {
		return p.Tokyo.Line.Stats().Level == want && p.Kochi.Line.Stats().Level == want
	}) {
		t.Fatalf("not at %v within %v:\n%+v\n%+v", want, within, p.Tokyo.Line.Stats().State,
			p.Kochi.Line.Stats().State)
	}
}

// TestKeyManagerAway: the key manager of an end goes away and comes back under
// each policy that has another way. Traffic goes on without a lost packet; both
// ends say the level, since when and why, alarm, log it, and tell each other.
func TestKeyManagerAway(t *testing.T) {
	for _, tt := range []struct {
		policy rekey.Policy
		end    int
		err    error
	}{
		{rekey.QKDPreferred, 0, tunnel.ErrKeyDown}, {rekey.QKDPreferred, 1, tunnel.ErrKeyDenied},
		{rekey.QKDRequired, 0, tunnel.ErrKeyEmpty}, {rekey.QKDRequired, 1, tunnel.ErrKeyDown},
	} {
		var log syncBuffer
		opt := Options{Policy: tt.policy, Keys: 10_000, EpochLife: 2 * time.Second,
			HoldMax: 20 * time.Second, Log: &log, Keepalive: time.Second}
		bubble(t, opt, func(t *testing.T, p *Pair) {
			p.levels(t, rekey.QKD, 10*time.Second)
			out, atKochi := newSource(p.Tokyo, 1), p.Kochi.Receive()
			p.Keys.Fail(tt.end, tt.err)
			p.levels(t, rekey.Chained, 20*time.Second)
			out.send(t, 100, 50*time.Millisecond)
			for _, s := range []*Site{p.Tokyo, p.Kochi} {
				st := s.Line.Stats()
				if time.Since(st.Since) > 20*time.Second || !strings.Contains(st.Why, "key manager") ||
					st.Alarms == 0 || len(st.State.Alarms) == 0 || st.Chained == 0 {
					t.Errorf("%v, %s: %+v", tt, s.name, st.State)
				}
				if st.Peer.Level != rekey.Chained || !strings.Contains(st.Peer.Reason, "key manager") {
					t.Errorf("%v, %s: the peer says %+v", tt, s.name, st.Peer)
				}
			}
			p.Keys.Fail(tt.end, nil)
			p.levels(t, rekey.QKD, time.Minute)
			out.send(t, 50, 50*time.Millisecond)
			time.Sleep(2 * time.Second)
			if n := out.check(t, atKochi.Packets()); n != 0 {
				t.Errorf("%v: %d packets are missing", tt, n)
			}
			for _, s := range []*Site{p.Tokyo, p.Kochi} {
				if st := s.Line.Stats(); len(st.State.Alarms) != 0 || st.Peer.Level != rekey.QKD {
					t.Errorf("%v, %s is well again: %+v, %+v", tt, s.name, st.State, st.Peer)
				}
			}
		})
		for _, want := range []string{"msg=level site=tokyo level=CHAINED", "level=WARN msg=alarm"} {
			if !strings.Contains(log.String(), want) {
				t.Errorf("%v: no %q in the log", tt, want)
			}
		}
	}
}

// TestChainGone: with no QKD and the chain lost by a restart, qkd-preferred goes
// on at PQC and says so, qkd-required blocks; both come back with the keys.
func TestChainGone(t *testing.T) {
	for policy, want := range map[rekey.Policy]rekey.Level{
		rekey.QKDPreferred: rekey.PQC, rekey.QKDRequired: rekey.Blocked,
	} {
		opt := Options{Policy: policy, Keys: 10_000, EpochLife: 2 * time.Second,
			HoldMax: 20 * time.Second}
		bubble(t, opt, func(t *testing.T, p *Pair) {
			p.levels(t, rekey.QKD, 10*time.Second)
			p.Keys.Fail(0, tunnel.ErrKeyDown)
			p.Keys.Fail(1, tunnel.ErrKeyDown)
			p.Kochi.Stop()
			p.Kochi.Start()
			time.Sleep(40 * time.Second)
			p.levels(t, want, time.Minute)
			p.Keys.Fail(0, nil)
			p.Keys.Fail(1, nil)
			p.levels(t, rekey.QKD, 2*time.Minute)
		})
	}
}

// TestUnlikePolicies: an end that asks for more than the other gives gets no
// line, and both know why.
func TestUnlikePolicies(t *testing.T) {
	opt := Options{Policy: rekey.QKDStrict, PeerPolicy: rekey.QKDPreferred, Keys: 100}
	bubble(t, opt, func(t *testing.T, p *Pair) {
		time.Sleep(time.Minute)
		for _, s := range []*Site{p.Tokyo, p.Kochi} {
			st := s.Line.Stats()
			if st.Level != rekey.Blocked || st.PeerPolicy == "" || len(st.State.Alarms) == 0 ||
				!strings.Contains(st.State.Alarms[0], "policies do not fit") {
				t.Errorf("%s: %+v", s.name, st.State)
			}
		}
		if p.Keys.Left() != 100 {
			t.Errorf("%d keys were burnt", 100-p.Keys.Left())
		}
	})
}

// TestRestoredMachine: keys that a copy of this memory may hold are dropped at
// once, and the line is up again.
func TestRestoredMachine(t *testing.T) {
	bubble(t, Options{Policy: rekey.QKDStrict, Keys: 100}, func(t *testing.T, p *Pair) {
		p.Up(10 * time.Second)
		before := p.Tokyo.Line.Stats()
		p.Tokyo.Line.Restored()
		if !p.Wait(10*time.Second, func() bool {
			return p.Tokyo.Line.Stats().Epoch > before.Epoch
		}) {
			t.Fatalf("no new epoch: %+v", p.Tokyo.Line.Stats().State)
		}
		p.Up(10 * time.Second)
		if st := p.Tokyo.Line.Stats(); st.Alarms == before.Alarms {
			t.Errorf("no alarm: %+v", st)
		}
	})
}
