package etsi014_test

import (
	"bufio"
	"cmp"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net/http"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/quietline/quietline/etsi014"
)

// batch is a KME of constant keys, as many as asked.
type batch struct{ fixed }

func (*batch) Keys(
	_ context.Context, _ etsi014.Caller, req etsi014.KeyRequest,
) (etsi014.Container, error) {
	var c etsi014.Container
	for range req.Number {
		c.Keys = append(c.Keys, containerOf(32).Keys...)
	}
	return c, nil
}

// drive sends one request again and again over conns kept connections for a
// time and returns requests per second and latencies at 50 and 99 percent.
func drive(
	t testing.TB, w *world, addr, target string, conns int, d time.Duration,
) (perSecond float64, p50, p99 time.Duration) {
	t.Helper()
	text := "GET " + target + " HTTP/1.1\r\nHost: kme\r\n\r\n"
	var mu sync.Mutex
	var all []time.Duration
	var wg sync.WaitGroup
	ready, begin := sync.WaitGroup{}, make(chan struct{})
	for range conns {
		ready.Add(1)
		wg.Go(func() {
			c, err := tls.Dial("tcp", addr, w.tls("tokyo"))
			ready.Done()
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			r, took := bufio.NewReader(c), []time.Duration(nil)
			<-begin
			for end := time.Now().Add(d); time.Now().Before(end); {
				start := time.Now()
				if _, err := io.WriteString(c, text); err != nil {
					t.Error(err)
					return
				}
				resp, err := http.ReadResponse(r, nil)
				if err != nil || resp.StatusCode != 200 {
					t.Error(resp, err)
					return
				}
				if _, err := io.Copy(io.Discard, resp.Body); err != nil {
					t.Error(err)
				}
				took = append(took, time.Since(start))
			}
			mu.Lock()
			all = append(all, took...)
			mu.Unlock()
		})
	}
	ready.Wait()
	close(begin)
	wg.Wait()
	if len(all) == 0 {
		t.Fatal("no request was answered")
	}
	slices.Sort(all)
	return float64(len(all)) / d.Seconds(), all[len(all)/2], all[len(all)*99/100]
}

// bare serves a constant of the same length as the door's answer over the same
// TLS: what net/http and crypto/tls cost alone.
func (w *world) bare(t testing.TB, target string) string {
	t.Helper()
	answer := w.send(t, "tokyo", "GET", target, "").body
	return serve(t, etsi014.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, _ *http.Request) {
		rw.Header().Set("Content-Type", "application/json")
		rw.Header().Set("Content-Length", fmt.Sprint(len(answer)))
		_, _ = io.WriteString(rw, answer)
	}), w.live.Server(), nil))
}

// The door beside a bare handler, interleaved, with a KME that costs nothing.
// What a durable store adds is measured with the real one.
func TestLoad(t *testing.T) {
	if os.Getenv("QUIETLINE_LONG") == "" {
		t.Skip("set QUIETLINE_LONG=1 for the load measurement (40 s)")
	}
	w := newWorld(t, func(c *etsi014.HandlerConfig) { c.KME, c.Observe = &batch{}, nil })
	for _, load := range []struct {
		keys, conns int
		least       float64 // share of the bare handler's requests
	}{{1, 1, 0}, {1, 8, 0}, {1, 64, 0.5}, {128, 8, 0}} {
		target := fmt.Sprintf("%s?number=%d", enc, load.keys)
		bare := w.bare(t, target)
		var door, alone []float64
		for range 4 {
			n, p50, p99 := drive(t, w, w.addr, target, load.conns, time.Second)
			m, b50, b99 := drive(t, w, bare, target, load.conns, time.Second)
			door, alone = append(door, n), append(alone, m)
			t.Logf("%3d keys, %2d connections: door %6.0f/s p50 %v p99 %v, bare %6.0f/s p50 %v p99 %v",
				load.keys, load.conns, n, p50, p99, m, b50, b99)
		}
		share := median(door) / median(alone)
		t.Logf("%3d keys, %2d connections: %.0f requests/s, %.0f keys/s, %.0f %% of bare", load.keys,
			load.conns, median(door), median(door)*float64(load.keys), 100*share)
		if share < load.least {
			t.Errorf("%.0f %% of the bare handler, want %.0f %%", 100*share, 100*load.least)
		}
	}
}

func median[T cmp.Ordered](list []T) T {
	return slices.Sorted(slices.Values(list))[len(list)/2]
}
