package identity_test

import (
	"bytes"
	"context"
	"log/slog"
	"os"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/quietline/quietline/etsi014/etsitest"
	"github.com/quietline/quietline/etsi014/identity"
)

// syncBuffer is a log that one goroutine writes and another reads.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// expiry is how a test tells which certificate is loaded.
func expiry(l *identity.Live) time.Time { return l.Stats().Expires }

// A changed file is loaded after it has been quiet for one look; half a pair
// leaves the old state until the other half is there.
func TestFollow(t *testing.T) {
	s := newSite(t) // outside the bubble, whose clock is another one
	dir2 := t.TempDir()
	until := time.Now().Add(5 * time.Hour).Truncate(time.Second)
	next := s.ca.Issue(t, etsitest.Leaf{Server: true, To: until, From: time.Unix(0, 0)})
	cert2, key2 := etsitest.WriteFiles(t, dir2, "kme", next)
	crl := s.ca.Revoke(t, until, s.sae.Leaf)
	read := func(path string) []byte {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	// The bubble's clock begins in the year 2000, so its certificates must too.
	first := s.ca.Issue(t, etsitest.Leaf{Server: true, From: time.Unix(0, 0)})
	etsitest.WriteFiles(t, s.dir, "kme", first)
	s.cfg.CRLs = []string{s.dir + "/list.crl"}
	etsitest.WriteFile(t, s.cfg.CRLs[0], s.ca.Revoke(t, until))
	s.cfg.DenyFiles = []string{s.dir + "/denied"}
	etsitest.WriteFile(t, s.cfg.DenyFiles[0], nil)

	synctest.Test(t, func(t *testing.T) {
		var log syncBuffer
		live := open(t, s.cfg)
		old := expiry(live)
		ctx, cancel := context.WithCancel(t.Context())
		gone := make(chan struct{})
		go func() {
			live.Follow(ctx, time.Second, slog.New(slog.NewTextHandler(&log, nil)))
			close(gone)
		}()
		looks := func(n int) {
			time.Sleep(time.Duration(n)*time.Second + time.Millisecond)
			synctest.Wait()
		}
		looks(3)
		if log.String() != "" {
			t.Errorf("loaded without a change: %s", log.String())
		}
		etsitest.WriteFile(t, s.cfg.Pairs[0].Cert, read(cert2))
		looks(1)
		if log.String() != "" {
			t.Errorf("loaded at the first look: %s", log.String())
		}
		looks(5)
		if n := strings.Count(log.String(), "not loaded"); n != 1 || !expiry(live).Equal(old) {
			t.Errorf("half a pair: %d complaints: %s", n, log.String())
		}
		etsitest.WriteFile(t, s.cfg.Pairs[0].Key, read(key2))
		looks(2)
		if !expiry(live).Equal(until) {
			t.Errorf("the new pair is not loaded: %s", log.String())
		}
		etsitest.WriteFile(t, s.cfg.CRLs[0], crl)
		looks(2)
		if live.Stats().Revoked != 1 {
			t.Errorf("the new CRL is not loaded: %s", log.String())
		}
		etsitest.WriteFile(t, s.cfg.DenyFiles[0], []byte(pinOf(s.sae)))
		looks(2)
		if live.Stats().Denied != 1 {
			t.Errorf("the new deny list is not loaded: %s", log.String())
		}
		if err := os.Remove(s.cfg.CA); err != nil {
			t.Fatal(err)
		}
		looks(2)
		if n := strings.Count(log.String(), "not loaded"); n != 2 || live.Stats().Revoked != 1 {
			t.Errorf("missing CA file: %d complaints: %s", n, log.String())
		}
		// A Reload with other files makes those the ones that are watched.
		other := s.cfg
		other.CA, other.CRLs, other.DenyFiles = s.dir+"/ca2.crt", nil, nil
		etsitest.WriteFile(t, other.CA, s.ca.PEM())
		if err := live.Reload(other); err != nil {
			t.Fatal(err)
		}
		looks(3)
		etsitest.WriteFile(t, other.CA, []byte("x"))
		looks(2)
		if n := strings.Count(log.String(), "not loaded"); n != 3 {
			t.Errorf("after Reload: %d complaints: %s", n, log.String())
		}
		// A change right after a Reload, before Follow looked again, counts too.
		if err := live.Reload(s.cfg); err == nil {
			t.Error("loaded without a CA file")
		}
		etsitest.WriteFile(t, other.CA, s.ca.PEM())
		if err := live.Reload(other); err != nil {
			t.Fatal(err)
		}
		etsitest.WriteFile(t, other.CA, []byte("y"))
		looks(2)
		if n := strings.Count(log.String(), "not loaded"); n != 4 {
			t.Errorf("right after Reload: %d complaints: %s", n, log.String())
		}
		cancel()
		<-gone
	})
}
