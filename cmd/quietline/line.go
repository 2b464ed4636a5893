package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/quietline/quietline/cmd/internal/control"
	"github.com/quietline/quietline/cmd/internal/daemon"
)

func newLineCommand() *cobra.Command {
	var file, id string
	var all bool
	cmd := &cobra.Command{
		Use:   "line",
		Short: "Run one encrypted line or all of a site, or command one",
		Long: "line moves IP packets between its TUN device and the other site, sealed under\n" +
			"keys that last one epoch. It renews its certificate by itself, and ends when the\n" +
			"line leaves the site file. With --all it runs every line of the site in one\n" +
			"process, each with its own door; one that breaks begins anew after 5 s. With a\n" +
			"verb, it commands the line that runs.",
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			site, err := loadConfig(cmd, file)
			if err != nil {
				return err
			}
			if all && (id != "" || len(site.Lines) == 0) {
				return usage(errors.New("--all runs every line of a site that has some"),
					"quietline line --config FILE --all")
			}
			if all {
				return serve(cmd, site, func(ctx context.Context, env daemon.Env) error {
					return daemon.FollowLines(ctx, env, file)
				})
			}
			l, err := site.Line(id)
			if err != nil {
				return usage(err, "quietline line --config FILE --line ID")
			}
			return serve(cmd, site, func(ctx context.Context, env daemon.Env) error {
				return daemon.FollowLine(ctx, env, file, l)
			})
		},
	}
	configFlag(cmd, &file)
	lineFlag(cmd, &id)
	cmd.Flags().BoolVar(&all, "all", false, "run every line of the site")
	cmd.AddCommand(newRekeyCommand(), newGuardCommand())
	return cmd
}

func lineFlag(cmd *cobra.Command, id *string) {
	cmd.Flags().StringVar(id, "line", "", "the line's `id`, when the site has several")
}

func newRekeyCommand() *cobra.Command {
	var file, id string
	var wait time.Duration
	cmd := &cobra.Command{
		Use:   "rekey",
		Short: "Begin a new epoch now",
		Long: "rekey asks the running line for a new epoch and waits until it carries traffic.\n" +
			"It exits 1 when none came within --wait; the line then goes on as its policy says.",
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			site, err := loadConfig(cmd, file)
			if err != nil {
				return err
			}
			l, err := site.Line(id)
			if err != nil {
				return usage(err, "quietline line rekey --config FILE --line ID")
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), wait)
			defer cancel()
			s, err := rekey(ctx, control.Dial(l.Control))
			if err != nil {
				return err
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "line %s: epoch %d, %s\n", l.ID, s.Epoch, s.Level)
			return err
		},
	}
	configFlag(cmd, &file)
	lineFlag(cmd, &id)
	cmd.Flags().DurationVar(&wait, "wait", 10*time.Second, "how long to wait for the new `epoch`")
	return cmd
}

// poll is the time between two looks at a line that rekeys.
const poll = 50 * time.Millisecond

// rekey commands a new epoch and waits until ctx ends for it to be in use.
func rekey(ctx context.Context, c *control.Client) (*control.Line, error) {
	before, err := lineStatus(ctx, c)
	if err != nil {
		return nil, err
	}
	if err := c.Rekey(ctx); err != nil {
		return nil, err
	}
	tick := time.NewTicker(poll)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil, hinted(fmt.Errorf("rekey: no new epoch yet; the line is %s%s",
				before.Level, because(before.Reason)), "quietline status shows what it waits for")
		case <-tick.C:
		}
		now, err := lineStatus(ctx, c)
		if ctx.Err() != nil {
			continue
		}
		if err != nil {
			return nil, err
		}
		if now.Epoch != before.Epoch {
			return now, nil
		}
		before = now
	}
}

func lineStatus(ctx context.Context, c *control.Client) (*control.Line, error) {
	s, err := c.Status(ctx)
	if err != nil {
		return nil, err
	}
	if s.Line == nil {
		return nil, errors.New("the daemon at this socket is not a line")
	}
	return s.Line, nil
}
