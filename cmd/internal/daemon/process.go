// Package daemon joins the rooms to the three daemons of a site: [KME], [Line]
// and [Sim]. Each runs until its context ends, then stops gracefully, and
// returns an error only when it had to stop by itself.
//
// A caller must keep in mind to call secret.Harden first, before any key is in
// memory, and that a daemon which cannot keep its promises stops rather than
// serving on: the supervisor starts it again.
package daemon

import (
	"io"
	"log/slog"
	"os"

	"golang.org/x/term"
)

// Logger writes text to a terminal and JSON anywhere else.
func Logger(w io.Writer, level slog.Level) *slog.Logger {
	options := &slog.HandlerOptions{Level: level}
	if f, ok := w.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		return slog.New(slog.NewTextHandler(w, options))
	}
	return slog.New(slog.NewJSONHandler(w, options))
}
