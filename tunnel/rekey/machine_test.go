package rekey

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/quietline/quietline/secret"
	"github.com/quietline/quietline/tunnel"
)

// upLine is a world whose line is up.
func upLine(t *testing.T, p Policy, tweak func(int, *Config)) *world {
	t.Helper()
	w := newWorld(7)
	w.log = t.Logf
	w.start(p, tweak)
	w.mustBeUp(t, time.Second)
	return w
}

func (w *world) mustBeUp(t *testing.T, within time.Duration) {
	t.Helper()
	if !w.until(within, w.up) {
		t.Fatalf("line is not up after %v: %+v, %+v, fault %v", within, w.ends[0].m.State(),
			w.ends[1].m.State(), w.fault)
	}
}

func (w *world) ok(t *testing.T) {
	t.Helper()
	if w.fault != nil {
		t.Fatal(w.fault)
	}
}

func TestLineComesUpAndRekeys(t *testing.T) {
	for _, p := range []Policy{PQCOnly, QKDStrict} {
		t.Run(p.String(), func(t *testing.T) {
			w := upLine(t, p, nil)
			if d := w.now.Sub(epochZero); d > 60*time.Millisecond {
				t.Errorf("up after %v: more than two and a half round trips of 20 ms", d)
			}
			w.traffic(50 * time.Millisecond)
			w.run(10 * time.Minute)
			w.ok(t)
			for _, e := range w.ends {
				if got := e.m.Stats().Epochs; got != 6 {
					t.Errorf("end %d made %d epochs in ten minutes, want 6", e.id, got)
				}
				if e.lost != 0 || e.opened < 11_000 {
					t.Errorf("end %d opened %d records and lost %d", e.id, e.opened, e.lost)
				}
			}
		})
	}
}

// TestSecondEpochs rekeys every second a thousand times under traffic that the
// network reorders: not one record is lost.
func TestSecondEpochs(t *testing.T) {
	w := newWorld(3)
	w.toy = true
	w.net.vary = 40 * time.Millisecond
	w.start(QKDStrict, func(_ int, c *Config) { c.EpochLife = time.Second })
	w.mustBeUp(t, time.Second)
	w.traffic(7 * time.Millisecond)
	w.run(1000 * time.Second)
	w.ok(t)
	for _, e := range w.ends {
		s := e.m.Stats()
		if e.lost != 0 || s.Epochs < 1000 || s.KeysUsed != s.Completed || s.KeysLost != 0 {
			t.Errorf("end %d lost %d records in %+v", e.id, e.lost, s)
		}
	}
}

func TestConfigIsChecked(t *testing.T) {
	w := newWorld(1)
	for name, tc := range map[string]struct {
		bend func(*Config)
		want error
	}{
		"zero link secret":  {func(c *Config) { clear(c.LinkSecret.Expose()) }, ErrConfig},
		"no link secret":    {func(c *Config) { c.LinkSecret.Clear() }, ErrConfig},
		"long link secret":  {func(c *Config) { c.LinkSecret = secret.New(33) }, ErrConfig},
		"short seed":        {func(c *Config) { c.StaticSeed = secret.New(31) }, ErrConfig},
		"no peer":           {func(c *Config) { c.PeerStatic = nil }, ErrConfig},
		"broken peer":       {func(c *Config) { c.PeerStatic = bytes.Repeat([]byte{255}, 1216) }, ErrConfig},
		"peer is oneself":   {func(c *Config) { c.PeerStatic = publics[0] }, ErrConfig},
		"no policy":         {func(c *Config) { c.Policy = 0 }, ErrPolicy},
		"policy otp-strict": {func(c *Config) { c.Policy = OTPStrict }, ErrNotBuilt},
		"suite 7":           {func(c *Config) { c.Suite = 7 }, ErrConfig},
		"short life":        {func(c *Config) { c.EpochLife = time.Second - 1 }, ErrConfig},
		"long life":         {func(c *Config) { c.EpochLife = time.Hour + 1 }, ErrConfig},
		"hold below life":   {func(c *Config) { c.HoldMax = 120 * time.Second }, ErrConfig},
		"too many bytes":    {func(c *Config) { c.EpochBytes = 1<<38 + 1 }, ErrConfig},
		"five keys":         {func(c *Config) { c.KeysPerEpoch = 5 }, ErrConfig},
		"key of 129 bits":   {func(c *Config) { c.KeyBits = 129 }, ErrConfig},
		"fast probe":        {func(c *Config) { c.ProbeEvery = time.Millisecond }, ErrConfig},
		"long key budget":   {func(c *Config) { c.KeyBudget = time.Minute }, ErrConfig},
		"negative RTT":      {func(c *Config) { c.RTT = -1 }, ErrConfig},
		"no randomness":     {func(c *Config) { c.Rand = bytes.NewReader(nil) }, nil},
	} {
		c := w.config(0, QKDStrict)
		tc.bend(&c)
		m, err := New(c)
		if err == nil || m != nil || tc.want != nil && !errors.Is(err, tc.want) {
			t.Errorf("%s: %v, want %v", name, err, tc.want)
		}
		if c.LinkSecret.Len() != 0 || c.StaticSeed.Len() != 0 {
			t.Errorf("%s: New leaves the secrets", name)
		}
	}
}

// TestStrangersMeetSilence sends a million (in short runs ten thousand)
// datagrams of nobody's: no answer, no KEM work, no key drawn.
func TestStrangersMeetSilence(t *testing.T) {
	w := upLine(t, QKDStrict, nil)
	e := w.named("R")
	before := e.m.Stats()
	r := rand.New(rand.NewPCG(5, 5))
	const n = 10_000
	for i := range n {
		d := make([]byte, r.IntN(maxDatagram+40))
		_, _ = rngReader{r}.Read(d)
		if len(d) > 3 && i%2 == 0 { // a form that passes all but mac1
			copy(d, []byte{byte(1 + i%4), wireVersion, byte(XWing), 0})
		}
		out := e.m.Step(w.now, Input{Datagram: d})
		if len(out.Datagrams) > 0 || out.Request != nil || out.Install != nil || len(out.Events) > 0 {
			t.Fatalf("datagram %x is answered: %+v", d, out)
		}
	}
	got := e.m.Stats()
	if dropped := got.BadForm + got.BadMAC - before.BadForm - before.BadMAC; dropped != n {
		t.Errorf("%d of %d datagrams are counted as dropped", dropped, n)
	}
	got.BadForm, got.BadMAC = before.BadForm, before.BadMAC
	if d := cmp.Diff(before, got); d != "" {
		t.Errorf("junk caused work: %s", d)
	}
}

// TestWrongSecretsMeetSilence: an end with another link secret, another link,
// or another key than the pinned one gets no answer at all.
func TestWrongSecretsMeetSilence(t *testing.T) {
	for name, bend := range map[string]func(*Config){
		"link secret": func(c *Config) { c.LinkSecret.Expose()[31] ^= 1 },
		"static key":  func(c *Config) { c.StaticSeed = seeds(5) },
		"link":        func(c *Config) { c.LinkID[0]++ },
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(1)
			w.start(QKDStrict, func(i int, c *Config) {
				if i == 0 {
					bend(c)
				}
			})
			w.run(2 * time.Minute)
			w.ok(t)
			for _, e := range w.ends {
				s := e.m.Stats()
				if s.Answered != 0 || s.KeysDrawn != 0 || s.Completed != 0 || s.Started == 0 {
					t.Errorf("end %d: %+v", e.id, s)
				}
			}
			if name == "link secret" && w.ends[0].m.Stats().BadMAC == 0 {
				t.Error("the drop is not counted as a bad mac1")
			}
		})
	}
}

// capture notes all datagrams an end sends.
func capture(e *end) *[][]byte {
	var ds [][]byte
	e.trace = func(d []byte) {
		if d != nil {
			ds = append(ds, bytes.Clone(d))
		}
	}
	return &ds
}

// TestReplay: every datagram of an old handshake, sent again to both ends at
// any later time, draws no key, installs nothing and changes no level.
func TestReplay(t *testing.T) {
	w := newWorld(9)
	var old [][]byte
	w.bent = func(e *end) { e.trace = func(d []byte) { old = append(old, bytes.Clone(d)) } }
	w.start(QKDStrict, nil)
	w.mustBeUp(t, time.Second)
	w.run(30 * time.Second) // stored replies are gone
	for _, e := range w.ends {
		before, state := e.m.Stats(), e.m.State()
		for range 3 {
			for _, d := range old {
				if d == nil {
					continue
				}
				out := e.m.Step(w.now, Input{Datagram: d})
				if out.Request != nil || out.Install != nil || out.Send != 0 || len(out.Retire) != 0 {
					t.Fatalf("replay causes %+v", out)
				}
			}
		}
		after := e.m.Stats()
		if after.Completed != before.Completed || after.KeysDrawn != before.KeysDrawn {
			t.Errorf("replay counts as a handshake: %+v", after)
		}
		if work := after.KEMs - before.KEMs; work > 3 {
			t.Errorf("three replays of M1 cost %d KEM operations, one M2 has 3", work)
		}
		if d := cmp.Diff(state, e.m.State()); d != "" {
			t.Errorf("replay changes the state: %s", d)
		}
	}
	w.run(5 * time.Minute)
	w.ok(t)
	if w.scheduled().m.Stats().Failed != 0 {
		t.Error("the line suffered from replays")
	}
}

// TestReflection: an end's own datagrams do not open at it.
func TestReflection(t *testing.T) {
	w := newWorld(9)
	var own [2][][]byte
	w.bent = func(e *end) {
		id := e.id
		e.trace = func(d []byte) {
			if d != nil {
				own[id] = append(own[id], bytes.Clone(d))
			}
		}
	}
	w.start(QKDStrict, nil)
	w.mustBeUp(t, time.Second)
	for i, e := range w.ends {
		before := e.m.Stats()
		for _, d := range own[i] {
			if out := e.m.Step(w.now, Input{Datagram: d}); len(out.Datagrams) != 0 {
				t.Errorf("end %d answers itself", i)
			}
		}
		if got := e.m.Stats().BadMAC - before.BadMAC; got != uint64(len(own[i])) {
			t.Errorf("end %d drops %d of %d own datagrams", i, got, len(own[i]))
		}
	}
}

// TestEveryBitCounts flips a bit of each byte of each message, signed again so
// that mac1 is right: the handshake does not go on, and goes on with the good
// message afterwards.
func TestEveryBitCounts(t *testing.T) {
	for kind := byte(kindM1); kind <= kindM4; kind++ {
		w := newWorld(4)
		tried := 0
		w.bent = func(e *end) {
			var parts [][]byte
			e.tamper = func(to *end, d []byte) {
				if d[0] != kind {
					return
				}
				parts = append(parts, d)
				if len(parts) > int(d[3]&15) {
					tried += tamper(t, to, parts)
					parts = nil
				}
			}
		}
		w.start(QKDStrict, nil)
		w.mustBeUp(t, 30*time.Second)
		w.ok(t)
		if tried < 40 {
			t.Errorf("M%d: only %d tries", kind, tried)
		}
	}
}

// tamper gives the parts of a message to an end, with one byte changed each
// time, and returns how often.
func tamper(t *testing.T, to *end, parts [][]byte) (tried int) {
	pieces := to.m.env.pieces
	step := 1
	if len(parts) > 1 {
		step = 37 // ciphertexts are long and each try costs a decapsulation
	}
	for p := range parts {
		for i := 0; i < len(parts[p])-2*macSize; i += step {
			if len(parts) == 1 && i == 4 {
				i = 12 // the message id only joins fragments; it is not authenticated
			}
			to.m.env.pieces = [buffers]assembly{}
			for q, d := range parts {
				d = bytes.Clone(d)
				if p == q {
					d[i] ^= 1 << (i % 8)
				}
				body := d[:len(d)-2*macSize]
				copy(d[len(body):], mac1(to.m.env.in, body))
				before := to.m.stats
				out := to.m.Step(to.w.now, Input{Datagram: d})
				if out.Install != nil || out.Request != nil ||
					len(out.Datagrams) > 0 && to.m.stats.Resent == before.Resent {
					t.Fatalf("M%d, part %d with byte %d changed: %+v", d[0], p, i, out)
				}
			}
			tried++
		}
	}
	to.m.env.pieces = pieces
	return tried
}

func TestKeyIDsAreUsedOnce(t *testing.T) {
	t.Run("own key manager gives one twice", func(t *testing.T) {
		w := upLine(t, QKDStrict, nil)
		w.kme.next-- // the same key_ID again
		e := w.scheduled()
		e.step(Input{Rekey: true})
		w.run(5 * time.Second)
		w.ok(t)
		if !e.alarmed("gave a key twice") || e.m.Stats().Epochs != 1 {
			t.Errorf("events %v, %+v", e.events, e.m.Stats())
		}
	})
	t.Run("peer names one twice", func(t *testing.T) {
		w := upLine(t, QKDStrict, nil)
		w.kme.next--
		i, r := w.scheduled(), w.other(w.scheduled())
		clear(i.m.used) // a peer that forgot
		i.step(Input{Rekey: true})
		w.run(5 * time.Second)
		if !r.alarmed("used before") {
			t.Errorf("no alarm at the responder: %v", r.events)
		}
		if s := i.m.Stats(); s.KeysLost != 1 || s.KeysDrawn != 3 || s.Completed != 2 {
			t.Errorf("the key is not replaced: %+v", s)
		}
	})
}

// TestKeyIDsAreForgotten: the memory of used key_IDs lasts an hour and is then
// as large as an hour's handshakes.
func TestKeyIDsAreForgotten(t *testing.T) {
	w := newWorld(1)
	w.toy = true
	w.start(QKDStrict, func(_ int, c *Config) { c.EpochLife = 10 * time.Second })
	w.run(keyMemory + 20*time.Minute)
	w.ok(t)
	for _, e := range w.ends {
		n := len(e.m.used)
		if n != len(e.m.usedList) || n < 340 || n > 400 {
			t.Errorf("end %d remembers %d and %d key_IDs", e.id, n, len(e.m.usedList))
		}
	}
}

func (e *end) alarmed(part string) bool {
	for _, ev := range e.events {
		if ev.Kind == "alarm" && strings.Contains(ev.Reason, part) {
			return true
		}
	}
	return false
}

func TestVolume(t *testing.T) {
	w := upLine(t, PQCOnly, nil)
	for _, e := range w.ends {
		n := e.m.Stats().Epochs
		e.step(Input{Sent: softBytes - 1})
		w.run(2 * time.Second)
		if e.m.Stats().Epochs != n {
			t.Fatalf("end %d rekeys too early", e.id)
		}
		e.step(Input{Sent: softBytes})
		w.run(20 * time.Second)
		if e.m.Stats().Epochs != n+1 {
			t.Fatalf("end %d does not rekey by volume", e.id)
		}
	}
	w.net.cut = [2]bool{true, true}
	e := w.ends[0]
	e.step(Input{Sent: hardBytes - 1})
	if e.blocked {
		t.Fatal("blocked below 2^38 bytes")
	}
	e.step(Input{Sent: hardBytes})
	if !e.blocked || e.m.State().Level != Blocked || !strings.Contains(e.m.State().Why, "2^38") {
		t.Fatalf("2^38 bytes do not block: %+v", e.m.State())
	}
	w.net.cut = [2]bool{}
	w.mustBeUp(t, 15*time.Second)
	w.ok(t)
}

// TestKeyManagerErrors: each kind of failure at each end holds the epoch and
// never blocks before HoldMax; it is up again when the key manager is.
func TestKeyManagerErrors(t *testing.T) {
	for _, who := range []string{"I", "R", "both"} {
		for _, err := range []error{tunnel.ErrKeyEmpty, tunnel.ErrKeyDown, tunnel.ErrKeyDenied,
			tunnel.ErrKeyUnknown, errors.New("strange")} {
			t.Run(fmt.Sprintf("%s %v", who, err), func(t *testing.T) {
				w := upLine(t, QKDStrict, func(_ int, c *Config) {
					c.EpochLife, c.HoldMax = 20*time.Second, 60*time.Second
				})
				for _, e := range w.ends {
					if who == "both" || e == w.named(who) {
						w.kme.state[e.id].err = err
					}
				}
				w.run(58 * time.Second)
				w.ok(t)
				for _, e := range w.ends {
					if e.blocked {
						t.Fatalf("blocked before the hold time: %+v", e.m.State())
					}
				}
				if who == "both" {
					w.run(10 * time.Second)
					for _, e := range w.ends {
						if s := e.m.State(); !e.blocked || s.Level != Blocked || !strings.Contains(s.Why, ":") {
							t.Fatalf("not blocked, or without reason: %+v", s)
						}
					}
				}
				w.kme.state = [2]kmeState{}
				w.mustBeUp(t, 30*time.Second)
				w.run(3 * time.Minute)
				w.ok(t)
				if !w.up() {
					t.Fatal("line is not healthy afterwards")
				}
			})
		}
	}
}

// TestRestart: either end loses its memory and the line is up again within
// the boot grace and three round trips.
func TestRestart(t *testing.T) {
	for _, who := range []string{"I", "R"} {
		for _, after := range []time.Duration{5 * time.Second, 117 * time.Second, 121 * time.Second} {
			w := upLine(t, QKDStrict, nil)
			w.traffic(100 * time.Millisecond)
			w.run(after)
			e := w.named(who)
			e.boot()
			w.mustBeUp(t, bootGrace+60*time.Millisecond)
			w.run(5 * time.Minute)
			w.ok(t)
			if o := w.other(e); !o.alarmed("chain secret was lost") {
				t.Errorf("%s restarted after %v: no alarm: %v", who, after, o.events)
			}
		}
	}
}

// TestChainGoesOn: each epoch's chain secret is the one before it, mixed; both
// ends hold the same and only one of it.
func TestChainGoesOn(t *testing.T) {
	w := upLine(t, PQCOnly, nil)
	seen := map[[16]byte]bool{}
	for range 5 {
		a, b := w.ends[0].m.chains, w.ends[1].m.chains
		if a[0].id != b[0].id || !bytes.Equal(a[0].rk.Expose(), b[0].rk.Expose()) {
			t.Fatal("ends hold different chain secrets")
		}
		if a[0].rk.Len() != chainSize || a[1].rk.Len() != 0 || b[1].rk.Len() != 0 || seen[a[0].id] {
			t.Fatalf("chain %x: %d and %d bytes", a[0].id, a[0].rk.Len(), a[1].rk.Len())
		}
		seen[a[0].id] = true
		w.run(12 * time.Second)
		w.ends[0].step(Input{Rekey: true})
		w.run(time.Second)
	}
	for _, e := range w.ends {
		if e.alarmed("chain") {
			t.Errorf("end %d alarms: %v", e.id, e.events)
		}
	}
}

// TestNothingIsAnsweredTwice: the machine ignores an answer that nobody waits
// for and wipes its keys.
func TestLateAnswersAreWiped(t *testing.T) {
	w := upLine(t, QKDStrict, nil)
	for _, id := range []uint64{0, 1, 99} {
		key := tunnel.Key{Bits: secret.Copy([]byte("0123456789abcdef0123456789abcdef"))}
		raw := key.Bits.Expose()
		out := w.ends[0].m.Step(w.now, Input{Keys: &KeyAnswer{ID: id, Keys: []tunnel.Key{key}}})
		if !allZero(raw) || key.Bits.Len() != 0 || out.Install != nil {
			t.Errorf("answer %d is kept", id)
		}
	}
}

// TestSecretsAreHidden prints everything exported in every way and looks for
// the bytes.
func TestSecretsAreHidden(t *testing.T) {
	w := newWorld(1)
	var installed []*Epoch
	w.bent = func(e *end) {
		e.bend = func(o *Output) {
			if o.Install != nil {
				installed = append(installed, o.Install)
			}
		}
	}
	w.start(QKDStrict, nil)
	w.mustBeUp(t, time.Second)
	cfg := w.config(0, QKDStrict)
	secrets := [][]byte{cfg.LinkSecret.Expose(), cfg.StaticSeed.Expose()}
	for _, e := range installed {
		secrets = append(secrets, e.RecvKey.Expose(), e.SendKey.Expose(), e.RecvIV.Expose())
	}
	secrets = append(secrets, w.ends[0].m.chains[0].rk.Expose())
	things := []any{cfg, &cfg, w.ends[0].m, *w.ends[0].m, installed[0], *installed[0],
		Output{Install: installed[0]}, w.ends[0].m.State(), w.ends[0].m.Stats(),
		KeyAnswer{Keys: []tunnel.Key{{Bits: cfg.LinkSecret}}}}
	for _, x := range things {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%x", "%d"} {
			text := fmt.Sprintf(verb, x)
			for _, s := range secrets {
				for _, form := range []string{string(s), fmt.Sprintf("%x", s), fmt.Sprint(s),
					strings.Trim(fmt.Sprintf("%#v", s), "[]byte{}")} {
					if strings.Contains(text, form) {
						t.Fatalf("%s of %T shows a secret", verb, x)
					}
				}
			}
		}
	}
	m := w.ends[0].m
	raw := [][]byte{m.cfg.LinkSecret.Expose(), m.cfg.StaticSeed.Expose(), m.chains[0].rk.Expose(),
		m.env.in.Expose()}
	m.Clear()
	for i, b := range raw {
		if len(b) == 0 || !allZero(b) {
			t.Errorf("Clear leaves secret %d", i)
		}
	}
	if out := m.Step(w.now.Add(time.Hour), Input{Rekey: true}); len(out.Datagrams) > 0 {
		t.Error("a cleared machine speaks")
	}
}

// TestSecretsAreCleared: when a handshake is over nothing of it is left.
func TestSecretsAreCleared(t *testing.T) {
	w := newWorld(1)
	w.start(QKDStrict, nil)
	e := w.scheduled()
	eph, ck := e.m.init.eph.Expose(), e.m.init.t.ck.Expose()
	var bits [][]byte
	w.mustBeUp(t, time.Second)
	if !allZero(eph) || !allZero(ck) {
		t.Error("ephemeral seed or chaining key of M1 is left")
	}
	for _, e := range w.ends {
		a := w.kme.answer(w, e.id, KeyRequest{New: 1, SizeBits: 256})
		bits = append(bits, a.Keys[0].Bits.Expose())
		e.m.answered(&a)
		if e.m.init != nil || len(e.m.pending) != 0 {
			t.Errorf("end %d holds a handshake that is over", e.id)
		}
	}
	for _, b := range bits {
		if !allZero(b) {
			t.Error("QKD key is left")
		}
	}
}

func TestPendingIsBounded(t *testing.T) {
	w := upLine(t, PQCOnly, nil)
	w.run(20 * time.Second)
	i, r := w.scheduled(), w.other(w.scheduled())
	m1s := capture(i)
	for range 40 { // an initiator that starts again and again
		i.m.Clear()
		i.boot()
	}
	from := addrOf(9)
	for _, d := range *m1s {
		d = bytes.Clone(d)
		out := r.m.Step(w.now, Input{Datagram: d, From: from})
		if len(out.Datagrams) == 1 && out.Datagrams[0][0] == kindCookie {
			c := bake(r.m.env.jar.secrets[0], from) // a sender that has the cookie
			copy(d[len(d)-macSize:], mac1(c, d[:len(d)-macSize]))
			r.m.Step(w.now, Input{Datagram: d, From: from})
		}
		if n := len(r.m.pending); n > maxPending {
			t.Fatalf("%d pending handshakes", n)
		}
	}
	if n := len(r.m.pending); n <= loadPending {
		t.Errorf("%d pending handshakes after 40 M1s", n)
	}
	w.run(pendingLife + time.Second)
	if len(r.m.pending) != 0 {
		t.Error("pending handshakes do not end")
	}
	w.ok(t)
}

func TestRandomnessFails(t *testing.T) {
	w := newWorld(1)
	left := 2*16 + 4 // two boot_ids and one index
	w.start(PQCOnly, func(_ int, c *Config) {
		c.Rand = &limited{&left, rngReader{w.rng}}
	})
	w.run(time.Minute)
	for _, e := range w.ends {
		if e.send != nil || len(e.events) == 0 {
			t.Errorf("end %d: %v", e.id, e.events)
		}
	}
	left = 1 << 30
	w.mustBeUp(t, time.Minute)
}

type limited struct {
	left *int
	r    rngReader
}

func (l *limited) Read(b []byte) (int, error) {
	if *l.left < len(b) {
		return 0, errors.New("no randomness")
	}
	*l.left -= len(b)
	return l.r.Read(b)
}
