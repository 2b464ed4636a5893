package seal

import (
	"bytes"
	"crypto/hkdf"
	"crypto/sha512"
	"encoding/hex"
	"errors"
	"fmt"
	"testing"

	"pgregory.net/rapid"

	"github.com/quietline/quietline/secret"
	"github.com/quietline/quietline/tunnel/wire"
)

func testKey() (key, iv secret.Bytes) {
	return secret.Copy(bytes.Repeat([]byte{0x42}, KeyLen)),
		secret.Copy(bytes.Repeat([]byte{0x17}, IVLen))
}

// pair is a sealer and its opener on a queue.
func pair(tb testing.TB, queue uint16) (*Sealer, *Opener) {
	tb.Helper()
	key, iv := testKey()
	s, err := NewSealer(AES256GCM, key, iv, 0xabcd, queue)
	if err != nil {
		tb.Fatal(err)
	}
	o, err := NewOpener(AES256GCM, key, iv, queue)
	if err != nil {
		tb.Fatal(err)
	}
	return s, o
}

// open parses and opens a datagram in a copy.
func open(o *Opener, datagram []byte) ([]byte, error) {
	b := bytes.Clone(datagram)
	h, err := wire.ParseHeader(b)
	if err != nil {
		return nil, err
	}
	return o.Open(b[wire.HeaderLen:][:0], b, h)
}

func TestRoundTrip(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		s, o := pair(t, 3)
		for i := range rapid.IntRange(1, 5).Draw(rt, "records") {
			record := rapid.SliceOfN(rapid.Byte(), 1, 3000).Draw(rt, "record")
			dst := rapid.SliceOfN(rapid.Byte(), 0, 40).Draw(rt, "dst")
			out, err := s.Seal(bytes.Clone(dst), record)
			if err != nil {
				rt.Fatal(err)
			}
			if !bytes.HasPrefix(out, dst) {
				rt.Fatal("seal changed what was there")
			}
			datagram := out[len(dst):]
			if len(datagram) != wire.HeaderLen+len(record)+wire.TagLen {
				rt.Fatalf("%d bytes of record become %d", len(record), len(datagram))
			}
			h, err := wire.ParseHeader(datagram)
			want := wire.Header{Queue: 3, Index: 0xabcd, Counter: uint64(i)}
			if err != nil || h != want {
				rt.Fatalf("header %+v, %v; want %+v", h, err, want)
			}
			got, err := open(o, datagram)
			if err != nil || !bytes.Equal(got, record) {
				rt.Fatalf("open: %x, %v; want %x", got, err, record)
			}
		}
	})
}

// In place means: same bytes out as into a fresh buffer, nothing allocated.
func TestSealInPlace(t *testing.T) {
	fresh, _ := pair(t, 1)
	inPlace, o := pair(t, 1)
	record := bytes.Repeat([]byte("record"), 200)
	want, err := fresh.Seal(nil, record)
	if err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, wire.HeaderLen+len(record)+wire.TagLen)
	copy(buf[wire.HeaderLen:], record)
	got, err := inPlace.Seal(buf[:0], buf[wire.HeaderLen:][:len(record)])
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) || &got[0] != &buf[0] {
		t.Error("sealed in place differs from sealed into a fresh buffer")
	}
	if back, err := open(o, got); err != nil || !bytes.Equal(back, record) {
		t.Errorf("open: %v", err)
	}
}

// The key schedule and nonce by hand, with the AEAD used directly.
func TestKeyAndNonce(t *testing.T) {
	key, iv := testKey()
	s, err := NewSealer(AES256GCM, key, iv, 1, 0x0102)
	if err != nil {
		t.Fatal(err)
	}
	s.counter = 0x0a0b
	out, err := s.Seal(nil, []byte("hello"))
	if err != nil {
		t.Fatal(err)
	}
	qk, err := hkdf.Expand(sha512.New384, key.Expose(), "QLE1 queue\x01\x02", 32)
	if err != nil {
		t.Fatal(err)
	}
	aead, err := AES256GCM(qk)
	if err != nil {
		t.Fatal(err)
	}
	nonce, _ := hex.DecodeString("1717171717171717" + "1717" + "1d1c") // ...17 XOR 0a, 17 XOR 0b
	got, err := aead.Open(nil, nonce, out[wire.HeaderLen:], out[:wire.HeaderLen])
	if err != nil || string(got) != "hello" {
		t.Errorf("open by hand: %q, %v", got, err)
	}
}

func TestRefused(t *testing.T) {
	s, o := pair(t, 1)
	_, other := pair(t, 2)
	d0, _ := s.Seal(nil, []byte("zero"))
	d1, _ := s.Seal(nil, []byte("one"))
	for i := range d1 {
		bad := bytes.Clone(d1)
		bad[i] ^= 1
		if _, err := open(o, bad); err == nil {
			t.Errorf("byte %d flipped: opened", i)
		}
	}
	if _, err := open(other, d0); !errors.Is(err, ErrForged) {
		t.Errorf("with the key of another queue: %v", err)
	}
	// The forgeries above, one with a far higher counter, moved no window.
	for _, d := range [][]byte{d1, d0} {
		if _, err := open(o, d); err != nil {
			t.Fatalf("good record after forgeries: %v", err)
		}
		if _, err := open(o, d); !errors.Is(err, ErrReplayed) {
			t.Errorf("second time: %v", err)
		}
	}
	s.counter = 2 * WindowLen
	far, _ := s.Seal(nil, []byte("far"))
	if _, err := open(o, far); err != nil {
		t.Fatal(err)
	}
	if _, err := open(o, d0); !errors.Is(err, ErrTooOld) {
		t.Errorf("behind the window: %v", err)
	}
}

func TestSpent(t *testing.T) {
	s, _ := pair(t, 1)
	record := make([]byte, 100)
	s.bytes = MaxBytes - uint64(len(record)+wire.TagLen)
	out, err := s.Seal(nil, record)
	if err != nil {
		t.Fatalf("last record: %v", err)
	}
	if s.Sealed() != MaxBytes {
		t.Errorf("sealed %d, want %d", s.Sealed(), uint64(MaxBytes))
	}
	again, err := s.Seal(out, []byte{1})
	if !errors.Is(err, ErrSpent) || len(again) != len(out) {
		t.Errorf("beyond the limit: %d bytes, %v", len(again)-len(out), err)
	}
}

func TestKeySize(t *testing.T) {
	key, iv := testKey()
	if _, err := NewSealer(AES256GCM, iv, iv, 0, 0); !errors.Is(err, ErrKeySize) {
		t.Errorf("short key: %v", err)
	}
	if _, err := NewOpener(AES256GCM, key, key, 0); !errors.Is(err, ErrKeySize) {
		t.Errorf("long IV: %v", err)
	}
	broken := errors.New("broken")
	failing := func([]byte) (AEAD, error) { return nil, broken }
	if _, err := NewSealer(failing, key, iv, 0, 0); !errors.Is(err, broken) {
		t.Errorf("cipher that fails: %v", err)
	}
}

func TestNoAllocation(t *testing.T) {
	s, o := pair(t, 1)
	buf := make([]byte, wire.MaxDatagram)
	n := testing.AllocsPerRun(1000, func() {
		out, err := s.Seal(buf[:0], buf[wire.HeaderLen:][:1400])
		if err != nil {
			t.Fatal(err)
		}
		h, err := wire.ParseHeader(out)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := o.Open(out[wire.HeaderLen:][:0], out, h); err != nil {
			t.Fatal(err)
		}
		if _, err := o.Open(out[wire.HeaderLen:][:0], out, h); err == nil {
			t.Fatal("replayed")
		}
	})
	if n != 0 {
		t.Errorf("%v allocations a record", n)
	}
}

func BenchmarkSeal(b *testing.B) {
	for _, n := range []int{64, 1400, 8900} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			s, _ := pair(b, 1)
			buf := make([]byte, wire.MaxDatagram)
			b.SetBytes(int64(n))
			for b.Loop() {
				s.bytes = 0
				if _, err := s.Seal(buf[:0], buf[wire.HeaderLen:][:n]); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
