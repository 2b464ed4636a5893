package etsi014_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/etsi014/etsitest"
)

func TestClientDrawsAndFetches(t *testing.T) {
	w := newWorld(t, nil)
	tokyo, kochi := w.client(t, "tokyo"), w.client(t, "kochi")
	s, err := tokyo.Status(t.Context(), "kochi")
	if err != nil {
		t.Fatal(err)
	}
	want := etsi014.Status{
		SourceKME: "kme-tokyo", TargetKME: "kme-kochi", Initiator: "tokyo", Target: "kochi",
		KeySizeBits: 256, StoredKeys: 1000, MaxKeys: 100000, MaxKeysPerRequest: 128,
		MaxKeySizeBits: 4096, MinKeySizeBits: 64, MaxTargets: 3,
	}
	if diff := cmp.Diff(want, s); diff != "" {
		t.Error(diff)
	}
	drawn, err := tokyo.Keys(t.Context(), etsi014.KeyRequest{
		Targets: []etsi014.SAEID{"kochi", "osaka"}, Number: 3, SizeBits: 512,
	})
	if err != nil {
		t.Fatal(err)
	}
	defer drawn.Clear()
	ids := []etsi014.KeyID{drawn.Keys[2].ID, drawn.Keys[0].ID}
	got, err := kochi.KeysByID(t.Context(), etsi014.IDRequest{Initiator: "tokyo", IDs: ids})
	if err != nil {
		t.Fatal(err)
	}
	defer got.Clear()
	for i, from := range []int{2, 0} {
		if got.Keys[i].ID != drawn.Keys[from].ID ||
			!bytes.Equal(got.Keys[i].Bits.Expose(), drawn.Keys[from].Bits.Expose()) {
			t.Errorf("key %d differs", i)
		}
	}
	one, err := tokyo.Keys(t.Context(), etsi014.KeyRequest{Targets: []etsi014.SAEID{"kochi"}})
	if err != nil || len(one.Keys) != 1 || one.Keys[0].Bits.Len() != 32 {
		t.Errorf("defaults: %v, %v", one, err)
	}
	one.Clear()
}

func TestClientErrors(t *testing.T) {
	w := newWorld(t, nil)
	w.kme.Stock, w.kme.Retry = 1, 3*time.Second
	tokyo := w.client(t, "tokyo")
	keys := func(sae string, req etsi014.KeyRequest) error {
		if len(req.Targets) == 0 {
			req.Targets = []etsi014.SAEID{"a/b"}
		}
		_, err := w.client(t, sae).Keys(t.Context(), req)
		return err
	}
	byID := func(id etsi014.KeyID) error {
		_, err := tokyo.KeysByID(t.Context(), etsi014.IDRequest{
			Initiator: "kochi", IDs: []etsi014.KeyID{id},
		})
		return err
	}
	type ext = []etsi014.Extension
	for name, tc := range map[string]struct{ err, want error }{
		"stranger":       {keys("nobody", etsi014.KeyRequest{}), etsi014.ErrDenied},
		"no certificate": {keys("anonymous", etsi014.KeyRequest{}), etsi014.ErrDenied},
		"empty": {keys("tokyo", etsi014.KeyRequest{Number: 2, SizeBits: 128}),
			etsi014.ErrEmpty},
		"size":   {keys("tokyo", etsi014.KeyRequest{SizeBits: 9}), etsi014.ErrSize},
		"range":  {keys("tokyo", etsi014.KeyRequest{SizeBits: 8}), etsi014.ErrRequest},
		"number": {keys("tokyo", etsi014.KeyRequest{Number: -1}), etsi014.ErrRequest},
		"mandatory": {keys("tokyo", etsi014.KeyRequest{Mandatory: ext{{"acme_x": 1}}}),
			etsi014.ErrMandatory},
		"unencodable": {keys("tokyo", etsi014.KeyRequest{Optional: ext{{"f": func() {}}}}),
			etsi014.ErrRequest},
		"bad SAE": {keys("tokyo", etsi014.KeyRequest{Targets: []etsi014.SAEID{""}}),
			etsi014.ErrRequest},
		"unknown": {byID(etsi014.KeyID{1}), etsi014.ErrUnknownKey},
	} {
		if !errors.Is(tc.err, tc.want) {
			t.Errorf("%s: got %v", name, tc.err)
		}
	}
	e := new(etsi014.Error)
	if err := keys("tokyo", etsi014.KeyRequest{Number: 3}); !errors.As(err, &e) ||
		e.MissingBits != 512 || e.RetryAfter != 3*time.Second {
		t.Errorf("got %+v", e)
	}
	if w.kme.Left() != 1 {
		t.Errorf("%d keys are left", w.kme.Left())
	}
	if _, err := tokyo.Keys(t.Context(), etsi014.KeyRequest{}); !errors.Is(err, etsi014.ErrRequest) {
		t.Errorf("no target: %v", err)
	}
	if _, err := tokyo.KeysByID(t.Context(), etsi014.IDRequest{
		Initiator: "kochi",
	}); !errors.Is(err, etsi014.ErrRequest) {
		t.Errorf("no key_ID: %v", err)
	}
}

func TestNewClientChecks(t *testing.T) {
	cfg := func() *tls.Config { return new(tls.Config) }
	for _, urls := range [][]string{
		nil, {""}, {"http://kme:1"}, {"https://"}, {"https://kme:1?a"}, {"https://u:p@kme"},
		{"https://kme:1", "kme:2"}, {"https://kme:1#x"}, {"https://[::1"},
	} {
		if _, err := etsi014.NewClient(etsi014.ClientConfig{URLs: urls, TLS: cfg}); err == nil {
			t.Errorf("%q was taken", urls)
		} else if strings.Contains(err.Error(), "u:p") {
			t.Errorf("the error shows a password: %v", err)
		}
	}
	if _, err := etsi014.NewClient(etsi014.ClientConfig{URLs: []string{"https://kme"}}); err == nil {
		t.Error("a client without TLS was made")
	}
}

// closedAddr is a loopback address where nobody listens.
func closedAddr(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// pair returns a client of SAE tokyo with two addresses.
func (w *world) pair(t *testing.T, first, second string) *etsi014.Client {
	return newClient(t, etsi014.ClientConfig{
		URLs: []string{"https://" + first, "https://" + second + "/"},
		TLS:  func() *tls.Config { return w.tls("tokyo") },
	})
}

var toKochi = etsi014.KeyRequest{Targets: []etsi014.SAEID{"kochi"}}

// An address that cannot be reached costs no key: the second one is asked.
func TestFailOverBeforeTheRequest(t *testing.T) {
	w := newWorld(t, nil)
	// A listener that breaks every handshake.
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var broken sync.WaitGroup
	broken.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_ = c.Close()
		}
	})
	defer broken.Wait()
	defer l.Close()
	// One whose certificate is of another authority.
	foreign := newWorld(t, nil)
	for name, first := range map[string]string{
		"closed": closedAddr(t), "broken handshake": l.Addr().String(), "wrong CA": foreign.addr,
	} {
		c := w.pair(t, first, w.addr)
		for range 2 {
			before := w.kme.Left()
			keys, err := c.Keys(t.Context(), toKochi)
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			keys.Clear()
			if got := before - w.kme.Left(); got != 1 {
				t.Errorf("%s: %d keys were drawn for one", name, got)
			}
		}
	}
	if foreign.kme.Left() != 1000 {
		t.Error("a KME that was not trusted gave keys")
	}
	_, err = w.pair(t, closedAddr(t), closedAddr(t)).Keys(t.Context(), toKochi)
	if !errors.Is(err, etsi014.ErrDown) {
		t.Errorf("both closed: %v", err)
	}
}

// tap is a KME's door whose answer is lost: the request arrives, the
// connection breaks. It lets the first pass requests through.
func tap(t *testing.T, w *world, pass int32) (addr string, arrived *atomic.Int32) {
	t.Helper()
	arrived = new(atomic.Int32)
	inner, err := etsi014.NewHandler(etsi014.HandlerConfig{KME: w.kme, Identify: w.live.Identify})
	if err != nil {
		t.Fatal(err)
	}
	h := http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if arrived.Add(1) <= pass {
			inner.ServeHTTP(rw, r)
			return
		}
		_, _ = io.Copy(io.Discard, r.Body)
		panic(http.ErrAbortHandler)
	})
	return serve(t, etsi014.NewServer(h, w.live.Server(), nil)), arrived
}

// A lost answer is an error, on a fresh and on a kept connection alike, and is
// never repeated behind the caller's back; only status is.
func TestLostAnswerIsNotRepeated(t *testing.T) {
	w := newWorld(t, nil)
	byID := etsi014.IDRequest{Initiator: "kochi", IDs: []etsi014.KeyID{{1}}}
	for _, pass := range []int32{0, 1} {
		for name, ask := range map[string]func(*etsi014.Client) error{
			"enc_keys": func(c *etsi014.Client) error {
				_, err := c.Keys(t.Context(), toKochi)
				return err
			},
			"dec_keys": func(c *etsi014.Client) error {
				_, err := c.KeysByID(t.Context(), byID)
				return err
			},
		} {
			addr, arrived := tap(t, w, pass)
			c := w.pair(t, addr, w.addr)
			if pass == 1 { // leaves a connection to be kept
				if _, err := c.Status(t.Context(), "kochi"); err != nil {
					t.Fatal(err)
				}
			}
			before := w.kme.Left()
			if err := ask(c); !errors.Is(err, etsi014.ErrDown) {
				t.Errorf("%s, pass %d: got %v", name, pass, err)
			}
			if got := arrived.Load(); got != pass+1 || w.kme.Left() != before {
				t.Errorf("%s, pass %d: %d requests arrived, %d keys left the second address",
					name, pass, got, before-w.kme.Left())
			}
		}
		addr, _ := tap(t, w, pass)
		c := w.pair(t, addr, w.addr)
		for range 2 {
			if _, err := c.Status(t.Context(), "kochi"); err != nil {
				t.Errorf("status, pass %d: %v", pass, err)
			}
		}
	}
}

// Connections are kept, and a renewed certificate is used for the next one.
func TestClientReusesConnections(t *testing.T) {
	w := newWorld(t, nil)
	var dials atomic.Int32
	c := newClient(t, etsi014.ClientConfig{URLs: []string{"https://" + w.addr},
		TLS: func() *tls.Config { dials.Add(1); return w.tls("tokyo") }})
	for range 20 {
		keys, err := c.Keys(t.Context(), toKochi)
		if err != nil {
			t.Fatal(err)
		}
		keys.Clear()
	}
	if got := dials.Load(); got != 1 {
		t.Errorf("%d connections for 20 requests in a row", got)
	}
}

// A call ends with its context, also while the KME is silent.
func TestClientContext(t *testing.T) {
	w := newWorld(t, nil)
	release := make(chan struct{})
	entered := make(chan struct{}, 1)
	w.kme.Fail = func() error {
		entered <- struct{}{}
		<-release
		return etsi014.ErrDown
	}
	ctx, cancel := context.WithCancel(t.Context())
	go func() { <-entered; cancel() }()
	if _, err := w.client(t, "tokyo").Keys(ctx, toKochi); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	close(release)
}

// Many at once: every key goes to one caller.
func TestClientsAtOnce(t *testing.T) {
	w := newWorld(t, nil)
	c := w.client(t, "tokyo")
	var mu sync.Mutex
	seen := map[etsi014.KeyID]bool{}
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 25 {
				keys, err := c.Keys(t.Context(), etsi014.KeyRequest{
					Targets: toKochi.Targets, Number: 2,
				})
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				for _, k := range keys.Keys {
					seen[k.ID] = true
				}
				mu.Unlock()
				keys.Clear()
			}
		})
	}
	wg.Wait()
	if len(seen) != 400 || w.kme.Left() != 600 {
		t.Errorf("%d keys seen, %d left", len(seen), w.kme.Left())
	}
}

// BenchmarkKeys is one key of 256 bits over kept mutual TLS.
func BenchmarkKeys(b *testing.B) {
	w := newWorld(b, nil)
	w.kme = &etsitest.KME{}
	h, err := etsi014.NewHandler(etsi014.HandlerConfig{
		KME: &endless{}, Identify: w.live.Identify,
	})
	if err != nil {
		b.Fatal(err)
	}
	addr := serve(b, etsi014.NewServer(h, w.live.Server(), nil))
	c := newClient(b, etsi014.ClientConfig{
		URLs: []string{"https://" + addr}, TLS: func() *tls.Config { return w.tls("tokyo") },
	})
	b.ReportAllocs()
	for b.Loop() {
		keys, err := c.Keys(b.Context(), toKochi)
		if err != nil {
			b.Fatal(err)
		}
		keys.Clear()
	}
}

// endless is a KME of constant keys.
type endless struct{ fixed }

func (*endless) Keys(
	context.Context, etsi014.Caller, etsi014.KeyRequest,
) (etsi014.Container, error) {
	return containerOf(32), nil
}
