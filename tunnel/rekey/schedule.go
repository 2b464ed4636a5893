package rekey

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/sha512"
	"encoding/binary"
	"fmt"
	"time"

	"github.com/quietline/quietline/secret"
)

const (
	hashSize  = sha512.Size384
	tagSize   = 16
	nonceSize = 12
	keySize   = 32
	chainSize = hashSize // bytes of a chain secret rk
)

// transcript is the key schedule of handshake.md 4.4: h is the hash of every
// byte both ends have seen, ck the chaining key into which every secret goes.
// Each step has its own label and binds h, so the result is secure if any one
// of the secrets is unknown to an attacker.
type transcript struct {
	h  [hashSize]byte
	ck secret.Bytes
}

// newTranscript starts from the public facts of the line. The order of the
// two static keys fixes the roles, so a reflected message opens nowhere.
func newTranscript(name string, s Suite, link [16]byte, initiator, responder []byte) *transcript {
	d := sha512.New384()
	for _, part := range [][]byte{[]byte("QLE1"), {byte(s)}, link[:], initiator, responder} {
		_, _ = d.Write(binary.BigEndian.AppendUint64(nil, uint64(len(part))))
		_, _ = d.Write(part)
	}
	t := &transcript{}
	d.Sum(t.h[:0])
	ck := sha512.Sum384([]byte(name))
	t.ck = secret.Copy(ck[:])
	return t
}

// fork copies the transcript; both copies are to be cleared.
func (t *transcript) fork() *transcript {
	return &transcript{h: t.h, ck: secret.Copy(t.ck.Expose())}
}

func (t *transcript) clear() {
	if t != nil {
		t.ck.Clear()
	}
}

// mixHash binds public bytes: h = H(h, len, x).
func (t *transcript) mixHash(x []byte) {
	d := sha512.New384()
	_, _ = d.Write(t.h[:])
	_, _ = d.Write(binary.BigEndian.AppendUint64(nil, uint64(len(x))))
	_, _ = d.Write(x)
	d.Sum(t.h[:0])
}

// mixKey binds a secret: ck = Expand(Extract(ck, s), "QLE1 ck " label h).
// The secret stays the caller's to clear.
func (t *transcript) mixKey(label string, s secret.Bytes) {
	t.alive()
	prk, err := hkdf.Extract(sha512.New384, s.Expose(), t.ck.Expose())
	must(err)
	defer secret.Wipe(prk)
	next := expand(prk, "QLE1 ck "+label+string(t.h[:]), hashSize)
	t.ck.Clear()
	t.ck = next
}

// derive expands ck under a label and h.
func (t *transcript) derive(label string, n int) secret.Bytes {
	t.alive()
	return expand(t.ck.Expose(), "QLE1 "+label+string(t.h[:]), n)
}

func expand(prk []byte, info string, n int) secret.Bytes {
	out, err := hkdf.Expand(sha512.New384, prk, info, n)
	must(err)
	return secret.Own(out)
}

// alive stops before a cleared chaining key yields keys that anybody can
// compute: better no daemon than that.
func (t *transcript) alive() {
	if t.ck.Len() != hashSize {
		panic("rekey: use of a cleared transcript")
	}
}

// must stops on an error that only a programming mistake can cause: a wrong
// length that is constant in this package.
func must(err error) {
	if err != nil {
		panic(fmt.Sprintf("rekey: %v", err))
	}
}

// seal encrypts plain under a key of its own and binds the ciphertext. The
// nonce is zero because each key, bound to label and h, seals once.
func (t *transcript) seal(label string, plain []byte) []byte {
	box := t.aead(label).Seal(nil, make([]byte, nonceSize), plain, t.h[:])
	t.mixHash(box)
	return box
}

// open is the reverse of seal. On failure nothing has changed.
func (t *transcript) open(label string, box []byte) ([]byte, error) {
	plain, err := t.aead(label).Open(nil, make([]byte, nonceSize), box, t.h[:])
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", label, err)
	}
	t.mixHash(box)
	return plain, nil
}

func (t *transcript) aead(label string) cipher.AEAD {
	key := t.derive("k "+label, keySize)
	defer key.Clear()
	return newGCM(key)
}

func newGCM(key secret.Bytes) cipher.AEAD {
	block, err := aes.NewCipher(key.Expose())
	must(err)
	gcm, err := cipher.NewGCM(block)
	must(err)
	return gcm
}

// chain is a chain secret: the heir of all QKD keys and KEM secrets of the
// epochs before. Its identifier may be seen by the peer only.
type chain struct {
	id    [16]byte
	rk    secret.Bytes
	qkd   bool      // a QKD key is in it
	fresh time.Time // when the youngest QKD key went in
	depth int       // epochs since then
}

// heir notes what the chain secret after c rests on, when an epoch of the
// level was made from c; c may be nil.
func (c *chain) heir(next chain, level Level, now time.Time) chain {
	switch {
	case level == QKD:
		next.qkd, next.fresh = true, now
	case c != nil && c.qkd:
		next.qkd, next.fresh, next.depth = true, c.fresh, c.depth+1
	}
	return next
}

// level is what an epoch without a QKD key of its own rests on.
func (c *chain) level() Level {
	if c != nil && c.qkd {
		return Chained
	}
	return PQC
}

// copy is for a handshake under way; it is cleared with it.
func (c *chain) copy() chain {
	d := *c
	d.rk = secret.Copy(c.rk.Expose())
	return d
}

// split yields the epoch keys and the next chain secret, then clears ck.
func (t *transcript) split(initiator bool) (*Epoch, chain) {
	defer t.clear()
	kIR, ivIR := t.derive("key I to R ", keySize), t.derive("iv I to R ", nonceSize)
	kRI, ivRI := t.derive("key R to I ", keySize), t.derive("iv R to I ", nonceSize)
	next := chain{rk: t.derive("rk ", chainSize)}
	id := t.derive("rk id ", len(next.id))
	copy(next.id[:], id.Expose())
	id.Clear()
	if initiator {
		return &Epoch{SendKey: kIR, SendIV: ivIR, RecvKey: kRI, RecvIV: ivRI}, next
	}
	return &Epoch{SendKey: kRI, SendIV: ivRI, RecvKey: kIR, RecvIV: ivIR}, next
}
