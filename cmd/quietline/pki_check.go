package main

import (
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/quietline/quietline/cmd/internal/enrol"
)

func newPKICheck() *cobra.Command {
	var file string
	var links []string
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "check",
		Short: "Look at every certificate, key and secret that a site file names",
		Long: "check finds what daemons and peers would refuse, says what was compared with what,\n" +
			"and what to do. It changes nothing and opens no connection; quietline doctor tls\n" +
			"looks at a door that runs. A line's check value must be the same at its other end:\n" +
			"compare it over the telephone, or give it with --link. Exit 1 if a fault is found.",
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			site, err := loadConfig(cmd, file)
			if err != nil {
				return err
			}
			other := map[string]string{}
			for _, l := range links {
				id, value, ok := strings.Cut(l, "=")
				if _, err := site.Line(id); !ok || id == "" || err != nil {
					return usage(fmt.Errorf("--link %q names no line of the site", l), "--link LINE=VALUE")
				}
				other[id] = value
			}
			return printFindings(cmd.OutOrStdout(), enrol.Inspect(site, other, time.Now()), asJSON)
		},
	}
	siteFlag(cmd, &file)
	cmd.Flags().StringArrayVar(&links, "link", nil, "`LINE=VALUE`, the check value at the other end")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func printFindings(w io.Writer, list []enrol.Finding, asJSON bool) error {
	faults := 0
	for _, f := range list {
		if f.Fault != "" {
			faults++
		}
	}
	if asJSON {
		if err := printJSON(w, list); err != nil {
			return err
		}
	} else {
		for _, f := range list {
			switch {
			case f.Fault != "":
				fmt.Fprintf(w, "FAULT %s: %s\n", f.What, f.Fault)
			case f.Note != "":
				fmt.Fprintf(w, "good  %s, check value %s\n", f.What, f.Note)
			default:
				fmt.Fprintf(w, "good  %s\n", f.What)
			}
		}
	}
	if faults > 0 {
		return errReported
	}
	return nil
}
