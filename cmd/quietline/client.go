package main

import (
	"encoding/base64"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/etsi014/identity"
	"github.com/quietline/quietline/secret"
)

// party is who asks which KME about whom: the flags that every call of client
// takes.
type party struct {
	urls          []string
	cert, key, ca string
	kme, peer     string
	timeout       time.Duration
	asJSON        bool
}

func newClientCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "client",
		Short: "Draw and collect keys as an application does (ETSI GS QKD 014)",
		Long: "client asks a key manager over ETSI GS QKD 014, ours or another's, with an\n" +
			"application's own certificate. A key leaves the key manager once: a repeated\n" +
			"enc draws another key, and dec collects each key once.",
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return usage(errors.New("no verb is given"), "quietline client --help lists the verbs")
		},
	}
	cmd.AddCommand(newClientStatusCommand(), newClientEncCommand(), newClientDecCommand(),
		newClientProfileCommand())
	return cmd
}

func (p *party) flags(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringArrayVar(&p.urls, "url", nil, "base `URL` of the KME; again for fail-over")
	f.StringVar(&p.cert, "cert", "", "this application's certificate, PEM `file`")
	f.StringVar(&p.key, "key", "", "its key, PEM `file` of mode 0600")
	f.StringVar(&p.ca, "ca", "", "the CA of the KME's certificate, PEM `file`")
	f.StringVar(&p.kme, "kme", "", "KME `ID` that the KME's certificate must name; default any")
	f.StringVar(&p.peer, "peer", "", "`SAE` ID of the application at the other end")
	f.DurationVar(&p.timeout, "timeout", 10*time.Second, "of the whole call")
	f.BoolVar(&p.asJSON, "json", false, "print the standard's JSON")
}

// open checks the flags and makes the client; it connects to nobody.
func (p *party) open(cmd *cobra.Command) (*etsi014.Client, error) {
	hint := cmd.CommandPath() + " --help shows the flags"
	for _, f := range []struct{ name, value string }{
		{"cert", p.cert}, {"key", p.key}, {"ca", p.ca}, {"peer", p.peer},
	} {
		if f.value == "" {
			return nil, usage(fmt.Errorf("--%s is missing", f.name), hint)
		}
	}
	if len(p.urls) == 0 {
		return nil, usage(errors.New("--url is missing"), hint)
	}
	if _, err := etsi014.ParseSAEID(p.peer); err != nil {
		return nil, usage(fmt.Errorf("--peer: %w", err), hint)
	}
	if p.timeout <= 0 {
		return nil, usage(fmt.Errorf("--timeout is %v; it must be above 0", p.timeout), hint)
	}
	live, err := identity.Open(identity.Config{
		Pairs: []identity.Pair{{Cert: p.cert, Key: p.key}}, CA: p.ca,
	})
	if err != nil {
		return nil, err
	}
	c, err := etsi014.NewClient(etsi014.ClientConfig{
		URLs: p.urls, TLS: live.Client, KME: etsi014.KMEID(p.kme), Timeout: p.timeout,
	})
	if err != nil {
		return nil, usage(err, hint)
	}
	return c, nil
}

// clientHint adds to a failed call what a person can do about it.
func (p *party) clientHint(err error) error {
	door := "HOST:PORT"
	if u, perr := url.Parse(p.urls[0]); perr == nil {
		door = u.Host
	}
	hint := ""
	e := new(etsi014.Error)
	switch {
	case errors.Is(err, etsi014.ErrEmpty):
		hint = "the link has not made enough key yet; try again later, or ask for less"
		if errors.As(err, &e) && e.RetryAfter > 0 {
			hint = fmt.Sprintf("come again in %v", e.RetryAfter)
		}
		if errors.As(err, &e) && e.MissingBits > 0 {
			hint += fmt.Sprintf("; %d bits are missing", e.MissingBits)
		}
	case errors.Is(err, etsi014.ErrUnknownKey):
		hint = "each application collects a key once; let the other end draw a new one"
	case errors.Is(err, etsi014.ErrSize):
		hint = "--size counts bits"
	case errors.Is(err, etsi014.ErrDenied), errors.Is(err, etsi014.ErrDown):
		hint = "quietline doctor tls " + door + " tells which side refuses, and why"
	}
	return hinted(err, hint)
}

// statusJSON is the standard's Status object, table 8 of clause 6.1.
type statusJSON struct {
	SourceKME  etsi014.KMEID  `json:"source_KME_ID"`
	TargetKME  etsi014.KMEID  `json:"target_KME_ID"`
	Master     etsi014.SAEID  `json:"master_SAE_ID"`
	Slave      etsi014.SAEID  `json:"slave_SAE_ID"`
	KeySize    int            `json:"key_size"`
	Stored     int            `json:"stored_key_count"`
	MaxKeys    int            `json:"max_key_count"`
	PerRequest int            `json:"max_key_per_request"`
	MaxSize    int            `json:"max_key_size"`
	MinSize    int            `json:"min_key_size"`
	MaxTargets int            `json:"max_SAE_ID_count"`
	Extension  map[string]any `json:"status_extension,omitempty"`
}

func newClientStatusCommand() *cobra.Command {
	var p party
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show what this application and its peer can draw",
		Args:  noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := p.open(cmd)
			if err != nil {
				return err
			}
			defer c.Close()
			s, err := c.Status(cmd.Context(), etsi014.SAEID(p.peer))
			if err != nil {
				return p.clientHint(err)
			}
			if p.asJSON {
				return printJSON(cmd.OutOrStdout(), statusJSON{s.SourceKME, s.TargetKME,
					s.Initiator, s.Target, s.KeySizeBits, s.StoredKeys, s.MaxKeys,
					s.MaxKeysPerRequest, s.MaxKeySizeBits, s.MinKeySizeBits, s.MaxTargets,
					s.Extension})
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(),
				"%s at %s and %s at %s: %s of %d bits to draw\n"+
					"limits: %d keys, %s per request, %d to %d bits, %s besides\n",
				s.Initiator, s.SourceKME, s.Target, s.TargetKME, count(s.StoredKeys, "key"),
				s.KeySizeBits, s.MaxKeys, count(s.MaxKeysPerRequest, "key"), s.MinKeySizeBits,
				s.MaxKeySizeBits, count(s.MaxTargets, "SAE"))
			return err
		},
	}
	p.flags(cmd)
	return cmd
}

func newClientEncCommand() *cobra.Command {
	var p party
	var number, size int
	var also []string
	var out string
	cmd := &cobra.Command{
		Use:   "enc",
		Short: "Draw new keys",
		Long: "enc draws new keys and prints key_ID and key (base64), one key a line. Tell the\n" +
			"other end the key_ID; it collects the same key with quietline client dec.",
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			req := etsi014.KeyRequest{Targets: []etsi014.SAEID{etsi014.SAEID(p.peer)},
				Number: number, SizeBits: size}
			hint := cmd.CommandPath() + " --help shows the flags"
			if number < 1 || size < 0 {
				return usage(fmt.Errorf("--number %d --size %d: at least one key, no negative size",
					number, size), hint)
			}
			for _, a := range also {
				if _, err := etsi014.ParseSAEID(a); err != nil {
					return usage(fmt.Errorf("--also: %w", err), hint)
				}
				req.Targets = append(req.Targets, etsi014.SAEID(a))
			}
			return p.keys(cmd, out, func(c *etsi014.Client) (etsi014.Container, error) {
				return c.Keys(cmd.Context(), req)
			})
		},
	}
	p.flags(cmd)
	cmd.Flags().IntVar(&number, "number", 1, "how many keys")
	cmd.Flags().IntVar(&size, "size", 0, "`bits` per key; 0 = the KME's default")
	cmd.Flags().StringArrayVar(&also, "also", nil, "one more `SAE` that may collect; repeatable")
	outFlag(cmd, &out)
	return cmd
}

func newClientDecCommand() *cobra.Command {
	var p party
	var ids []string
	var out string
	cmd := &cobra.Command{
		Use:   "dec",
		Short: "Collect keys by key_ID",
		Long: "dec collects the keys that --peer drew for this application: all or none, in\n" +
			"the order of --id. Each application collects a key once.",
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			req := etsi014.IDRequest{Initiator: etsi014.SAEID(p.peer)}
			hint := cmd.CommandPath() + " --help shows the flags"
			if len(ids) == 0 {
				return usage(errors.New("--id is missing"), hint)
			}
			for _, s := range ids {
				id, err := etsi014.ParseKeyID(s)
				if err != nil {
					return usage(fmt.Errorf("--id %q: %w", s, err), hint)
				}
				req.IDs = append(req.IDs, id)
			}
			return p.keys(cmd, out, func(c *etsi014.Client) (etsi014.Container, error) {
				return c.KeysByID(cmd.Context(), req)
			})
		},
	}
	p.flags(cmd)
	cmd.Flags().StringArrayVar(&ids, "id", nil, "a `key_ID`; repeatable")
	outFlag(cmd, &out)
	return cmd
}

func outFlag(cmd *cobra.Command, out *string) {
	cmd.Flags().StringVar(out, "out", "", "write into this new `file` (mode 0600) and print nothing")
}

// keys asks by ask and prints or writes what came. Where keys shall go is
// looked at first, because keys that cannot be put down are lost.
func (p *party) keys(cmd *cobra.Command, out string,
	ask func(*etsi014.Client) (etsi014.Container, error),
) error {
	c, err := p.open(cmd)
	if err != nil {
		return err
	}
	defer c.Close()
	if out != "" {
		if err := writable(out); err != nil {
			return err
		}
	}
	got, err := ask(c)
	if err != nil {
		return p.clientHint(err)
	}
	defer got.Clear()
	text := secret.Own(appendKeys(nil, got, p.asJSON))
	defer text.Clear()
	if out == "" {
		_, err = cmd.OutOrStdout().Write(text.Expose())
	} else {
		err = secret.WriteFile(out, text.Expose())
	}
	if err != nil {
		return hinted(err, "the keys are lost; draw new ones")
	}
	return nil
}

// writable says whether a new file can be made. An old one is not replaced: it
// may hold the only copy of a key.
func writable(path string) error {
	if _, err := os.Lstat(path); err == nil {
		return hinted(fmt.Errorf("write %s: it exists", path), "name a new file; no key was asked")
	}
	dir := filepath.Dir(path)
	if err := unix.Access(dir, unix.W_OK|unix.X_OK); err != nil {
		return hinted(fmt.Errorf("write into %s: %w", dir, err), "no key was asked")
	}
	return nil
}

// appendKeys writes keys as lines "key_ID base64" or as the standard's
// container (table 10) into one buffer of the right size, because a buffer
// that grows leaves copies.
func appendKeys(b []byte, c etsi014.Container, asJSON bool) []byte {
	room := 16
	for _, k := range c.Keys {
		room += 64 + base64.StdEncoding.EncodedLen(k.Bits.Len())
	}
	b = append(make([]byte, 0, len(b)+room), b...)
	if asJSON {
		b = append(b, `{"keys":[`...)
	}
	for i, k := range c.Keys {
		if asJSON {
			if i > 0 {
				b = append(b, ',')
			}
			b = append(b, `{"key_ID":"`...)
		}
		b, _ = k.ID.AppendText(b)
		if asJSON {
			b = append(b, `","key":"`...)
		} else {
			b = append(b, ' ')
		}
		b = base64.StdEncoding.AppendEncode(b, k.Bits.Expose())
		if asJSON {
			b = append(b, `"}`...)
		} else {
			b = append(b, '\n')
		}
	}
	if asJSON {
		b = append(b, "]}\n"...)
	}
	return b
}
