package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/quietline/quietline/cmd/internal/config"
	"github.com/quietline/quietline/cmd/internal/control"
	"github.com/quietline/quietline/cmd/internal/daemon"
	"github.com/quietline/quietline/kms"
	"github.com/quietline/quietline/kms/keyring"
	"github.com/quietline/quietline/secret"
)

// longest passphrase that is read, bytes.
const longest = 1024

// passphrases asks for passphrases: at the terminal without echo, or in a file
// or standard input, one a line.
type passphrases struct {
	file string // "" = terminal, or standard input if that is none; "-" = standard input
	cmd  *cobra.Command
	rest []byte // of the file, not used yet
	read bool
	// last is the passphrase that was given last, so that a command which needs
	// it twice asks once. It goes with the process.
	last secret.Bytes
}

func passphraseFlag(cmd *cobra.Command) *passphrases {
	p := &passphrases{cmd: cmd}
	cmd.Flags().StringVar(&p.file, "passphrase-file", "",
		"read passphrases from this `file` (mode 0600), one a line; - = standard input")
	return p
}

// ask returns the next passphrase; the caller clears it.
func (p *passphrases) ask(prompt string) (secret.Bytes, error) {
	in, ok := p.cmd.InOrStdin().(*os.File)
	if p.file == "" && ok && term.IsTerminal(int(in.Fd())) {
		fmt.Fprint(p.cmd.ErrOrStderr(), prompt+": ")
		b, err := term.ReadPassword(int(in.Fd()))
		fmt.Fprintln(p.cmd.ErrOrStderr())
		if err != nil {
			return secret.Bytes{}, fmt.Errorf("read passphrase: %w", err)
		}
		return given(b)
	}
	if !p.read {
		if err := p.load(); err != nil {
			return secret.Bytes{}, err
		}
	}
	line, rest, _ := bytes.Cut(p.rest, []byte("\n"))
	p.rest = rest
	return given(bytes.TrimSuffix(line, []byte("\r")))
}

func given(b []byte) (secret.Bytes, error) {
	if len(b) == 0 {
		return secret.Bytes{}, usage(errors.New("no passphrase is given"),
			"type it, or give --passphrase-file FILE")
	}
	return secret.Own(b), nil
}

func (p *passphrases) load() error {
	p.read = true
	if p.file != "" && p.file != "-" {
		s, err := secret.ReadFile(p.file, longest)
		if err == nil {
			p.rest = s.Expose()
		}
		return err
	}
	b := make([]byte, longest)
	n, err := io.ReadFull(p.cmd.InOrStdin(), b)
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("read passphrase: %w", err)
	}
	p.rest = b[:n]
	return nil
}

// fresh asks for a new passphrase, at the terminal twice.
func (p *passphrases) fresh(prompt string) (secret.Bytes, error) {
	first, err := p.ask(fmt.Sprintf("%s, at least %d characters", prompt, keyring.MinPassphrase))
	if err != nil || p.read {
		return first, err
	}
	again, err := p.ask("the same again")
	if err != nil {
		return again, err
	}
	defer again.Clear()
	if !bytes.Equal(first.Expose(), again.Expose()) {
		first.Clear()
		return secret.Bytes{}, errors.New("the two passphrases differ; nothing was changed")
	}
	return first, nil
}

// key asks for the passphrase of a root key file and makes its key here, in a
// process that ends soon, so that neither the passphrase nor the memory of
// Argon2id ever is in the daemon.
func (p *passphrases) key(path string, s *keyring.SealedRoot) (secret.Bytes, error) {
	if p.last.Len() != 0 {
		key := s.Key(p.last)
		if root, err := s.Open(key); err == nil {
			root.Clear()
			return key, nil
		}
	}
	phrase, err := p.ask("passphrase of " + path)
	if err != nil {
		return phrase, err
	}
	p.last = phrase
	return s.Key(phrase), nil
}

// kmeSite loads a site file that has a key manager.
func kmeSite(cmd *cobra.Command, file string) (*config.Site, error) {
	site, err := loadConfig(cmd, file)
	if err == nil && site.KME == nil {
		err = daemon.ErrNoKME
	}
	return site, err
}

func newKMEUnseal() *cobra.Command {
	var file string
	cmd := &cobra.Command{
		Use:   "unseal",
		Short: "Give a sealed key manager the passphrase of its root key",
		Long: "unseal asks for the passphrase and opens the key manager with it. Wrong ones are\n" +
			"counted and stand in the audit log after the right one.",
		Args: noArgs,
	}
	configFlag(cmd, &file)
	phrases := passphraseFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := secret.Harden(); err != nil {
			return err
		}
		site, err := kmeSite(cmd, file)
		if err != nil {
			return err
		}
		client := control.Dial(site.KME.Control)
		status, err := client.Status(cmd.Context())
		if err != nil {
			return err
		}
		if status.KME != nil && !status.KME.Sealed {
			_, err := fmt.Fprintf(cmd.OutOrStdout(), "%s is not sealed\n", site.KME.ID)
			return err
		}
		s, err := keyring.ReadSealedRoot(site.KME.RootKey)
		if err != nil {
			return err
		}
		key, err := phrases.key(site.KME.RootKey, s)
		if err != nil {
			return err
		}
		defer key.Clear()
		if err := client.Unseal(cmd.Context(), key); err != nil {
			return err
		}
		_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s is unsealed\n", site.KME.ID)
		return err
	}
	return cmd
}

func newKMESeal() *cobra.Command {
	var file string
	cmd := &cobra.Command{
		Use:   "seal",
		Short: "Have a running key manager forget its keys until it is unsealed",
		Long: "seal drops root key, epoch keys and everything open from memory. Applications are\n" +
			"answered 503, and what was open with peers is void, as after a restart. For a key\n" +
			"manager whose root key is under a passphrase.",
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			site, err := kmeSite(cmd, file)
			if err != nil {
				return err
			}
			if err := control.Dial(site.KME.Control).Seal(cmd.Context()); err != nil {
				return err
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s is sealed; quietline kme unseal opens it\n",
				site.KME.ID)
			return err
		},
	}
	configFlag(cmd, &file)
	return cmd
}

func newKMENewRoot() *cobra.Command {
	var sealed bool
	cmd := &cobra.Command{
		Use:   "new-root FILE",
		Short: "Make a root key file, with or without a passphrase",
		Long: "new-root writes a new file (mode 0600) for root_key of a site that has no stock yet,\n" +
			"or for a systemd credential. It never replaces a file. The root key of a key manager\n" +
			"that has stock is changed by quietline kme rotate-root.",
		Args: cobra.ArbitraryArgs,
	}
	cmd.Flags().BoolVar(&sealed, "passphrase", false, "put it under a passphrase")
	phrases := passphraseFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if len(args) != 1 {
			return usage(errors.New("expected one FILE"), cmd.CommandPath()+" FILE")
		}
		if err := secret.Harden(); err != nil {
			return err
		}
		if err := newRoot(args[0], sealed, phrases); err != nil {
			return err
		}
		_, err := fmt.Fprintf(cmd.OutOrStdout(),
			"%s is made; keep a copy away from this machine and from copies of the state folder\n", args[0])
		return err
	}
	return cmd
}

func newRoot(path string, sealed bool, phrases *passphrases) error {
	if !sealed {
		return keyring.NewRootKey(path)
	}
	if _, err := os.Lstat(path); err == nil {
		return fmt.Errorf("make root key %s: it exists", path)
	}
	phrase, err := phrases.fresh("new passphrase for " + path)
	if err != nil {
		return err
	}
	phrases.last = phrase
	return keyring.NewSealedRoot(path, phrase)
}

func newKMERotateRoot() *cobra.Command {
	var file, next string
	var sealed, plain, replace bool
	cmd := &cobra.Command{
		Use:   "rotate-root",
		Short: "Change the root key of a running key manager, or its passphrase",
		Long: "rotate-root makes a new root key of the same kind as the one in use (or --passphrase,\n" +
			"--plain), has the key manager go over to it, and destroys the old one. The stock\n" +
			"stays. If it is cut short, the same command ends it; until then both root keys work.\n\n" +
			"Copies of the old root key that lie elsewhere open nothing that the key manager has\n" +
			"stored since, but still open old copies of its state folder: destroy both.\n\n" +
			"With root_credential the new root key is given by --new FILE, made by new-root; it\n" +
			"is taken up at the next start with the new credential.",
		Args: noArgs,
	}
	configFlag(cmd, &file)
	f := cmd.Flags()
	f.BoolVar(&sealed, "passphrase", false, "put the new root key under a passphrase")
	f.BoolVar(&plain, "plain", false, "put the new root key under no passphrase")
	f.StringVar(&next, "new", "", "the new root key `file`, for a site with root_credential")
	f.BoolVar(&replace, "replace", false, "give up a new root key that was begun with and is lost")
	phrases := passphraseFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if sealed && plain {
			return usage(errors.New("expected one of --passphrase and --plain"), "give one or none")
		}
		if err := secret.Harden(); err != nil {
			return err
		}
		site, err := kmeSite(cmd, file)
		if err != nil {
			return err
		}
		if (site.KME.RootCredential != "") != (next != "") {
			return usage(errors.New("--new goes with root_credential, and only with it"),
				cmd.CommandPath()+" --help tells how each kind is changed")
		}
		if next != "" {
			return rotateCredential(cmd, site, next, replace)
		}
		r := daemon.Rotation{Path: site.KME.RootKey, Client: control.Dial(site.KME.Control),
			Key: phrases.key, Replace: replace}
		r.New = func(path string) error {
			_, err := keyring.ReadRootKey(site.KME.RootKey)
			same := errors.Is(err, kms.ErrSealed)
			return newRoot(path, sealed || same && !plain, phrases)
		}
		return rotateRoot(cmd, site, &r)
	}
	return cmd
}

func rotateRoot(cmd *cobra.Command, site *config.Site, r *daemon.Rotation) error {
	// A key manager that cannot take it is found before anybody types.
	status, err := r.Client.Status(cmd.Context())
	if err == nil && status.KME != nil && status.KME.Sealed {
		err = hinted(fmt.Errorf("%w", kms.ErrSealed), "quietline kme unseal opens it")
	}
	if err != nil {
		return err
	}
	resumed, err := r.Run(cmd.Context())
	if err != nil {
		return hinted(err, "nothing is lost, both root keys work; repeat the command")
	}
	word := "is changed"
	if resumed {
		word = "was being changed before; that change is done now"
	}
	_, err = fmt.Fprintf(cmd.OutOrStdout(), "the root key of %s %s\n"+
		"next: put a copy of %s away, and destroy copies of the old root key: they\n"+
		"open old copies of %s\n", site.KME.ID, word, r.Path, site.State)
	return err
}

// rotateCredential admits a root key that systemd will show at the next start.
func rotateCredential(cmd *cobra.Command, site *config.Site, path string, replace bool) error {
	root, err := keyring.ReadRootKey(path)
	if err != nil {
		return err
	}
	defer root.Clear()
	step := control.RootAdmit
	if replace {
		step = control.RootReplace
	}
	if err := control.Dial(site.KME.Control).Root(cmd.Context(), step, root); err != nil {
		return err
	}
	name := site.KME.RootCredential
	_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s takes both root keys now\n"+
		"next:\n  systemd-creds encrypt --name=%s %s /etc/credstore.encrypted/%s\n"+
		"  restart the service; quietline audit show tells \"root key rotated\" within a minute\n"+
		"  shred -u %s, and destroy copies of the old credential\n", site.KME.ID, name, path, name, path)
	return err
}
