package rekey

import (
	"bytes"
	"testing"
	"time"
)

// recordings returns the M1s of n starts of the scheduled initiator.
func recordings(w *world, n int) (m1s [][][]byte) {
	i := w.scheduled()
	ds := capture(i)
	for range n {
		*ds = nil
		i.boot()
		m1s = append(m1s, *ds)
	}
	i.trace = nil
	return m1s
}

// TestReplayFloodCostsNoKEM: somebody replays recorded M1s from false
// addresses. After five the responder does no KEM work for them, its answers
// are shorter than what they answer, and the true peer gets through.
func TestReplayFloodCostsNoKEM(t *testing.T) {
	w := upLine(t, QKDStrict, func(_ int, c *Config) { c.EpochLife = 20 * time.Second })
	m1s := recordings(w, 60)
	w.run(30 * time.Second)
	w.mustBeUp(t, time.Second)
	r := w.named("R")
	before := r.m.Stats()
	in, out := 0, 0
	flood := func() {
		for n, m1 := range m1s {
			for _, d := range m1 {
				in += len(d)
				o := r.m.Step(w.now, Input{Datagram: d, From: addrOf(10 + n)})
				for _, a := range o.Datagrams {
					out += len(a)
				}
			}
		}
	}
	for range 20 {
		flood()
		w.run(time.Second)
	}
	w.ok(t)
	after := r.m.Stats()
	if work := after.KEMs - before.KEMs; work > 3*3*(loadPending+1)+6 {
		t.Errorf("1200 replays cost %d KEM operations", work)
	}
	if after.Cookies == before.Cookies || out > in/2 {
		t.Errorf("%d bytes answer %d bytes, %d cookies asked for", out, in, after.Cookies)
	}
	if after.Completed == before.Completed || !w.up() {
		t.Errorf("the peer does not get through: %+v", after)
	}
	if after.KeysMissed != before.KeysMissed {
		t.Error("replays reach the key manager")
	}
}

// TestCookie: under load the peer comes up with one round trip more.
func TestCookie(t *testing.T) {
	w := newWorld(1)
	w.start(QKDStrict, nil)
	load := true
	for _, e := range w.ends {
		e.loaded = func() bool { return load }
	}
	w.mustBeUp(t, time.Second)
	if d := w.now.Sub(epochZero); d != 70*time.Millisecond {
		t.Errorf("up after %v, want one round trip of 20 ms more than 50 ms", d)
	}
	i, r := w.named("I"), w.named("R")
	if s := r.m.Stats(); s.Cookies != 3 || s.Answered != 1 {
		t.Errorf("%+v", s)
	}
	// With the cookie in hand the next handshake needs no other.
	w.run(15 * time.Second)
	i.step(Input{Rekey: true})
	w.run(15 * time.Second)
	if s := r.m.Stats(); s.Cookies != 3 || s.Answered != 2 {
		t.Errorf("second handshake: %+v", s)
	}
	// Both ends turn and forget cookies; then a new one is asked for.
	w.run(10 * time.Minute)
	w.ok(t)
	if s := r.m.Stats(); s.Cookies <= 3 || s.Completed < 6 || i.m.Stats().Failed != 0 {
		t.Errorf("after ten minutes: %+v", s)
	}
}

func cookiePair(t *testing.T) (i, r *envelope) {
	w := newWorld(1)
	w.start(PQCOnly, nil)
	return &w.named("I").m.env, &w.named("R").m.env
}

func TestCookieIsBound(t *testing.T) {
	i, r := cookiePair(t)
	now := epochZero
	ds, err := i.wrap(now, message{kind: kindM1, payload: []byte("an M1")})
	if err != nil {
		t.Fatal(err)
	}
	d, from := ds[0], addrOf(3)
	if m, f := r.unwrap(now, d, from, true); m != nil || f != faultLoad {
		t.Fatalf("without a cookie: %v, fault %d", m, f)
	}
	if m, f := r.unwrap(now, d, from, false); m == nil || f != faultNone {
		t.Fatalf("without load: fault %d", f)
	}
	reply, err := r.cookieReply(now, d, from)
	if err != nil {
		t.Fatal(err)
	}
	if len(reply) != 1 || len(reply[0]) >= len(d)+100 {
		t.Fatalf("reply of %d bytes", len(reply[0]))
	}
	m, f := i.unwrap(now, reply[0], addrOf(0), true)
	if f != faultNone {
		t.Fatalf("reply: fault %d", f)
	}
	if i.taste(now, m, nil) {
		t.Error("a reply to a datagram that was not sent is taken")
	}
	for n := range m.payload {
		bad := *m
		bad.payload = bytes.Clone(m.payload)
		bad.payload[n] ^= 1
		if i.taste(now, &bad, ds) {
			t.Errorf("a reply with byte %d changed is taken", n)
		}
	}
	if !i.taste(now, m, ds) || i.taste(now, m, ds) {
		t.Error("a reply is taken once")
	}
	i.stamp(now, ds)
	for name, tc := range map[string]struct {
		from  int
		after time.Duration
		want  bool
	}{
		"good": {3, 0, true}, "another address": {4, 0, false},
		"in two minutes": {3, cookieLife + 1, true}, "in four": {3, 2*cookieLife + 1, false},
	} {
		if got := r.jar.knows(now.Add(tc.after), d, addrOf(tc.from)); got != tc.want {
			t.Errorf("%s: %v", name, got)
		}
	}
	d[20] ^= 1
	if r.jar.knows(now, d, from) {
		t.Error("the cookie is good for another datagram")
	}
	d[20] ^= 1
	// The secret turns twice: the cookie is forgotten.
	for range 2 {
		now = now.Add(cookieLife)
		if err := r.jar.turn(now, r.rand); err != nil {
			t.Fatal(err)
		}
	}
	if r.jar.knows(now, d, from) {
		t.Error("a cookie outlives its secret")
	}
	i.stamp(now, ds)
	if !allZero(d[len(d)-macSize:]) {
		t.Error("an old cookie is still used")
	}
}

func FuzzCookie(f *testing.F) {
	f.Add(make([]byte, replySize))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, payload []byte) {
		a, _ := envelopes(t)
		a.eat = a.in
		ds, err := a.wrap(epochZero, message{kind: kindM1})
		if err != nil {
			t.Fatal(err)
		}
		if a.taste(epochZero, &message{kind: kindCookie, payload: payload}, ds) {
			t.Fatal("a cookie from nothing")
		}
	})
}
