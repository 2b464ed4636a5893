package rekey

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"

	"github.com/quietline/quietline/secret"
)

// oracle is a KEM that stands beside the one in use.
type oracle interface {
	public() []byte
	decapsulate(ct []byte) ([]byte, error)
}

// reader follows a vector from its secrets alone, straight down handshake.md
// 4.5: no machine, no parser of this package, KEMs composed from their parts.
// Its errors name the place where it stops.
type reader struct {
	v     *vector
	fault *faultVector
	learn bool // fill in what the scribe could not see
	keys  map[string]string

	t              *transcript
	m              []byte // what is left of the message
	indexI, indexR []byte
}

func unhex(s string) []byte {
	b, err := hex.DecodeString(s)
	if err != nil {
		panic(err)
	}
	return b
}

func (r *reader) oracle(seed string) oracle {
	if r.v.Suite == int(XWing) {
		return makeStdXWing(unhex(seed))
	}
	return makeStdP384(unhex(seed))
}

// payload checks the envelopes of a message and joins it.
func (r *reader) payload(n int) ([]byte, error) {
	v, m := r.v, r.v.Messages[n]
	pkI, pkR := r.oracle(v.SeedI).public(), r.oracle(v.SeedR).public()
	direction, receiver := byte(0), sha512.Sum384(pkR)
	if m.From == "R" {
		direction, receiver = 1, sha512.Sum384(pkI)
	}
	key := macKey(secret.Own(unhex(v.LinkSecret)), "mac1", direction, receiver)
	var all []byte
	for i, text := range m.Datagrams {
		d := unhex(text)
		body := d[:len(d)-2*macSize]
		h := hmac.New(sha256.New, key.Expose())
		_, _ = h.Write(body)
		if !bytes.Equal(h.Sum(nil)[:macSize], d[len(body):len(body)+macSize]) {
			return nil, errors.New("mac1")
		}
		if int(d[0]) != m.Kind || int(d[2]) != v.Suite || int(d[3]) != i<<4|len(m.Datagrams)-1 {
			return nil, errors.New("header")
		}
		index := map[int][]byte{kindM1: {0, 0, 0, 0}, kindM2: r.indexI, kindM3: r.indexR, kindM4: r.indexI}
		if !bytes.Equal(d[12:16], index[m.Kind]) {
			return nil, errors.New("receiver index")
		}
		all = append(all, body[headerSize:]...)
	}
	if f := r.fault; f != nil && f.Message == n {
		all[f.Offset] ^= 1 << f.Bit
	}
	return all, nil
}

func (r *reader) take(n int) []byte {
	x := r.m[:n]
	r.m = r.m[n:]
	r.t.mixHash(x)
	return x
}

func (r *reader) mix(label string, bits []byte) { r.t.mixKey(label, secret.Copy(bits)) }

func (r *reader) decapsulate(label, seed string, ct []byte) error {
	ss, err := r.oracle(seed).decapsulate(ct)
	if err != nil {
		return errors.New(label)
	}
	r.mix(label, ss)
	return nil
}

func (r *reader) open(n int, label string) error {
	plain, err := r.t.open(label, r.m)
	if err != nil {
		return errors.New(label)
	}
	m := &r.v.Messages[n]
	if r.learn {
		m.Plain = hex.EncodeToString(plain)
	}
	if m.Plain != hex.EncodeToString(plain) {
		return fmt.Errorf("plaintext of %s", label)
	}
	return nil
}

func (r *reader) follow() error {
	v := r.v
	pkI, pkR := r.oracle(v.SeedI).public(), r.oracle(v.SeedR).public()
	r.t = newTranscript(v.Protocol, Suite(v.Suite), [16]byte(unhex(v.LinkID)), pkI, pkR)
	for n, m := range v.Messages {
		var err error
		if r.m, err = r.payload(n); err != nil {
			return err
		}
		switch m.Kind {
		case kindM1:
			err = r.m1(n)
		case kindM2:
			err = r.m2(n)
		case kindM3:
			err = r.m3(n)
		case kindM4:
			err = r.m4(n)
		}
		if err != nil {
			return err
		}
	}
	return r.result()
}

func (r *reader) m1(n int) error {
	public, ct := len(r.oracle(r.v.SeedE).public()), r.ctSize()
	r.take(32)
	r.indexI = r.take(4)
	r.take(public)
	ctR := r.take(ct)
	r.mix("psk", unhex(r.v.LinkSecret))
	if err := r.decapsulate("ss_R", r.v.SeedR, ctR); err != nil {
		return err
	}
	return r.open(n, "c1")
}

func (r *reader) m2(n int) error {
	r.take(32)
	r.indexR = r.take(4)
	ctE, ctI := r.take(r.ctSize()), r.take(r.ctSize())
	if err := r.decapsulate("ss_E", r.v.SeedE, ctE); err != nil {
		return err
	}
	if err := r.decapsulate("ss_I", r.v.SeedI, ctI); err != nil {
		return err
	}
	return r.open(n, "c2")
}

func (r *reader) m3(n int) error {
	m := &r.v.Messages[n]
	r.t.mixHash(r.indexR)
	if n == 2 { // the chain secret goes in once
		if r.v.Chain == "" {
			r.mix("rk reset", nil)
		} else {
			r.mix("rk", unhex(r.v.Chain))
		}
	}
	if err := r.open(n, "c3"); err != nil {
		return err
	}
	plain := unhex(m.Plain)
	if r.learn {
		m.Mode = int(plain[0])
		for i := range int(plain[3]) {
			id := hex.EncodeToString(plain[16+16*i : 32+16*i])
			m.QKD = append(m.QKD, qkdVector{id, r.keys[id]})
		}
		r.v.Messages[n+1].Refuses = n+2 < len(r.v.Messages)
	}
	for i, k := range m.QKD {
		if k.KeyID != hex.EncodeToString(plain[16+16*i:32+16*i]) {
			return errors.New("key_ID")
		}
	}
	return nil
}

func (r *reader) m4(n int) error {
	if r.v.Messages[n].Refuses {
		r.t.mixHash(r.indexI)
		return r.open(n, "c4 error")
	}
	m3 := r.v.Messages[n-1]
	if len(m3.QKD) == 0 {
		r.mix(fmt.Sprintf("noqkd %d", m3.Mode), nil)
	}
	for i, k := range m3.QKD {
		r.mix(fmt.Sprintf("qkd %d", i+1), unhex(k.Key))
	}
	r.t.mixHash(r.indexI)
	return r.open(n, "c4")
}

func (r *reader) ctSize() int {
	if r.v.Suite == int(XWing) {
		return 1120
	}
	return 1665
}

func (r *reader) result() error {
	e, next := r.t.split(true)
	o := r.v.Out
	for name, pair := range map[string][2]string{
		"key I to R": {hex.EncodeToString(e.SendKey.Expose()), o.KeyIR},
		"key R to I": {hex.EncodeToString(e.RecvKey.Expose()), o.KeyRI},
		"iv I to R":  {hex.EncodeToString(e.SendIV.Expose()), o.IVIR},
		"iv R to I":  {hex.EncodeToString(e.RecvIV.Expose()), o.IVRI},
		"next chain": {hex.EncodeToString(next.rk.Expose()), o.NextChain},
		"chain id":   {hex.EncodeToString(next.id[:]), o.NextChainID},
	} {
		if pair[0] != pair[1] {
			return errors.New(name)
		}
	}
	if binary.BigEndian.Uint32(r.indexI) != o.IndexI || binary.BigEndian.Uint32(r.indexR) != o.IndexR {
		return errors.New("index")
	}
	return nil
}

// faults names every field of every message with one bit of it changed, and
// notes where the reader stops.
func faults(v *vector) (all []faultVector) {
	r := &reader{v: v}
	public, ct := len(r.oracle(v.SeedE).public()), r.ctSize()
	for n, m := range v.Messages {
		type field struct {
			name string
			size int
		}
		var fields []field
		box := field{fmt.Sprintf("box of M%d", m.Kind), len(unhex(m.Plain))}
		tag := field{fmt.Sprintf("tag of M%d", m.Kind), tagSize}
		switch m.Kind {
		case kindM1:
			fields = []field{{"N_I", 32}, {"idx_I", 4}, {"ek_e", public}, {"ct_R", ct}}
		case kindM2:
			fields = []field{{"N_R", 32}, {"idx_R", 4}, {"ct_E", ct}, {"ct_I", ct}}
		}
		at := 0
		for i, f := range append(fields, box, tag) {
			fault := faultVector{Field: f.name, Message: n, Offset: at + f.size/2, Bit: i}
			at += f.size
			if err := (&reader{v: v, fault: &fault}).follow(); err != nil {
				fault.StopsAt = err.Error()
			}
			all = append(all, fault)
		}
	}
	return all
}
