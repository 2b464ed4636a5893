// Package simulator is a QKD link without photons: a device with two ends,
// one at each site, whose raw detections are distilled as a real device's are.
//
// The main type is [End]. It joins one end's optics (simulator/optics) to its
// distillation (hw/distill), and keeps the finished blocks in memory until they
// are fetched: it is a Source for Serve of hw/socket, which hands them to the
// key manager. A [Preset] describes the link; both ends must have the same.
//
// # Two connections
//
// The classical channel carries the messages of hw/distill over the wide-area
// network. Its authenticity rests on the Wegman-Carter tags inside these
// messages, so it needs no TLS; whoever changes or injects a message causes an
// alarm and a new session, never a wrong key. The fibre carries what photons
// carry, preparations included: it stands for the glass and belongs on a
// connection that nobody else can read. Each may be TCP or a Unix socket.
//
// Both carry frames: the length of the body (4 bytes, big endian) and the body.
// On the classical channel a body is one message of hw/distill, or empty, which
// says only that the sender lives. On the fibre:
//
//	HELLO   1 | "QLFI" | version 1 | role | SHA-256 of the link's description
//	        opens the connection in both directions, together
//	WINDOW  2 | window of simulator/optics             alice to bob
//	        at least every 20 ms; generation 0 when she sends no pulses
//	CREDIT  3 | windows taken (8 bytes) | 0, or 1 when bob takes no detections
//	        after each window, and each second while bob is busy
//
// Alice keeps at most eight windows unanswered. She learns from bob neither
// slots nor clicks. The fibre is broken when it carries
// no byte for three seconds, the classical channel after ten.
//
// # Sessions
//
// Each classical connection is a session with a new machine at both ends and a
// generation above all earlier ones of either end; it is on disk before it is
// used. Slots count from 0 in each generation, and each has its own pulses.
// So when one end restarts, both start again, and what was not yet a block is
// lost.
//
// # What a caller must keep in mind
//
// Simulated is true in every block, status and description. Pulses follow the
// wall clock; an end that cannot keep up loses pulses, it builds no queue.
// Blocks that nobody fetches stay in memory up to Config.SpoolBytes; then the
// end stops distilling and its status says so. They are lost with the process.
package simulator

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"sync"
	"sync/atomic"
	"time"

	"github.com/quietline/quietline/hw"
	"github.com/quietline/quietline/hw/distill"
	"github.com/quietline/quietline/simulator/optics"
)

// Config of one end. Fields without a stated default are needed.
type Config struct {
	Role   distill.Role
	Link   string // the link's name in logs and in Describe
	Preset Preset // the same at both ends
	// Fibre and Classical lead to the other end: one side dials, the other
	// listens. By custom bob dials.
	Fibre, Classical Channel
	// Auth is the authentication key shared with the other end. The end uses
	// it during Run; it stays the caller's to close.
	Auth distill.AuthKeys
	// StateDir is an existing folder for the end's state file.
	StateDir string
	// Eve, alice only, is the fraction of pulses that an eavesdropper
	// intercepts from the start, 0 to 1.
	Eve float64
	// SpoolBytes bounds the secret bytes that wait to be fetched; reached, the
	// end stops distilling. 0 means DefaultSpoolBytes.
	SpoolBytes int
	// Seeds make a run repeat itself; nil draws new ones from crypto/rand,
	// and nothing else is safe outside of tests.
	Seeds *Seeds
	Log   *slog.Logger     // nil discards
	Now   func() time.Time // nil means time.Now; it paces the pulses
}

// Seeds of one end: its own choices, and what nature does at it.
type Seeds struct{ Own, Physics optics.Seed }

// DefaultSpoolBytes holds ten minutes of key at 100 kbit/s: longer than a key
// manager takes to restart.
const DefaultSpoolBytes = 8 << 20

// End is one end of a simulated link. Its methods may be called by any
// goroutine, Run once.
type End struct {
	cfg    Config
	seeds  Seeds
	state  *state // owned by the session loop during Run
	digest [32]byte
	spool  *spool
	events *events
	eve    atomic.Uint64 // float64 bits

	session atomic.Pointer[session] // nil between two classical connections
	fibre   fibre

	mu    sync.Mutex // guards what follows; never held across I/O
	stats Stats
	rates rates
	// lastEnd is why the last session ended, if it was not its connection.
	lastEnd string
}

// New returns an end that does nothing before Run. It reads the state file and
// fails with ErrConfig, ErrNewerState or the file's error.
func New(cfg Config) (*End, error) {
	if err := cfg.check(); err != nil {
		return nil, err
	}
	st, err := loadState(cfg.StateDir)
	if err != nil {
		return nil, err
	}
	digest, err := linkDigest(cfg.Preset.Link)
	if err != nil {
		return nil, err
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.SpoolBytes == 0 {
		cfg.SpoolBytes = DefaultSpoolBytes
	}
	cfg.Log = cfg.Log.With("link", cfg.Link)
	e := &End{cfg: cfg, state: st, digest: digest, spool: newSpool(cfg.SpoolBytes),
		events: newEvents()}
	if cfg.Seeds != nil {
		e.seeds = *cfg.Seeds
	} else {
		_, _ = rand.Read(e.seeds.Own[:]) // never fails since Go 1.24
		_, _ = rand.Read(e.seeds.Physics[:])
	}
	e.fibre.changed = make(chan struct{})
	e.eve.Store(math.Float64bits(cfg.Eve))
	e.stats = Stats{Role: cfg.Role, Session: distill.Stats{AuthLeft: -1}}
	return e, nil
}

func (c Config) check() error {
	var faults []error
	bad := func(ok bool, what string) {
		if !ok {
			faults = append(faults, fmt.Errorf("%w: %s", ErrConfig, what))
		}
	}
	bad(c.Role == distill.Alice || c.Role == distill.Bob, "role is neither alice nor bob")
	bad(c.Fibre != nil, "no fibre")
	bad(c.Classical != nil, "no classical channel")
	bad(c.Auth != nil, "no authentication key")
	bad(c.StateDir != "", "no state folder")
	bad(c.SpoolBytes >= 0, "negative spool")
	bad(c.Eve >= 0 && c.Eve <= 1, "eve's fraction is outside 0 to 1")
	bad(c.Eve == 0 || c.Role == distill.Alice, "eve sits at alice's end")
	if err := c.Preset.Link.Validate(); err != nil {
		faults = append(faults, fmt.Errorf("%w: %w", ErrConfig, err))
	}
	return errors.Join(faults...)
}

// Run works until ctx ends, and then returns nil once all that it started has
// ended and the blocks in memory are wiped. It returns early with an error
// when the state file cannot be written. The listeners behind Config.Fibre and
// Config.Classical stay open.
func (e *End) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var wg sync.WaitGroup
	wg.Go(func() { e.runFibre(ctx) })
	wg.Go(func() { e.runReports(ctx) })
	err := e.runSessions(ctx)
	cancel()
	wg.Wait()
	e.spool.clear()
	return err
}

// SetEve changes the fraction of pulses that are intercepted, 0 to 1, from the
// next window on. Only alice's end can.
func (e *End) SetEve(fraction float64) error {
	if e.cfg.Role != distill.Alice {
		return ErrNotAlice
	}
	if !(fraction >= 0 && fraction <= 1) {
		return fmt.Errorf("%w: eve's fraction is %v, outside 0 to 1", ErrConfig, fraction)
	}
	e.eve.Store(math.Float64bits(fraction))
	return nil
}

// CutFibre cuts the fibre at this end, or joins it again. Both ends see it.
func (e *End) CutFibre(cut bool) { e.fibre.setCut(cut) }

// Describe says what this device is.
func (e *End) Describe() hw.Info {
	return hw.Info{
		Vendor:     "Quietline",
		Model:      "simulator " + e.cfg.Preset.Name,
		Serial:     e.cfg.Link,
		Randomness: "operating system, expanded by AES-256; no photons",
		Simulated:  true,
		BlockBytes: e.cfg.Preset.Forecast().SecretBits / 8,
	}
}

// Next waits for the next block and hands it over: the caller owns it and
// keeps it until the key manager has acknowledged it, as hw/socket.Serve does.
// Blocks that were not handed over when Run returns are wiped.
func (e *End) Next(ctx context.Context) (hw.Block, error) { return e.spool.take(ctx) }

// NextEvent waits for the next alarm or the next of the reports that are made
// each second. A reader that is slow loses reports, and of alarms the oldest.
func (e *End) NextEvent(ctx context.Context) (hw.Event, error) { return e.events.next(ctx) }
