package pad

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/quietline/quietline/secret"
	"github.com/quietline/quietline/tunnel/dudect"
)

// pools are an Out and an In with the same blocks.
func pools(target, blocks, size int) (*Out, *In) {
	o := &Out{target: target, at: rLen}
	in := &In{blocks: map[uint32]*incoming{}}
	rng := rand.New(rand.NewPCG(1, 2))
	for i := range blocks {
		b := make([]byte, size)
		for j := range b {
			b[j] = byte(rng.Uint32())
		}
		in.add(uint32(i+1), secret.Copy(b))
		o.add(&block{uint32(i + 1), secret.Own(b)})
	}
	return o, in
}

var clockZero = time.Date(2026, 11, 22, 0, 0, 0, 0, time.UTC)

func TestBucket(t *testing.T) {
	for _, tt := range []struct{ n, largest, want int }{
		{0, 1408, 128}, {1, 1408, 128}, {126, 1408, 128}, {127, 1408, 512}, {510, 1408, 512},
		{511, 1408, 1408}, {1406, 1408, 1408}, {1407, 1408, 0}, {10, 64, 64}, {200, 512, 512},
		{200, 256, 256}, {300, 256, 0},
	} {
		if got := Bucket(tt.n, tt.largest); got != tt.want {
			t.Errorf("Bucket(%d, %d) = %d, want %d", tt.n, tt.largest, got, tt.want)
		}
	}
	if Largest(1406) != 1408 || Largest(1407) != 1424 {
		t.Errorf("Largest %d, %d", Largest(1406), Largest(1407))
	}
}

// TestTagOfRFC: the tag is Poly1305, RFC 8439 section 2.5.2.
func TestTagOfRFC(t *testing.T) {
	key, _ := hex.DecodeString("85d6be7857556d337f4452fe42d506a80103808afb0db2fd4abff6af4149f51b")
	var got [tagLen]byte
	message := []byte("Cryptographic Forum Research Group")
	tag(&got, key[:16], key[16:], message)
	if hex.EncodeToString(got[:]) != "a8061dc1305136c6c22b8baf0c0127a9" {
		t.Errorf("tag %x", got)
	}
	if !authentic(got[:], key[:16], key[16:], message) {
		t.Error("the true tag is refused")
	}
	for i := range got {
		got[i] ^= 1
		if authentic(got[:], key[:16], key[16:], message) {
			t.Errorf("byte %d changed, and taken", i)
		}
		got[i] ^= 1
	}
}

// TestRoundTrip: records of any length come back, in any order, once; equal
// buckets look alike; pad is wiped at both ends and never used again.
func TestRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		o, in := pools(1<<10, 4, 4096)
		sent := map[string][]byte{}
		used := map[string]bool{}
		var order [][]byte
		for i := 0; ; i++ {
			record := rapid.SliceOfN(rapid.Byte(), 0, 1390).Draw(t, "record")
			p, err := o.Seal(nil, record, 1408, true, clockZero)
			if errors.Is(err, ErrEmpty) {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			if n := len(p) - Overhead; n != Bucket(len(record), 1408) {
				t.Fatalf("record of %d shows %d", len(record), n)
			}
			if place := string(p[4:12]); used[place] {
				t.Fatalf("pad %x twice", place)
			} else {
				used[place] = true
			}
			order, sent[string(p)] = append(order, p), record
		}
		perm := rapid.Permutation(order).Draw(t, "order")
		for _, p := range perm {
			got, err := in.Open([]byte("x"), p)
			if err != nil || !bytes.Equal(got[1:], sent[string(p)]) {
				t.Fatalf("opens as %x, %v", got, err)
			}
			if _, err := in.Open(nil, p); !errors.Is(err, ErrUsed) {
				t.Fatalf("a second time: %v", err)
			}
		}
		if o.left != 0 || len(o.blocks) != 0 || o.used+o.wasted != 4*(4096-rLen) {
			t.Fatalf("left %d, used %d, wasted %d", o.left, o.used, o.wasted)
		}
		if in.used != o.used {
			t.Fatalf("used %d here and %d there", o.used, in.used)
		}
	})
}

// TestWiped: what hid a record is zero at both ends.
func TestWiped(t *testing.T) {
	o, in := pools(1<<10, 1, 4096)
	p, err := o.Seal(nil, []byte("secret"), 1408, true, clockZero)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := in.Open(nil, p); err != nil {
		t.Fatal(err)
	}
	zero := make([]byte, 128+Cost)
	for name, b := range map[string][]byte{"sender": o.blocks[0].bits.Expose(), "receiver": in.blocks[1].bits.Expose()} {
		if !bytes.Equal(b[rLen:rLen+144], zero) || bytes.Equal(b[rLen+144:rLen+288], zero) {
			t.Errorf("%s: not exactly the used pad is wiped", name)
		}
	}
	o.void()
	in.void()
	if _, err := o.Seal(nil, nil, 1408, true, clockZero); !errors.Is(err, ErrEmpty) {
		t.Errorf("void pad seals: %v", err)
	}
	if _, err := in.Open(nil, p); !errors.Is(err, ErrBlock) {
		t.Errorf("void pad opens: %v", err)
	}
}

// TestForgeriesBurnNoPad: every byte changed is found, and the true record
// opens afterwards.
func TestForgeriesBurnNoPad(t *testing.T) {
	o, in := pools(1<<10, 2, 4096)
	p, err := o.Seal(nil, []byte("secret"), 1408, true, clockZero)
	if err != nil {
		t.Fatal(err)
	}
	for i := range p {
		for bit := range 8 {
			bad := bytes.Clone(p)
			bad[i] ^= 1 << bit
			if _, err := in.Open(nil, bad); err == nil {
				t.Fatalf("byte %d bit %d changed, and taken", i, bit)
			}
		}
	}
	for n := range len(p) {
		if _, err := in.Open(nil, p[:n]); err == nil {
			t.Fatalf("cut to %d, and taken", n)
		}
	}
	if got, err := in.Open(nil, p); err != nil || string(got) != "secret" {
		t.Errorf("%q, %v", got, err)
	}
	if in.used != 144 {
		t.Errorf("%d bytes used, want 144", in.used)
	}
}

// TestAdmission: what is left is kept for urgent traffic, step by step.
func TestAdmission(t *testing.T) {
	const block = 16 << 10
	full := 64 * (block - rLen)
	for _, tt := range []struct {
		left  float64 // part of the target
		mark  Mark
		plain error
		large error // urgent
		small error // urgent, smallest bucket
	}{
		{1, Good, nil, nil, nil},
		{0.26, Good, nil, nil, nil},
		{0.24, Low, ErrReserved, nil, nil}, // no key rate: nothing for the rest
		{0.09, Critical, ErrReserved, nil, nil},
		{0.019, Empty, ErrReserved, ErrReserved, nil},
	} {
		o, _ := pools(full, int(64*tt.left+1), block)
		for float64(o.left) > tt.left*float64(full) {
			if o.reserve(144) == nil {
				t.Fatal("no pad")
			}
			o.at, o.left = o.at+144, o.left-144
		}
		if _, m, _ := o.level(0); m != tt.mark {
			t.Errorf("%v: mark %v, want %v", tt.left, m, tt.mark)
		}
		seal := func(n int, urgent bool) error {
			_, err := o.Seal(nil, make([]byte, n), 1408, urgent, clockZero)
			return err
		}
		got := fmt.Sprint(seal(1300, false), seal(1300, true), seal(100, true))
		if want := fmt.Sprint(tt.plain, tt.large, tt.small); got != want {
			t.Errorf("%v: %s, want %s", tt.left, got, want)
		}
	}
}

// TestBucketOfTokens: below the low mark the rest gets the key rate, no more.
func TestBucketOfTokens(t *testing.T) {
	o, _ := pools(64*16<<10, 13, 16<<10) // 20 %
	o.level(1440)                        // ten small records a second
	var sent [4]int
	for second := range sent {
		for ms := range 1000 {
			now := clockZero.Add(time.Duration(second)*time.Second + time.Duration(ms)*time.Millisecond)
			if _, err := o.Seal(nil, make([]byte, 100), 1408, false, now); err == nil {
				sent[second]++
			} else if !errors.Is(err, ErrReserved) {
				t.Fatal(err)
			}
		}
	}
	if diff := cmp.Diff([3]int{10, 10, 10}, [3]int(sent[1:])); diff != "" {
		t.Errorf("records a second (-want +got):\n%s", diff)
	}
}

func TestSizes(t *testing.T) {
	o, _ := pools(1<<10, 1, 4096)
	if _, err := o.Seal(nil, make([]byte, 1407), 1408, true, clockZero); !errors.Is(err, ErrSize) {
		t.Errorf("too large: %v", err)
	}
}

func FuzzOpen(f *testing.F) {
	o, _ := pools(1<<10, 2, 4096)
	p, _ := o.Seal(nil, []byte("secret"), 1408, true, clockZero)
	f.Add(p)
	f.Add(p[:40])
	f.Fuzz(func(t *testing.T, b []byte) {
		_, in := pools(1<<10, 2, 4096)
		got, err := in.Open(nil, b)
		if err == nil && !bytes.Equal(b, p) {
			t.Errorf("%x opens as %x", b, got)
		}
	})
}

func BenchmarkSeal(b *testing.B) {
	for _, n := range []int{100, 500, 1390} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			o, _ := pools(1, 1, 64<<10)
			record, dst := make([]byte, n), make([]byte, 0, 2048)
			b.SetBytes(int64(n))
			b.ReportAllocs()
			for b.Loop() {
				if o.at+1424 > 64<<10 {
					o.at, o.left = rLen, 64<<10 // the work, not the pad, is measured
				}
				if _, err := o.Seal(dst, record, 1408, true, clockZero); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// TestKeyCost prints and holds the tables of docs/handshake.md.
func TestKeyCost(t *testing.T) {
	for _, tt := range []struct{ least, most, bucket, datagram int }{
		{0, 126, 128, 188}, {127, 510, 512, 572}, {511, 1406, 1408, 1468},
	} {
		for _, n := range []int{tt.least, tt.most} {
			o, _ := pools(1, 1, 4096)
			p, err := o.Seal(nil, make([]byte, n), 1408, true, clockZero)
			if err != nil || len(p) != Overhead+tt.bucket || int(o.used) != tt.bucket+Cost ||
				len(p)+32 != tt.datagram {
				t.Errorf("%d bytes: record of %d, %d pad, %v", n, len(p), o.used, err)
			}
		}
		t.Logf("%4d to %4d bytes: ciphertext %4d, pad %4d, datagram %4d", tt.least, tt.most, tt.bucket,
			tt.bucket+Cost, tt.datagram)
	}
	// A GB of full packets, blocks of 16 KiB as they are used up.
	const full, block = 1390, 16 << 10
	o, _ := pools(1, 64, block)
	packets := 0
	for {
		if _, err := o.Seal(nil, make([]byte, 1+full), 1408, true, clockZero); err != nil {
			break
		}
		packets++
	}
	perGB := float64(64*block) / float64(packets*full) * 8e9
	t.Logf("%.2f Gbit of key for 1 GB of packets of %d bytes, %.2f without what blocks waste", perGB/1e9, full,
		float64(o.used)/float64(packets*full)*8)
	if perGB < 8.1e9 || perGB > 8.7e9 {
		t.Errorf("%.3g bits of key for a GB", perGB)
	}
}

// TestTimingOfTags: neither how much of a tag is right nor what is hidden shows
// in time.
func TestTimingOfTags(t *testing.T) {
	o, in := pools(1, 1, 16<<10)
	p, err := o.Seal(nil, make([]byte, 500), 1408, true, clockZero)
	if err != nil {
		t.Fatal(err)
	}
	first, last := bytes.Clone(p), bytes.Clone(p)
	first[len(p)-tagLen] ^= 0x80
	last[len(p)-1] ^= 0x80
	kinds := [2][]byte{first, last}
	var dst []byte
	if x := dudect.Steady(4000, func(k int) { dst, _ = in.Open(dst[:0], kinds[k]) }); math.Abs(x) >= dudect.Limit {
		t.Errorf("t = %.1f between a tag wrong at its first and at its last byte", x)
	}
	plain := [2][]byte{make([]byte, 500), bytes.Repeat([]byte{0xff}, 500)}
	if x := dudect.Steady(4000, func(k int) {
		o.at, o.left = rLen, 1<<20 // the time, not the pad, is of interest
		dst, _ = o.Seal(dst[:0], plain[k], 1408, true, clockZero)
	}); math.Abs(x) >= dudect.Limit {
		t.Errorf("t = %.1f between zeros and ones", x)
	}
}
