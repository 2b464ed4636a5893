package distill

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/quietline/quietline/secret"
)

// authSeed has so many pads, each of which tells its index.
func authSeed(pads int) []byte {
	b := make([]byte, 32+16*pads)
	for i := range 32 {
		b[i] = byte(i)
	}
	for i := range pads {
		binary.LittleEndian.PutUint64(b[32+16*i:], uint64(1000+i))
	}
	return b
}

func newAuth(t testing.TB, pads int) (*AuthFile, string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "auth")
	if err := CreateAuthFile(path, authSeed(pads)); err != nil {
		t.Fatal(err)
	}
	return reopen(t, path), path
}

func reopen(t testing.TB, path string) *AuthFile {
	t.Helper()
	f, err := OpenAuthFile(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	return f
}

// Whatever is asked for in whatever order, over restarts: no pad comes twice,
// and none comes to the sender it is not for.
func TestPadsComeOnce(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(rt *rapid.T) {
		dir, err := os.MkdirTemp("", "auth")
		if err != nil {
			rt.Fatal(err)
		}
		defer os.RemoveAll(dir)
		path := filepath.Join(dir, "auth")
		if err := CreateAuthFile(path, authSeed(96)); err != nil {
			rt.Fatal(err)
		}
		f, err := OpenAuthFile(path)
		if err != nil {
			rt.Fatal(err)
		}
		defer func() { _ = f.Close() }()
		seen := map[[16]byte]bool{}
		seq := uint64(0)
		for range rapid.IntRange(1, 10).Draw(rt, "steps") {
			switch rapid.IntRange(0, 5).Draw(rt, "step") {
			case 0:
				_ = f.Close()
				if f, err = OpenAuthFile(path); err != nil {
					rt.Fatal(err)
				}
			case 1:
				seq++
				bits := bytes.Repeat([]byte{byte(seq), 1, byte(seq >> 8)}, 32)
				for i := range 6 {
					bits[16*i] = byte(200 + i)
				}
				if err := f.Add(5, seq, bits); err != nil {
					rt.Fatal(err)
				}
			default:
				name := PadName{0, 0, rapid.Uint32Range(0, 100).Draw(rt, "index")}
				if s := rapid.Uint64Range(0, seq).Draw(rt, "segment"); s > 0 {
					name = PadName{5, s, rapid.Uint32Range(0, 7).Draw(rt, "index")}
				}
				before := f.Left()
				peek, peekErr := f.Peek(name)
				pad, err := f.Take(name)
				switch {
				case !errors.Is(err, peekErr) || peek != pad:
					rt.Fatalf("peek gives %x, %v; take %x, %v", peek, peekErr, pad, err)
				case err == nil && (seen[pad] || pad == [16]byte{}):
					rt.Fatalf("pad %v comes twice", name)
				case err == nil && f.Left() >= before:
					rt.Fatalf("%d bits left, then %d", before, f.Left())
				case err == nil:
					seen[pad] = true
				case !errors.Is(err, ErrPadUsed) && !errors.Is(err, ErrPadUnknown):
					rt.Fatal(err)
				}
			}
		}
	})
}

func TestTakeMarksBefore(t *testing.T) {
	t.Parallel()
	f, _ := newAuth(t, 96)
	if _, err := f.Take(PadName{Index: 7}); err != nil {
		t.Fatal(err)
	}
	for index, want := range map[uint32]error{0: ErrPadUsed, 6: ErrPadUsed, 7: ErrPadUsed,
		5: nil, 9: nil, 96: ErrPadUnknown} {
		if _, err := f.Take(PadName{Index: index}); !errors.Is(err, want) {
			t.Errorf("index %d: %v, want %v", index, err, want)
		}
	}
	if _, err := f.Take(PadName{Generation: 3, Index: 1}); !errors.Is(err, ErrPadUnknown) {
		t.Errorf("unknown segment: %v", err)
	}
}

// What was given out is on disk as used before it is given out, and gone.
func TestUsedPadsLeaveTheFile(t *testing.T) {
	t.Parallel()
	f, path := newAuth(t, 96)
	want := make([]byte, 16)
	binary.LittleEndian.PutUint64(want, 1004)
	if raw, _ := os.ReadFile(path); !bytes.Contains(raw, want) {
		t.Fatal("the test looks for the wrong bytes")
	}
	pad, err := f.Take(PadName{Index: 4})
	if err != nil || !bytes.Equal(pad[:], want) {
		t.Fatalf("pad %x, %v", pad, err)
	}
	raw, err := os.ReadFile(path)
	if err != nil || bytes.Contains(raw, want) {
		t.Errorf("used pad is still in the file (%v)", err)
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
}

func TestPoolSurvivesRestart(t *testing.T) {
	t.Parallel()
	f, path := newAuth(t, 96)
	if err := f.Add(3, 4, make([]byte, 96)); err != nil {
		t.Fatal(err)
	}
	for _, n := range []PadName{{0, 0, 3}, {0, 0, 2}, {3, 4, 0}} {
		if _, err := f.Take(n); err != nil {
			t.Fatal(err)
		}
	}
	segments, point := f.Segments(), f.Point(Bob)
	_ = f.Close()
	again := reopen(t, path)
	if diff := cmp.Diff(segments, again.Segments()); diff != "" || again.Point(Bob) != point {
		t.Errorf("after restart: %s", diff)
	}
}

func TestFailedWriteGivesNothing(t *testing.T) {
	t.Parallel()
	f, path := newAuth(t, 96)
	// The folder goes away: the write before the pad is given out fails.
	if err := os.RemoveAll(filepath.Dir(path)); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if pad, err := f.Take(PadName{Index: 1}); err == nil || pad != [16]byte{} {
			t.Errorf("pad %x, %v", pad, err)
		}
	}
	if err := f.Add(1, 1, make([]byte, 48)); err == nil {
		t.Error("added to a pool that cannot be saved")
	}
}

func TestPoolIsLocked(t *testing.T) {
	t.Parallel()
	f, path := newAuth(t, 96)
	if _, err := OpenAuthFile(path); err == nil || !strings.Contains(err.Error(), "in use") {
		t.Errorf("second open: %v", err)
	}
	_ = f.Close()
	if _, err := f.Take(PadName{}); err == nil {
		t.Error("take after close")
	}
	reopen(t, path)
}

func TestCreateRefuses(t *testing.T) {
	t.Parallel()
	_, path := newAuth(t, 96)
	if err := CreateAuthFile(path, authSeed(96)); !errors.Is(err, os.ErrExist) {
		t.Errorf("over a pool: %v", err)
	}
	if err := CreateAuthFile(path+"2", authSeed(95)); err == nil {
		t.Error("a short seed was taken")
	}
}

func TestOpenRefuses(t *testing.T) {
	t.Parallel()
	_, path := newAuth(t, 96)
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	newer := append([]byte(nil), good...)
	newer[6] = 2
	for name, raw := range map[string][]byte{"empty": nil, "other": []byte("hello, this is text"),
		"cut": good[:len(good)-1], "long": append(good[:len(good):len(good)], 0), "newer": newer} {
		other := filepath.Join(t.TempDir(), name)
		if err := secret.WriteFile(other, raw); err != nil {
			t.Fatal(err)
		}
		if _, err := OpenAuthFile(other); err == nil {
			t.Errorf("%s: opened", name)
		} else if name == "newer" && !strings.Contains(err.Error(), "version is 2") {
			t.Error(err)
		}
	}
	open := filepath.Join(t.TempDir(), "open")
	if err := secret.WriteFileMode(open, good, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenAuthFile(open); !errors.Is(err, secret.ErrExposed) {
		t.Errorf("readable by others: %v", err)
	}
}

func TestSegmentsAreBounded(t *testing.T) {
	t.Parallel()
	f, _ := newAuth(t, 96)
	for i := range uint64(maxSegments + 5) {
		if err := f.Add(1, i, make([]byte, 48)); err != nil {
			t.Fatal(err)
		}
	}
	s := f.Segments()
	if len(s) != maxSegments || s[0].Generation != 0 || s[1].Seq != 6 {
		t.Errorf("%d segments, first %+v %+v", len(s), s[0], s[1])
	}
	if err := f.Add(1, 260, make([]byte, 48)); err == nil {
		t.Error("one block was added twice")
	}
	if err := f.Add(1, 999, make([]byte, 40)); err == nil {
		t.Error("half a group was added")
	}
}

// A pool put back from a copy would use pads again. The peer has seen them.
func TestRolledBackPoolIsRefused(t *testing.T) {
	t.Parallel()
	l := newLink(t, tinyConfig(), clean, 21)
	path := l.auth[Alice].path
	old, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	l.tamper = func(_ Role, raw []byte) [][]byte {
		if raw[0] == kindAck { // before the session gives pads back
			return nil
		}
		return [][]byte{raw}
	}
	l.run(1)
	_ = l.auth[Alice].Close()
	if err := secret.WriteFile(path, old); err != nil {
		t.Fatal(err)
	}
	l.auth[Alice] = reopen(t, path)
	l.tamper = nil
	l.restart(1000)
	l.run(1)
	if !errors.Is(l.errs[Alice], ErrRolledBack) || l.auth[Alice].Left() != 3072*128 {
		t.Errorf("error is %v, %d bits left", l.errs[Alice], l.auth[Alice].Left())
	}
}

// However many tags were lost on the way or forged, the ends find together.
func TestLostTagsDoNotPartTheEnds(t *testing.T) {
	t.Parallel()
	l := newLink(t, tinyConfig(), clean, 22)
	for i := range uint32(100) { // bob's accepts that alice never saw
		if _, err := l.auth[Bob].Take(PadName{Index: 3*i + 2}); err != nil {
			t.Fatal(err)
		}
	}
	l.restart(50)
	l.run(1)
	l.quiet()
	if diff := cmp.Diff(l.auth[Alice].Segments(), l.auth[Bob].Segments()); diff != "" {
		t.Error(diff)
	}
}

func TestForgedTagsCostNothing(t *testing.T) {
	t.Parallel()
	l := newLink(t, tinyConfig(), clean, 24)
	l.tamper = func(_ Role, raw []byte) [][]byte {
		if raw[0] == kindAmplify {
			raw = bytes.Clone(raw)
			raw[len(raw)-1]++
		}
		return [][]byte{raw}
	}
	before := l.auth[Bob].Left()
	for i := range uint64(3) {
		l.restart(100 + 100*i)
		l.run(1)
		if !errors.Is(l.errs[Bob], ErrAuthentication) {
			t.Fatalf("bob: %v", l.errs[Bob])
		}
	}
	if got := l.auth[Bob].Left(); got != before {
		t.Errorf("forged tags cost bob %d bits", before-got)
	}
}

func TestNoSharedKeyEndsSession(t *testing.T) {
	t.Parallel()
	l := newLink(t, tinyConfig(), clean, 23)
	for _, i := range []uint32{3070, 3071} {
		if _, err := l.auth[Alice].Take(PadName{Index: i}); err != nil {
			t.Fatal(err)
		}
		if _, err := l.auth[Bob].Take(PadName{Index: i}); err != nil {
			t.Fatal(err)
		}
	}
	l.restart(60)
	l.run(1)
	l.check()
	if !errors.Is(l.errs[Alice], ErrAuthEmpty) || l.auth[Alice].Left() != 0 {
		t.Errorf("alice: %v", l.errs[Alice])
	}
	if len(l.alarms[Alice]) != 1 || l.alarms[Alice][0].Alarm != "authentication key unusable" {
		t.Errorf("alarms: %+v", l.alarms[Alice])
	}
}

func FuzzAuthFile(f *testing.F) {
	path := filepath.Join(f.TempDir(), "auth")
	if err := CreateAuthFile(path, authSeed(96)); err != nil {
		f.Fatal(err)
	}
	good, err := os.ReadFile(path)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add(good[:60])
	f.Fuzz(func(t *testing.T, raw []byte) {
		p := &AuthFile{}
		if p.parse(raw) != nil {
			return
		}
		// What parses is written back as it was.
		p.path = filepath.Join(t.TempDir(), "again")
		if err := p.save(); err != nil {
			t.Fatal(err)
		}
		again, err := os.ReadFile(p.path)
		if err != nil || !bytes.Equal(again, raw) {
			t.Fatalf("%d bytes become %d: %v", len(raw), len(again), err)
		}
		_ = p.Left()
	})
}
