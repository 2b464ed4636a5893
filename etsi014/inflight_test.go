package etsi014_test

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/quietline/quietline/etsi014"
)

// slow is a KME that serves SAE tokyo only when it is let go.
type slow struct {
	fixed
	entered chan struct{}
	release chan struct{}
}

func (s *slow) Status(
	ctx context.Context, who etsi014.Caller, peer etsi014.SAEID,
) (etsi014.Status, error) {
	if who.SAE == "tokyo" {
		s.entered <- struct{}{}
		select {
		case <-s.release:
		case <-ctx.Done():
			return etsi014.Status{}, ctx.Err()
		}
	}
	return etsi014.Status{Initiator: who.SAE, Target: peer}, nil
}

// An SAE that asks too much at once is told to come again; the others, and
// itself later, are served.
func TestOneSAECannotTakeTheDoor(t *testing.T) {
	const most = 5
	kme := &slow{entered: make(chan struct{}), release: make(chan struct{})}
	w := newWorld(t, func(c *etsi014.HandlerConfig) {
		c.KME, c.Limits.MaxInFlight = kme, most
	})
	var held sync.WaitGroup
	for range most {
		held.Go(func() {
			if _, err := w.client(t, "tokyo").Status(t.Context(), "kochi"); err != nil {
				t.Error(err)
			}
		})
	}
	for range most {
		<-kme.entered
	}
	_, err := w.client(t, "tokyo").Status(t.Context(), "kochi")
	e := new(etsi014.Error)
	if !errors.As(err, &e) || !errors.Is(e, etsi014.ErrDown) || e.RetryAfter != time.Second {
		t.Errorf("one too many: %v", err)
	}
	if _, err := w.client(t, "kochi").Status(t.Context(), "tokyo"); err != nil {
		t.Errorf("another SAE: %v", err)
	}
	close(kme.release)
	held.Wait()
	go func() { <-kme.entered }()
	if _, err := w.client(t, "tokyo").Status(t.Context(), "kochi"); err != nil {
		t.Errorf("afterwards: %v", err)
	}
}

// A KME that does not come back is given up after the door's patience.
func TestSlowKMEIsGivenUp(t *testing.T) {
	kme := &slow{entered: make(chan struct{}, 1)}
	w := newWorld(t, func(c *etsi014.HandlerConfig) {
		c.KME, c.Limits.Timeout = kme, time.Millisecond
	})
	r := w.send(t, "tokyo", "GET", "/api/v1/keys/kochi/status", "")
	if r.code != 503 || r.body != errorBody("key manager cannot serve") {
		t.Errorf("got %d %s", r.code, r.body)
	}
}

// Strangers who shake hands and leave, bodies without end, and clients that
// say nothing do not keep a good client from its keys.
func TestHostileNeighbours(t *testing.T) {
	w := newWorld(t, nil)
	var silent []*tls.Conn
	for range 50 {
		c, err := tls.Dial("tcp", w.addr, w.tls("osaka"))
		if err != nil {
			t.Fatal(err)
		}
		silent = append(silent, c)
		_, err = fmt.Fprintf(c, "POST %s HTTP/1.1\r\nHost: kme\r\nContent-Length: 60000\r\n\r\n{", enc)
		if err != nil {
			t.Fatal(err)
		}
	}
	for range 20 {
		if c, err := tls.Dial("tcp", w.addr, w.tls("anonymous")); err == nil {
			_ = c.Close() // in TLS 1.3 the refusal comes after the handshake
		}
	}
	c := w.client(t, "tokyo")
	for range 20 {
		keys, err := c.Keys(t.Context(), toKochi)
		if err != nil {
			t.Fatal(err)
		}
		keys.Clear()
	}
	for _, c := range silent {
		_ = c.Close()
	}
}
