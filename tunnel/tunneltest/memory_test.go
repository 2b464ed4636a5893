package tunneltest

import (
	"net/netip"
	"os"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"
)

// resident is the process's memory that is in use now, bytes.
func resident(t *testing.T) int64 {
	t.Helper()
	text, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		t.Fatal(err)
	}
	pages, err := strconv.ParseInt(strings.Fields(string(text))[1], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return pages * int64(os.Getpagesize())
}

// Under a flood both ways, with an epoch a second, memory stays as it was after
// the first moments: ten minutes with the long switch.
func TestMemoryIsFlat(t *testing.T) {
	warm, flat, every := 2*time.Second, 4*time.Second, time.Second
	if os.Getenv("QUIETLINE_LONG") == "1" {
		warm, flat, every = 30*time.Second, 10*time.Minute, 30*time.Second
	}
	sites := kernelPair(t, 0, backends[1], false)
	poll(t, "line up", func() bool {
		return sites[0].line.Stats().PeerAlive && sites[1].line.Stats().PeerAlive
	})
	for i, s := range sites {
		defer flood(t, s.ns, netip.AddrPortFrom(tunAddr[1-i][0].Addr(), 9))()
	}
	look := func() (heap, rss int64) {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return int64(m.HeapAlloc), resident(t)
	}
	time.Sleep(warm)
	heap, rss := look()
	t.Logf("after %v: heap %d KiB, resident %d KiB", warm, heap>>10, rss>>10)
	most, mostRSS := heap, rss
	for end := time.Now().Add(flat); time.Now().Before(end); {
		time.Sleep(every)
		h, r := look()
		most, mostRSS = max(most, h), max(mostRSS, r)
	}
	st := sites[0].line.Stats()
	t.Logf("in %v more: heap at most %d KiB, resident %d KiB; %d packets there, %d epochs", flat,
		most>>10, mostRSS>>10, st.Sent.Packets, st.Handshakes.Epochs)
	if st.Sent.Packets < 1000 || st.Handshakes.Epochs < 2 {
		t.Fatal("there was no load")
	}
	// An epoch has two keys and windows a direction, made and dropped anew: with
	// all that waits for the collector less than a mebibyte. What the collector
	// and its threads' stacks hold beside may be as much as four.
	if most > heap+1<<20 || mostRSS > rss+4<<20 {
		t.Errorf("heap grew by %d KiB, resident memory by %d KiB", (most-heap)>>10, (mostRSS-rss)>>10)
	}
}
