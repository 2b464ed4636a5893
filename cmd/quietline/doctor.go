package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/quietline/quietline/cmd/internal/config"
	"github.com/quietline/quietline/cmd/internal/control"
	"github.com/quietline/quietline/cmd/internal/enrol"
	"github.com/quietline/quietline/etsi014/doctor"
)

// doctorAnswer is doctor --json.
type doctorAnswer struct {
	Address string         `json:"address,omitempty"` // of doctor tls
	Site    string         `json:"site,omitempty"`    // of doctor
	OK      bool           `json:"ok"`                // nothing failed and nothing was warned of
	Checks  []doctor.Check `json:"checks"`
}

func newDoctorCommand() *cobra.Command {
	cmd := newDoctorSiteCommand("doctor")
	site := newDoctorSiteCommand("site")
	site.Short = "The same as quietline doctor"
	cmd.AddCommand(site, newDoctorTLSCommand())
	return cmd
}

func newDoctorSiteCommand(use string) *cobra.Command {
	var file string
	var links []string
	var asJSON bool
	cmd := &cobra.Command{
		Use:   use,
		Short: "Find out why two ends do not come together",
		Long: "doctor looks at every certificate, key, list, bundle and secret that the site file\n" +
			"names, at enrolments, at the clock, and asks the daemons that run what troubles\n" +
			"them. Each fault says what was compared with what, and what to do. It changes\n" +
			"nothing. A line's check value must be the same at its other end: compare it over\n" +
			"the telephone, or give it with --link. quietline doctor tls HOST:PORT looks at a\n" +
			"door of anybody's. It exits 0 only if all is well.",
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
			checks := enrol.Inspect(file, site, other, time.Now())
			checks = append(checks, askDaemons(cmd.Context(), site)...)
			return printDiagnosis(cmd.OutOrStdout(), doctorAnswer{Site: site.Site, Checks: checks}, asJSON)
		},
	}
	siteFlag(cmd, &file)
	cmd.Flags().StringArrayVar(&links, "link", nil, "`LINE=VALUE`, the check value at the other end")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

// askTime bounds the question to one daemon.
const askTime = 2 * time.Second

// askDaemons asks those that run what troubles them.
func askDaemons(ctx context.Context, s *config.Site) (list []doctor.Check) {
	if s.KME != nil {
		list = append(list, askDaemon(ctx, "daemon kme", s.KME.Control)...)
	}
	for _, l := range s.Lines {
		list = append(list, askDaemon(ctx, "daemon line "+l.ID, l.Control)...)
	}
	return list
}

func askDaemon(ctx context.Context, name, socket string) (list []doctor.Check) {
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	note := func(what, found, hint string) {
		list = append(list, doctor.Check{Name: name + what, Verdict: doctor.Fail, Found: found, Hint: hint})
	}
	st, err := control.Dial(socket).Status(ctx)
	if errors.Is(err, control.ErrDown) {
		return []doctor.Check{{Name: name, Verdict: doctor.OK, Found: "does not run, so it was not asked"}}
	} else if err != nil {
		note("", err.Error(), "quietline status shows more")
		return list
	}
	for _, c := range st.Certificates {
		if c.Fault != "" {
			found, hint, _ := strings.Cut(c.Fault, "; ")
			note(": certificate "+cmp.Or(c.Subject, c.File), found, cmp.Or(hint, "see the check of its file"))
		}
	}
	if k := st.KME; k != nil {
		if !k.Serving {
			note("", "it does not serve: "+k.Reason, "quietline status shows more")
		}
		for _, p := range k.Peers {
			if !p.Up {
				note(": peer "+p.KME, cmp.Or(p.Reason, "no session"), "quietline doctor at that site tells "+
					"its side; is it running, and does a firewall let it through?")
			}
		}
	}
	if l := st.Line; l != nil && l.Failure != "" {
		note("", "the last handshake failed: "+l.Failure, "quietline doctor at the other end; compare "+
			"the check values of the link secret")
	}
	if list == nil {
		list = []doctor.Check{{Name: name, Verdict: doctor.OK, Found: "runs, and complains of nothing"}}
	}
	return list
}

func newDoctorTLSCommand() *cobra.Command {
	var cfg doctor.Config
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "tls HOST:PORT",
		Short: "Say which side refuses which certificate, and why",
		Long: "tls connects to a KME as an application would and takes the handshake apart:\n" +
			"files, connection, both certificates, the authorities each side takes, alerts,\n" +
			"clocks, and tells every fault that can be seen. Without --cert and --key, or\n" +
			"without --ca, it looks at the rest and says what it could not. It draws no key.\n" +
			"It exits 0 only if all was looked at and is well.",
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) != 1 {
				return usage(errors.New("tls takes one address"), "quietline doctor tls HOST:PORT")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if _, port, err := net.SplitHostPort(args[0]); err != nil || port == "" {
				return usage(fmt.Errorf("%q is not host:port", args[0]), "quietline doctor tls HOST:PORT")
			}
			if (cfg.Cert == "") != (cfg.Key == "") {
				return usage(errors.New("--cert and --key belong together"), cmd.CommandPath()+
					" --help shows the flags")
			}
			cfg.Addr = args[0]
			return printDiagnosis(cmd.OutOrStdout(), doctorAnswer{Address: args[0],
				Checks: doctor.Examine(cmd.Context(), cfg)}, asJSON)
		},
	}
	f := cmd.Flags()
	f.StringVar(&cfg.Cert, "cert", "", "the application's certificate, PEM `file`")
	f.StringVar(&cfg.Key, "key", "", "its key, PEM `file` of mode 0600")
	f.StringVar(&cfg.CA, "ca", "", "the CA of the KME's certificate, PEM `file`")
	f.StringVar(&cfg.ServerName, "name", "", "`name` that the KME must show; default HOST")
	f.DurationVar(&cfg.Timeout, "timeout", 10*time.Second, "of the whole examination")
	f.BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func printDiagnosis(w io.Writer, a doctorAnswer, asJSON bool) error {
	a.OK = true
	for _, c := range a.Checks {
		a.OK = a.OK && c.Verdict == doctor.OK
	}
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
