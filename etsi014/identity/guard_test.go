package identity_test

import (
	"bufio"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"testing"
	"time"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/etsi014/etsitest"
	"github.com/quietline/quietline/etsi014/identity"
)

// doorOf serves a KME's door for a site on loopback until the test ends.
func doorOf(t *testing.T, live *identity.Live) (addr string) {
	t.Helper()
	h, err := etsi014.NewHandler(etsi014.HandlerConfig{
		KME: &etsitest.KME{Stock: 1000}, Identify: live.Identify,
	})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := etsi014.NewServer(h, live.Server(), nil)
	live.Guard(server)
	done := make(chan error, 1)
	go func() { done <- etsi014.Serve(server, l, etsi014.Bounds{}) }()
	t.Cleanup(func() {
		if err := server.Shutdown(context.WithoutCancel(t.Context())); err != nil {
			t.Error(err)
		}
		<-done
	})
	return l.Addr().String()
}

// wire is one kept connection of an SAE.
type wire struct {
	conn *tls.Conn
	r    *bufio.Reader
}

func dial(t *testing.T, addr string, cfg *tls.Config) *wire {
	t.Helper()
	c, err := tls.Dial("tcp", addr, cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	if err := c.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	return &wire{c, bufio.NewReader(c)}
}

// ask sends a status request and returns the code, or the error of a
// connection that ended.
func (w *wire) ask() (int, error) {
	_, err := io.WriteString(w.conn, "GET /api/v1/keys/b/status HTTP/1.1\r\nHost: kme\r\n\r\n")
	if err != nil {
		return 0, err
	}
	resp, err := http.ReadResponse(w.r, nil)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	_, err = io.Copy(io.Discard, resp.Body)
	return resp.StatusCode, err
}

// A deny list ends a live connection at once, while the client is silent, and
// leaves the others alone.
func TestGuardEndsLiveConnections(t *testing.T) {
	s := newSite(t)
	other := s.ca.Issue(t, etsitest.Leaf{URIs: []string{"urn:quietline:sae:osaka"}})
	s.cfg.Rules = append(s.cfg.Rules, identity.Rule{SAE: "osaka"})
	live := open(t, s.cfg)
	addr := doorOf(t, live)
	denied, kept := dial(t, addr, s.client(s.sae)), dial(t, addr, s.client(other))
	for _, w := range []*wire{denied, kept} {
		if code, err := w.ask(); code != 200 {
			t.Fatalf("got %d, %v", code, err)
		}
	}
	next := s.cfg
	next.Deny = []string{pinOf(s.sae)}
	if err := live.Reload(next); err != nil {
		t.Fatal(err)
	}
	if _, err := denied.r.ReadByte(); err == nil {
		t.Error("the denied connection lives")
	}
	if code, err := kept.ask(); code != 200 {
		t.Errorf("the other connection: %d, %v", code, err)
	}
	if err := live.Reload(s.cfg); err != nil {
		t.Fatal(err)
	}
	if code, err := dial(t, addr, s.client(s.sae)).ask(); code != 200 {
		t.Errorf("after the deny list was emptied: %d, %v", code, err)
	}
}

// Reloads of certificates, authorities and rules under load lose no request.
func TestReloadLosesNoRequest(t *testing.T) {
	s := newSite(t)
	live := open(t, s.cfg)
	addr := doorOf(t, live)
	c, err := etsi014.NewClient(etsi014.ClientConfig{
		URLs: []string{"https://" + addr},
		TLS:  func() *tls.Config { return s.client(s.sae) },
	})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	var mu sync.Mutex
	more := sync.NewCond(&mu)
	asked, failed, stop := 0, false, false
	var load sync.WaitGroup
	load.Go(func() {
		for {
			_, err := c.Status(t.Context(), "b")
			mu.Lock()
			asked++
			if failed = err != nil; failed {
				t.Error(err)
			}
			end, fresh := stop || failed, asked%2 == 0
			more.Broadcast()
			mu.Unlock()
			if end {
				return
			}
			if fresh { // half of the requests come on a new connection
				c.Close()
			}
		}
	})
	for i := range 20 {
		next := s.cfg
		next.Pairs = []identity.Pair{s.pair(t, "kme", etsitest.Leaf{Server: true})}
		next.Rules = append(next.Rules[:1:1], identity.Rule{
			SAE: "x", Value: fmt.Sprintf("urn:x:%d", i),
		})
		if err := live.Reload(next); err != nil {
			t.Error(err)
			break
		}
		mu.Lock()
		for before := asked; asked < before+5 && !failed; { // it goes on under the new state
			more.Wait()
		}
		mu.Unlock()
	}
	mu.Lock()
	stop = true
	mu.Unlock()
	load.Wait()
}
