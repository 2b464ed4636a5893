package rekey

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha512"
	"encoding/binary"
	"testing"

	"github.com/quietline/quietline/secret"
)

// TestScheduleByHand computes the key schedule a second time from HMAC and
// SHA-384 alone, as handshake.md 4.4 writes it.
func TestScheduleByHand(t *testing.T) {
	length := func(b []byte) []byte { return binary.BigEndian.AppendUint64(nil, uint64(len(b))) }
	hash := func(parts ...[]byte) []byte {
		d := sha512.Sum384(bytes.Join(parts, nil))
		return d[:]
	}
	mac := func(key []byte, parts ...[]byte) []byte {
		h := hmac.New(sha512.New384, key)
		_, _ = h.Write(bytes.Join(parts, nil))
		return h.Sum(nil)
	}
	link, pkI, pkR := [16]byte{1, 2, 3}, []byte("initiator"), []byte("responder!")
	tr := newTranscript("a name", XWing, link, pkI, pkR)
	h := hash(length([]byte("QLE1")), []byte("QLE1"), length([]byte{1}), []byte{1},
		length(link[:]), link[:], length(pkI), pkI, length(pkR), pkR)
	ck := hash([]byte("a name"))
	check := func(step string) {
		t.Helper()
		if !bytes.Equal(tr.h[:], h) || !bytes.Equal(tr.ck.Expose(), ck) {
			t.Fatalf("%s: the schedule differs", step)
		}
	}
	check("start")
	x := []byte("public bytes")
	tr.mixHash(x)
	h = hash(h, length(x), x)
	check("mixHash")
	s := []byte("a secret")
	tr.mixKey("label", secret.Copy(s))
	prk := mac(ck, s)
	ck = mac(prk, []byte("QLE1 ck label"), h, []byte{1}) // HKDF-Expand, one block of 48 bytes
	check("mixKey")
	key := mac(ck, []byte("QLE1 key I to R "), h, []byte{1})[:32]
	e, next := tr.split(true)
	if !bytes.Equal(e.SendKey.Expose(), key) {
		t.Error("direction key differs")
	}
	if rk := mac(ck, []byte("QLE1 rk "), h, []byte{1}); !bytes.Equal(next.rk.Expose(), rk) {
		t.Error("chain secret differs")
	}
	if tr.ck.Len() != 0 {
		t.Error("split leaves the chaining key")
	}
}

func TestScheduleBinds(t *testing.T) {
	base := func() *transcript {
		return newTranscript("n", XWing, [16]byte{1}, []byte("i"), []byte("r"))
	}
	other := map[string]*transcript{
		"suite": newTranscript("n", MLKEM1024P384, [16]byte{1}, []byte("i"), []byte("r")),
		"link":  newTranscript("n", XWing, [16]byte{2}, []byte("i"), []byte("r")),
		"roles": newTranscript("n", XWing, [16]byte{1}, []byte("r"), []byte("i")),
		"name":  newTranscript("m", XWing, [16]byte{1}, []byte("i"), []byte("r")),
		"split": newTranscript("n", XWing, [16]byte{1}, []byte("ir"), []byte("")),
		"bytes": base(), "label": base(), "secret": base(), "order": base(),
	}
	want := base()
	want.mixKey("k", secret.Copy([]byte("s")))
	for name, tr := range other {
		switch name {
		case "bytes":
			tr.mixHash(nil)
			tr.mixKey("k", secret.Copy([]byte("s")))
		case "label":
			tr.mixKey("l", secret.Copy([]byte("s")))
		case "secret":
			tr.mixKey("k", secret.Bytes{})
		case "order":
			tr.mixKey("k", secret.Copy([]byte("s")))
			tr.mixHash([]byte("x"))
		default:
			tr.mixKey("k", secret.Copy([]byte("s")))
		}
		if bytes.Equal(tr.derive("out", 32).Expose(), want.derive("out", 32).Expose()) {
			t.Errorf("another %s gives the same key", name)
		}
	}
}

func TestSealBindsAndOpens(t *testing.T) {
	a := newTranscript("n", XWing, [16]byte{}, []byte("i"), []byte("r"))
	b := a.fork()
	box := a.seal("c1", []byte("plain"))
	if _, err := b.open("c2", box); err == nil {
		t.Error("a box opens under another label")
	}
	for i := range box {
		bad := bytes.Clone(box)
		bad[i] ^= 1
		if _, err := b.open("c1", bad); err == nil {
			t.Errorf("a box with byte %d changed opens", i)
		}
	}
	plain, err := b.open("c1", box)
	if err != nil || string(plain) != "plain" {
		t.Fatalf("open: %q, %v", plain, err)
	}
	if a.h != b.h {
		t.Error("seal and open end with different transcripts")
	}
	if again := a.seal("c1", []byte("plain")); bytes.Equal(again, box) {
		t.Error("the same label and text give the same box twice")
	}
}

func TestClearedTranscriptGivesNoKeys(t *testing.T) {
	tr := newTranscript("n", XWing, [16]byte{}, nil, nil)
	tr.clear()
	for name, use := range map[string]func(){
		"derive": func() { tr.derive("x", 32) },
		"mixKey": func() { tr.mixKey("x", secret.Bytes{}) },
		"seal":   func() { tr.seal("x", nil) },
	} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("%s works on a cleared transcript", name)
				}
			}()
			use()
		}()
	}
}
