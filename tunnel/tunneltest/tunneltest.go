// Package tunneltest runs two real lines over a network in memory that loses,
// duplicates and reorders, with a key manager in memory between them. The main
// type is [Pair].
//
// A caller must keep in mind that everything runs on timers and channels only,
// so that a test may put it into a testing/synctest bubble, where hours of
// rekeying take a second and the seed decides what the network does.
package tunneltest

import (
	"context"
	"io"
	"log/slog"
	"sync"
	"testing"
	"time"

	"github.com/quietline/quietline/secret"
	"github.com/quietline/quietline/tunnel"
	"github.com/quietline/quietline/tunnel/lab"
	"github.com/quietline/quietline/tunnel/line"
	"github.com/quietline/quietline/tunnel/pad"
	"github.com/quietline/quietline/tunnel/rekey"
	"github.com/quietline/quietline/tunnel/tun"
)

// Options of a pair. The zero value is pqc-only on a fair network.
type Options struct {
	Policy rekey.Policy // default pqc-only
	// PeerPolicy is Kochi's, where it is another; default Policy.
	PeerPolicy rekey.Policy
	// Classes of a policy with one-time pad; Hold is the pad that is held ready,
	// default 64 KiB.
	Classes   []line.Class
	Hold      int
	Weather   lab.Weather
	EpochLife time.Duration // default 120 s
	HoldMax   time.Duration // default as package rekey
	Keepalive time.Duration // default as package line
	Keys      int           // QKD keys in stock at the start
	// Sources take the place of that stock, at Tokyo and Kochi.
	Sources [2]tunnel.KeySource
	MTU     int // default 1424
	Queues  int // of each TUN device; default 1
	// Coalesce makes sockets hand over several datagrams in one burst, as a
	// kernel with receive offload does.
	Coalesce bool
	// PathMTU is what the sockets believe that the path takes, bytes; 0 = they
	// know of none. What it takes is for [Net.Tap] to say.
	PathMTU int
	// Log receives what both lines log; nil = nothing.
	Log io.Writer
}

// Pair is two lines, tokyo and kochi, that know each other.
type Pair struct {
	Tokyo, Kochi *Site
	Net          *Net
	Keys         *Stock
}

// Site is one end. Its line can be stopped and started anew, which is a restart
// of the process: keys and counters are gone, the configuration stays.
type Site struct {
	Line   *line.Line
	Device *tun.Memory

	tb     testing.TB
	opt    Options
	name   string
	net    *Net
	end    int
	keys   *end
	config func() rekey.Config
	stop   context.CancelFunc
	done   chan error
}

// New starts a pair; it ends with the test or bubble that tb stands for, if
// [Pair.Close] has not been called before.
func New(tb testing.TB, opt Options) *Pair {
	tb.Helper()
	if opt.Policy == 0 {
		opt.Policy = rekey.PQCOnly
	}
	if opt.MTU == 0 {
		opt.MTU = 1424
		if opt.Policy.Pad() {
			opt.MTU = 1390
		}
	}
	if opt.PeerPolicy == 0 {
		opt.PeerPolicy = opt.Policy
	}
	opt.Queues = max(opt.Queues, 1)
	p := &Pair{Net: newNet(opt.Weather, opt.Coalesce), Keys: newStock(opt.Keys)}
	seeds := [2]byte{0x11, 0x22}
	sites := [2]*Site{}
	for i, name := range []string{"tokyo", "kochi"} {
		own, other := seeds[i], seeds[1-i]
		peer, err := rekey.Public(rekey.XWing, seed(other))
		if err != nil {
			tb.Fatal(err)
		}
		sites[i] = &Site{tb: tb, opt: opt, name: name, net: p.Net, end: i, keys: p.Keys.ends[i],
			config: func() rekey.Config {
				return rekey.Config{LinkID: [16]byte{1}, StaticSeed: seed(own), PeerStatic: peer,
					LinkSecret: seed(0x33), Policy: [2]rekey.Policy{opt.Policy, opt.PeerPolicy}[i], EpochLife: opt.EpochLife,
					HoldMax: opt.HoldMax}
			}}
	}
	p.Tokyo, p.Kochi = sites[0], sites[1]
	p.Tokyo.Start()
	p.Kochi.Start()
	tb.Cleanup(p.Close)
	return p
}

// seed is a secret of 32 equal bytes.
func seed(b byte) secret.Bytes {
	s := secret.New(32)
	for i := range s.Expose() {
		s.Expose()[i] = b
	}
	return s
}

// Start makes and runs the site's line.
func (s *Site) Start() {
	s.tb.Helper()
	m, err := rekey.New(s.config())
	if err != nil {
		s.tb.Fatal(err)
	}
	s.Device = tun.NewMemory(s.name, s.opt.MTU, s.opt.Queues)
	conn := s.net.open(s.end)
	if s.opt.PathMTU > 0 {
		conn = &routedConn{Conn: conn, mtu: s.opt.PathMTU}
	}
	cfg := line.Config{Device: s.Device, Conn: conn, Machine: m, Keys: s.source(),
		Keepalive: s.opt.Keepalive}
	if policy := s.config().Policy; policy.Pad() {
		pm, err := pad.New(pad.Config{Target: max(s.opt.Hold, 64<<10)})
		if err != nil {
			s.tb.Fatal(err)
		}
		cfg.Pad = &line.Pad{Machine: pm, Strict: policy == rekey.OTPStrict, Classes: s.opt.Classes}
	}
	if s.opt.Log != nil {
		cfg.Log = slog.New(slog.NewTextHandler(s.opt.Log, nil)).With("site", s.name)
	}
	if s.Line, err = line.New(cfg); err != nil {
		s.tb.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	s.stop, s.done = cancel, make(chan error, 1)
	go func(l *line.Line, done chan error) { done <- l.Run(ctx) }(s.Line, s.done)
}

// source is where the site's line draws keys.
func (s *Site) source() tunnel.KeySource {
	if from := s.opt.Sources[s.end]; from != nil {
		return from
	}
	return s.keys
}

// Stop ends the site's line and waits for that.
func (s *Site) Stop() {
	s.tb.Helper()
	if s.stop == nil {
		return
	}
	s.stop()
	if err := <-s.done; err != nil {
		s.tb.Errorf("%s: %v", s.name, err)
	}
	s.stop = nil
}

// Close ends both lines and the network. It may be called twice.
func (p *Pair) Close() {
	p.Tokyo.Stop()
	p.Kochi.Stop()
	p.Net.close()
}

// Up waits until both ends send and have heard each other, at most so long.
func (p *Pair) Up(within time.Duration) {
	p.Tokyo.tb.Helper()
	if !p.Wait(within, func() bool {
		a, b := p.Tokyo.Line.Stats(), p.Kochi.Line.Stats()
		return a.Level > rekey.Blocked && b.Level > rekey.Blocked && a.PeerAlive && b.PeerAlive
	}) {
		p.Tokyo.tb.Fatalf("line is not up within %v: tokyo %+v, kochi %+v", within,
			p.Tokyo.Line.Stats().State, p.Kochi.Line.Stats().State)
	}
}

// Wait looks every 10 ms whether what holds, at most so long.
func (p *Pair) Wait(within time.Duration, what func() bool) bool {
	deadline := time.Now().Add(within)
	for !what() {
		if time.Now().After(deadline) {
			return false
		}
		time.Sleep(10 * time.Millisecond)
	}
	return true
}

// Receiver gathers what a site's host receives.
type Receiver struct {
	mu      sync.Mutex
	packets [][]byte
}

// Receive starts gathering, until the device closes.
func (s *Site) Receive() *Receiver {
	r := &Receiver{}
	device := s.Device
	go func() {
		for {
			p, err := device.Take(context.Background())
			if err != nil {
				return
			}
			r.mu.Lock()
			r.packets = append(r.packets, p)
			r.mu.Unlock()
		}
	}()
	return r
}

// Packets returns what has come so far.
func (r *Receiver) Packets() [][]byte {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([][]byte(nil), r.packets...)
}
