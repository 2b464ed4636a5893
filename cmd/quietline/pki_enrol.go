package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"github.com/spf13/cobra"

	"github.com/quietline/quietline/cmd/internal/config"
	"github.com/quietline/quietline/cmd/internal/enrol"
)

// siteFlag adds --config with the usual name as its default.
func siteFlag(cmd *cobra.Command, file *string) {
	cmd.Flags().StringVar(file, "config", "site.yaml", "the site's YAML `file`")
}

func openHome(file string) (*enrol.Home, error) {
	h, err := enrol.OpenHome(file)
	if errors.Is(err, enrol.ErrNoSite) {
		return nil, hinted(err, "quietline init makes one; a site made by hand is enrolled by hand")
	}
	return h, err
}

// inviteFlags are those of pki invite.
type inviteFlags struct {
	file, offline, reply string
	terms                enrol.Terms
}

func newPKIInvite() *cobra.Command {
	var f inviteFlags
	cmd := &cobra.Command{
		Use:   "invite SITE",
		Short: "Let another site join this one",
		Long: "invite prints a token for the other site and waits until it has joined. The token\n" +
			"works once, for a site of that name, for --for. Read the fingerprint to the person\n" +
			"there over the telephone; invite then asks for the one that the person reads back,\n" +
			"and tells nothing to a machine with another. After an interruption, the same\n" +
			"command goes on.\n\n" +
			"A site that cannot be reached takes files: --offline FILE writes the invitation,\n" +
			"--reply FILE takes what comes back.",
		Args: exactly(1, "SITE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			f.terms.Site, f.terms.Offline = args[0], f.offline != "" || f.reply != ""
			person := asker{in: bufio.NewReader(cmd.InOrStdin()), out: cmd.OutOrStdout()}
			return f.run(cmd.Context(), cmd.OutOrStdout(), person.heard)
		},
	}
	siteFlag(cmd, &f.file)
	fl := cmd.Flags()
	fl.DurationVar(&f.terms.Life, "for", enrol.DefaultLife, "how long the token works")
	fl.StringVar(&f.terms.Policy, "policy", "qkd-strict", "`policy` of the line")
	fl.StringVar(&f.terms.Fingerprint, "fingerprint", "", "of the invited site, if it is known by now; "+
		"asked for if not given")
	fl.BoolVar(&f.terms.Again, "again", false, "enrol anew a site that has joined before")
	fl.StringVar(&f.offline, "offline", "", "write the invitation to this `file` and do not listen")
	fl.StringVar(&f.reply, "reply", "", "take the reply to --offline from this `file`")
	cmd.MarkFlagsMutuallyExclusive("offline", "reply")
	return cmd
}

// heard asks for a fingerprint. The reader stays behind if ctx ends first: the
// program ends then too.
func (a *asker) heard(ctx context.Context, site string) (string, error) {
	type answer struct {
		text string
		err  error
	}
	got := make(chan answer, 1)
	go func() {
		text, err := a.answer("Fingerprint that "+site+" reads out", "--fingerprint")
		got <- answer{text, err}
	}()
	select {
	case r := <-got:
		return r.text, r.err
	case <-ctx.Done():
		return "", fmt.Errorf("nobody confirmed the fingerprint of %s: %w", site, ctx.Err())
	}
}

func (f *inviteFlags) run(ctx context.Context, w io.Writer, ask enrol.Ask) error {
	h, err := openHome(f.file)
	if err != nil {
		return err
	}
	inv, err := h.Invite(f.terms, time.Now())
	if err != nil {
		return err
	}
	switch {
	case inv.Done():
		fmt.Fprintf(w, "%s has joined, with fingerprint %s\n", f.terms.Site, inv.Bound())
	case f.reply != "":
		print, err := inv.ReadReply(ctx, f.reply, ask)
		if err != nil {
			return err
		}
		fmt.Fprintf(w, "%s has joined, with fingerprint %s\n", f.terms.Site, print)
	case f.offline != "":
		return f.write(w, inv)
	default:
		if err := f.wait(ctx, w, inv, ask); err != nil {
			return err
		}
	}
	return nextDaemons(w, h)
}

// write makes the file for a stick.
func (f *inviteFlags) write(w io.Writer, inv *enrol.Invitation) error {
	if err := inv.WriteFile(f.offline); err != nil {
		return err
	}
	t := inv.Token()
	_, err := fmt.Fprintf(w, "Carry %s to %s on a stick, and send this command another way, until %s:\n"+
		"  quietline pki join --config %s/site.yaml --offline %s --reply REPLY %s\n"+
		"It asks for the fingerprint; read it over the telephone:\n  %s\n"+
		"next, with the file that comes back:\n  quietline pki invite --config %s --reply REPLY %s\n",
		f.offline, t.To, t.Expires.Local().Format(time.DateTime), t.To, f.offline, t.Text(), t.Groups(),
		f.file, t.To)
	return err
}

// wait serves the invitation until the other site has joined.
func (f *inviteFlags) wait(ctx context.Context, w io.Writer, inv *enrol.Invitation, ask enrol.Ask,
) error {
	t := inv.Token()
	ln, err := net.Listen("tcp", t.Address.String())
	if err != nil {
		return hinted(fmt.Errorf("open the door for %s: %w", t.To, err),
			"is another quietline pki invite open? is "+t.Address.Addr().String()+
				" an address of this machine?")
	}
	fmt.Fprintf(w, "At %s, until %s, run:\n  quietline pki join --config %s/site.yaml %s\n"+
		"It asks for the fingerprint of this site; read it over the telephone:\n  %s\n"+
		"waiting for %s at %s\n", t.To, t.Expires.Local().Format(time.DateTime), t.To, t.Text(),
		t.Groups(), t.To, t.Address)
	err = inv.Serve(ctx, ln, ask, func(s string) { fmt.Fprintln(w, s) })
	switch {
	case errors.Is(err, context.Canceled):
		return hinted(fmt.Errorf("%s has not joined yet", t.To), "the same command goes on waiting")
	case err != nil:
		return err
	}
	_, err = fmt.Fprintf(w, "%s has joined\n", t.To)
	return err
}

// nextDaemons prints the commands that start a site's daemons.
func nextDaemons(w io.Writer, h *enrol.Home) error {
	s, err := config.Load(h.SiteFile())
	if err != nil {
		return err
	}
	fmt.Fprintln(w, "next:")
	for _, l := range s.Links {
		if l.Simulator != nil {
			fmt.Fprintf(w, "  quietline sim --config %s --link %s\n", h.SiteFile(), l.ID)
		}
	}
	fmt.Fprintf(w, "  quietline kme --config %s\n", h.SiteFile())
	for _, l := range s.Lines {
		fmt.Fprintf(w, "  quietline line --config %s --line %s\n", h.SiteFile(), l.ID)
	}
	return nil
}

func newPKIJoin() *cobra.Command {
	var file, heard, offline, reply string
	cmd := &cobra.Command{
		Use:   "join TOKEN",
		Short: "Join the site that gave the token",
		Long: "join makes this site and the inviting one trust each other: key managers and line.\n" +
			"It asks for the fingerprint that the person there reads over the telephone. After\n" +
			"an interruption, the same command completes it.",
		Args: exactly(1, "TOKEN"),
		RunE: func(cmd *cobra.Command, args []string) error {
			t, err := enrol.ParseToken(args[0])
			if err != nil {
				return err
			}
			h, err := openHome(file)
			if err != nil {
				return err
			}
			if heard == "" {
				ask := asker{in: bufio.NewReader(cmd.InOrStdin()), out: cmd.OutOrStdout()}
				if heard, err = ask.answer("Fingerprint that "+t.From+" reads out", "--fingerprint"); err != nil {
					return err
				}
			}
			j, err := h.Join(t, heard)
			if err != nil {
				return err
			}
			if err := runJoin(cmd, j, t, offline, reply); err != nil {
				return err
			}
			fmt.Fprintf(cmd.OutOrStdout(), "%s has joined %s\n", t.To, t.From)
			if offline != "" {
				fmt.Fprintf(cmd.OutOrStdout(), "carry %s back to %s, and read this fingerprint to the "+
					"person there:\n  %s\n", reply, t.From, h.Fingerprint())
			}
			return nextDaemons(cmd.OutOrStdout(), h)
		},
	}
	siteFlag(cmd, &file)
	fl := cmd.Flags()
	fl.StringVar(&heard, "fingerprint", "", "of the inviting site, as heard over the telephone; asked for if not given")
	fl.StringVar(&offline, "offline", "", "the invitation's `file`, of a stick")
	fl.StringVar(&reply, "reply", "", "`file` to write, which goes back")
	cmd.MarkFlagsRequiredTogether("offline", "reply")
	return cmd
}

func runJoin(cmd *cobra.Command, j *enrol.Joining, t *enrol.Token, offline, reply string) error {
	switch {
	case offline != "":
		return j.RunFiles(offline, reply, time.Now())
	case !t.Address.IsValid():
		return usage(errors.New("this token is for a file"), "--offline FILE --reply FILE")
	}
	err := j.Run(cmd.Context(), func(s string) { fmt.Fprintln(cmd.OutOrStdout(), s) })
	var op *net.OpError
	if errors.As(err, &op) && op.Op == "dial" {
		return hinted(err, "is quietline pki invite still open at "+t.From+"? it closes once a "+
			"site has joined; does a firewall let "+t.Address.String()+" through?")
	}
	return err
}
