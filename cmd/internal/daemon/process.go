// Package daemon joins the rooms to the three daemons of a site: [KME], [Line]
// and [Sim]. Each runs until its context ends, then stops gracefully, and
// returns an error only when it had to stop by itself.
//
// A caller must keep in mind to call [Harden] first, before any key is in
// memory, and that a daemon which cannot keep its promises stops rather than
// serving on: the supervisor starts it again.
package daemon

import (
	"fmt"
	"io"
	"log/slog"
	"os"

	"golang.org/x/sys/unix"
	"golang.org/x/term"
)

// Harden makes the process fit to hold keys: files are made for the owner
// only, and neither a core dump nor a debugger of the same user shows memory
// (PR_SET_DUMPABLE, prctl(2)). The process keeps access to its own /proc.
func Harden() error {
	unix.Umask(0o077)
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("forbid core dumps: %w", err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("forbid core dumps: %w", err)
	}
	return nil
}

// Logger writes text to a terminal and JSON anywhere else.
func Logger(w io.Writer, level slog.Level) *slog.Logger {
	options := &slog.HandlerOptions{Level: level}
	if f, ok := w.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		return slog.New(slog.NewTextHandler(w, options))
	}
	return slog.New(slog.NewJSONHandler(w, options))
}
