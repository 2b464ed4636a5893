package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"github.com/spf13/cobra"

	"github.com/quietline/quietline/etsi014/doctor"
	"github.com/quietline/quietline/etsi014/identity"
)

// doctorAnswer is doctor tls --json.
type doctorAnswer struct {
	Address string         `json:"address"`
	OK      bool           `json:"ok"` // nothing failed and nothing was warned of
	Checks  []doctor.Check `json:"checks"`
}

func newDoctorCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Find out why two ends do not come together",
		Args:  noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return usage(errors.New("no verb is given"), "quietline doctor --help lists the verbs")
		},
	}
	cmd.AddCommand(newDoctorTLSCommand())
	return cmd
}

func newDoctorTLSCommand() *cobra.Command {
	var cfg doctor.Config
	var cert, key string
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "tls HOST:PORT",
		Short: "Say which side refuses which certificate, and why",
		Long: "tls connects to a KME as an application would and takes the handshake apart:\n" +
			"files, connection, both certificates, the authorities each side takes, alerts,\n" +
			"clocks. It draws no key. It exits 0 only if all is well.",
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) != 1 {
				return usage(errors.New("tls takes one address"), "quietline doctor tls HOST:PORT")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			hint := cmd.CommandPath() + " --help shows the flags"
			if _, port, err := net.SplitHostPort(args[0]); err != nil || port == "" {
				return usage(fmt.Errorf("%q is not host:port", args[0]), "quietline doctor tls HOST:PORT")
			}
			for _, f := range []struct{ name, value string }{
				{"cert", cert}, {"key", key}, {"ca", cfg.Files.CA},
			} {
				if f.value == "" {
					return usage(fmt.Errorf("--%s is missing", f.name), hint)
				}
			}
			cfg.Addr = args[0]
			cfg.Files.Pairs = []identity.Pair{{Cert: cert, Key: key}}
			answer := doctorAnswer{Address: args[0], OK: true}
			answer.Checks = doctor.Examine(cmd.Context(), cfg)
			for _, c := range answer.Checks {
				answer.OK = answer.OK && c.Verdict == doctor.OK
			}
			return printDiagnosis(cmd.OutOrStdout(), answer, asJSON)
		},
	}
	f := cmd.Flags()
	f.StringVar(&cert, "cert", "", "the application's certificate, PEM `file`")
	f.StringVar(&key, "key", "", "its key, PEM `file` of mode 0600")
	f.StringVar(&cfg.Files.CA, "ca", "", "the CA of the KME's certificate, PEM `file`")
	f.StringVar(&cfg.ServerName, "name", "", "`name` that the KME must show; default HOST")
	f.DurationVar(&cfg.Timeout, "timeout", 10*time.Second, "of the whole examination")
	f.BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func printDiagnosis(w io.Writer, a doctorAnswer, asJSON bool) error {
	if asJSON {
		if err := printJSON(w, a); err != nil {
			return err
		}
	} else {
		for _, c := range a.Checks {
			if _, err := fmt.Fprintf(w, "%-4s %s: %s\n", c.Verdict, c.Name, c.Found); err != nil {
				return err
			}
			if c.Hint != "" {
				if _, err := fmt.Fprintf(w, "     next: %s\n", c.Hint); err != nil {
					return err
				}
			}
		}
	}
	if !a.OK {
		return errReported
	}
	return nil
}
