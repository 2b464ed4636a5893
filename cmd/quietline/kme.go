package main

import (
	"context"

	"github.com/spf13/cobra"

	"github.com/quietline/quietline/cmd/internal/daemon"
)

func newKMECommand() *cobra.Command {
	var file string
	cmd := &cobra.Command{
		Use:   "kme",
		Short: "Run the key manager of a site",
		Long: "kme takes secret blocks from the QKD links, agrees on them with the key managers\n" +
			"at the other ends, and hands each key out once over ETSI GS QKD 014.\n\n" +
			"On SIGHUP, and when they change, it reads certificates, roots, lists and the SAEs\n" +
			"of the site file again, and loses no request. When peers, links or the list of SAEs\n" +
			"change, or its certificate towards peers is renewed, it begins anew with the file.",
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			site, err := loadConfig(cmd, file)
			if err != nil {
				return err
			}
			return serve(cmd, site, func(ctx context.Context, env daemon.Env) error {
				env.File = file
				return daemon.FollowKME(ctx, env, file)
			})
		},
	}
	configFlag(cmd, &file)
	cmd.AddCommand(newKMEUnseal(), newKMESeal(), newKMENewRoot(), newKMERotateRoot())
	return cmd
}
