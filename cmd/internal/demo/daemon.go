package demo

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/quietline/quietline/cmd/internal/control"
	"github.com/quietline/quietline/tunnel/lab"
)

// daemon is one quietline process of a site, as an operator would start it.
type daemon struct {
	name   string // e.g. "tokyo kme"
	log    string // path of what it wrote to stderr
	client *control.Client
	cmd    *exec.Cmd
	ended  chan struct{} // closed when the process is gone
}

// start runs a verb of this very binary inside a namespace. Its log goes to a
// file beside its state, so that a failure can show it.
func start(ns *lab.Namespace, dir, name, socket string, args ...string) (*daemon, error) {
	d := &daemon{
		name: name, log: filepath.Join(dir, strings.ReplaceAll(name, " ", "-")+".log"),
		client: control.Dial(socket), ended: make(chan struct{}),
	}
	log, err := os.OpenFile(d.log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	d.cmd = exec.Command("/proc/self/exe", args...)
	d.cmd.Stderr, d.cmd.Stdout = log, log
	d.cmd.Dir = dir
	if err := ns.Start(d.cmd); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	go func() {
		_ = d.cmd.Wait()
		close(d.ended)
	}()
	return d, nil
}

// ready waits until the control socket answers.
func (d *daemon) ready(ctx context.Context) error {
	return poll(ctx, 15*time.Second, func() error {
		select {
		case <-d.ended:
			return permanent{fmt.Errorf("%s ended: %s", d.name, d.cmd.ProcessState)}
		default:
		}
		_, err := d.client.Status(ctx)
		return err
	})
}

// stop asks the process to end and waits for it.
func (d *daemon) stop() {
	_ = d.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-d.ended:
	case <-time.After(3 * time.Second):
		_ = d.cmd.Process.Kill()
		<-d.ended
	}
}

// tail returns the last lines of the log.
func (d *daemon) tail(lines int) string {
	b, err := os.ReadFile(d.log)
	if err != nil {
		return err.Error()
	}
	all := strings.Split(strings.TrimRight(string(b), "\n"), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}

// permanent marks an error that waiting does not heal.
type permanent struct{ error }

// Unwrap lets errors.Is see the cause.
func (p permanent) Unwrap() error { return p.error }

// poll calls f every 100 ms until it returns nil, a permanent error, or the
// time is over; it then returns f's last error.
func poll(ctx context.Context, limit time.Duration, f func() error) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		err := f()
		var p permanent
		switch {
		case err == nil:
			return nil
		case errors.As(err, &p):
			return p.error
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("not within %s: %w", limit, err)
		case <-tick.C:
		}
	}
}
