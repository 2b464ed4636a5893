package main

import (
	"bytes"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/quietline/quietline/cmd/internal/pki"
	"github.com/quietline/quietline/hw/distill"
	"github.com/quietline/quietline/kms/keyring"
	"github.com/quietline/quietline/secret"
	"github.com/quietline/quietline/tunnel/bundle"
	handshake "github.com/quietline/quietline/tunnel/rekey"
)

// certificateJSON is one element of pki show --json.
type certificateJSON struct {
	Root      string    `json:"root"`
	Name      string    `json:"name"`
	Serial    string    `json:"serial"`
	NotBefore time.Time `json:"not_before"`
	NotAfter  time.Time `json:"not_after"`
	// Left is the time until NotAfter, seconds; negative when it is past.
	Left    float64 `json:"left_seconds"`
	Revoked bool    `json:"revoked"`
}

func newPKIShow() *cobra.Command {
	var dir string
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "show",
		Short: "List roots and certificates, the next to expire first",
		Args:  noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			a, err := pki.Open(dir)
			if err != nil {
				return noAuthority(err, dir)
			}
			list, err := a.List()
			if err != nil {
				return err
			}
			for _, r := range pki.Roots {
				list = append(list, pki.Entry{Root: r, Cert: a.Root(r).Certificate()})
			}
			return showCertificates(cmd.OutOrStdout(), list, asJSON)
		},
	}
	dirFlag(cmd, &dir)
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func showCertificates(w io.Writer, list []pki.Entry, asJSON bool) error {
	out := []certificateJSON{}
	for _, e := range list {
		out = append(out, certificateJSON{Root: string(e.Root), Name: e.Cert.Subject.CommonName,
			Serial: fmt.Sprintf("%x", e.Cert.SerialNumber), NotBefore: e.Cert.NotBefore,
			NotAfter: e.Cert.NotAfter, Left: time.Until(e.Cert.NotAfter).Seconds(), Revoked: e.Revoked})
	}
	if asJSON {
		return printJSON(w, out)
	}
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "root\tname\tuntil\tstate\tserial")
	for _, c := range out {
		state := "valid"
		switch now := time.Now(); {
		case c.Revoked:
			state = "revoked"
		case now.After(c.NotAfter):
			state = "expired"
		case now.Before(c.NotBefore):
			state = "not yet valid; check the clock"
		case now.After(c.NotAfter.Add(-c.NotAfter.Sub(c.NotBefore) / 3)):
			state = "due for renewal"
		}
		fmt.Fprintf(tw, "%s\t%s\t%s\t%s\t%s\n", c.Root, c.Name,
			c.NotAfter.UTC().Format("2006-01-02 15:04"), state, c.Serial)
	}
	return tw.Flush()
}

func newPKIExport() *cobra.Command {
	var dir, p12, cert, key, password string
	cmd := &cobra.Command{
		Use:   "export NAME",
		Short: "Write a certificate as PKCS#12 or as two PEM files",
		Long: "export writes <dir>/<NAME>.pem in the form that a box takes. The password of a\n" +
			"PKCS#12 file is read from a file of mode 0600: on a command line others see it.",
		Args: exactly(1, "NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			a, err := pki.Open(dir)
			if err != nil {
				return noAuthority(err, dir)
			}
			p, err := pki.LoadPair(a.PairFile(args[0]))
			if err != nil {
				return err
			}
			if p12 == "" && (cert == "" || key == "") {
				return usage(errors.New("export needs a form"), "--p12 FILE --password-file FILE, "+
					"or --cert FILE --key FILE")
			}
			if p12 == "" {
				return pki.WritePEM(cert, key, p)
			}
			return exportPKCS12(a, p, p12, password)
		},
	}
	dirFlag(cmd, &dir)
	cmd.Flags().StringVar(&p12, "p12", "", "PKCS#12 `file` to write")
	cmd.Flags().StringVar(&password, "password-file", "", "`file` with its password, 12 characters at least")
	cmd.Flags().StringVar(&cert, "cert", "", "PEM `file` for the chain")
	cmd.Flags().StringVar(&key, "key", "", "PEM `file` for the key")
	return cmd
}

func exportPKCS12(a *pki.Authority, p *pki.Pair, path, passwordFile string) error {
	if passwordFile == "" {
		return usage(errors.New("--password-file is missing"),
			"a file of mode 0600 with 12 characters or more")
	}
	password, err := secret.ReadFile(passwordFile, 1<<10)
	if err != nil {
		return err
	}
	defer password.Clear()
	trimmed := secret.Copy(bytes.TrimRight(password.Expose(), "\r\n"))
	defer trimmed.Clear()
	var roots []*x509.Certificate
	for _, r := range pki.Roots {
		if root := a.Root(r).Certificate(); p.Chain[0].CheckSignatureFrom(root) == nil {
			roots = append(roots, root)
		}
	}
	return pki.WritePKCS12(path, p, roots, trimmed)
}

func newPKISecret() *cobra.Command {
	return &cobra.Command{
		Use:   "secret root|line|seed PATH",
		Short: "Make a secret file from the system's random generator",
		Long: "secret never overwrites.\n\n" +
			"  root  PATH becomes a key manager's root key\n" +
			"  line  the folder PATH gets static.seed and link.secret; copy link.secret to the\n" +
			"        other end, the seed stays\n" +
			"  seed  PATH becomes the authentication seed of a QKD link; both ends the same",
		Args: exactly(2, "root|line|seed PATH"),
		RunE: func(cmd *cobra.Command, args []string) error { return makeSecret(args[0], args[1]) },
	}
}

func makeSecret(kind, path string) error {
	switch kind {
	case "root":
		return keyring.NewRootKey(path)
	case "line":
		if err := os.MkdirAll(path, 0o700); err != nil {
			return err
		}
		s, _, err := bundle.Generate(handshake.XWing, secret.Bytes{})
		if err != nil {
			return err
		}
		defer s.Clear()
		return bundle.WriteSecrets(path, s)
	case "seed":
		if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("make %s: %w", filepath.Base(path), fs.ErrExist)
		}
		s, err := distill.NewAuthSeed(rand.Reader)
		if err != nil {
			return err
		}
		defer s.Clear()
		return secret.WriteFile(path, s.Expose())
	}
	return usage(fmt.Errorf("%q is no kind of secret", kind), "kinds: root, line, seed")
}
