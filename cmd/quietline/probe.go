package main

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/etsi014/identity"
	"github.com/quietline/quietline/etsi014/probe"
)

// probeAnswer is probe --json.
type probeAnswer struct {
	URL   string         `json:"url"`
	OK    bool           `json:"ok"` // no case failed
	Pass  int            `json:"pass"`
	Skip  int            `json:"skip"`
	Warn  int            `json:"warn"`
	Fail  int            `json:"fail"`
	Cases []probe.Result `json:"cases"`
}

// probeFlags is who probes: two applications, a third if there is one.
type probeFlags struct {
	url, slaveURL        string
	ca, slaveCA          string
	master, slave, third application
	only                 []string
	timeout              time.Duration
	list, asJSON         bool
}

// application is an SAE with its certificate files.
type application struct{ sae, cert, key string }

func newProbeCommand() *cobra.Command {
	var p probeFlags
	cmd := &cobra.Command{
		Use:   "probe URL",
		Short: "Ask a key manager, anybody's, whether it keeps to ETSI GS QKD 014",
		Long: "probe plays two applications that share keys, --sae at the KME of URL and --peer\n" +
			"there or at --peer-url, and a third one if it is given. It sends the requests of\n" +
			"all cases and says for each what was expected and what came: FAIL where the\n" +
			"standard says otherwise, WARN where the standard is silent and applications\n" +
			"suffer, SKIP where a case cannot be asked.\n\n" +
			"It draws some two hundred keys, which are then nobody's. Nobody else may draw for\n" +
			"the two applications meanwhile, because stored keys are counted.\n\n" +
			"Exit codes: 0 no case failed, 1 a case failed or the probe was cut short,\n" +
			"2 not understood.",
		Args: cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			only, err := p.selected(cmd)
			if err != nil {
				return err
			}
			if p.list {
				if err := noArgs(cmd, args); err != nil {
					return err
				}
				return printCases(cmd.OutOrStdout(), only, p.asJSON)
			}
			if len(args) != 1 {
				return usage(errors.New("probe takes one URL"), "quietline probe https://HOST:PORT")
			}
			p.url = args[0]
			cfg, err := p.config(cmd)
			if err != nil {
				return err
			}
			cfg.Only = only
			return p.run(cmd, cfg)
		},
	}
	p.flags(cmd)
	return cmd
}

func (p *probeFlags) flags(cmd *cobra.Command) {
	f := cmd.Flags()
	app := func(a *application, sae, prefix, who string) {
		f.StringVar(&a.sae, sae, "", "`SAE` ID of "+who)
		f.StringVar(&a.cert, prefix+"cert", "", "its certificate, PEM `file`")
		f.StringVar(&a.key, prefix+"key", "", "its key, PEM `file` of mode 0600")
	}
	app(&p.master, "sae", "", "the application that draws")
	app(&p.slave, "peer", "peer-", "the application that collects")
	app(&p.third, "third", "third-", "a third application, of the peer's KME; default none")
	f.StringVar(&p.ca, "ca", "", "the CA of the KME's certificate, PEM `file`")
	f.StringVar(&p.slaveURL, "peer-url", "", "base `URL` of the peer's KME; default URL")
	f.StringVar(&p.slaveCA, "peer-ca", "", "the CA of that KME, PEM `file`; default --ca")
	f.StringArrayVar(&p.only, "only", nil,
		"ask this `case` only; repeatable, a final * stands for any rest")
	f.DurationVar(&p.timeout, "timeout", 10*time.Second, "of one request")
	f.BoolVar(&p.list, "list", false, "list the cases and ask nothing")
	f.BoolVar(&p.asJSON, "json", false, "print JSON")
}

// selected turns --only into a choice of cases; each value must choose some.
func (p *probeFlags) selected(cmd *cobra.Command) (func(string) bool, error) {
	fits := func(pattern, name string) bool {
		if start, ok := strings.CutSuffix(pattern, "*"); ok {
			return strings.HasPrefix(name, start)
		}
		return pattern == name
	}
	for _, o := range p.only {
		if !slices.ContainsFunc(probe.Cases(), func(c probe.Case) bool { return fits(o, c.Name) }) {
			return nil, usage(fmt.Errorf("--only %s is no case", o), cmd.CommandPath()+" --list")
		}
	}
	return func(name string) bool {
		return len(p.only) == 0 ||
			slices.ContainsFunc(p.only, func(o string) bool { return fits(o, name) })
	}, nil
}

// config checks the flags and reads the files; it connects to nobody.
func (p *probeFlags) config(cmd *cobra.Command) (probe.Config, error) {
	hint := cmd.CommandPath() + " --help shows the flags"
	need := []struct{ name, value string }{
		{"sae", p.master.sae}, {"cert", p.master.cert}, {"key", p.master.key}, {"ca", p.ca},
		{"peer", p.slave.sae}, {"peer-cert", p.slave.cert}, {"peer-key", p.slave.key},
	}
	if p.third != (application{}) {
		need = append(need, []struct{ name, value string }{
			{"third", p.third.sae}, {"third-cert", p.third.cert}, {"third-key", p.third.key},
		}...)
	}
	for _, f := range need {
		if f.value == "" {
			return probe.Config{}, usage(fmt.Errorf("--%s is missing", f.name), hint)
		}
	}
	if p.timeout <= 0 {
		return probe.Config{}, usage(fmt.Errorf("--timeout is %v; it must be above 0", p.timeout), hint)
	}
	slaveURL, slaveCA := p.slaveURL, p.slaveCA
	if slaveURL == "" {
		slaveURL = p.url
	}
	if slaveCA == "" {
		slaveCA = p.ca
	}
	cfg := probe.Config{Timeout: p.timeout}
	var err error
	if cfg.Master, err = p.master.party(p.url, p.ca); err != nil {
		return probe.Config{}, err
	}
	if cfg.Slave, err = p.slave.party(slaveURL, slaveCA); err != nil {
		return probe.Config{}, err
	}
	if p.third.sae != "" {
		third, err := p.third.party(slaveURL, slaveCA)
		if err != nil {
			return probe.Config{}, err
		}
		cfg.Third = &third
	}
	return cfg, nil
}

// party reads an application's files.
func (a application) party(url, ca string) (probe.Party, error) {
	sae, err := etsi014.ParseSAEID(a.sae)
	if err != nil {
		return probe.Party{}, usage(fmt.Errorf("SAE %q: %w", a.sae, err), "")
	}
	live, err := identity.Open(identity.Config{
		Pairs: []identity.Pair{{Cert: a.cert, Key: a.key}}, CA: ca,
	})
	if err != nil {
		return probe.Party{}, err
	}
	return probe.Party{SAE: sae, URL: url, TLS: live.Client()}, nil
}

// run asks, and prints each answer as it comes.
func (p *probeFlags) run(cmd *cobra.Command, cfg probe.Config) error {
	w := cmd.OutOrStdout()
	answer := probeAnswer{URL: p.url, Cases: []probe.Result{}}
	var werr error // the first
	sum, err := probe.Run(cmd.Context(), cfg, func(r probe.Result) {
		answer.Cases = append(answer.Cases, r)
		if !p.asJSON && werr == nil {
			werr = printResult(w, r)
		}
	})
	answer.Pass, answer.Skip, answer.Warn, answer.Fail = sum.Pass, sum.Skip, sum.Warn, sum.Fail
	answer.OK = err == nil && sum.Fail == 0
	if err != nil && len(answer.Cases) == 0 {
		return usage(err, "quietline probe https://HOST:PORT")
	}
	if p.asJSON {
		werr = printJSON(w, answer)
	} else if werr == nil {
		_, werr = fmt.Fprintf(w, "%s: %d passed, %d skipped, %d warned, %d failed\n",
			count(len(answer.Cases), "case"), sum.Pass, sum.Skip, sum.Warn, sum.Fail)
	}
	switch {
	case err != nil:
		return err
	case werr != nil:
		return werr
	case !answer.OK:
		return errReported
	}
	return nil
}

func printResult(w io.Writer, r probe.Result) error {
	_, err := fmt.Fprintf(w, "%s %s (%s): %s\n", r.Verdict, r.Name, r.Clause, r.Title)
	if err == nil && r.Want != "" {
		_, err = fmt.Fprintf(w, "     want %s\n", r.Want)
	}
	if err == nil && r.Got != "" {
		_, err = fmt.Fprintf(w, "     got  %s\n", r.Got)
	}
	return err
}

func printCases(w io.Writer, only func(string) bool, asJSON bool) error {
	cases := slices.DeleteFunc(probe.Cases(), func(c probe.Case) bool { return !only(c.Name) })
	if asJSON {
		return printJSON(w, cases)
	}
	for _, c := range cases {
		if _, err := fmt.Fprintf(w, "%s (%s): %s\n", c.Name, c.Clause, c.Title); err != nil {
			return err
		}
	}
	return nil
}
