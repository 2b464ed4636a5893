package daemon

import (
	"bufio"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/quietline/quietline/etsi014"
)

// rate is what a run of requests came to.
type rate struct {
	perSecond float64
	p50, p99  time.Duration
}

func (r rate) String() string {
	return fmt.Sprintf("%6.0f/s p50 %7.2f ms p99 %7.2f ms", r.perSecond, ms(r.p50), ms(r.p99))
}

func ms(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

func rateOf(took []time.Duration, d time.Duration) rate {
	if len(took) == 0 {
		return rate{}
	}
	slices.Sort(took)
	return rate{float64(len(took)) / d.Seconds(), took[len(took)/2], took[len(took)*99/100]}
}

// drive sends requests over kept connections for a time, or until next has no
// more of them.
func drive(t *testing.T, addr string, cfg *tls.Config, conns int, d time.Duration,
	next func() (request string, ok bool)) rate {
	t.Helper()
	var mu sync.Mutex
	var all []time.Duration
	var ready, done sync.WaitGroup
	begin := make(chan struct{})
	for range conns {
		ready.Add(1)
		done.Go(func() {
			c, err := tls.Dial("tcp", addr, cfg)
			ready.Done()
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			<-begin
			took := sustain(t, c, time.Now().Add(d), next)
			mu.Lock()
			all = append(all, took...)
			mu.Unlock()
		})
	}
	ready.Wait()
	start := time.Now()
	close(begin)
	done.Wait()
	return rateOf(all, time.Since(start))
}

// sustain sends one request after the other on one connection.
func sustain(t *testing.T, c net.Conn, end time.Time,
	next func() (string, bool)) (took []time.Duration) {
	r := bufio.NewReader(c)
	for time.Now().Before(end) {
		text, ok := next()
		if !ok {
			return took
		}
		start := time.Now()
		if _, err := io.WriteString(c, text); err != nil {
			t.Error(err)
			return took
		}
		resp, err := http.ReadResponse(r, nil)
		if err != nil {
			t.Error(err)
			return took
		}
		body, err := io.ReadAll(resp.Body)
		if err != nil || resp.StatusCode != http.StatusOK {
			t.Errorf("%s %.200s %v", resp.Status, body, err)
			return took
		}
		took = append(took, time.Since(start))
	}
	return took
}

// always is a request without an end.
func always(target string) func() (string, bool) {
	text := "GET " + target + " HTTP/1.1\r\nHost: kme\r\n\r\n"
	return func() (string, bool) { return text, true }
}

const (
	encPath = "/api/v1/keys/sae-kochi/enc_keys"
	decPath = "/api/v1/keys/sae-tokyo/dec_keys"
)

// bare serves an answer of that length with net/http and crypto/tls and
// nothing of ours: the same certificate, the same demand for one.
func (l *lit) bare(t *testing.T, length int) (addr string) {
	t.Helper()
	k := l.tokyo.KME
	pair, err := tls.LoadX509KeyPair(k.Certificate, k.Key)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	text, err := os.ReadFile(k.ClientCA)
	if err != nil || !roots.AppendCertsFromPEM(text) {
		t.Fatal(err)
	}
	answer := strings.Repeat("x", length)
	s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		w.Header().Set("Content-Length", fmt.Sprint(len(answer)))
		_, _ = io.WriteString(w, answer)
	}), TLSConfig: &tls.Config{Certificates: []tls.Certificate{pair}, ClientCAs: roots,
		ClientAuth: tls.RequireAndVerifyClientCert, SessionTicketsDisabled: true,
		NextProtos: []string{"http/1.1"}}}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- s.ServeTLS(listener, "", "") }()
	t.Cleanup(func() {
		_ = s.Close()
		if err := <-done; !errors.Is(err, http.ErrServerClosed) {
			t.Error(err)
		}
	})
	return listener.Addr().String()
}

// answer is the body of one request at a door.
func answer(t *testing.T, addr string, cfg *tls.Config, target string) []byte {
	t.Helper()
	c, err := tls.Dial("tcp", addr, cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: kme\r\n\r\n", target); err != nil {
		t.Fatal(err)
	}
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		t.Fatal(err)
	}
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return body
}

// rounds of each measurement: the door, then the bare handler, and again; the
// medians are compared.
const rounds = 5

// TestMeasureDoor measures the whole key manager, with its durable store and
// audit log, beside a bare handler. QUIETLINE_LONG=1, -v, two minutes.
func TestMeasureDoor(t *testing.T) {
	if os.Getenv("QUIETLINE_LONG") == "" {
		t.Skip("set QUIETLINE_LONG=1 to measure the door (2 min)")
	}
	l := newLit(t, 3000, 64<<10, nil)
	tokyo := l.certificates(t, "sae-tokyo").Client()
	kochi := l.certificates(t, "sae-kochi").Client()
	tokyo.ServerName, kochi.ServerName = "127.0.0.1", "127.0.0.1"
	one := l.bare(t, len(answer(t, l.tokyoDoor, tokyo, encPath)))
	batch := l.bare(t, len(answer(t, l.tokyoDoor, tokyo, encPath+"?number=128")))
	for _, conns := range []int{1, 8, 64} {
		compare(t, fmt.Sprintf("enc_keys, 1 key, %d connections", conns), 1,
			func(t *testing.T) rate {
				return drive(t, l.tokyoDoor, tokyo, conns, time.Second, always(encPath))
			},
			func(t *testing.T) rate { return drive(t, one, tokyo, conns, time.Second, always(encPath)) })
	}
	for _, conns := range []int{1, 8, 64} {
		compare(t, fmt.Sprintf("dec_keys, 1 key, %d connections", conns), 1,
			func(t *testing.T) rate {
				return drive(t, l.kochiDoor, kochi, conns, time.Second, collecting(l.drawn(t, 6000)))
			},
			func(t *testing.T) rate { return drive(t, one, kochi, conns, time.Second, always(encPath)) })
	}
	for _, conns := range []int{1, 8} {
		many := always(encPath + "?number=128")
		compare(t, fmt.Sprintf("enc_keys, 128 keys, %d connections", conns), 128,
			func(t *testing.T) rate { return drive(t, l.tokyoDoor, tokyo, conns, time.Second, many) },
			func(t *testing.T) rate { return drive(t, batch, tokyo, conns, time.Second, many) })
	}
	compare(t, "full handshakes, 8 at once", 0,
		func(t *testing.T) rate { return handshakes(t, l.tokyoDoor, tokyo) },
		func(t *testing.T) rate { return handshakes(t, one, tokyo) })
}

// compare runs both in turn and logs every round and the medians.
func compare(t *testing.T, name string, keys int, door, bare func(*testing.T) rate) {
	t.Run(name, func(t *testing.T) {
		var a, b []rate
		for i := range rounds {
			a, b = append(a, door(t)), append(b, bare(t))
			t.Logf("round %d: door %v; bare %v", i+1, a[i], b[i])
		}
		middle := func(list []rate) rate {
			slices.SortFunc(list, func(x, y rate) int { return int(x.perSecond - y.perSecond) })
			return list[len(list)/2]
		}
		d, m := middle(a), middle(b)
		t.Logf("median: door %v; bare %v; %.0f %% of bare; %.0f keys/s", d, m,
			100*d.perSecond/m.perSecond, d.perSecond*float64(keys))
	})
}

// drawn are key_IDs that kochi may collect, once each.
func (l *lit) drawn(t *testing.T, n int) (ids []etsi014.KeyID) {
	t.Helper()
	c := l.client(t, "sae-tokyo", l.tokyoDoor)
	defer c.Close()
	for len(ids) < n {
		got, err := c.Keys(t.Context(), etsi014.KeyRequest{
			Targets: []etsi014.SAEID{"sae-kochi"}, Number: 128})
		if err != nil {
			t.Fatal(err)
		}
		for _, k := range got.Keys {
			ids = append(ids, k.ID)
		}
		got.Clear()
	}
	return ids
}

// collecting asks for each key once.
func collecting(ids []etsi014.KeyID) func() (string, bool) {
	var at atomic.Int64
	return func() (string, bool) {
		i := int(at.Add(1)) - 1
		if i >= len(ids) {
			return "", false
		}
		return fmt.Sprintf("GET %s?key_ID=%v HTTP/1.1\r\nHost: kme\r\n\r\n", decPath, ids[i]), true
	}
}

// handshakes opens connections, sends one request that costs no key manager
// anything, and closes: in TLS 1.3 only an answer shows that the server took
// the certificate.
func handshakes(t *testing.T, addr string, cfg *tls.Config) rate {
	t.Helper()
	var mu sync.Mutex
	var all []time.Duration
	var done sync.WaitGroup
	begin := time.Now()
	for range 8 {
		done.Go(func() {
			for time.Since(begin) < time.Second {
				start := time.Now()
				answer(t, addr, cfg, "/")
				mu.Lock()
				all = append(all, time.Since(start))
				mu.Unlock()
			}
		})
	}
	done.Wait()
	return rateOf(all, time.Since(begin))
}

// TestCollecting: each key_ID is asked once, and then no more.
func TestCollecting(t *testing.T) {
	next := collecting(make([]etsi014.KeyID, 2))
	for i, want := range []bool{true, true, false} {
		if text, ok := next(); ok != want || ok != strings.HasPrefix(text, "GET "+decPath) {
			t.Errorf("request %d: %q, %v", i, text, ok)
		}
	}
}
