package node

import (
	"context"
	"crypto/sha256"
	"fmt"
	"os"
	"time"

	"github.com/quietline/quietline/secret"
)

// ReloadTLS reads certificate, key, authorities and revocation lists of the
// peer channel anew: all of them or, with an error, none; but of a revocation
// list that cannot be used, the error tells and what it said before counts on.
// New connections use the files at once. Those that stand are cut at once if the peer's certificate is
// no longer good, and, if our own certificate is another, are replaced one by
// one with no message lost; a peer that refuses the new certificate keeps its
// old connection. Stock, sessions and calls are not touched.
func (n *Node) ReloadTLS() error {
	if n.cfg.alone() {
		return nil
	}
	t, err := loadTrust(&n.cfg, n.hub.trust.Load())
	if err == nil {
		n.hub.renew(t)
		err = t.faults
	}
	if err != nil {
		return fmt.Errorf("reload certificates for peers: %w", err)
	}
	return nil
}

// FollowTLS calls ReloadTLS when one of the files changes, until ctx ends. It
// looks every so often and waits until it sees the same twice in a row, for a
// certificate and its key are not always written in one step. What cannot be
// loaded is logged; the old files stay in force until the next change.
func (n *Node) FollowTLS(ctx context.Context, every time.Duration) {
	if n.cfg.alone() {
		return
	}
	done := n.hub.trust.Load().sum
	seen := done
	for sleep(ctx, every) {
		before := seen
		if seen = n.cfg.sumTLS(); seen != before || seen == done {
			continue
		}
		done = seen
		if err := n.ReloadTLS(); err != nil {
			n.log.Warn("changed certificates for peers not loaded", "err", err)
			continue
		}
		n.log.Info("changed certificates for peers loaded")
	}
}

// sumTLS is over all files of the peer channel; one that is missing counts as
// empty.
func (c *Config) sumTLS() [sha256.Size]byte {
	files := append([]string{c.TLS.Cert, c.TLS.Key, c.TLS.CA}, c.TLS.CRLs...)
	for _, p := range c.Peers {
		files = append(files, p.CA)
	}
	h := sha256.New()
	for _, f := range files {
		text, _ := os.ReadFile(f)
		part := sha256.Sum256(text)
		secret.Wipe(text)
		h.Write(part[:])
	}
	return [sha256.Size]byte(h.Sum(nil))
}
