// Package node is a running KME: the protocol machine of kms/peer with a
// store, a key ring, the drivers of its links and the channels to its peers
// around it.
//
// The main type is [Node]: [Open] unseals and leases, [Node.Run] works until
// its context ends, [Node.KME] is what goes behind the ETSI 014 door.
//
// Goroutines of a Node, all ended by Run: one that owns machine and store; per
// link one that reads blocks and one that reads events; per peer one that
// dials, or one listener for all that dial us, and a reader and a writer per
// connection.
//
// A caller must keep in mind that a KME stops for good when a commit fails:
// Run returns the cause, calls are answered etsi014.ErrDown, and only a
// restart, which reads back what the disk really holds, serves again.
package node

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/hw"
	"github.com/quietline/quietline/kms"
	"github.com/quietline/quietline/kms/boltstore"
	"github.com/quietline/quietline/kms/keyring"
	"github.com/quietline/quietline/kms/peer"
	"github.com/quietline/quietline/secret"
)

// StoreFile is the name of the store (see boltstore) in the state folder.
const StoreFile = "kms.db"

// epochFile holds the epoch keys, see keyring; it lies beside the store.
const epochFile = "epoch.keys"

// Peer is another KME.
type Peer struct {
	ID etsi014.KMEID
	// Addr is where it listens, host:port. Needed if our ID sorts before its:
	// of two KMEs that one dials.
	Addr string
	// CA is the file of the authorities that may sign this peer's certificate,
	// PEM; "" = TLSFiles.CA. With a file for each, no peer's authority can pass
	// for another peer.
	CA string
}

// Link is a link of this KME.
type Link struct {
	ID      kms.LinkID // the same at both KMEs
	Peer    etsi014.KMEID
	Driver  hw.Driver // closed by Node.Close
	Weights peer.Weights
}

// SAE is an application of the network and the KME that serves it.
type SAE struct {
	ID  etsi014.SAEID
	KME etsi014.KMEID
}

// Config is what a KME needs to run.
type Config struct {
	KME     etsi014.KMEID
	Dir     string // state folder; made with mode 0700
	RootKey string // file of 32 bytes with mode 0600; see keyring.NewRootKey
	// Root is the root key itself, instead of RootKey. It stays the caller's
	// and is not needed after Open.
	Root   secret.Bytes
	Lab    bool   // take blocks of simulated links
	Listen string // address for peers that dial us; empty = none does
	TLS    TLSFiles
	Peers  []Peer
	Links  []Link
	SAEs   []SAE // of all sites
	Limits kms.Limits
	// Retention is how long a drawn key waits for its target; 0 = 600 s.
	Retention time.Duration
	// MaxSegments bounds the stock of a link, in blocks; 0 = 65,536.
	MaxSegments int
	// EpochTurn is how often delivered keys become unreadable on this disk;
	// 0 = 1 min.
	EpochTurn time.Duration
	// TrustDisks keeps stock through a restart of both KMEs of a link.
	TrustDisks bool
	Logger     *slog.Logger // nil = discard
}

// Validate tells everything that is wrong with the configuration itself.
func (c *Config) Validate() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if c.KME == "" || len(c.KME) > 255 {
		bad("KME ID must have 1 to 255 bytes")
	}
	peers := map[etsi014.KMEID]bool{}
	for _, p := range c.Peers {
		switch {
		case p.ID == c.KME:
			bad("peer has our own KME ID %q; every KME needs its own", p.ID)
		case peers[p.ID]:
			bad("peer %q is named twice", p.ID)
		case c.KME < p.ID && p.Addr == "":
			bad("peer %q needs an address: of two KMEs the one whose ID sorts first dials", p.ID)
		case c.KME > p.ID && c.Listen == "":
			bad("peer %q dials us: a listen address is needed", p.ID)
		}
		peers[p.ID] = true
	}
	links := map[kms.LinkID]bool{}
	for _, l := range c.Links {
		switch {
		case l.ID == "" || len(l.ID) > 64:
			bad("link name %q must have 1 to 64 bytes", l.ID)
		case l.ID == kms.Loopback:
			bad("link name %q is kept for keys between SAEs of one KME; choose another", l.ID)
		case links[l.ID]:
			bad("link %q is named twice", l.ID)
		case !peers[l.Peer]:
			bad("link %q leads to %q, which is no peer", l.ID, l.Peer)
		}
		links[l.ID] = true
	}
	saes := map[etsi014.SAEID]bool{}
	for _, s := range c.SAEs {
		switch {
		case s.ID == "" || len(s.ID) > 291 || strings.ContainsRune(string(s.ID), 0):
			bad("SAE ID %q must have 1 to 291 characters", s.ID)
		case saes[s.ID]:
			bad("SAE %q is named twice", s.ID)
		}
		saes[s.ID] = true
	}
	if err := c.Limits.Validate(); err != nil {
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// Node is a running KME. Its methods may be called from several goroutines.
type Node struct {
	cfg      Config
	log      *slog.Logger
	store    kms.Store
	owner    *owner
	ring     *keyring.Ring
	kme      *kms.KME
	listener net.Listener
	hub      *hub
	devices  []*device
}

// Open opens store and keys of a KME, binds its listener and makes it ready to
// Run. Nothing is served yet.
func Open(cfg Config) (*Node, error) {
	if err := cfg.Validate(); err != nil {
		return nil, fmt.Errorf("open KME: %w", err)
	}
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("open KME: %w", err)
	}
	// The store is made before the epoch keys: where these are, it has been.
	_, none := os.Stat(filepath.Join(cfg.Dir, epochFile))
	store, err := boltstore.Open(filepath.Join(cfg.Dir, StoreFile), cfg.KME,
		boltstore.Options{MustExist: none == nil})
	if err != nil {
		return nil, err
	}
	n, err := open(cfg, store)
	if err != nil {
		_ = store.Close()
		return nil, err
	}
	return n, nil
}

// open is Open over any store.
func open(cfg Config, store kms.Store) (*Node, error) {
	n := &Node{cfg: cfg, log: cfg.Logger, store: store}
	if err := n.open(); err != nil {
		if n.ring != nil {
			n.ring.Close()
		}
		return nil, err
	}
	return n, nil
}

func (n *Node) open() (err error) {
	if n.log == nil {
		n.log = slog.New(slog.DiscardHandler)
	}
	saes := map[etsi014.SAEID]etsi014.KMEID{}
	for _, s := range n.cfg.SAEs {
		saes[s.ID] = s.KME
	}
	if n.owner, err = n.lease(saes); err != nil {
		return err
	}
	if n.kme, err = kms.NewKME(n.cfg.KME, saes, n.cfg.Limits, n.owner); err != nil {
		return fmt.Errorf("open KME: %w", err)
	}
	if n.hub, err = newHub(n.cfg, n.log, n.owner); err != nil {
		return err
	}
	n.owner.send = n.hub.send
	for _, l := range n.cfg.Links {
		n.devices = append(n.devices, newDevice(n, l))
	}
	if n.cfg.Listen != "" {
		if n.listener, err = net.Listen("tcp", n.cfg.Listen); err != nil {
			return fmt.Errorf("listen for peers: %w", err)
		}
	}
	return nil
}

// lease takes the store over, opens the key ring and makes the machine.
func (n *Node) lease(saes map[etsi014.SAEID]etsi014.KMEID) (*owner, error) {
	ctx := context.Background()
	snap := peer.Snapshot{Links: map[kms.LinkID]kms.Lease{}, IDKeys: map[kms.LinkID][]byte{}}
	var err error
	if snap.KME, err = n.store.Lease(ctx, "", 0); err != nil {
		return nil, fmt.Errorf("open KME: %w", err)
	}
	root := n.cfg.Root
	if root.Len() == 0 {
		if root, err = keyring.ReadRootKey(n.cfg.RootKey); err != nil {
			return nil, err
		}
		defer root.Clear()
	}
	ring, err := keyring.Open(filepath.Join(n.cfg.Dir, epochFile), root, snap.KME.Epoch,
		snap.KME.Incarnation == 0)
	if err != nil {
		return nil, err
	}
	n.ring = ring
	if err := n.dropLinks(ctx, snap.KME); err != nil {
		return nil, err
	}
	if n.cfg.MaxSegments == 0 {
		n.cfg.MaxSegments = 1 << 16
	}
	mc := peer.Config{MaxSegments: n.cfg.MaxSegments, KME: n.cfg.KME, SAEs: saes, TrustDisks: n.cfg.TrustDisks,
		Retention: n.cfg.Retention, KeySizeBits: n.cfg.Limits.KeySizeBits, Rand: rand.Reader,
		Reserve: reserved(n.cfg.Limits)}
	if snap.Links[kms.Loopback], err = n.store.Lease(ctx, kms.Loopback, -1); err != nil {
		return nil, fmt.Errorf("open KME: %w", err)
	}
	for _, l := range n.cfg.Links {
		mc.Links = append(mc.Links, peer.Link{ID: l.ID, Peer: l.Peer, Weights: l.Weights})
		lease, err := n.store.Lease(ctx, l.ID, -1)
		if err != nil {
			return nil, fmt.Errorf("open KME: %w", err)
		}
		snap.Links[l.ID] = lease
		if lease.IDKey.Epoch == 0 {
			continue
		}
		key, err := ring.Unwrap(keyring.IDKeyName(l.ID), lease.IDKey)
		if errors.Is(err, kms.ErrCorrupt) {
			n.log.Error("ID key cannot be read", "link", l.ID, "err", err) // the machine makes another
			continue
		} else if err != nil {
			return nil, fmt.Errorf("open ID key of link %s: %w", l.ID, err)
		}
		defer key.Clear()
		snap.IDKeys[l.ID] = key.Expose()
	}
	machine, err := peer.New(mc, snap)
	if err != nil {
		return nil, fmt.Errorf("open KME: %w", err)
	}
	o := newOwner(machine, n.store, snap.KME.Fence, ring, n.log)
	if n.cfg.EpochTurn > 0 {
		o.turnEvery = n.cfg.EpochTurn
	}
	return o, nil
}

// dropLinks voids what is stored of links that the configuration no longer has:
// nobody could draw it, and its keys would keep old epochs alive.
func (n *Node) dropLinks(ctx context.Context, kme kms.Lease) error {
	for _, id := range kme.Links {
		if id == kms.Loopback ||
			slices.ContainsFunc(n.cfg.Links, func(l Link) bool { return l.ID == id }) {
			continue
		}
		lease, err := n.store.Lease(ctx, id, -1)
		if err != nil {
			return fmt.Errorf("drop link %s: %w", id, err)
		}
		if len(lease.Segments) == 0 && lease.IDKey.Epoch == 0 {
			continue
		}
		n.log.Warn("stock of a link that is no longer configured is void", "link", id,
			"bits", lease.Ledger.Stored)
		ledger := lease.Ledger
		ledger.Void, ledger.Stored = ledger.Void+ledger.Stored, 0
		changes := []kms.Change{
			{Op: kms.OpLink, Segment: kms.SegmentID{Link: id}},
			{Op: kms.OpTally, Segment: kms.SegmentID{Link: id}, Ledger: ledger}}
		for _, s := range lease.Segments {
			c := kms.Change{Op: kms.OpVoid, Segment: s.ID, Reason: "link is no longer configured"}
			if s.State == kms.StateClosed {
				c = kms.Change{Op: kms.OpFinish, Segment: s.ID}
			}
			changes = append(changes, c)
		}
		if _, err := n.store.Commit(ctx, kme.Fence, changes); err != nil {
			return fmt.Errorf("drop link %s: %w", id, err)
		}
	}
	return nil
}

// Run works until ctx ends or the KME must stop; it returns nil or the cause.
// It is called once.
func (n *Node) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return n.owner.run(ctx) })
	g.Go(func() error { n.hub.run(ctx, n.listener); return nil })
	for _, d := range n.devices {
		g.Go(func() error { d.ingest(ctx); return nil })
		g.Go(func() error { d.watch(ctx); return nil })
	}
	err := g.Wait()
	if err != nil {
		return fmt.Errorf("run KME: %w", err)
	}
	return nil
}

// KME is what goes behind the door. It answers etsi014.ErrDown while Run does
// not run.
func (n *Node) KME() *kms.KME { return n.kme }

// ListenAddr is where peers reach us; nil without a listener.
func (n *Node) ListenAddr() net.Addr {
	if n.listener == nil {
		return nil
	}
	return n.listener.Addr()
}

// SetPeerAddr changes where a peer is dialled from the next attempt on.
func (n *Node) SetPeerAddr(id etsi014.KMEID, addr string) { n.hub.setAddr(id, addr) }

// Health is nil while the KME serves, else why it does not.
func (n *Node) Health() error { return n.owner.health() }

// Stats tells the KME's state; after the end, the last one.
func (n *Node) Stats() kms.Stats {
	st := n.owner.stats()
	for i := range st.Peers {
		if why := n.hub.reason(st.Peers[i].ID); why != "" && !st.Peers[i].Connected {
			st.Peers[i].Reason = why
		}
	}
	for _, d := range n.devices {
		for i := range st.Links {
			if st.Links[i].ID == d.link.ID {
				d.fill(&st.Links[i])
			}
		}
	}
	return st
}

// Audit yields the records of the audit log after the given number, checking
// the chain; see audit.Verify and audit.Lines. The KME goes on meanwhile.
func (n *Node) Audit(ctx context.Context, from uint64) iter.Seq2[kms.Record, error] {
	return n.store.Scan(ctx, from)
}

// Close lets go of listener, drivers and store, after Run has returned.
func (n *Node) Close() error {
	var errs []error
	if n.listener != nil {
		if err := n.listener.Close(); !errors.Is(err, net.ErrClosed) {
			errs = append(errs, err)
		}
	}
	for _, l := range n.cfg.Links {
		if l.Driver != nil {
			errs = append(errs, l.Driver.Close())
		}
	}
	errs = append(errs, n.store.Close())
	n.ring.Close()
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("close KME: %w", err)
	}
	return nil
}
