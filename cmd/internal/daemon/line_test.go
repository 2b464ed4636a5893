package daemon

import (
	"context"
	"path/filepath"
	"testing"
	"time"

	"github.com/quietline/quietline/cmd/internal/config"
	"github.com/quietline/quietline/cmd/internal/control"
	"github.com/quietline/quietline/etsi014/etsitest"
	"github.com/quietline/quietline/tunnel/rekey"
	"github.com/quietline/quietline/tunnel/tunneltest"
)

// TestLineStatusAndRekey shows a real line, over a network in memory, through
// its control socket, and rekeys it there.
func TestLineStatusAndRekey(t *testing.T) {
	pair := tunneltest.New(t, tunneltest.Options{Policy: rekey.QKDStrict, Keys: 20})
	pair.Up(20 * time.Second)
	e := lineEnd{line: pair.Tokyo.Line}
	cfg := &config.Line{ID: "a", Policy: "qkd-strict"}
	env := Env{Site: &config.Site{Site: "tokyo"}, Version: "v1"}
	socket := filepath.Join(t.TempDir(), "line.sock")
	parts, _, err := env.doors("a", socket, "", control.Door{
		Status: func() control.Status { return e.status(cfg) },
		Rekey:  func() error { e.line.Rekey(); return nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- together(ctx, parts...) }()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("run: %v", err)
		}
	}()
	c := control.Dial(socket)
	before, err := c.Status(ctx)
	if err != nil {
		t.Fatal(err)
	}
	l := before.Line
	if before.Daemon != "line" || before.ID != "a" || before.Site != "tokyo" ||
		before.Version != "v1" || before.PID == 0 || before.Started.IsZero() {
		t.Errorf("status begins with %+v", before)
	}
	if l.Level != "QKD" || l.Epoch == 0 || l.Age == nil || l.LastKey == nil || l.Keys != 1 ||
		l.Policy != "qkd-strict" || l.PeerPolicy != "qkd-strict" || l.Device.Backend != "memory" {
		t.Errorf("line %+v", l)
	}
	if l.Stock != nil {
		t.Errorf("stock %d, though nobody asked", *l.Stock)
	}
	if err := c.Rekey(ctx); err != nil {
		t.Fatal(err)
	}
	if !pair.Wait(20*time.Second, func() bool {
		s, err := c.Status(ctx)
		return err == nil && s.Line.Epoch > l.Epoch && s.Line.Rekeys > l.Rekeys
	}) {
		t.Error("no new epoch")
	}
}

// TestWatchStock follows a key manager that runs dry and goes away.
func TestWatchStock(t *testing.T) {
	kme := &etsitest.KME{Stock: 5}
	ka, _ := door(t, kme)
	s := source(t, ka)
	e := lineEnd{keys: &s}
	look := func() {
		t.Helper()
		ctx, cancel := context.WithCancel(t.Context())
		cancel() // one look, then the end
		if err := e.watchStock(ctx); err != nil {
			t.Fatal(err)
		}
	}
	e.look(t.Context())
	if got := e.stock.Load(); got == nil || got.Keys != 5 {
		t.Fatalf("stock %+v, want 5 keys", got)
	}
	look() // its call is cut short: not known
	if got := e.stock.Load(); got != nil {
		t.Errorf("stock %+v of a key manager that did not answer", got)
	}
}
