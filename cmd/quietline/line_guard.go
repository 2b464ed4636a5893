package main

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/quietline/quietline/cmd/internal/daemon"
	"github.com/quietline/quietline/tunnel/guard"
)

func newGuardCommand() *cobra.Command {
	var file, id string
	var remove, check bool
	cmd := &cobra.Command{
		Use:   "guard",
		Short: "Keep a line's networks from being reached without it",
		Long: "guard puts routes and nftables rules into the kernel that let packets for the\n" +
			"networks behind a line leave through its device or not at all. A line installs\n" +
			"them when it starts, and they stay when it ends; run guard at boot, before the\n" +
			"network is up, to have them from the first packet on. With --remove it takes\n" +
			"them away, with --check it exits 1 if they are not there.",
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			site, err := loadConfig(cmd, file)
			if err != nil {
				return err
			}
			l, err := site.Line(id)
			if err != nil {
				return usage(err, "quietline line guard --config FILE --line ID")
			}
			if remove && check {
				return usage(errors.New("--remove and --check exclude each other"),
					"quietline line guard --config FILE --check")
			}
			c := daemon.GuardOf(l)
			act, done := guard.Install, "is guarded"
			switch {
			case remove:
				act, done = guard.Remove, "is not guarded any more"
			case check:
				act = guard.Check
			}
			if err := act(c); err != nil {
				return hinted(err, "it needs CAP_NET_ADMIN, and the package nftables")
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "line %s %s: %v\n", l.ID, done, c.Networks)
			return err
		},
	}
	configFlag(cmd, &file)
	lineFlag(cmd, &id)
	cmd.Flags().BoolVar(&remove, "remove", false, "take the guard away")
	cmd.Flags().BoolVar(&check, "check", false, "only look whether the guard stands")
	return cmd
}
