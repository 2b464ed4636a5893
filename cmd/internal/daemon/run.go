package daemon

import (
	"context"
	"log/slog"
	"math"
	"os"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/quietline/quietline/cmd/internal/config"
	"github.com/quietline/quietline/cmd/internal/control"
	"github.com/quietline/quietline/cmd/internal/metrics"
)

// Env is what every daemon is given.
type Env struct {
	Site    *config.Site
	Version string // of the program, for status
	Log     *slog.Logger
	// File is where Site was read, to be read again while a daemon runs; "" =
	// never. Only the key manager does.
	File string

	vault *vault // of a key manager that begins anew in the same process
}

// part is something that works until ctx ends and returns nil then.
type part func(ctx context.Context) error

// doors opens control and, if configured, metrics. The door's Status is given
// what every daemon's has. It returns what to run, and what to close if the
// daemon fails before it runs.
func (e Env) doors(id, socket, scrape string, door control.Door) ([]part, func(), error) {
	status := e.common(id, door.Status)
	door.Status = status
	c, err := control.Listen(socket, door, e.Log)
	if err != nil {
		return nil, nil, err
	}
	if scrape == "" {
		return []part{c.Run}, func() { _ = c.Close() }, nil
	}
	m, err := metrics.Listen(scrape, status, e.Log)
	if err != nil {
		_ = c.Close()
		return nil, nil, err
	}
	return []part{c.Run, m.Run}, func() { _ = c.Close(); _ = m.Close() }, nil
}

// common adds to a status what every daemon tells.
func (e Env) common(id string, status func() control.Status) func() control.Status {
	started := time.Now()
	return func() control.Status {
		s := status()
		s.ID, s.Site, s.Version = id, e.Site.Site, e.Version
		s.PID, s.Started = os.Getpid(), started
		return s
	}
}

// together runs all parts until ctx ends or one of them fails, which ends the
// others.
func together(ctx context.Context, parts ...part) error {
	g, ctx := errgroup.WithContext(ctx)
	for _, p := range parts {
		g.Go(func() error { return p(ctx) })
	}
	return g.Wait()
}

// closers is what a daemon must close, the last opened first.
type closers []func()

func (c *closers) add(f func()) { *c = append(*c, f) }

func (c *closers) close() {
	for i := len(*c) - 1; i >= 0; i-- {
		(*c)[i]()
	}
}

// known is nil for what no device tells.
func known(x float64) *float64 {
	if math.IsNaN(x) || math.IsInf(x, 0) {
		return nil
	}
	return &x
}
