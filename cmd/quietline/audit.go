package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/quietline/quietline/cmd/internal/config"
	"github.com/quietline/quietline/cmd/internal/control"
	"github.com/quietline/quietline/cmd/internal/daemon"
	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/kms"
	"github.com/quietline/quietline/kms/audit"
	"github.com/quietline/quietline/kms/boltstore"
	"github.com/quietline/quietline/kms/node"
)

func init() { verbs = append(verbs, newAuditCommand) }

func newAuditCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "audit",
		Short: "Verify or show the audit log of the key manager",
		Long: "audit reads the log in which the key manager records every step of every key: from\n" +
			"the key manager if it runs, else from its store, which is not changed.",
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return usage(errors.New("audit needs a verb"), "quietline audit --help lists them")
		},
	}
	cmd.AddCommand(newAuditVerify(), newAuditShow())
	return cmd
}

func newAuditVerify() *cobra.Command {
	var file string
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "verify",
		Short: "Check that no record was changed, removed, added or moved",
		Long: "verify follows the chain of hashes from the first record to the last. It exits 0 when\n" +
			"the log is whole, else 1, and names the first bad record. A log cut short together\n" +
			"with its store is found by the peer: compare the hash with one noted before.",
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			site, err := auditSite(cmd, file)
			if err != nil {
				return err
			}
			return withAuditLog(cmd.Context(), site, func(log control.AuditLog) error {
				return auditVerify(cmd.OutOrStdout(), site.KME.ID, log, asJSON)
			})
		},
	}
	configFlag(cmd, &file)
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func newAuditShow() *cobra.Command {
	var file, sae, link, action, since, till string
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "show",
		Short: "Show what the log tells",
		Long: "show prints a line for each change that the filters pick. Actions: " +
			strings.Join(audit.Actions(), ", ") + ".",
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			f := audit.Filter{SAE: etsi014.SAEID(sae), Link: kms.LinkID(link), Action: action}
			if action != "" && !slices.Contains(audit.Actions(), action) {
				return usage(fmt.Errorf("there is no action %q", action),
					"actions are "+strings.Join(audit.Actions(), ", "))
			}
			for _, t := range []struct {
				name, text string
				at         *time.Time
			}{{"since", since, &f.Since}, {"till", till, &f.Till}} {
				if err := parseTime(t.name, t.text, t.at); err != nil {
					return err
				}
			}
			site, err := auditSite(cmd, file)
			if err != nil {
				return err
			}
			return withAuditLog(cmd.Context(), site, func(log control.AuditLog) error {
				return auditShow(cmd.OutOrStdout(), log, f, asJSON)
			})
		},
	}
	configFlag(cmd, &file)
	flags := cmd.Flags()
	flags.StringVar(&sae, "sae", "", "only what names this SAE")
	flags.StringVar(&link, "link", "", "only what is of this link")
	flags.StringVar(&action, "action", "", "only this action")
	flags.StringVar(&since, "since", "", "only from this `time` on, as 2026-11-21T12:00:00Z")
	flags.StringVar(&till, "till", "", "only before this `time`")
	flags.BoolVar(&asJSON, "json", false, "print JSON, an object a line")
	return cmd
}

func parseTime(flag, text string, at *time.Time) (err error) {
	if text == "" {
		return nil
	}
	if *at, err = time.Parse(time.RFC3339, text); err != nil {
		return usage(fmt.Errorf("--%s %q is no time", flag, text),
			"write it as 2026-11-21T12:00:00Z")
	}
	return nil
}

func auditSite(cmd *cobra.Command, file string) (*config.Site, error) {
	site, err := loadConfig(cmd, file)
	if err == nil && site.KME == nil {
		err = daemon.ErrNoKME
	}
	return site, err
}

// withAuditLog reads the log from the key manager, or from its store if none
// answers.
func withAuditLog(ctx context.Context, site *config.Site, read func(control.AuditLog) error) error {
	client := control.Dial(site.KME.Control)
	probe, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	if _, err := client.Status(probe); !errors.Is(err, control.ErrDown) {
		if err != nil {
			return err
		}
		return read(client.Audit(ctx))
	}
	// A damaged page may point outside the file: an error, not the end of us.
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	store, err := boltstore.OpenRead(filepath.Join(site.State, "kme", node.StoreFile),
		etsi014.KMEID(site.KME.ID))
	if err != nil {
		return err
	}
	return errors.Join(read(control.AuditRecords(store.Scan(ctx, 0))), store.Close())
}

// auditAnswer is audit verify --json.
type auditAnswer struct {
	KME     string `json:"kme"`
	OK      bool   `json:"ok"`
	Records uint64 `json:"records"` // good ones, from the first on
	Hash    string `json:"hash"`    // of the chain up to the last good one
	Fault   string `json:"fault,omitempty"`
}

func auditVerify(w io.Writer, kme string, log control.AuditLog, asJSON bool) error {
	answer := auditAnswer{KME: kme}
	var fault error
	for rec, err := range log {
		if err == nil && rec.Record != answer.Records+1 {
			err = fmt.Errorf("record %d follows record %d: %w", rec.Record, answer.Records,
				kms.ErrCorrupt)
		}
		if err != nil {
			fault, answer.Fault = err, err.Error()
			break
		}
		answer.Records, answer.Hash = rec.Record, rec.Hash
	}
	answer.OK = fault == nil
	switch {
	case fault != nil && !errors.Is(fault, kms.ErrCorrupt):
		return fault // it could not be read: that says nothing about the log
	case asJSON:
		if err := printJSON(w, answer); err != nil || answer.OK {
			return err
		}
		return errReported
	case fault != nil:
		return hinted(fmt.Errorf("verify audit log of %s: %d good records, then: %w", kme,
			answer.Records, fault), "keep a copy of the store and look for who changed it")
	}
	_, err := fmt.Fprintf(w, "audit log of %s is whole: %d records, hash %s\n", kme, answer.Records,
		answer.Hash)
	return err
}

func auditShow(w io.Writer, log control.AuditLog, f audit.Filter, asJSON bool) error {
	enc := json.NewEncoder(w)
	for rec, err := range log {
		if err != nil {
			return err
		}
		for _, l := range rec.Lines {
			if !f.Match(l) {
				continue
			}
			if asJSON {
				err = enc.Encode(l)
			} else {
				_, err = fmt.Fprintln(w, l)
			}
			if err != nil {
				return err
			}
		}
	}
	return nil
}
