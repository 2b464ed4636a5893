package rekey

import (
	"bytes"
	"crypto/ecdh"
	"crypto/hkdf"
	"crypto/hpke"
	"crypto/mlkem"
	"crypto/rand"
	"crypto/sha3"
	"crypto/sha512"
	"encoding/binary"
	"testing"
	"time"

	"github.com/quietline/quietline/secret"
)

// stdP384 is MLKEM1024-P384 of draft-ietf-hpke-pq from its two parts: the
// oracle for crypto/hpke and the way we use it.
type stdP384 struct {
	m *mlkem.DecapsulationKey1024
	p *ecdh.PrivateKey
}

func makeStdP384(seed []byte) stdP384 {
	x := sha3.NewSHAKE256()
	_, _ = x.Write(seed)
	seedM, seedP := make([]byte, 64), make([]byte, 48)
	_, _ = x.Read(seedM)
	m, err := mlkem.NewDecapsulationKey1024(seedM)
	if err != nil {
		panic(err) // any 64 bytes are a seed
	}
	for { // a number that is no scalar of the curve is passed over
		_, _ = x.Read(seedP)
		if p, err := ecdh.P384().NewPrivateKey(seedP); err == nil {
			return stdP384{m, p}
		}
	}
}

func (k stdP384) public() []byte {
	return append(k.m.EncapsulationKey().Bytes(), k.p.PublicKey().Bytes()...)
}

func (k stdP384) decapsulate(ct []byte) ([]byte, error) {
	ssM, err := k.m.Decapsulate(ct[:1568])
	if err != nil {
		return nil, err
	}
	ctP, err := ecdh.P384().NewPublicKey(ct[1568:])
	if err != nil {
		return nil, err
	}
	ssP, err := k.p.ECDH(ctP)
	if err != nil {
		return nil, err
	}
	h := sha3.New256()
	for _, p := range [][]byte{ssM, ssP, ct[1568:], k.p.PublicKey().Bytes(), []byte("MLKEM1024-P384")} {
		_, _ = h.Write(p)
	}
	return exportHPKE(h.Sum(nil)), nil
}

// exportHPKE is the key schedule and export of RFC 9180 sections 5.1 and 5.3
// in base mode, KEM 0x0051, HKDF-SHA384, export only.
func exportHPKE(shared []byte) []byte {
	suite := []byte{'H', 'P', 'K', 'E', 0, 0x51, 0, 2, 0xff, 0xff}
	extract := func(salt []byte, label string, ikm []byte) []byte {
		in := bytes.Join([][]byte{[]byte("HPKE-v1"), suite, []byte(label), ikm}, nil)
		prk, err := hkdf.Extract(sha512.New384, in, salt)
		must(err)
		return prk
	}
	expand := func(prk []byte, label string, info []byte) []byte {
		in := bytes.Join([][]byte{binary.BigEndian.AppendUint16(nil, 48), []byte("HPKE-v1"), suite,
			[]byte(label), info}, nil)
		out, err := hkdf.Expand(sha512.New384, prk, string(in), 48)
		must(err)
		return out
	}
	context := bytes.Join([][]byte{{0}, extract(nil, "psk_id_hash", nil),
		extract(nil, "info_hash", []byte(hpkeInfo))}, nil)
	exporter := expand(extract(shared, "secret", nil), "exp", context)
	return expand(exporter, "sec", []byte(hpkeExport))
}

func TestP384AgreesWithItsParts(t *testing.T) {
	k := hpkeKEM{hpke.MLKEM1024P384()}
	for range 10 {
		seed := secret.New(seedSize)
		_, _ = rand.Read(seed.Expose())
		std := makeStdP384(seed.Expose())
		public, err := k.public(seed)
		if err != nil {
			t.Fatal(err)
		}
		n, m := k.sizes()
		if !bytes.Equal(public, std.public()) || len(public) != n {
			t.Fatalf("public keys of seed %x differ", seed.Expose())
		}
		ct, ss, err := k.encapsulate(nil, public)
		if err != nil {
			t.Fatal(err)
		}
		if opened, err := std.decapsulate(ct); err != nil || !bytes.Equal(opened, ss.Expose()) ||
			len(ct) != m {
			t.Fatalf("the parts open the ciphertext otherwise: %v", err)
		}
		got, err := k.decapsulate(seed, ct)
		if err != nil || !bytes.Equal(got.Expose(), ss.Expose()) {
			t.Fatalf("decapsulate: another secret, %v", err)
		}
		ct[0] ^= 1
		if got, err := k.decapsulate(seed, ct); err != nil || bytes.Equal(got.Expose(), ss.Expose()) {
			t.Fatalf("a changed ciphertext gives the same secret (err %v)", err)
		}
		ct[1600] ^= 1
		if _, err := k.decapsulate(seed, ct); err == nil {
			t.Fatal("a point off the curve is taken")
		}
	}
}

func TestP384RefusesWrongSizes(t *testing.T) {
	k := hpkeKEM{hpke.MLKEM1024P384()}
	if _, err := k.public(secret.New(31)); err == nil {
		t.Error("public takes a seed of 31 bytes")
	}
	if _, err := k.decapsulate(seeds(0), make([]byte, 1664)); err == nil {
		t.Error("decapsulate takes a ciphertext of 1664 bytes")
	}
	for _, n := range []int{0, 1216, 1664, 1665} {
		if _, _, err := k.encapsulate(nil, make([]byte, n)); err == nil {
			t.Errorf("encapsulate takes %d zero bytes", n)
		}
	}
}

// suite2 turns a configuration of a world to the strict suite.
func suite2(t testing.TB) func(int, *Config) {
	var public [2][]byte
	for i := range public {
		var err error
		if public[i], err = Public(MLKEM1024P384, seeds(i)); err != nil {
			t.Fatal(err)
		}
	}
	return func(i int, c *Config) { c.Suite, c.PeerStatic = MLKEM1024P384, public[1-i] }
}

func TestStrictSuite(t *testing.T) {
	w := upLine(t, QKDStrict, suite2(t))
	w.traffic(100 * time.Millisecond)
	w.run(5 * time.Minute)
	w.ok(t)
	for _, e := range w.ends {
		if s := e.m.Stats(); s.Epochs != 3 || e.lost != 0 || s.BadMessages != 0 {
			t.Errorf("end %d: %+v, lost %d", e.id, s, e.lost)
		}
	}
}

// TestSuitesDoNotMix: ends set to unlike suites do not answer each other.
func TestSuitesDoNotMix(t *testing.T) {
	w := newWorld(1)
	strict := suite2(t)
	w.start(PQCOnly, func(i int, c *Config) {
		if i == 0 {
			strict(i, c)
		}
	})
	w.run(30 * time.Second)
	for _, e := range w.ends {
		if s := e.m.Stats(); s.Answered != 0 || s.BadForm == 0 {
			t.Errorf("end %d: %+v", e.id, s)
		}
	}
}

func BenchmarkHandshake(b *testing.B) {
	for name, tweak := range map[string]func(int, *Config){
		"X-Wing": nil, "MLKEM1024-P384": suite2(b)} {
		b.Run(name, func(b *testing.B) {
			w := newWorld(1)
			w.net.delay = 0
			w.start(QKDStrict, tweak)
			w.run(20 * time.Second)
			i := w.scheduled()
			for b.Loop() {
				i.step(Input{Rekey: true})
				w.run(0)
				w.run(12 * time.Second) // the old epoch goes
			}
			if n := i.m.Stats().Completed; n < uint64(b.N) {
				b.Fatalf("%d handshakes in %d rounds", n, b.N)
			}
		})
	}
}

// BenchmarkJunk is one datagram of a stranger, of the form that passes all
// checks but mac1.
func BenchmarkJunk(b *testing.B) {
	w := newWorld(1)
	w.start(QKDStrict, nil)
	w.run(time.Second)
	d := bytes.Repeat([]byte{7}, maxDatagram)
	copy(d, []byte{kindM1, wireVersion, byte(XWing), 2})
	m := w.named("R").m
	before := m.Stats()
	b.ReportAllocs()
	for b.Loop() {
		m.Step(w.now, Input{Datagram: d, From: addrOf(9)})
	}
	if s := m.Stats(); s.KEMs != before.KEMs || s.BadMAC < uint64(b.N) {
		b.Fatalf("%+v", s)
	}
}
