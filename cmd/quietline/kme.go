package main

import (
	"github.com/spf13/cobra"

	"github.com/quietline/quietline/cmd/internal/daemon"
)

func newKMECommand() *cobra.Command {
	var file string
	cmd := &cobra.Command{
		Use:   "kme",
		Short: "Run the key manager of a site",
		Long: "kme takes secret blocks from the QKD links, agrees on them with the key managers\n" +
			"at the other ends, and hands each key out once over ETSI GS QKD 014.",
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			site, err := loadConfig(cmd, file)
			if err != nil {
				return err
			}
			return serve(cmd, site, daemon.KME)
		},
	}
	configFlag(cmd, &file)
	return cmd
}
