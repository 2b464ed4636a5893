package rekey

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"flag"
	"os"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/quietline/quietline/secret"
	"github.com/quietline/quietline/tunnel"
)

var rewriteVectors = flag.Bool("vectors", false, "write testdata/vectors again")

// vector is one handshake with all that is needed to follow it: every secret
// that goes in, every datagram, every key that comes out. All is hexadecimal.
type vector struct {
	Name       string
	Suite      int
	Policy     string
	LinkID     string
	LinkSecret string
	SeedI      string // static seeds
	SeedR      string
	SeedE      string // of the ephemeral key
	Chain      string // chain secret that goes in; empty = reset
	QKD        []qkdVector
	Datagrams  []datagramVector
	Out        keysVector
}

type qkdVector struct{ KeyID, Key string }

type datagramVector struct{ From, Hex string }

type keysVector struct {
	IndexI, IndexR uint32
	Epoch          uint64
	Level          string
	KeyIR, IVIR    string
	KeyRI, IVRI    string
	NextChain      string
	NextChainID    string
}

// record plays a handshake in a world and notes everything.
func recordVector(t *testing.T, name string, p Policy, second bool) vector {
	t.Helper()
	w := newWorld(2026)
	v := vector{Name: name, Suite: int(XWing), Policy: p.String(),
		LinkID:     hex.EncodeToString(append([]byte{7}, make([]byte, 15)...)),
		LinkSecret: hex.EncodeToString(linkSecret().Expose())}
	epochs := map[string]*Epoch{}
	role := func(e *end) string {
		if e.m.scheduled {
			return "I"
		}
		return "R"
	}
	w.bent = func(e *end) {
		e.bend = func(o *Output) {
			if o.Install != nil {
				epochs[role(e)] = o.Install
			}
		}
		e.trace = func(d []byte) {
			if d != nil {
				v.Datagrams = append(v.Datagrams, datagramVector{role(e), hex.EncodeToString(d)})
			}
		}
		e.keys = func(ks []tunnel.Key) {
			if !e.m.scheduled {
				return
			}
			for _, k := range ks {
				v.QKD = append(v.QKD, qkdVector{hex.EncodeToString(k.ID[:]), hex.EncodeToString(k.Bits.Expose())})
			}
		}
	}
	w.start(p, func(_ int, c *Config) { c.KeysPerEpoch = 2 })
	i, r := w.named("I"), w.named("R")
	if second { // the vector is the second handshake, with a chain secret
		w.mustBeUp(t, time.Second)
		w.run(20 * time.Second)
		v.Datagrams, v.QKD = nil, nil
		v.Chain = hex.EncodeToString(i.m.chains[0].rk.Expose())
		i.step(Input{Rekey: true})
	}
	v.SeedI = hex.EncodeToString(i.m.cfg.StaticSeed.Expose())
	v.SeedR = hex.EncodeToString(r.m.cfg.StaticSeed.Expose())
	v.SeedE = hex.EncodeToString(i.m.init.eph.Expose())
	w.run(time.Second)
	w.ok(t)
	if !w.up() {
		t.Fatal("line is not up")
	}
	e := epochs["I"]
	h := func(b secret.Bytes) string { return hex.EncodeToString(b.Expose()) }
	v.Out = keysVector{e.RecvIndex, e.SendIndex, e.Number, e.Level.String(), h(e.SendKey), h(e.SendIV),
		h(e.RecvKey), h(e.RecvIV), h(i.m.chains[0].rk), hex.EncodeToString(i.m.chains[0].id[:])}
	return v
}

// TestVectors keeps the wire format and key schedule still: the same secrets
// and randomness give the same datagrams and keys as ever.
func TestVectors(t *testing.T) {
	for _, tc := range []struct {
		file   string
		policy Policy
		second bool
	}{{"xwing-pqc-only", PQCOnly, false}, {"xwing-qkd-strict", QKDStrict, false},
		{"xwing-qkd-strict-chain", QKDStrict, true}} {
		got := recordVector(t, tc.file, tc.policy, tc.second)
		path := "testdata/vectors/" + tc.file + ".json"
		if *rewriteVectors {
			b, err := json.MarshalIndent(got, "", "\t")
			if err != nil {
				t.Fatal(err)
			}
			if err := os.MkdirAll("testdata/vectors", 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, append(b, '\n'), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want := readVector(t, path)
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("%s: %.2000s", tc.file, d)
		}
		follow(t, want)
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

// follow opens a vector from its secrets alone, straight down handshake.md
// 4.5, without the machine and with the standard library's X-Wing.
func follow(t *testing.T, v vector) {
	t.Helper()
	un := func(s string) []byte {
		b, err := hex.DecodeString(s)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	var parts [5][]byte
	var index [5][]byte
	for _, d := range v.Datagrams {
		b := un(d.Hex)
		parts[b[0]] = append(parts[b[0]], b[headerSize:len(b)-2*macSize]...)
		index[b[0]] = b[12:16]
	}
	own := func(s string) secret.Bytes { return secret.Own(un(s)) }
	static := map[string]stdXWing{"I": newStdXWing(t, un(v.SeedI)), "R": newStdXWing(t, un(v.SeedR)),
		"E": newStdXWing(t, un(v.SeedE))}
	tr := newTranscript("QLE1 X-Wing HKDF-SHA384 AES256-GCM", XWing, [16]byte(un(v.LinkID)),
		static["I"].public(), static["R"].public())
	cut := func(b *[]byte, n int) []byte {
		x := (*b)[:n]
		*b = (*b)[n:]
		tr.mixHash(x)
		return x
	}
	open := func(label string, box []byte) []byte {
		plain, err := tr.open(label, box)
		if err != nil {
			t.Fatalf("%s: %v", v.Name, err)
		}
		return plain
	}
	m := parts[kindM1]
	cut(&m, 32)
	indexI := cut(&m, 4)
	cut(&m, 1216)
	ctR := cut(&m, 1120)
	tr.mixKey("psk", own(v.LinkSecret))
	tr.mixKey("ss_R", secret.Own(static["R"].decapsulate(t, ctR)))
	open("c1", m)
	m = parts[kindM2]
	cut(&m, 32)
	indexR := cut(&m, 4)
	ctE, ctI := cut(&m, 1120), cut(&m, 1120)
	tr.mixKey("ss_E", secret.Own(static["E"].decapsulate(t, ctE)))
	tr.mixKey("ss_I", secret.Own(static["I"].decapsulate(t, ctI)))
	open("c2", m)
	tr.mixHash(indexR)
	if v.Chain == "" {
		tr.mixKey("rk reset", secret.Bytes{})
	} else {
		tr.mixKey("rk", own(v.Chain))
	}
	c3 := open("c3", parts[kindM3])
	if len(v.QKD) == 0 {
		tr.mixKey("noqkd 1", secret.Bytes{})
	}
	for i, k := range v.QKD {
		if !bytes.Equal(c3[16+16*i:32+16*i], un(k.KeyID)) {
			t.Errorf("%s: key_ID %d stands not in c3", v.Name, i)
		}
		tr.mixKey([]string{"qkd 1", "qkd 2"}[i], own(k.Key))
	}
	tr.mixHash(indexI)
	open("c4", parts[kindM4])
	if !bytes.Equal(index[kindM2], indexI) || !bytes.Equal(index[kindM3], indexR) {
		t.Errorf("%s: indexes in headers and messages differ", v.Name)
	}
	e, next := tr.split(true)
	for name, pair := range map[string][2]string{
		"I to R": {hex.EncodeToString(e.SendKey.Expose()), v.Out.KeyIR},
		"R to I": {hex.EncodeToString(e.RecvKey.Expose()), v.Out.KeyRI},
		"IV I":   {hex.EncodeToString(e.SendIV.Expose()), v.Out.IVIR},
		"IV R":   {hex.EncodeToString(e.RecvIV.Expose()), v.Out.IVRI},
		"chain":  {hex.EncodeToString(next.rk.Expose()), v.Out.NextChain},
	} {
		if pair[0] != pair[1] {
			t.Errorf("%s: %s is %s, want %s", v.Name, name, pair[0], pair[1])
		}
	}
}
