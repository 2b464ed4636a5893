package main

import (
	"context"

	"github.com/spf13/cobra"

	"github.com/quietline/quietline/cmd/internal/daemon"
)

func newSimCommand() *cobra.Command {
	var file, link string
	cmd := &cobra.Command{
		Use:   "sim",
		Short: "Play one end of a QKD link, without photons",
		Long: "sim is the device of a simulated link: optics, distillation, and the socket at\n" +
			"which the key manager takes secret blocks. Its keys protect nothing.",
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			site, err := loadConfig(cmd, file)
			if err != nil {
				return err
			}
			l, err := site.SimulatedLink(link)
			if err != nil {
				return usage(err, "quietline sim --config FILE --link ID")
			}
			return serve(cmd, site, func(ctx context.Context, env daemon.Env) error {
				return daemon.FollowSim(ctx, env, file, l)
			})
		},
	}
	configFlag(cmd, &file)
	cmd.Flags().StringVar(&link, "link", "", "the link's `id`, when the site simulates several")
	return cmd
}
