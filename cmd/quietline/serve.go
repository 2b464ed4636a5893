package main

import (
	"context"
	"log/slog"

	"github.com/spf13/cobra"

	"github.com/quietline/quietline/cmd/internal/config"
	"github.com/quietline/quietline/cmd/internal/daemon"
	"github.com/quietline/quietline/secret"
)

// serve runs a daemon until a signal ends it.
func serve(
	cmd *cobra.Command, site *config.Site, run func(context.Context, daemon.Env) error,
) error {
	if err := secret.Harden(); err != nil {
		return err
	}
	env := daemon.Env{
		Site:    site,
		Version: version().Version,
		Log:     daemon.Logger(cmd.ErrOrStderr(), slog.LevelInfo),
	}
	return run(cmd.Context(), env)
}
