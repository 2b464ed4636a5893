package main

import (
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/quietline/quietline/cmd/internal/boxes"
	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/etsi014/identity"
)

// profileAnswer is client profile NAME --json.
type profileAnswer struct {
	Box        string   `json:"box"`
	Folder     string   `json:"folder"`
	Files      []string `json:"files"`
	Unverified int      `json:"unverified"` // marks in the configuration text
}

func newClientProfileCommand() *cobra.Command {
	var s boxes.Setup
	var cert, key, sae, peer, out string
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "profile NAME",
		Short: "Write another maker's configuration and certificates into a folder",
		Long: "profile writes the configuration text of a box that draws keys from a KME, and\n" +
			"its certificate as PEM and PKCS#12, into a new folder. The text says which lines\n" +
			"are unverified. quietline client profile list names the boxes.",
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) != 1 {
				return usage(errors.New("profile takes one name"),
					"quietline client profile list names the boxes")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			for _, f := range []struct{ name, value string }{
				{"url", s.URL}, {"cert", cert}, {"key", key}, {"ca", s.Files.CA}, {"peer", peer},
				{"out", out},
			} {
				if f.value == "" {
					return usage(fmt.Errorf("--%s is missing", f.name),
						cmd.CommandPath()+" --help shows the flags")
				}
			}
			s.SAE, s.Peer = etsi014.SAEID(sae), etsi014.SAEID(peer)
			s.Files.Pairs = []identity.Pair{{Cert: cert, Key: key}}
			return writeProfile(cmd, args[0], out, s, asJSON)
		},
	}
	f := cmd.Flags()
	f.StringVar(&s.URL, "url", "", "base `URL` of the KME")
	f.StringVar(&cert, "cert", "", "the box's certificate, PEM `file`")
	f.StringVar(&key, "key", "", "its key, PEM `file` of mode 0600")
	f.StringVar(&s.Files.CA, "ca", "", "the CA of the KME's certificate, PEM `file`")
	f.StringVar(&sae, "sae", "", "the box's own `SAE` ID; default: as its certificate says")
	f.StringVar(&peer, "peer", "", "`SAE` ID of the box at the other end")
	f.StringVar(&out, "out", "", "the new `folder`")
	f.BoolVar(&asJSON, "json", false, "print JSON")
	cmd.AddCommand(newProfileListCommand())
	return cmd
}

func writeProfile(cmd *cobra.Command, name, out string, s boxes.Setup, asJSON bool) error {
	files, err := boxes.Write(out, name, s)
	switch {
	case errors.Is(err, boxes.ErrBox):
		return usage(err, "quietline client profile list names the boxes")
	case errors.Is(err, boxes.ErrSetup):
		return usage(err, cmd.CommandPath()+" --help shows the flags")
	case err != nil:
		return err
	}
	n, err := boxes.Unverified(out, name)
	if err != nil {
		return err
	}
	if asJSON {
		return printJSON(cmd.OutOrStdout(), profileAnswer{name, out, files, n})
	}
	_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s: %s\n%s in the text that no real box has verified\n",
		out, strings.Join(files, " "), count(n, "place"))
	return err
}

func newProfileListCommand() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "list",
		Short: "Name the boxes",
		Args:  noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if asJSON {
				return printJSON(cmd.OutOrStdout(), boxes.List())
			}
			for _, b := range boxes.List() {
				if _, err := fmt.Fprintf(cmd.OutOrStdout(), "%-11s %s\n", b.Name, b.About); err != nil {
					return err
				}
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}
