package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/quietline/quietline/cmd/internal/config"
)

func newCheckCommand() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "check FILE",
		Short: "Validate a site file without starting anything",
		Long: "check reads a site file and tells every fault at once, with line and key.\n" +
			"It opens no socket and none of the files that the site names.",
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) != 1 {
				return usage(errors.New("check takes one file"), "quietline check FILE")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			return check(cmd.OutOrStdout(), args[0], asJSON)
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

// checkAnswer is check --json.
type checkAnswer struct {
	File   string      `json:"file"`
	OK     bool        `json:"ok"`
	Site   string      `json:"site,omitempty"`
	Faults []faultJSON `json:"faults"`
}

type faultJSON struct {
	Line int    `json:"line"`
	Key  string `json:"key"`
	Text string `json:"text"`
}

func check(w io.Writer, file string, asJSON bool) error {
	site, err := config.Load(file)
	var faults *config.Faults
	if err != nil && !errors.As(err, &faults) {
		return err
	}
	if asJSON {
		answer := checkAnswer{File: file, OK: err == nil, Faults: []faultJSON{}}
		if err == nil {
			answer.Site = site.Site
		} else {
			for _, f := range faults.List {
				answer.Faults = append(answer.Faults, faultJSON(f))
			}
		}
		if jerr := printJSON(w, answer); jerr != nil || err == nil {
			return jerr
		}
		return errReported
	}
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(w, "%s is valid: %s\n", file, summary(site))
	return err
}

// summary says in one line what a site is.
func summary(s *config.Site) string {
	parts := []string{"site " + s.Site}
	if s.KME != nil {
		parts = append(parts, "key manager "+s.KME.ID)
	}
	links := count(len(s.Links), "link")
	simulated := 0
	for _, l := range s.Links {
		if l.Simulator != nil {
			simulated++
		}
	}
	if simulated > 0 {
		links += fmt.Sprintf(" (%d simulated)", simulated)
	}
	return strings.Join(append(parts, links, count(len(s.SAEs), "SAE"),
		count(len(s.Lines), "line")), ", ")
}

func printJSON(w io.Writer, v any) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}
