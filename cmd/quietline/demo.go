package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/quietline/quietline/cmd/internal/demo"
	"github.com/quietline/quietline/tunnel/lab"
)

func newDemoCommand() *cobra.Command {
	var opt demo.Options
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Show the whole on this machine: two sites, a QKD link, an encrypted line",
		Long: "demo builds two sites in namespaces of their own, joins them by a simulated QKD\n" +
			"link and an encrypted line, moves real traffic, proves that none of it crosses\n" +
			"the outer network in clear, cuts the fibre and mends it. Nothing is left behind.\n\n" +
			"It needs no root where the kernel lets a user make namespaces and TUN devices;\n" +
			"elsewhere it says what is missing.",
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := checkDemo(opt); err != nil {
				return err
			}
			return runDemo(cmd, opt)
		},
	}
	f := cmd.Flags()
	f.DurationVar(&opt.For, "for", 45*time.Second, "aimed length of the whole `time`; the stages take what they need")
	f.BoolVar(&opt.JSON, "json", false, "print one JSON object per line")
	f.Float64Var(&opt.Eve, "eve", 0, "`fraction` of the pulses that an eavesdropper intercepts and resends, 0 to 1")
	f.BoolVar(&opt.Keep, "keep", false, "stay until Ctrl-C and print curl lines that draw keys")
	return cmd
}

func checkDemo(opt demo.Options) error {
	const more = "quietline demo --help shows the flags"
	switch {
	case !(opt.Eve >= 0 && opt.Eve <= 1): // NaN too
		return usage(fmt.Errorf("--eve %v is not between 0 and 1", opt.Eve), more)
	case opt.For < 0 || opt.For > 24*time.Hour:
		return usage(fmt.Errorf("--for %s is not between 0 and 24h", opt.For), more)
	case opt.JSON && opt.Keep:
		return usage(errors.New("--keep prints lines for a person; it does not go with --json"), more)
	}
	return nil
}

// runDemo passes here three times: as the caller, as the first process of the
// new namespaces, and inside them.
func runDemo(cmd *cobra.Command, opt demo.Options) error {
	if lab.Inside() {
		opt.Out = cmd.OutOrStdout()
		opt.Terminal = term.IsTerminal(int(os.Stdout.Fd()))
		return demo.Run(cmd.Context(), opt)
	}
	// Reexec hands signals on, and the inside ends in order; the end of our
	// own context would kill it.
	code, err := lab.Reexec(context.WithoutCancel(cmd.Context()), lab.Options{TUN: true})
	var limit *lab.LimitError
	switch {
	case errors.As(err, &limit):
		return hinted(fmt.Errorf("demo: %s: %w", limit.Limit, limit.Err), limit.Hint)
	case err != nil:
		return err
	case code != exitOK:
		return &fault{err: errReported, code: code} // the inside has told why
	}
	return nil
}
