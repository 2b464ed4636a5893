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

// initFlags are those of init.
type initFlags struct {
	site, address, device, ca, dir string
	signed                         enrol.Signed
}

func newInitCommand() *cobra.Command {
	var f initFlags
	cmd := &cobra.Command{
		Use:   "init",
		Short: "Make a site: certificates, secrets and its file",
		Long: "init asks three questions, or takes the answers from flags, and makes a folder\n" +
			"with everything that the daemons of a site need. There is no password: every\n" +
			"door asks for a certificate, and the one for applications opens on loopback only.\n" +
			"If it is interrupted, the same command completes it.\n\n" +
			"The site signs its certificates itself, unless a hospital has a CA: --ca external\n" +
			"writes requests for it, and the command that it prints takes the chains.",
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			h, err := f.run(bufio.NewReader(cmd.InOrStdin()), cmd.OutOrStdout())
			pending := new(enrol.Pending)
			switch {
			case errors.As(err, &pending):
				return toldPending(cmd.OutOrStdout(), pending)
			case errors.Is(err, enrol.ErrExists):
				return hinted(err, "quietline check "+filepath.Join(f.dir, "site.yaml")+
					", or another --dir")
			case err != nil:
				return err
			}
			return toldSite(cmd.OutOrStdout(), h)
		},
	}
	fl := cmd.Flags()
	fl.StringVar(&f.site, "site", "", "`name` of the site")
	fl.StringVar(&f.address, "address", "", "IP `address` at which other sites reach this one")
	fl.StringVar(&f.device, "device", "", "socket of the QKD device, unix:///`path`, or simulated")
	fl.StringVar(&f.dir, "dir", "", "`folder` to make; default the site's name")
	fl.StringVar(&f.ca, "ca", "", "external = another CA signs the certificates; default the site's own")
	fl.StringArrayVar(&f.signed.Chains, "chain", nil, "take a chain that the CA made; `file`, leaf first")
	fl.StringVar(&f.signed.SAECA, "sae-ca", "", "the CA for applications; PEM `file`")
	fl.StringVar(&f.signed.PeerCA, "peer-ca", "", "the CA for key managers; PEM `file`")
	cmd.MarkFlagsRequiredTogether("chain", "sae-ca", "peer-ca")
	for _, name := range []string{"site", "address", "device", "ca"} {
		cmd.MarkFlagsMutuallyExclusive("chain", name)
	}
	return cmd
}

func (f *initFlags) run(in *bufio.Reader, out io.Writer) (*enrol.Home, error) {
	if len(f.signed.Chains) > 0 {
		if f.dir == "" {
			return nil, usage(errors.New("--dir is missing"), "it is the folder that init --ca external made")
		}
		return enrol.Take(f.dir, f.signed)
	}
	ask := asker{in: in, out: out}
	plan, err := ask.plan(f.site, f.address, f.device, f.ca)
	if err != nil {
		return nil, err
	}
	if f.dir == "" {
		f.dir = plan.Site
	}
	return enrol.Create(f.dir, plan)
}

// toldPending says what the CA has to do.
func toldPending(w io.Writer, p *enrol.Pending) error {
	fmt.Fprintf(w, "site %s waits for your CA. Have it sign, and keep the names of the requests:\n", p.Site)
	for _, r := range p.Requests {
		fmt.Fprintf(w, "  %s\n    %s\n", r.File, r.For)
	}
	fmt.Fprintf(w, "next, with its chains, leaf first and every intermediate behind:\n  quietline init --dir %s", p.Dir)
	for _, r := range p.Requests {
		fmt.Fprintf(w, " --chain %s.crt", strings.TrimSuffix(filepath.Base(r.File), ".csr"))
	}
	_, err := fmt.Fprintln(w, " --sae-ca sae-ca.crt --peer-ca peer-ca.crt")
	return err
}

func toldSite(w io.Writer, h *enrol.Home) error {
	if h.Plan().Device == enrol.Simulated {
		fmt.Fprintln(w, "SIMULATED: this site takes keys that protect nothing. Not for patients' data.")
	}
	keys := ""
	if h.Authority() == nil {
		keys = "Its certificates are renewed by your CA; quietline status tells when they are due.\n"
	}
	_, err := fmt.Fprintf(w, "site %s is made: %s\nfingerprint: %s\n"+keys+
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

func (a *asker) plan(site, address, device, ca string) (p enrol.Plan, err error) {
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
	p = enrol.Plan{Site: site, Address: ip, Device: device, CA: ca}
	if err := p.Check(); err != nil {
		return p, usage(err, "quietline init --help tells what each answer means")
	}
	return p, nil
}
