package rekey

import (
	"bytes"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

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
