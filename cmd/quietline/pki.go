package main

import (
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/quietline/quietline/cmd/internal/pki"
	"github.com/quietline/quietline/secret"
)

func init() { verbs = append(verbs, newPKICommand) }

func newPKICommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "pki",
		Short: "Make, renew and revoke certificates; enrol another site",
		Long: "pki is the site's own small certificate authority. Its folder holds three roots,\n" +
			"for SAEs, for peer key managers and for administrators, and every certificate.\n" +
			"A hospital that has a CA takes: pki issue --request, then pki issue --chain.",
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return usage(errors.New("pki needs a verb"), "quietline pki --help lists them")
		},
	}
	for _, sub := range []func() *cobra.Command{newPKIInit, newPKIIssue, newPKIRenew,
		newPKIRevoke, newPKIShow, newPKIExport, newPKISecret, newPKIInvite, newPKIJoin} {
		cmd.AddCommand(sub())
	}
	return cmd
}

// dirFlag adds --dir, the authority's folder.
func dirFlag(cmd *cobra.Command, dir *string) {
	cmd.Flags().StringVar(dir, "dir", "pki", "the authority's `folder`")
}

// exactly takes n arguments that are called what.
func exactly(n int, what string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) != n {
			return usage(fmt.Errorf("%s takes %s, found %s", cmd.CommandPath(), what,
				count(len(args), "argument")), cmd.CommandPath()+" "+what)
		}
		return nil
	}
}

func newPKIInit() *cobra.Command {
	var dir, site string
	cmd := &cobra.Command{
		Use:   "init",
		Short: "Make the three roots of a site",
		Long: "init makes what is missing in the folder, so it can be repeated after a fault.\n" +
			"Keep a copy of the folder where thieves of the box do not find it.",
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if site == "" {
				return usage(errors.New("--site is missing"), "quietline pki init --site tokyo")
			}
			a, err := pki.Init(dir, site)
			if err != nil {
				return err
			}
			for _, r := range pki.Roots {
				fmt.Fprintf(cmd.OutOrStdout(), "%-6s %s until %s\n", r, a.RootFile(r),
					a.Root(r).Certificate().NotAfter.UTC().Format(time.DateOnly))
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "next: quietline pki issue --dir %s sae ID\n", dir)
			return err
		},
	}
	dirFlag(cmd, &dir)
	cmd.Flags().StringVar(&site, "site", "", "the site's `name`, which stands in the roots")
	return cmd
}

// issueFlags are those of pki issue.
type issueFlags struct {
	dir, name           string
	dns, ips            []string
	life                time.Duration
	csr, request, chain string
	ca                  string
}

func newPKIIssue() *cobra.Command {
	var f issueFlags
	cmd := &cobra.Command{
		Use:   "issue sae|kme|door|admin ID",
		Short: "Issue a certificate with its key",
		Long: "issue writes <dir>/<name>.pem, certificate and key in one file of mode 0600.\n\n" +
			"  sae    an application; names urn:quietline:sae:ID\n" +
			"  kme    a key manager towards its peers; names urn:quietline:kme:ID\n" +
			"  door   the ETSI GS QKD 014 door; needs --dns or --ip\n" +
			"  admin  a person\n\n" +
			"With --csr it signs a request whose key stays with its owner. For a hospital's\n" +
			"own CA: --request FILE writes a request, --chain FILE --ca FILE takes the answer.",
		Args: exactly(2, "sae|kme|door|admin ID"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return f.run(cmd.OutOrStdout(), args[0], args[1])
		},
	}
	dirFlag(cmd, &f.dir)
	fl := cmd.Flags()
	fl.StringVar(&f.name, "name", "", "`name` of the file; default ID")
	fl.StringSliceVar(&f.dns, "dns", nil, "DNS `names` of a door")
	fl.StringSliceVar(&f.ips, "ip", nil, "IP `addresses` of a door")
	fl.DurationVar(&f.life, "life", pki.LeafLife, "how long it is valid")
	fl.StringVar(&f.csr, "csr", "", "sign this request instead of making a key; `file`")
	fl.StringVar(&f.request, "request", "", "write a request for another CA to this `file`")
	fl.StringVar(&f.chain, "chain", "", "take the chain that another CA made; `file`, leaf first")
	fl.StringVar(&f.ca, "ca", "", "the other CA's root certificates; `file`")
	cmd.MarkFlagsMutuallyExclusive("csr", "request", "chain")
	cmd.MarkFlagsRequiredTogether("chain", "ca")
	return cmd
}

// wish puts kind and ID into the authority's words.
func (f *issueFlags) wish(kind, id string) (pki.Root, pki.Request, pki.Use, error) {
	req := pki.Request{CommonName: id, Life: f.life, DNS: f.dns}
	for _, s := range f.ips {
		ip, err := netip.ParseAddr(s)
		if err != nil {
			return "", req, pki.Use{}, usage(fmt.Errorf("--ip %q is not an address", s), "--ip 192.0.2.1")
		}
		req.IPs = append(req.IPs, ip)
	}
	switch kind {
	case "sae":
		req.SAE, req.Client = id, true
		return pki.SAERoot, req, pki.Use{URI: pki.SAEURI(id), Client: true}, nil
	case "kme":
		req.KME, req.Client, req.Server = id, true, true
		return pki.PeerRoot, req, pki.Use{URI: pki.KMEURI(id), Client: true, Server: true}, nil
	case "door":
		req.Server = true
		return pki.SAERoot, req, pki.Use{Server: true}, nil
	case "admin":
		req.Client = true
		return pki.AdminRoot, req, pki.Use{Client: true}, nil
	}
	return "", req, pki.Use{}, usage(fmt.Errorf("%q is no kind of certificate", kind),
		"kinds: sae, kme, door, admin")
}

func (f *issueFlags) run(w io.Writer, kind, id string) error {
	root, req, use, err := f.wish(kind, id)
	if err != nil {
		return err
	}
	if f.name == "" {
		f.name = id
	}
	base := filepath.Join(f.dir, f.name)
	switch {
	case f.request != "":
		if err := os.MkdirAll(f.dir, 0o700); err != nil {
			return err
		}
		if err := pki.WriteCSR(req, base+".new.key", f.request); err != nil {
			return err
		}
		_, err = fmt.Fprintf(w, "%s is for your CA; its key is %s.new.key\n"+
			"next: quietline pki issue --dir %s %s %s --chain CHAIN.pem --ca ROOTS.pem\n",
			f.request, base, f.dir, kind, id)
		return err
	case f.chain != "":
		return f.take(w, base, use)
	}
	a, err := pki.Open(f.dir)
	if err != nil {
		return noAuthority(err, f.dir)
	}
	if f.csr != "" {
		return f.sign(w, a, root, req)
	}
	p, err := a.Make(root, f.name, req)
	if errors.Is(err, pki.ErrExists) {
		return hinted(err, "quietline pki renew --dir "+f.dir+" "+f.name)
	} else if err != nil {
		return err
	}
	_, err = fmt.Fprintf(w, "%s: %s\n", a.PairFile(f.name), pki.Describe(p.Chain[0]))
	return err
}

// take imports the chain of another CA.
func (f *issueFlags) take(w io.Writer, base string, use pki.Use) error {
	chain, err := pki.ReadCertificates(f.chain)
	if err != nil {
		return err
	}
	roots, err := pki.ReadCertificates(f.ca)
	if err != nil {
		return err
	}
	p, err := pki.Import(base+".new.key", base+".pem", chain, roots, use)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(w, "%s: %s\n", base+".pem", pki.Describe(p.Chain[0]))
	return err
}

func (f *issueFlags) sign(w io.Writer, a *pki.Authority, root pki.Root, req pki.Request) error {
	text, err := os.ReadFile(f.csr)
	if err != nil {
		return err
	}
	csr, err := pki.ParseCSR(text)
	if err != nil {
		return err
	}
	cert, err := a.Sign(root, req, csr)
	if err != nil {
		return err
	}
	path := filepath.Join(f.dir, f.name+".crt")
	if err := secret.WriteFileMode(path, pki.EncodeCertificates([]*x509.Certificate{cert}), 0o644); err != nil {
		return err
	}
	_, err = fmt.Fprintf(w, "%s: %s\n", path, pki.Describe(cert))
	return err
}

// noAuthority adds the hint for a folder without roots.
func noAuthority(err error, dir string) error {
	if _, serr := os.Stat(filepath.Join(dir, "sae-ca.crt")); errors.Is(err, os.ErrNotExist) && serr == nil {
		return hinted(err, "the site's certificates are of another CA; quietline pki issue --request "+
			"FILE asks it for one")
	}
	if errors.Is(err, os.ErrNotExist) {
		return hinted(err, "quietline pki init --dir "+dir+" --site NAME makes it")
	}
	return err
}

func newPKIRenew() *cobra.Command {
	var dir string
	cmd := &cobra.Command{
		Use:   "renew NAME",
		Short: "Renew a certificate with a new key",
		Long: "renew replaces <dir>/<NAME>.pem by one with the same names and a full life.\n" +
			"Daemons that run take it up by themselves.",
		Args: exactly(1, "NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			a, err := pki.Open(dir)
			if err != nil {
				return noAuthority(err, dir)
			}
			p, err := a.Renew(args[0])
			if err != nil {
				return err
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s: %s\n", a.PairFile(args[0]),
				pki.Describe(p.Chain[0]))
			return err
		},
	}
	dirFlag(cmd, &dir)
	return cmd
}

func newPKIRevoke() *cobra.Command {
	var dir, file, site string
	cmd := &cobra.Command{
		Use:   "revoke NAME|SERIAL, or revoke --site SITE",
		Short: "Take certificates back, or cut a whole site off",
		Long: "revoke puts every certificate issued to a name, or the one with a serial number,\n" +
			"on the revocation list. A door that runs cuts their connections within seconds.\n\n" +
			"With --site it cuts another site off: its key manager, links and lines leave the\n" +
			"site file, and daemons that run follow within seconds; its stock is void, and the\n" +
			"secrets of its lines are removed.",
		Args: func(cmd *cobra.Command, args []string) error {
			if (len(args) == 1) == (site != "") || len(args) > 1 {
				return usage(errors.New("revoke takes a name, or --site SITE"),
					"quietline pki show lists the names")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if site != "" {
				return revokeSite(cmd.OutOrStdout(), file, site)
			}
			a, err := pki.Open(dir)
			if err != nil {
				return noAuthority(err, dir)
			}
			gone, err := a.Revoke(args[0])
			if err != nil {
				return err
			}
			for _, e := range gone {
				fmt.Fprintf(cmd.OutOrStdout(), "revoked: %s\n", pki.Describe(e.Cert))
			}
			if len(gone) == 0 {
				fmt.Fprintln(cmd.OutOrStdout(), "all of them were revoked before")
			}
			return nil
		},
	}
	dirFlag(cmd, &dir)
	siteFlag(cmd, &file)
	cmd.Flags().StringVar(&site, "site", "", "cut this `site` off")
	return cmd
}

func revokeSite(w io.Writer, file, site string) error {
	h, err := openHome(file)
	if err != nil {
		return err
	}
	if err := h.Revoke(site); err != nil {
		return err
	}
	_, err = fmt.Fprintf(w, "%s is cut off: daemons that run follow within seconds, others at their "+
		"start\nto enrol it anew: quietline pki invite --config %s %s\n", site, file, site)
	return err
}
