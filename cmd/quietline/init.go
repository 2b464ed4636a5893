package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/quietline/quietline/cmd/internal/enrol"
)

func init() { verbs = append(verbs, newInitCommand) }

func newInitCommand() *cobra.Command {
	var site, address, device, dir string
	cmd := &cobra.Command{
		Use:   "init",
		Short: "Make a site: certificates, secrets and its file",
		Long: "init asks three questions, or takes the answers from flags, and makes a folder\n" +
			"with everything that the daemons of a site need. There is no password: every\n" +
			"door asks for a certificate, and the one for applications opens on loopback only.\n" +
			"If it is interrupted, the same command completes it.",
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ask := asker{in: bufio.NewReader(cmd.InOrStdin()), out: cmd.OutOrStdout()}
			plan, err := ask.plan(site, address, device)
			if err != nil {
				return err
			}
			if dir == "" {
				dir = plan.Site
			}
			h, err := enrol.Create(dir, plan)
			if errors.Is(err, enrol.ErrExists) {
				return hinted(err, "quietline check "+filepath.Join(dir, "site.yaml")+
					", or another --dir")
			} else if err != nil {
				return err
			}
			return toldSite(cmd.OutOrStdout(), h)
		},
	}
	fl := cmd.Flags()
	fl.StringVar(&site, "site", "", "`name` of the site")
	fl.StringVar(&address, "address", "", "IP `address` at which other sites reach this one")
	fl.StringVar(&device, "device", "", "socket of the QKD device, unix:///`path`, or simulated")
	fl.StringVar(&dir, "dir", "", "`folder` to make; default the site's name")
	return cmd
}

func toldSite(w io.Writer, h *enrol.Home) error {
	if h.Plan().Device == enrol.Simulated {
		fmt.Fprintln(w, "SIMULATED: this site takes keys that protect nothing. Not for patients' data.")
	}
	_, err := fmt.Fprintf(w, "site %s is made: %s\nfingerprint: %s\n"+
		"Keep a copy of %s and %s away from this machine.\n"+
		"next, at one of the two sites (the other then joins):\n"+
		"  quietline pki invite --config %s OTHER-SITE\n", h.Plan().Site, h.SiteFile(),
		h.Fingerprint(), h.Path("pki"), h.Path("secrets"), h.SiteFile())
	return err
}

// asker asks for what flags leave open.
type asker struct {
	in  *bufio.Reader
	out io.Writer
}

// answer reads one line; the end of the input counts as no answer.
func (a *asker) answer(question, flag string) (string, error) {
	fmt.Fprintf(a.out, "%s: ", question)
	text, err := a.in.ReadString('\n')
	text = strings.TrimSpace(text)
	if err != nil && text == "" {
		fmt.Fprintln(a.out)
		return "", usage(fmt.Errorf("no answer to %q", question), "answer it, or give "+flag)
	}
	return text, nil
}

func (a *asker) plan(site, address, device string) (p enrol.Plan, err error) {
	for _, q := range []struct {
		text, flag string
		to         *string
	}{
		{"Name of this site, e.g. tokyo", "--site", &site},
		{"IP address at which other sites reach it, e.g. 192.0.2.1", "--address", &address},
		{"Socket of the QKD device, unix:///path, or simulated", "--device", &device},
	} {
		if *q.to == "" {
			if *q.to, err = a.answer(q.text, q.flag); err != nil {
				return p, err
			}
		}
	}
	ip, err := netip.ParseAddr(address)
	if err != nil {
		return p, usage(fmt.Errorf("address %q is not an IP address", address), "e.g. 192.0.2.1")
	}
	p = enrol.Plan{Site: site, Address: ip, Device: device}
	if err := p.Check(); err != nil {
		return p, usage(err, "quietline init --help tells what each answer means")
	}
	return p, nil
}
