package daemon

import (
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/quietline/quietline/cmd/internal/config"
	"github.com/quietline/quietline/cmd/internal/control"
	"github.com/quietline/quietline/cmd/internal/renew"
	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/kms"
	"github.com/quietline/quietline/kms/node"
)

// Errors of a key manager's start.
var (
	// ErrNoKME: the site file has no key manager.
	ErrNoKME = errors.New("the site file has no kme")
	// ErrOneRoot: whoever signs SAEs could sign a key manager too.
	ErrOneRoot = errors.New("client_ca and peer_ca hold the same root")
)

// KME runs the site's key manager until ctx ends. It returns an error when the
// key manager had to stop, for one when its store failed: a key manager that
// cannot write what it has given out must not give out more.
func KME(ctx context.Context, env Env) error {
	k := env.Site.KME
	if k == nil {
		return ErrNoKME
	}
	if err := openState(env.Site.State); err != nil {
		return err
	}
	m := newKeyManager(env) // opened before the control door answers
	parts, closeDoors, err := env.doors(k.ID, k.Control, k.Metrics, control.Door{Status: m.status,
		Audit: m.audit, Unseal: m.unseal, Seal: m.seal, Root: m.changeRoot})
	if err != nil {
		return err
	}
	var stack closers
	stack.add(closeDoors)
	if env.vault == nil {
		stack.add(m.vault.close)
	}
	defer stack.close()
	if err := m.open(&stack); err != nil {
		return err
	}
	env.Log.Info("key manager begins", "kme", k.ID, "addr", m.listener.Addr().String())
	return together(ctx, append(parts,
		func(ctx context.Context) error { return m.run(ctx, env.File) })...)
}

// keyManager is the node with its ETSI 014 door. The door stands before the
// node does: while the root key is sealed it answers 503.
type keyManager struct {
	env      Env
	vault    *vault
	gate     gate // holds the node
	unsealed chan chan<- error
	site     atomic.Pointer[config.Site] // as the door serves it
	warnings []string
	server   *http.Server
	listener net.Listener
	door     *keyDoor
	keeper   *renew.Keeper // nil without an authority here
}

func newKeyManager(env Env) *keyManager {
	m := &keyManager{env: env, vault: env.vault, unsealed: make(chan chan<- error)}
	if m.vault == nil {
		m.vault = newVault(env.Log)
	}
	m.site.Store(env.Site)
	return m
}

// open opens the door and, unless it is sealed, the node; what it opens goes
// on the stack.
func (m *keyManager) open(stack *closers) error {
	env := m.env
	m.warnings = keepsCopies("/", env.Site.State)
	for _, w := range m.warnings {
		env.Log.Warn("the disk may keep what was erased", "reason", w)
	}
	err := revive(env.Site.KME, env.Log)
	if err != nil {
		return fmt.Errorf("renew certificates: %w", err)
	}
	if m.door, err = openDoor(env.Site, env.Log); err != nil {
		return fmt.Errorf("open door: %w", err)
	}
	m.door.behind = m.reload
	if m.server, err = m.door.server(&m.gate); err != nil {
		return err
	}
	if m.keeper, m.server.Handler, err = renewals(env.Site.KME, m.door.live, m.server.Handler,
		env.Log); err != nil {
		return fmt.Errorf("open door: %w", err)
	}
	m.server.Handler = m.gate.guard(m.server.Handler)
	m.listener, err = net.Listen("tcp", env.Site.KME.Listen)
	if err != nil {
		return fmt.Errorf("open door: %w", err)
	}
	stack.add(func() { _ = m.listener.Close() })
	if err := m.vault.load(env.Site.KME); err != nil {
		return err
	}
	stack.add(m.closeNode)
	if sealed, _, _ := m.vault.state(); sealed {
		return nil
	}
	return m.openNode()
}

// twoRoots checks that SAEs and peers have no root in common, also when it
// stands in two files.
func twoRoots(s *config.Site) error {
	saes, err := certificates(s.KME.ClientCA)
	if err != nil {
		return err
	}
	files := []string{s.KME.PeerCA}
	for _, p := range s.Peers {
		if p.CA != "" {
			files = append(files, p.CA)
		}
	}
	for _, file := range files {
		peers, err := certificates(file)
		if err != nil {
			return err
		}
		for der := range peers {
			if saes[der] {
				return fmt.Errorf("%w: %s and %s", ErrOneRoot, s.KME.ClientCA, file)
			}
		}
	}
	return nil
}

// certificates reads the certificates of a PEM file, as DER.
func certificates(path string) (map[string]bool, error) {
	rest, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	found := make(map[string]bool)
	for {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			return found, nil
		}
		if block.Type == "CERTIFICATE" {
			found[string(block.Bytes)] = true
		}
	}
}

// nodeConfig puts the site file into the node's words and opens the drivers,
// which the node closes.
func nodeConfig(env Env, stack *closers) (node.Config, error) {
	s, k := env.Site, env.Site.KME
	cfg := node.Config{
		KME: etsi014.KMEID(k.ID), Dir: storeDir(s),
		Lab: s.Lab, Listen: k.PeerListen, Logger: env.Log,
		TLS:    node.TLSFiles{Cert: k.PeerCertificate, Key: k.PeerKey, CA: k.PeerCA},
		Limits: doorLimits(s), SAEs: doorSAEs(s),
	}
	if k.PeerCRL != "" {
		cfg.TLS.CRLs = []string{k.PeerCRL}
	}
	for _, p := range s.Peers {
		cfg.Peers = append(cfg.Peers,
			node.Peer{ID: etsi014.KMEID(p.KME), Addr: p.Address, CA: p.CA})
	}
	for _, l := range s.Links {
		d, err := openDriver(l.Driver, env.Log.With("link", l.ID))
		if err != nil {
			return node.Config{}, err
		}
		stack.add(func() { _ = d.Close() })
		cfg.Links = append(cfg.Links,
			node.Link{ID: kms.LinkID(l.ID), Peer: etsi014.KMEID(l.Peer), Driver: d})
	}
	return cfg, nil
}

// run serves until ctx ends. The node outlives the door, so that requests in
// flight end with their keys; if the node fails, the door closes. The file is
// the site's, to be loaded again; "" = never.
func (m *keyManager) run(ctx context.Context, file string) error {
	inner, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		defer stop()
		return serveDoor(ctx, m.server, m.listener, m.door.bounds())
	})
	g.Go(func() error { return m.keys(inner) })
	g.Go(func() error { return keep(m.keeper)(ctx) })
	g.Go(func() error { m.door.live.Follow(ctx, followEvery, m.door.log); return nil })
	if file != "" {
		g.Go(func() error { m.door.follow(ctx, file); return nil })
	}
	return g.Wait()
}

// followEvery is the time between two looks at the site file, certificates and
// revocation lists; after two of them at most a change is in force.
const followEvery = 2 * time.Second

// grace is how long requests in flight may take at the end: as long as the
// door gives the key manager for one.
const grace = 5 * time.Second

// serveDoor serves until ctx ends and lets requests in flight finish.
func serveDoor(ctx context.Context, s *http.Server, l net.Listener, bounds etsi014.Bounds) error {
	stopped := make(chan error, 1)
	go func() { stopped <- etsi014.Serve(s, l, bounds) }()
	select {
	case err := <-stopped:
		return fmt.Errorf("serve door: %w", err)
	case <-ctx.Done():
	}
	end, cancel := context.WithTimeout(context.WithoutCancel(ctx), grace)
	defer cancel()
	if err := s.Shutdown(end); err != nil {
		_ = s.Close()
	}
	<-stopped
	return nil
}
