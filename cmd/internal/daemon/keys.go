package daemon

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sync/errgroup"

	"github.com/quietline/quietline/cmd/internal/config"
	"github.com/quietline/quietline/cmd/internal/control"
	"github.com/quietline/quietline/kms"
	"github.com/quietline/quietline/kms/node"
	"github.com/quietline/quietline/secret"
)

// storeDir is the key manager's corner of the state folder.
func storeDir(s *config.Site) string { return filepath.Join(s.State, "kme") }

// keys opens the node when the vault is, and runs it until ctx ends or the
// vault is sealed again. What is open at the end goes with the stack.
func (m *keyManager) keys(ctx context.Context) error {
	for {
		if m.gate.node.Load() == nil {
			select {
			case <-ctx.Done():
				return nil
			case opened := <-m.unsealed:
				err := m.openNode()
				if err != nil {
					m.vault.drop()
				}
				opened <- err
				if err != nil {
					continue
				}
			}
		}
		if err := m.runNode(ctx); err != nil || ctx.Err() != nil {
			return err
		}
		m.closeNode()
		m.env.Log.Warn("key manager is sealed")
	}
}

// openNode opens store and devices with the vault's root key.
func (m *keyManager) openNode() error {
	root, err := m.vault.key()
	if err != nil {
		return err
	}
	defer root.Clear()
	var opened closers
	env := m.env
	env.Site = m.site.Load()
	cfg, err := nodeConfig(env, &opened)
	if err == nil {
		cfg.Root = root
		var n *node.Node
		if n, err = node.Open(cfg); err == nil {
			m.gate.node.Store(n)
			return nil
		}
	}
	opened.close()
	return err
}

// closeNode forgets whatever the node knew. It may be called without one.
func (m *keyManager) closeNode() {
	n := m.gate.node.Swap(nil)
	if n == nil {
		return
	}
	n.KME().Forget()
	if err := n.Close(); err != nil {
		m.env.Log.Error("key manager's store did not close", "err", err)
	}
}

// runNode runs the node until ctx ends or the vault is sealed.
func (m *keyManager) runNode(ctx context.Context) error {
	n := m.gate.node.Load()
	inner, stop := m.vault.until(ctx)
	defer stop()
	g, inner := errgroup.WithContext(inner)
	g.Go(func() error { return n.Run(inner) })
	g.Go(func() error { n.FollowTLS(inner, followEvery); return nil })
	g.Go(func() error {
		if err := m.begin(inner, n); err != nil && inner.Err() == nil {
			m.env.Log.Error("start is not in the audit log", "err", err)
		}
		return nil
	})
	return g.Wait()
}

// begin puts into the audit log that and how the node was unsealed, and with
// what configuration.
func (m *keyManager) begin(ctx context.Context, n *node.Node) error {
	if refused := m.vault.counted(); refused > 0 {
		if err := n.Note(ctx, kms.NoteRefusedSeal, refused); err != nil {
			return err
		}
	}
	return errors.Join(noteConfig(ctx, n, m.site.Load()), n.Note(ctx, kms.NoteUnsealed, 1))
}

// reload takes over what of a changed site file the node can.
func (m *keyManager) reload(ctx context.Context, s *config.Site) error {
	if n := m.gate.node.Load(); n != nil {
		if err := n.Reload(ctx, doorSAEs(s), doorLimits(s)); err != nil {
			return err
		}
		if err := noteConfig(ctx, n, s); err != nil {
			return err
		}
	}
	m.site.Store(s)
	return nil
}

// noteConfig puts a changed configuration into the audit log, before it counts
// as known: the hash of what is in force, in which secrets stand by path only.
func noteConfig(ctx context.Context, n *node.Node, s *config.Site) error {
	text, err := s.YAML()
	if err != nil {
		return fmt.Errorf("note configuration: %w", err)
	}
	path := filepath.Join(storeDir(s), "config.sum")
	before, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("note configuration: %w", err)
	}
	hash := sha256.Sum256(text)
	now := hex.EncodeToString(hash[:])
	if strings.TrimSpace(string(before)) == now {
		return nil
	}
	if err := n.Note(ctx, kms.NoteConfig+": SHA-256 "+now, 1); err != nil {
		return err
	}
	if err := secret.WriteFile(path, []byte(now+"\n")); err != nil {
		return fmt.Errorf("note configuration: %w", err)
	}
	return nil
}

// audit reads the audit log.
func (m *keyManager) audit(ctx context.Context) iter.Seq2[kms.Record, error] {
	n := m.gate.node.Load()
	if n == nil {
		return func(yield func(kms.Record, error) bool) { yield(kms.Record{}, kms.ErrSealed) }
	}
	return n.Audit(ctx, 0)
}

// unseal takes the key of the passphrase and waits until the node is open.
func (m *keyManager) unseal(ctx context.Context, key secret.Bytes) error {
	if err := m.vault.unseal(key); err != nil {
		return err
	}
	opened := make(chan error, 1)
	select {
	case m.unsealed <- opened:
	case <-ctx.Done():
		m.vault.drop()
		return ctx.Err()
	}
	return <-opened
}

// seal drops all keys until the next unseal.
func (m *keyManager) seal(ctx context.Context) error {
	n := m.gate.node.Load()
	if n == nil {
		return kms.ErrSealed
	}
	if err := m.vault.maySeal(); err != nil {
		return err
	}
	if err := n.Note(ctx, kms.NoteSealed, 1); err != nil {
		return err
	}
	m.vault.drop()
	return nil
}

// changeRoot takes a step of a change of the root key.
func (m *keyManager) changeRoot(ctx context.Context, step control.RootStep, key secret.Bytes) error {
	n := m.gate.node.Load()
	if n == nil {
		return kms.ErrSealed
	}
	if step != control.RootAdopt {
		return n.AdmitRoot(ctx, key, step == control.RootReplace)
	}
	root, err := m.vault.read(key)
	if err != nil {
		return err
	}
	adopted, err := n.AdoptRoot(ctx, root)
	if !adopted {
		root.Clear()
		return err
	}
	m.vault.take(root)
	return err
}
