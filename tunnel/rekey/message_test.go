package rekey

import (
	"bytes"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/quietline/quietline/secret"
	"github.com/quietline/quietline/tunnel"
)

var everything = cmp.AllowUnexported(intro{}, hello{}, welcome{}, choice{}, verdict{}, opening{})

func sampleIntro() intro {
	return intro{policy: QKDStrict, floor: QKD, offer: QKD, boot: [16]byte{1, 2}, counter: 3,
		epoch: 4, sending: 5}
}

type parsed interface {
	encode() []byte
	decode([]byte) error
}

func TestMessagesRoundTrip(t *testing.T) {
	good := sampleIntro()
	good.source = sourceDown
	for _, tc := range []struct {
		name     string
		in, back parsed
	}{
		{"c1", &hello{intro: sampleIntro(), chains: [2][16]byte{{9}, {8}}}, &hello{}},
		{"c2", &welcome{intro: good, chain: [16]byte{7}, busy: 250 * time.Millisecond, attempts: 3},
			&welcome{}},
		{"c3 no key", &choice{mode: PQC, attempt: 1, epoch: 9}, &choice{}},
		{"c3 refusal", &choice{mode: Blocked, attempt: 1, epoch: 9}, &choice{}},
		{"c3 two keys", &choice{mode: QKD, attempt: 3, epoch: 1 << 60, rtt: time.Second,
			ids: []tunnel.KeyID{{1}, {2}}}, &choice{}},
		{"c3 keys ahead", &choice{mode: QKD, attempt: 1, ids: []tunnel.KeyID{{1}},
			ahead: []tunnel.KeyID{{2}, {3}}}, &choice{}},
		{"c4", &verdict{status: refusedBusy, epoch: 3, wait: time.Minute}, &verdict{}},
	} {
		b := tc.in.encode()
		if err := tc.back.decode(b); err != nil {
			t.Errorf("%s: %v", tc.name, err)
			continue
		}
		if d := cmp.Diff(tc.in, tc.back, everything, cmpopts.EquateEmpty()); d != "" {
			t.Errorf("%s: %s", tc.name, d)
		}
		for _, n := range []int{0, 1, len(b) - 1} {
			if tc.back.decode(b[:n]) == nil {
				t.Errorf("%s: %d bytes are taken", tc.name, n)
			}
		}
		if tc.back.decode(append(bytes.Clone(b), 0)) == nil {
			t.Errorf("%s: a byte too many is taken", tc.name)
		}
	}
}

func TestMessagesRefuse(t *testing.T) {
	c1 := (&hello{intro: sampleIntro()}).encode()
	c2 := (&welcome{intro: sampleIntro()}).encode()
	c3 := (&choice{mode: QKD, attempt: 1, ids: []tunnel.KeyID{{1}, {2}}}).encode()
	c4 := (&verdict{}).encode()
	for _, tc := range []struct {
		name  string
		in    parsed
		b     []byte
		at    int
		value byte
	}{
		{"policy 0", &hello{}, c1, 0, 0},
		{"policy 7", &hello{}, c1, 0, 7},
		{"floor below the policy's", &hello{}, c1, 1, byte(PQC)},
		{"offer below the policy's", &hello{}, c1, 2, byte(PQC)},
		{"source state in c1", &hello{}, c1, 3, 1},
		{"source state 5", &welcome{}, c2, 3, 5},
		{"mode above QKD", &choice{}, c3, 0, 4},
		{"keys but mode PQC", &choice{}, c3, 0, byte(PQC)},
		{"no sources", &choice{}, c3, 1, 0},
		{"unknown source", &choice{}, c3, 1, 3},
		{"attempt 0", &choice{}, c3, 2, 0},
		{"five keys", &choice{}, c3, 3, 5},
		{"no keys but mode QKD", &choice{}, c3, 3, 0},
		{"one key and rubbish", &choice{}, c3, 3, 1},
		{"two keys and three ahead", &choice{}, c3, 3, 0x32},
		{"the same key twice", &choice{}, c3, 32, 1},
		{"status 6", &verdict{}, c4, 0, 6},
		{"reserved byte", &verdict{}, c4, 2, 1},
	} {
		b := bytes.Clone(tc.b)
		if err := tc.in.decode(b); err != nil {
			t.Fatalf("%s: the good form: %v", tc.name, err)
		}
		b[tc.at] = tc.value
		if tc.in.decode(b) == nil {
			t.Errorf("%s is taken", tc.name)
		}
	}
}

func envelopes(t testing.TB) (a, b *envelope) {
	key := secret.Copy(bytes.Repeat([]byte{9}, 32))
	rng := rngReader{rand.New(rand.NewPCG(1, 2))}
	return &envelope{suite: XWing, out: key, in: key, rand: rng},
		&envelope{suite: XWing, out: key, in: key, rand: rng}
}

func TestEnvelopeFragments(t *testing.T) {
	a, b := envelopes(t)
	for _, size := range []int{0, 1, maxFragment, maxFragment + 1, 2 * maxFragment, 2500, maxMessage} {
		in := message{kind: kindM1, receiver: 77, payload: bytes.Repeat([]byte{1, 2, 3, 5}, 1024)[:size]}
		ds, err := a.wrap(epochZero, in)
		if err != nil {
			t.Fatal(err)
		}
		for _, order := range [][]int{{0, 1, 2, 3}, {3, 2, 1, 0}, {1, 1, 0, 2, 0, 3}} {
			var got *message
			for _, i := range order {
				if i >= len(ds) || got != nil {
					continue
				}
				m, f := b.unwrap(epochZero, ds[i], addrOf(0), false)
				if f != faultNone {
					t.Fatalf("size %d: fault %d", size, f)
				}
				got = m
			}
			if got == nil || got.kind != in.kind || got.receiver != in.receiver ||
				!bytes.Equal(got.payload, in.payload) {
				t.Fatalf("size %d, order %v: got %v", size, order, got)
			}
			b.pieces = [buffers]assembly{}
		}
	}
}

func TestEnvelopeForgetsFragments(t *testing.T) {
	a, b := envelopes(t)
	wrap := func() [][]byte {
		ds, err := a.wrap(epochZero, message{kind: kindM2, payload: make([]byte, 2000)})
		if err != nil {
			t.Fatal(err)
		}
		return ds
	}
	first := wrap()
	b.unwrap(epochZero, first[0], addrOf(0), false)
	if m, _ := b.unwrap(epochZero.Add(bufferLives+1), first[1], addrOf(0), false); m != nil {
		t.Error("a fragment lives longer than it may")
	}
	b.pieces = [buffers]assembly{}
	second, third := wrap(), wrap()
	b.unwrap(epochZero, first[0], addrOf(0), false)
	b.unwrap(epochZero.Add(1), second[0], addrOf(0), false)
	b.unwrap(epochZero.Add(2), third[0], addrOf(0), false) // takes the buffer of first
	if m, _ := b.unwrap(epochZero.Add(3), second[1], addrOf(0), false); m == nil {
		t.Error("the younger message lost its buffer")
	}
	if m, _ := b.unwrap(epochZero.Add(3), first[1], addrOf(0), false); m != nil {
		t.Error("three messages fit into two buffers")
	}
}

func TestEnvelopeRefuses(t *testing.T) {
	a, b := envelopes(t)
	ds, err := a.wrap(epochZero, message{kind: kindM3, receiver: 5, payload: []byte("payload")})
	if err != nil {
		t.Fatal(err)
	}
	d := ds[0]
	for i := range d[:len(d)-macSize] { // without a cookie mac2 counts for nothing
		bad := bytes.Clone(d)
		bad[i] ^= 0x40
		m, f := b.unwrap(epochZero, bad, addrOf(0), false)
		if m != nil || f == faultNone {
			t.Errorf("byte %d changed: message %v, fault %d", i, m, f)
		}
	}
	for n := range d {
		if m, f := b.unwrap(epochZero, d[:n], addrOf(0), false); m != nil || f == faultNone {
			t.Errorf("%d bytes: message %v, fault %d", n, m, f)
		}
	}
	if m, f := b.unwrap(epochZero, make([]byte, maxDatagram+1), addrOf(0), false); m != nil || f != faultForm {
		t.Error("a long datagram is taken")
	}
	// Well signed, but with a form that the sender never makes.
	for name, frag := range map[string]byte{"index 1 of 1": 0x10, "16 fragments": 0x0f, "short first": 0x01} {
		bad := bytes.Clone(d)
		bad[3] = frag
		body := bad[:len(bad)-2*macSize]
		copy(bad[len(body):], mac1(b.in, body))
		if m, f := b.unwrap(epochZero, bad, addrOf(0), false); m != nil || f != faultForm {
			t.Errorf("%s: message %v, fault %d", name, m, f)
		}
	}
}

func TestOwns(t *testing.T) {
	for b, want := range map[byte]bool{0: true, 1: true, 4: true, 15: true, 16: false, 17: false, 255: false} {
		if Owns([]byte{b}) != want {
			t.Errorf("Owns(%d) = %v", b, !want)
		}
	}
	if Owns(nil) {
		t.Error("Owns takes an empty datagram")
	}
}

func FuzzUnwrap(f *testing.F) {
	a, _ := envelopes(f)
	for _, n := range []int{0, 30, 2000} {
		ds, _ := a.wrap(epochZero, message{kind: kindM1, payload: make([]byte, n)})
		for _, d := range ds {
			f.Add(d, true)
		}
	}
	f.Fuzz(func(t *testing.T, d []byte, sign bool) {
		_, b := envelopes(t)
		if n := len(d) - 2*macSize; sign && n >= 0 {
			copy(d[n:], mac1(b.in, d[:n]))
		}
		for range 3 {
			if m, fault := b.unwrap(epochZero, d, addrOf(0), false); m != nil &&
				(fault != faultNone || len(m.payload) > maxMessage) {
				t.Fatalf("message of %d bytes, fault %d", len(m.payload), fault)
			}
		}
	})
}

func FuzzInner(f *testing.F) {
	f.Add((&hello{intro: sampleIntro()}).encode())
	f.Add((&welcome{intro: sampleIntro()}).encode())
	f.Add((&choice{mode: QKD, attempt: 1, ids: []tunnel.KeyID{{1}}}).encode())
	f.Add((&verdict{}).encode())
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, p := range []parsed{&hello{}, &welcome{}, &choice{}, &verdict{}} {
			if err := p.decode(b); err == nil && !bytes.Equal(p.encode(), b) {
				t.Fatalf("%T has two forms: %x and %x", p, b, p.encode())
			}
		}
	})
}

func FuzzOpening(f *testing.F) {
	o := opening{random: make([]byte, 32), index: 1, first: make([]byte, 4), second: make([]byte, 5),
		box: make([]byte, 16)}
	f.Add(o.encode())
	f.Fuzz(func(t *testing.T, b []byte) {
		var o opening
		if err := o.decode(b, 4, 5, 0); err == nil && !bytes.Equal(o.encode(), b) {
			t.Fatalf("two forms of %x", b)
		}
	})
}
