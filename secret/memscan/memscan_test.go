package memscan_test

import (
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/quietline/quietline/secret"
	"github.com/quietline/quietline/secret/memscan"
)

// plant fills a new heap buffer of n bytes with random bytes. What it returns
// is the only copy: inlined, a short buffer would lie in the caller's stack,
// and the stack leaves a copy behind each time it grows.
//
//go:noinline
func plant(n int) []byte {
	b := make([]byte, n)
	_, _ = rand.Read(b)
	return b
}

func scan(t *testing.T, needles ...memscan.Needle) memscan.Report {
	t.Helper()
	r, err := memscan.Scan(needles...)
	if err != nil {
		t.Fatal(err)
	}
	if r.Scanned < 1<<19 { // the least that a Go process has
		t.Fatalf("scanned %d bytes only", r.Scanned)
	}
	return r
}

func want(t *testing.T, needle memscan.Needle, raw, base64 int) {
	t.Helper()
	c := scan(t, needle).Counts[0]
	if c.Raw != raw || c.Base64 != base64 || len(c.Where) != min(8, raw+base64) {
		t.Errorf("found %d raw, %d base64 %v; want %d, %d", c.Raw, c.Base64, c.Where, raw, base64)
	}
}

func TestFindsAPlantedCopyAndNoneAfterClear(t *testing.T) {
	for _, n := range []int{memscan.MinLen, 31, 32, 33, 4096} {
		key := plant(n)
		needle := memscan.Hide(key)
		want(t, needle, 1, 0)
		second := slices.Clone(key)
		want(t, needle, 2, 0)
		text := base64.StdEncoding.AppendEncode(nil, key)
		want(t, needle, 2, 1)
		secret.Wipe(second)
		secret.Wipe(text)
		want(t, needle, 1, 0)
		secret.Wipe(key)
		want(t, needle, 0, 0)
	}
}

func TestFindsTheCopiesOfACarelessHandler(t *testing.T) {
	key := plant(32)
	needle := memscan.Hide(key)
	answer, err := json.Marshal(map[string]any{"key": key})
	if err != nil {
		t.Fatal(err)
	}
	secret.Wipe(key)
	clear(answer)
	runtime.GC()
	c := scan(t, needle).Counts[0]
	if c.Base64 == 0 {
		t.Error("encoding/json left no copy in its pooled buffer: the scan misses free memory")
	}
	runtime.KeepAlive(answer)
}

// TestFindsCopiesAcrossWindows plants copies at and around every edge of the
// windows in which memory is read, wherever they fall.
func TestFindsCopiesAcrossWindows(t *testing.T) {
	const size = 3 << 20
	b, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE,
		unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(b)
	key := plant(301) // longer than the registers a preempted copy leaves on a stack
	needle := memscan.Hide(key)
	copies := 0
	for at := 0; at+len(key) <= size; at += 311 {
		copy(b[at:], key)
		copies++
	}
	secret.Wipe(key)
	want(t, needle, copies, 0)
}

func TestCountsEachNeedleByItself(t *testing.T) {
	keys := [][]byte{plant(32), plant(32), plant(32)}
	var needles []memscan.Needle
	for _, k := range keys {
		needles = append(needles, memscan.Hide(k))
	}
	secret.Wipe(keys[1])
	r := scan(t, needles...)
	for i, wantRaw := range []int{1, 0, 1} {
		if r.Counts[i].Raw != wantRaw {
			t.Errorf("needle %d: %d raw copies, want %d", i, r.Counts[i].Raw, wantRaw)
		}
	}
	if raw, text := r.Total(); raw != 2 || text != 0 {
		t.Errorf("total %d raw, %d base64; want 2, 0", raw, text)
	}
	runtime.KeepAlive(keys)
}

func TestLockedMemoryIsNotShown(t *testing.T) {
	s, err := secret.NewLocked(32)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Clear()
	_, _ = rand.Read(s.Expose())
	needle := memscan.Hide(s.Expose())
	r := scan(t, needle)
	if r.Unreadable == 0 {
		t.Skip("the kernel gave pinned pages, which the process itself can read")
	}
	if r.Counts[0].Raw != 0 || r.Unreadable != int64(os.Getpagesize()) {
		t.Errorf("%+v: want no copy and one page unreadable", r)
	}
}

func TestHideRefusesShortNeedles(t *testing.T) {
	defer func() {
		if text, _ := recover().(string); !strings.Contains(text, "at least 8") {
			t.Errorf("short needle: %q", text)
		}
	}()
	memscan.Hide(make([]byte, memscan.MinLen-1))
}

func BenchmarkScan(b *testing.B) {
	needle := memscan.Hide(plant(32))
	for b.Loop() {
		r, err := memscan.Scan(needle)
		if err != nil {
			b.Fatal(err)
		}
		b.SetBytes(r.Scanned)
	}
}
