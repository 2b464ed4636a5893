package pad

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/quietline/quietline/secret"
	"github.com/quietline/quietline/tunnel"
	"github.com/quietline/quietline/tunnel/seal"
	"github.com/quietline/quietline/tunnel/wire"
)

var rewriteVectors = flag.Bool("vectors", false, "write docs/vectors/pad again")

const vectorPath = "../../docs/vectors/pad/records.json"

// vector is a block of pad on its way, records under it as datagrams, and every
// field with a changed bit that must be found. Byte strings are hexadecimal.
type vector struct {
	Name, About string
	// Outer are direction key and IV of the epoch, and what the receiver calls it.
	OuterKey, OuterIV string
	Index             uint32
	Keys              []keyVector // of the block, in order
	Announce          []string    // bodies of CONTROL records: the block's parts
	Ready             string      // the answer
	Largest           int         // bucket
	Records           []recordVector
	Faults            []faultVector
}

type keyVector struct{ KeyID, Key string }

type recordVector struct {
	Plain    string // the record inside
	Pad      string // the PAD record
	Datagram string // sealed in the epoch, on queue 1
}

// faultVector is a bit to change in the PAD record number Record, or in its
// datagram if Outer. Opening must stop at StopsAt.
type faultVector struct {
	Field   string
	Record  int
	Outer   bool
	Offset  int
	Bit     int
	StopsAt string
}

func packet(n int) []byte {
	p := make([]byte, 1+n)
	p[0], p[1] = byte(wire.Whole), 0x45
	p[3], p[4] = byte(n>>8), byte(n)
	for i := 5; i < len(p); i++ {
		p[i] = byte(i)
	}
	return p
}

// record makes the vector anew.
func record(t *testing.T) vector {
	t.Helper()
	rng := rand.New(rand.NewPCG(2026, 11))
	random := func(n int) []byte {
		b := make([]byte, n)
		for i := range b {
			b[i] = byte(rng.Uint32())
		}
		return b
	}
	v := vector{Name: "records.json", About: "one block of 96 keys of 256 bits in two parts; four records",
		OuterKey: hex.EncodeToString(random(32)), OuterIV: hex.EncodeToString(random(12)),
		Index: 0x01020304, Largest: 1408}
	sender, receiver := boot(random(16)), boot(random(16))
	var bits []byte
	var ids []tunnel.KeyID
	for range 96 {
		id, key := tunnel.KeyID(random(16)), random(32)
		ids, bits = append(ids, id), append(bits, key...)
		v.Keys = append(v.Keys, keyVector{hex.EncodeToString(id[:]), hex.EncodeToString(key)})
	}
	for i, part := range [][]tunnel.KeyID{ids[:64], ids[64:]} {
		m := message{kind: kindAnnounce, boot: sender, block: 7, keyLen: 32, part: byte(i), parts: 2, ids: part}
		v.Announce = append(v.Announce, hex.EncodeToString(m.append(nil)))
	}
	ready := message{kind: kindReady, boot: receiver, of: sender, block: 7}
	v.Ready = hex.EncodeToString(ready.append(nil))
	o := &Out{target: 1, at: rLen}
	o.add(&block{7, secret.Copy(bits)})
	sealer, err := seal.NewSealer(seal.AES256GCM, secret.Own(unhex(v.OuterKey)), secret.Own(unhex(v.OuterIV)), v.Index, 1)
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range []int{20, 125, 126, 1000} {
		plain := packet(n)
		p, err := o.Seal(nil, plain, v.Largest, true, clockZero)
		if err != nil {
			t.Fatal(err)
		}
		d, err := sealer.Seal(nil, p)
		if err != nil {
			t.Fatal(err)
		}
		v.Records = append(v.Records, recordVector{hex.EncodeToString(plain), hex.EncodeToString(p), hex.EncodeToString(d)})
	}
	n := len(v.Records[0].Pad) / 2
	v.Faults = append(v.Faults, []faultVector{
		{"version", 0, false, 1, 1, "form"}, {"reserved", 0, false, 2, 0, "form"}, {"reserved", 0, false, 3, 7, "form"},
		{"block", 0, false, 7, 3, "block"}, {"offset unit", 0, false, 11, 0, "form"},
		{"offset", 0, false, 11, 5, "tag"}, {"offset of r", 0, false, 11, 4, "form"}, {"offset beyond", 0, false, 9, 0, "form"},
		{"length", 0, false, headLen + 1, 0, "tag"}, {"record", 0, false, headLen + 10, 6, "tag"},
		{"filling", 0, false, headLen + 120, 0, "tag"}, {"tag", 0, false, n - 1, 0, "tag"},
		{"type", 1, true, 0, 0, "outer"}, {"queue", 1, true, 3, 1, "outer"}, {"index", 1, true, 7, 0, "outer"},
		{"counter", 1, true, 15, 4, "outer"}, {"sealed", 1, true, 20, 0, "outer"}, {"outer tag", 1, true, 187, 0, "outer"},
	}...)
	return v
}

func unhex(s string) []byte {
	b, err := hex.DecodeString(s)
	if err != nil {
		panic(err)
	}
	return b
}

// follow opens a vector, with a fault or without, and says where it stops.
func follow(v vector, f *faultVector) string {
	ids := map[tunnel.KeyID][]byte{}
	for _, k := range v.Keys {
		ids[tunnel.KeyID(unhex(k.KeyID))] = unhex(k.Key)
	}
	var bits []byte
	var m message
	for _, a := range v.Announce {
		if m.parse(unhex(a)) != nil {
			return "announce"
		}
		for _, id := range m.ids {
			bits = append(bits, ids[id]...)
		}
	}
	in := &In{blocks: map[uint32]*incoming{}}
	in.add(m.block, secret.Own(bits))
	opener, err := seal.NewOpener(seal.AES256GCM, secret.Own(unhex(v.OuterKey)), secret.Own(unhex(v.OuterIV)), 1)
	if err != nil {
		return "setup"
	}
	for i, r := range v.Records {
		d := unhex(r.Datagram)
		if f != nil && f.Record == i && f.Outer {
			d[f.Offset] ^= 1 << f.Bit
		}
		h, err := wire.ParseHeader(d)
		if err != nil || h.Queue != 1 || h.Index != v.Index {
			return "outer"
		}
		p, err := opener.Open(nil, d, h)
		if err != nil {
			return "outer"
		}
		if hex.EncodeToString(p) != r.Pad {
			return "pad record"
		}
		if f != nil && f.Record == i && !f.Outer {
			p[f.Offset] ^= 1 << f.Bit
		}
		got, err := in.Open(nil, p)
		switch {
		case errors.Is(err, ErrForged):
			return "tag"
		case errors.Is(err, ErrBlock):
			return "block"
		case err != nil:
			return "form"
		case hex.EncodeToString(got) != r.Plain:
			return "plain"
		}
	}
	return ""
}

// TestVectors keeps record, messages and datagram still.
func TestVectors(t *testing.T) {
	got := record(t)
	if *rewriteVectors {
		b, err := json.MarshalIndent(got, "", "\t")
		if err == nil {
			err = errors.Join(os.MkdirAll(filepath.Dir(vectorPath), 0o755), os.WriteFile(vectorPath, append(b, '\n'), 0o644))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	text, err := os.ReadFile(vectorPath)
	if err != nil {
		t.Fatal(err)
	}
	var want vector
	dec := json.NewDecoder(bytes.NewReader(text))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&want); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("%.2000s", diff)
	}
	if at := follow(want, nil); at != "" {
		t.Errorf("stops at %s", at)
	}
	for _, f := range want.Faults {
		if at := follow(want, &f); at != f.StopsAt {
			t.Errorf("%s changed: stops at %q, want %q", f.Field, at, f.StopsAt)
		}
	}
}

// TestVectorsInPython lets a reader in another language open them.
func TestVectorsInPython(t *testing.T) {
	python, err := exec.LookPath("python3")
	if err != nil {
		t.Skip("python3 is not installed")
	}
	if out, err := exec.Command(python, "testdata/reader.py", vectorPath).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	text, err := os.ReadFile(vectorPath)
	if err != nil {
		t.Fatal(err)
	}
	var v vector
	if err := json.Unmarshal(text, &v); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string][2]string{ // the reader must be able to fail
		"key":   {v.Keys[70].Key, strings.Repeat("0", 64)},
		"plain": {v.Records[2].Plain, strings.Repeat("0", 254)},
		"fault": {`"StopsAt": "tag"`, `"StopsAt": "block"`},
	} {
		path := filepath.Join(t.TempDir(), "bad.json")
		if err := os.WriteFile(path, bytes.ReplaceAll(text, []byte(change[0]), []byte(change[1])), 0o600); err != nil {
			t.Fatal(err)
		}
		if out, err := exec.Command(python, "testdata/reader.py", path).CombinedOutput(); err == nil {
			t.Errorf("%s changed, and the reader is content:\n%s", name, out)
		}
	}
}
