package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/quietline/quietline/tunnel/bench"
	"github.com/quietline/quietline/tunnel/lab"
)

func newBenchCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "bench",
		Short: "Measure on this machine",
		Args:  noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return usage(errors.New("no verb is given"), "quietline bench --help lists the verbs")
		},
	}
	cmd.AddCommand(newBenchLineCommand(), newBenchEndCommand())
	return cmd
}

func newBenchLineCommand() *cobra.Command {
	opt := bench.Options{Self: []string{"/proc/self/exe", "bench", "end"}}
	var seconds int
	var loss float64
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "line",
		Short: "Compare the line with other tunnels of this machine",
		Long: "line joins two namespaces by a cable, brings up one tunnel after the other\n" +
			"between them and sends iperf3 through each, every round anew: our line, the same\n" +
			"without a cipher, a plain forwarder, the bare cable, and wireguard-go, nebula and\n" +
			"OpenVPN where they are in PATH. It prints medians, and ratios within a round.\n\n" +
			"All share the processors of this machine, so ratios count and absolute figures\n" +
			"say little. It needs iperf3 (apt-get install iperf3) and says how to get the rest.",
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			opt.Time = time.Duration(seconds) * time.Second
			opt.Loss = int(math.Round(loss * 1000))
			err := opt.Check()
			if errors.Is(err, bench.ErrOptions) {
				return usage(err, cmd.CommandPath()+" --help shows the flags")
			}
			if err != nil {
				return err
			}
			return benchLine(cmd, opt, asJSON)
		},
	}
	f := cmd.Flags()
	f.IntVar(&opt.Rounds, "rounds", 5, "how `often` each is measured")
	f.IntVar(&seconds, "seconds", 3, "length of each of three transfers a round, in `seconds`")
	f.IntVar(&opt.MTU, "mtu", 1500, "of the cable, in `bytes`")
	f.BoolVar(&opt.PlainCable, "plain-cable", false,
		"take segmentation offload from the cable, as on a plain network card")
	f.Float64Var(&loss, "loss", 0, "`percent` of packets that the cable loses, to 50; needs nft")
	f.StringSliceVar(&opt.Only, "only", nil, "`names` to measure, with commas; default all")
	f.BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

// benchLine passes here three times, as runDemo does.
func benchLine(cmd *cobra.Command, opt bench.Options, asJSON bool) error {
	if !lab.Inside() {
		// Reexec hands signals on, and the inside ends in order.
		code, err := lab.Reexec(context.WithoutCancel(cmd.Context()), lab.Options{TUN: true})
		var limit *lab.LimitError
		switch {
		case errors.As(err, &limit):
			return hinted(fmt.Errorf("bench: %s: %w", limit.Limit, limit.Err), limit.Hint)
		case err != nil:
			return err
		case code != exitOK:
			return &fault{err: errReported, code: code} // the inside has told why
		}
		return nil
	}
	opt.Progress = benchProgress(cmd.ErrOrStderr())
	rep, err := bench.Run(cmd.Context(), opt)
	if rep == nil {
		return err
	}
	// What an interrupted run has measured so far is worth printing.
	if asJSON {
		return errors.Join(err, printJSON(cmd.OutOrStdout(), rep))
	}
	return errors.Join(err, rep.Print(cmd.OutOrStdout()))
}

func benchProgress(w io.Writer) func(int, string, bench.Figures, error) {
	return func(round int, name string, f bench.Figures, err error) {
		if err != nil {
			fmt.Fprintf(w, "round %d %-13s %v\n", round+1, name, err)
			return
		}
		fmt.Fprintf(w, "round %d %-13s %.2f Gbit/s, %.0f small packets/s\n", round+1, name,
			f[bench.TCP1], f[bench.UDP64])
	}
}

// newBenchEndCommand is what bench line starts for each end of our own.
func newBenchEndCommand() *cobra.Command {
	return &cobra.Command{
		Use:    "end",
		Short:  "Be one end of a measured line (bench line starts it)",
		Hidden: true,
		Args:   noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return bench.End(cmd.Context(), os.Stdin)
		},
	}
}
