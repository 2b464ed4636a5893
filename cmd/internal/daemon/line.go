package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"slices"
	"sync/atomic"
	"time"

	"github.com/quietline/quietline/cmd/internal/config"
	"github.com/quietline/quietline/cmd/internal/control"
	"github.com/quietline/quietline/cmd/internal/renew"
	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/etsi014/identity"
	"github.com/quietline/quietline/tunnel"
	"github.com/quietline/quietline/tunnel/bundle"
	"github.com/quietline/quietline/tunnel/line"
	"github.com/quietline/quietline/tunnel/pad"
	"github.com/quietline/quietline/tunnel/rekey"
	"github.com/quietline/quietline/tunnel/tun"
	"github.com/quietline/quietline/tunnel/wire"
)

// Line runs one encrypted line until ctx ends. It returns an error when its
// device or socket breaks; a line that only lacks keys goes on, blocked.
func Line(ctx context.Context, env Env, cfg *config.Line) error {
	env.Log = env.Log.With("line", cfg.ID)
	if err := openState(env.Site.State); err != nil {
		return err
	}
	if err := guardLine(cfg, env.Log); err != nil {
		return err
	}
	var e lineEnd // set before the control door answers
	parts, closeDoors, err := env.doors(cfg.ID, cfg.Control, cfg.Metrics, control.Door{
		Status: func() control.Status {
			s := e.status(cfg)
			s.Certificates = append(certificateStatus(e.keeper), certificateStatus(e.padKeeper)...)
			return s
		},
		Rekey: func() error { e.line.Rekey(); return nil },
	})
	if err != nil {
		return err
	}
	var stack closers
	stack.add(closeDoors)
	defer stack.close()
	if err := e.open(cfg, env.Log, &stack); err != nil {
		return err
	}
	env.Log.Info("line begins", "addr", cfg.Endpoints[0].Remote.String())
	return together(ctx, append(parts, e.line.Run, e.watchStock, e.follow(env.Log), keep(e.keeper), keep(e.padKeeper),
		watchRestore(e.line.Restored, env.Log))...)
}

// lineEnd is a line with its key source.
type lineEnd struct {
	line  *line.Line
	keys  *keySource // nil under pqc-only without keys
	stock atomic.Pointer[tunnel.Stock]
	// keeper renews the certificate of keys; nil without one.
	keeper *renew.Keeper
	// padKeeper renews that of the pad's SAE; nil without one.
	padKeeper *renew.Keeper
	// simulated stays true once the key manager has said so: keys drawn then
	// may still be in use.
	simulated atomic.Bool
}

// open reads the secrets and opens device and socket; what it opens goes on
// the stack until the line owns it.
func (e *lineEnd) open(cfg *config.Line, log *slog.Logger, stack *closers) error {
	machine, err := openMachine(cfg)
	if err != nil {
		return err
	}
	stack.add(machine.Clear)
	lc := line.Config{Machine: machine, Log: log}
	if cfg.Keys != nil {
		keys, err := openKeySource(cfg.Keys, log)
		if err != nil {
			return err
		}
		stack.add(keys.close)
		e.keys, lc.Keys = &keys, keys
		e.keeper = lineKeeper(cfg.Keys, keys.live, log)
		if keys.pad != nil {
			e.padKeeper = lineKeeper(padSAE(cfg.Keys), keys.pad.live, log)
		}
	}
	if lc.Pad, err = openPad(cfg); err != nil {
		return err
	}
	mtu, err := innerMTU(cfg, lc.Pad != nil)
	if err != nil {
		return err
	}
	if err := openEnds(&lc, cfg, mtu, stack); err != nil {
		return err
	}
	e.line, err = line.New(lc)
	return err
}

// openPad makes the one-time pad; nil if the policy has none.
func openPad(cfg *config.Line) (*line.Pad, error) {
	policy, err := rekey.ParsePolicy(cfg.Policy)
	if err != nil || !policy.Pad() {
		return nil, err
	}
	m, err := pad.New(pad.Config{Target: cfg.PadHold})
	if err != nil {
		return nil, err
	}
	p := &line.Pad{Machine: m, Strict: policy == rekey.OTPStrict}
	for _, c := range cfg.Classes {
		class := line.Class{Name: c.Name, To: c.To, Pad: c.Pad, Urgent: c.Urgent}
		for _, port := range c.Ports {
			class.Ports = append(class.Ports, uint16(port))
		}
		for _, d := range c.DSCP {
			class.DSCP = append(class.DSCP, uint8(d))
		}
		p.Classes = append(p.Classes, class)
	}
	return p, nil
}

// innerMTU is the site file's, or what a path of pathMTU leaves.
func innerMTU(cfg *config.Line, padded bool) (int, error) {
	if cfg.TUN.MTU != 0 {
		return cfg.TUN.MTU, nil
	}
	mtu, err := wire.InnerMTU(pathMTU, cfg.Endpoints[0].Remote.Addr())
	if err == nil && padded {
		mtu, err = wire.PadMTU(mtu)
	}
	return mtu, err
}

// pathMTU is what a path carries unless the site file says otherwise, bytes:
// Ethernet's.
const pathMTU = 1500

// ErrBundle: the peer's bundle and the site file do not belong together.
var ErrBundle = errors.New("peer bundle does not fit the site file")

// maxBundle bounds what is read of a bundle, bytes; bundle has its own bound.
const maxBundle = 1 << 20

// openMachine reads what the two ends know of each other.
func openMachine(cfg *config.Line) (*rekey.Machine, error) {
	policy, err := rekey.ParsePolicy(cfg.Policy)
	if err != nil {
		return nil, err
	}
	peer, err := readBundle(cfg)
	if err != nil {
		return nil, err
	}
	seed, err := bundle.ReadSecret(cfg.StaticKey)
	if err != nil {
		return nil, fmt.Errorf("read static key: %w", err)
	}
	link, err := bundle.ReadSecret(cfg.LinkSecret)
	if err != nil {
		seed.Clear()
		return nil, fmt.Errorf("read link secret: %w", err)
	}
	return rekey.New(rekey.Config{
		LinkID: peer.LinkID, Suite: peer.Suite, PeerStatic: peer.Static,
		StaticSeed: seed, LinkSecret: link, Policy: policy,
		EpochLife: cfg.EpochLife, HoldMax: cfg.HoldMax,
		// A line that rekeys often also wants to be back soon.
		ProbeEvery: min(max(cfg.EpochLife, time.Second), 10*time.Second),
	})
}

// readBundle reads the peer's bundle and holds it against the site file.
func readBundle(cfg *config.Line) (*bundle.Bundle, error) {
	f, err := os.Open(cfg.PeerBundle)
	if err != nil {
		return nil, fmt.Errorf("read peer bundle: %w", err)
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxBundle))
	if err != nil {
		return nil, fmt.Errorf("read peer bundle: %w", err)
	}
	peer, err := bundle.Unmarshal(text)
	if err != nil {
		return nil, fmt.Errorf("read peer bundle %s: %w", cfg.PeerBundle, err)
	}
	if want := cfg.PeerFingerprint; want != "" && want != peer.Fingerprint() {
		return nil, fmt.Errorf("%w: %s of site %s is signed by the site key %s, peer_fingerprint is %s; "+
			"ask that site which is right, and enrol the line again: quietline pki invite --again",
			ErrBundle, cfg.PeerBundle, peer.Site, peer.Fingerprint(), want)
	}
	if cfg.Keys != nil && cfg.Keys.PeerSAE != peer.EpochSAE {
		return nil, fmt.Errorf("%w: %s of site %s, signed by %s, names the SAE %q, keys.peer_sae is %q; "+
			"correct the site file, or enrol the line again", ErrBundle, cfg.PeerBundle, peer.Site,
			peer.Fingerprint(), peer.EpochSAE, cfg.Keys.PeerSAE)
	}
	if cfg.Keys == nil || cfg.Keys.Pad == nil {
		return peer, nil
	}
	if want := cfg.Keys.Pad.PeerSAE; want != peer.PadSAE {
		return nil, fmt.Errorf("%w: %s of site %s, signed by %s, names the pad SAE %q, keys.pad.peer_sae "+
			"is %q; correct the site file, or enrol the line again", ErrBundle, cfg.PeerBundle, peer.Site,
			peer.Fingerprint(), peer.PadSAE, want)
	}
	return peer, nil
}

// follow takes up renewed certificates. Idle connections are closed then, for
// they still show the old one, which ends one day; a call in flight goes on.
func (e *lineEnd) follow(log *slog.Logger) part {
	return func(ctx context.Context) error {
		if e.keys == nil {
			<-ctx.Done()
			return nil
		}
		return together(ctx, e.dropOld, func(ctx context.Context) error {
			e.keys.live.Follow(ctx, followEvery, log)
			return nil
		}, func(ctx context.Context) error {
			if e.keys.pad != nil {
				e.keys.pad.live.Follow(ctx, followEvery, log)
			}
			return nil
		})
	}
}

// dropOld closes idle connections at the first two looks after a certificate
// was loaded: the second reaches those that were busy at the first.
func (e *lineEnd) dropOld(ctx context.Context) error {
	tick := time.NewTicker(followEvery)
	defer tick.Stop()
	seen, left := e.keys.live.Stats().Expires, 0
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		if now := e.keys.live.Stats().Expires; !now.Equal(seen) {
			seen, left = now, 2
		}
		if left > 0 {
			left--
			e.keys.close()
		}
	}
}

// stockEvery is the time between two looks at the stock. A look costs the key
// manager no key.
const stockEvery = 5 * time.Second

// watchStock keeps the number of keys in stock for status and metrics.
func (e *lineEnd) watchStock(ctx context.Context) error {
	if e.keys == nil {
		<-ctx.Done()
		return nil
	}
	tick := time.NewTicker(stockEvery)
	defer tick.Stop()
	for {
		e.look(ctx)
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// look asks for the stock once.
func (e *lineEnd) look(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, stockEvery)
	defer cancel()
	stock, err := e.keys.Status(ctx, tunnel.UseEpoch)
	if err != nil {
		e.stock.Store(nil) // the line itself reports what fails
		return
	}
	e.stock.Store(&stock)
	if stock.Simulated {
		e.simulated.Store(true)
	}
}

// openKeySource makes the clients of a line's key manager. It reads the files
// and opens no connection. The caller closes it.
func openKeySource(k *config.Keys, log *slog.Logger) (keySource, error) {
	s, err := openClient(k, log)
	if err != nil || k.Pad == nil {
		return s, err
	}
	p, err := openClient(padSAE(k), log)
	if err != nil {
		s.close()
		return keySource{}, err
	}
	s.pad = &p
	return s, nil
}

// padSAE is the same key manager, asked by the SAE of the pad.
func padSAE(k *config.Keys) *config.Keys {
	same := *k
	same.Certificate, same.Key, same.Pad = k.Pad.Certificate, k.Pad.Key, nil
	same.SAE, same.PeerSAE = k.Pad.SAE, k.Pad.PeerSAE
	return &same
}

// openClient makes the client of one SAE.
func openClient(k *config.Keys, log *slog.Logger) (keySource, error) {
	live, err := identity.Open(identity.Config{
		Pairs: []identity.Pair{{Cert: k.Certificate, Key: k.Key}},
		CA:    k.CA,
	})
	if err != nil {
		return keySource{}, fmt.Errorf("open key source: %w", err)
	}
	client, err := etsi014.NewClient(etsi014.ClientConfig{URLs: k.KMEs,
		KME: etsi014.KMEID(k.KME), TLS: live.Client, Log: log})
	if err != nil {
		return keySource{}, fmt.Errorf("open key source: %w", err)
	}
	return keySource{client: client, peer: etsi014.SAEID(k.PeerSAE), live: live}, nil
}

// openEnds opens device and socket as the site file says.
func openEnds(lc *line.Config, cfg *config.Line, mtu int, stack *closers) (err error) {
	has := func(list []string, word string) bool { return slices.Contains(list, word) }
	off := cfg.TUN.Without
	lc.Device, err = tun.Open(tun.Config{Name: cfg.TUN.Name, Addresses: cfg.TUN.Addresses,
		Routes: cfg.TUN.Routes, MTU: mtu, Queues: cfg.TUN.Queues,
		Offload: tun.Offload{NoTSO: has(off, "tso"), NoUSO: has(off, "uso"),
			NoChecksum: has(off, "checksum")}})
	if err != nil {
		return err
	}
	stack.add(func() { _ = lc.Device.Close() })
	path, outer := cfg.Endpoints[0], cfg.Outer
	lc.Conn, err = line.OpenUDP(line.UDP{Local: path.Local, Remote: path.Remote, Roam: path.Roaming,
		NoGSO: has(outer.Without, "gso"), NoGRO: has(outer.Without, "gro")})
	if err != nil {
		return err
	}
	stack.add(func() { _ = lc.Conn.Close() })
	lc.DSCP.Copy, lc.DSCP.Value = outer.Class()
	lc.NoECN, lc.NoProbing = outer.ECN == "hide", outer.PathMTU == "kernel"
	return nil
}

// status puts the line's numbers into the words of status.
func (e *lineEnd) status(cfg *config.Line) control.Status {
	st := e.line.Stats()
	l := &control.Line{
		Policy: cfg.Policy, Level: st.Level.String(), Since: st.Since, Reason: st.Why,
		Epoch: st.Epoch, Age: age(st.Made), Keys: st.EpochKeys, LastKey: age(st.LastKey),
		Rekeys:        st.Handshakes.Epochs,
		RekeyFailures: st.Handshakes.Failed,
		KeysDrawn:     st.Keys.Drawn, KeysCollected: st.Keys.Collected, KeyFailures: st.Keys.Failures,
		Handshake: st.Handshake, Failure: st.Failure, KeyManager: st.KeyManager,
		Peer: st.PeerAlive, PeerPolicy: st.PeerPolicy,
		Sent: traffic(st.Sent), Received: traffic(st.Received), Drops: st.Drops,
		Alarms: st.Alarms, LastAlarm: st.LastAlarm, Standing: st.State.Alarms,
		Fresh: age(st.Fresh), Chained: st.Chained, BlockAt: moment(st.BlockAt),
		Device: control.Device{Name: st.Device.Name, Backend: st.Device.Backend,
			Offload: st.Device.Offload, MTU: st.Device.MTU, Reason: st.Device.Reason},
		Socket: outerSocket(st),
	}
	if stock := e.stock.Load(); stock != nil {
		l.Stock = &stock.Keys
	}
	l.Pad = e.padStatus(st.Pad, cfg)
	if p := st.Peer; !p.Since.IsZero() {
		l.PeerLevel, l.PeerReason, l.PeerSince = p.Level.String(), p.Reason, moment(p.Since)
	}
	return control.Status{Daemon: "line", Simulated: e.simulated.Load(), Line: l}
}

func outerSocket(st line.Stats) control.Socket {
	return control.Socket{Remote: st.Remote.String(), Moves: st.Moves,
		SendOffload: st.SendOffload, ReceiveOffload: st.ReceiveOffload,
		SendBuffer: st.Buffers.Send, ReceiveBuffer: st.Buffers.Receive,
		PathMTU: st.PathMTU, PathProven: st.PathProven}
}

func traffic(t line.Traffic) control.Traffic { return control.Traffic(t) }

// moment is nil for what has not happened.
func moment(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	return &t
}

// age is nil for what has not happened.
func age(t time.Time) *float64 {
	if t.IsZero() {
		return nil
	}
	return known(time.Since(t).Seconds())
}
