package rekey

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"testing/cryptotest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/quietline/quietline/secret"
	"github.com/quietline/quietline/tunnel"
)

var rewriteVectors = flag.Bool("vectors", false, "write docs/vectors again")

const vectorFolder = "../../docs/vectors"

// vector is one handshake with all that is needed to follow it: every secret
// that goes in, every message, every key that comes out, and every field with
// a changed bit that must be found. Byte strings are hexadecimal.
type vector struct {
	Name       string
	About      string
	Protocol   string // name that starts the chaining key
	Suite      int
	LinkID     string
	LinkSecret string
	SeedI      string // static seeds of both ends
	SeedR      string
	SeedE      string // of the ephemeral key
	Chain      string // chain secret that goes in; empty = it starts anew
	Messages   []messageVector
	Out        keysVector
	Faults     []faultVector
}

// messageVector is one message, in order. An M4 with Refuses is sealed under
// the key before the QKD keys; another M3 follows it.
type messageVector struct {
	From      string
	Kind      int
	Refuses   bool
	Mode      int         // M3: level of the epoch, 1 PQC, 2 CHAINED, 3 QKD
	QKD       []qkdVector // M3: keys that it names, in order
	Plain     string      // what the box holds
	Datagrams []string
}

type qkdVector struct{ KeyID, Key string }

type keysVector struct {
	IndexI, IndexR         uint32
	Epoch                  uint64
	Level                  string
	KeyIR, IVIR            string
	KeyRI, IVRI            string
	NextChain, NextChainID string
}

// faultVector is a bit to change: in the payload of message number Message
// (from 0), joined from its fragments. Opening must stop at StopsAt.
type faultVector struct {
	Field   string
	Message int
	Offset  int
	Bit     int
	StopsAt string
}

// vectorCase is how a world gives a vector.
type vectorCase struct {
	policy Policy
	about  string
	before func(w *world) // makes the world ready; the next handshake is the vector
}

var vectorCases = []vectorCase{
	{PQCOnly, "first handshake, no QKD", nil},
	{QKDStrict, "first handshake, two QKD keys", nil},
	{QKDStrict, "second handshake: the chain secret of the first, two QKD keys",
		func(w *world) {}},
	{QKDRequired, "no QKD key at the initiator: chained", func(w *world) {
		w.kme.state[w.scheduled().id].err = tunnel.ErrKeyEmpty
	}},
	{QKDPreferred, "the responder does not get the keys of the first M3: refused, then chained",
		func(w *world) { w.kme.state[w.other(w.scheduled()).id].err = tunnel.ErrKeyDown }},
	{OTPPreferred, "first handshake of ends that prefer one-time pad, two QKD keys", nil},
	{OTPStrict, "first handshake of ends that insist on one-time pad, two QKD keys", nil},
}

func (c vectorCase) file(s Suite, n int) string {
	suite := map[Suite]string{XWing: "xwing", MLKEM1024P384: "mlkem1024p384"}[s]
	return fmt.Sprintf("%s-%d-%s.json", suite, n+1, c.policy)
}

// scribe writes down what two machines say.
type scribe struct {
	w      *world
	v      *vector
	epochs map[string]*Epoch
	keys   map[string]string
}

func (s *scribe) role(e *end) string {
	if e.m.scheduled {
		return "I"
	}
	return "R"
}

func (s *scribe) watch(e *end) {
	s.w.bent = nil
	e.bend = func(o *Output) {
		if o.Install != nil {
			s.epochs[s.role(e)] = o.Install
		}
	}
	e.trace = func(d []byte) {
		if d == nil {
			return
		}
		ms := &s.v.Messages
		if n := len(*ms); d[3]>>4 == 0 || n == 0 {
			*ms = append(*ms, messageVector{From: s.role(e), Kind: int(d[0])})
		}
		m := &(*ms)[len(*ms)-1]
		m.Datagrams = append(m.Datagrams, hex.EncodeToString(d))
	}
	e.keys = func(ks []tunnel.Key) {
		for _, k := range ks {
			s.keys[hex.EncodeToString(k.ID[:])] = hex.EncodeToString(k.Bits.Expose())
		}
	}
}

// recordVector plays a handshake and writes it down.
func recordVector(t *testing.T, suite Suite, n int, c vectorCase) vector {
	t.Helper()
	cryptotest.SetGlobalRandom(t, 2026) // crypto/hpke takes no other randomness
	w := newWorld(2026)
	_, name, err := suiteKEM(suite)
	if err != nil {
		t.Fatal(err)
	}
	v := vector{Name: c.file(suite, n), About: c.about, Protocol: name, Suite: int(suite),
		LinkID:     hex.EncodeToString(append([]byte{7}, make([]byte, 15)...)),
		LinkSecret: hex.EncodeToString(linkSecret().Expose())}
	s := &scribe{w, &v, map[string]*Epoch{}, map[string]string{}}
	w.bent = func(e *end) { s.watch(e) }
	tweak := func(int, *Config) {}
	if suite == MLKEM1024P384 {
		tweak = suite2(t)
	}
	first := w.bent
	w.bent = func(e *end) { first(e); w.bent = first }
	w.start(c.policy, func(i int, cfg *Config) { tweak(i, cfg); cfg.KeysPerEpoch = 2 })
	i, r := w.named("I"), w.named("R")
	if c.before != nil {
		w.mustBeUp(t, time.Second)
		w.run(20 * time.Second)
		c.before(w)
		v.Messages = nil
		v.Chain = hex.EncodeToString(i.m.chains[0].rk.Expose())
		i.step(Input{Rekey: true})
	}
	v.SeedI, v.SeedR, v.SeedE = hex.EncodeToString(i.m.cfg.StaticSeed.Expose()),
		hex.EncodeToString(r.m.cfg.StaticSeed.Expose()), hex.EncodeToString(i.m.init.eph.Expose())
	w.run(time.Second)
	w.ok(t)
	if !w.up() {
		t.Fatal("line is not up")
	}
	h := func(b secret.Bytes) string { return hex.EncodeToString(b.Expose()) }
	e := s.epochs["I"]
	v.Out = keysVector{e.RecvIndex, e.SendIndex, e.Number, e.Level.String(), h(e.SendKey), h(e.SendIV),
		h(e.RecvKey), h(e.RecvIV), h(i.m.chains[0].rk), hex.EncodeToString(i.m.chains[0].id[:])}
	if err := (&reader{v: &v, keys: s.keys, learn: true}).follow(); err != nil {
		t.Fatalf("%s: %v", v.Name, err)
	}
	v.Faults = faults(&v)
	return v
}

// TestVectors keeps the wire format and key schedule still: the same secrets
// and randomness give the same messages and keys as ever, an independent
// reader finds the keys, and no field can be changed.
func TestVectors(t *testing.T) {
	for _, suite := range []Suite{XWing, MLKEM1024P384} {
		for n, c := range vectorCases {
			path := filepath.Join(vectorFolder, c.file(suite, n))
			t.Run(c.file(suite, n), func(t *testing.T) {
				got := recordVector(t, suite, n, c)
				if *rewriteVectors {
					writeVector(t, path, got)
				}
				want := readVector(t, path)
				if d := cmp.Diff(want, got); d != "" {
					t.Errorf("%.2000s", d)
				}
				checkVector(t, want)
			})
		}
	}
}

func checkVector(t *testing.T, v vector) {
	t.Helper()
	if err := (&reader{v: &v}).follow(); err != nil {
		t.Error(err)
	}
	for _, f := range v.Faults {
		err := (&reader{v: &v, fault: &f}).follow()
		if err == nil || err.Error() != f.StopsAt {
			t.Errorf("%s of message %d changed: %v, want %s", f.Field, f.Message, err, f.StopsAt)
		}
	}
}

func writeVector(t *testing.T, path string, v vector) {
	t.Helper()
	b, err := json.MarshalIndent(v, "", "\t")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, append(b, '\n'), 0o644); err != nil {
		t.Fatal(err)
	}
}

func readVector(t *testing.T, path string) (v vector) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&v); err != nil {
		t.Fatal(err)
	}
	return v
}
