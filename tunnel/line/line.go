// Package line is the engine of one end of an encrypted line: it moves packets
// between a TUN device and a UDP socket, sealed under the epochs that the rekey
// machine agrees. The main type is [Line].
//
// Out: (1) [tunnel.Queue.ReadBatch] from the TUN device, (2) number and (3)
// seal each record in place, (4) [Conn.Write]. In: (1) [Conn.Read], (2) parse
// the header and find the epoch, (3) check the replay window, open, commit,
// (4) [tunnel.Queue.WriteBatch]. Each direction and queue is one goroutine that
// runs a batch from end to end; nothing is handed over between goroutines and
// nothing is allocated on the way.
//
// One more goroutine owns the rekey machine: it alone calls Step, sends
// handshake datagrams and keepalives, and publishes the epochs by atomic
// pointers. Calls to the key manager run beside it, so that a slow one delays
// no handshake.
//
// A caller must keep in mind that a line without an epoch is blocked: packets
// are dropped and counted, never sent in clear. The package stands beside the
// root of the room, not in it, because the root holds the types that package
// rekey builds on.
package line

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/quietline/quietline/tunnel"
	"github.com/quietline/quietline/tunnel/fdwait"
	"github.com/quietline/quietline/tunnel/rekey"
	"github.com/quietline/quietline/tunnel/seal"
	"github.com/quietline/quietline/tunnel/wire"
)

// Machine agrees the epochs of a line; [rekey.Machine] is one. It is called
// from one goroutine only.
type Machine interface {
	Step(now time.Time, in rekey.Input) rekey.Output
	State() rekey.State
	Stats() rekey.Stats
	Clear()
}

// Config is what a line is made of.
type Config struct {
	Device  tunnel.Device // the line closes it
	Conn    Conn          // the line closes it
	Machine Machine       // the line clears it
	// Keys is where QKD keys come from. Nil is a key manager that never
	// answers: a line whose policy wants no keys does not ask.
	Keys tunnel.KeySource
	// Keepalive is after how long without traffic the line says that it is
	// there; default 10 s. A peer not heard for three times as long is shown
	// as gone.
	Keepalive time.Duration
	// Cipher seals the records; nil = AES-256-GCM of the standard library.
	Cipher seal.Cipher
	DSCP   DSCP // what the outer packets show
	// NoECN hides from the network that inner packets can be marked for
	// congestion. What it has marked all the same is heeded.
	NoECN bool
	// NoProbing believes what the kernel hears of the path's MTU, and finds no
	// path that swallows packets silently.
	NoProbing bool
	// Pad is the one-time pad; nil = the policy wants none.
	Pad *Pad
	Log *slog.Logger // nil = discard
}

const (
	defaultKeepalive = 10 * time.Second // as WireGuard's KEEPALIVE_TIMEOUT
	// deadAfter is how many keepalives may be lost before a peer is shown as
	// gone.
	deadAfter = 3
)

// Line is one end of an encrypted line.
type Line struct {
	cfg Config
	log *slog.Logger

	sending   atomic.Pointer[sending]    // nil = blocked
	receiving atomic.Pointer[receptions] // never nil
	inbox     inbox
	roaming   roaming // nil = the peer's endpoint is fixed
	moves     atomic.Uint64
	classes   []*class   // of a line with pad; the last fits everything
	writes    sync.Mutex // of a line with pad: who writes to the device

	seals []*worker // one a TUN queue; each counts alone
	open  *worker
	own   *worker // the machine's owner

	began     time.Time
	lastHeard atomic.Int64 // nanoseconds since began; 0 = never
	calls     sync.WaitGroup

	mu       sync.Mutex // guards snapshot
	snapshot snapshot
}

// New checks cfg and returns a line that does nothing before Run. On error the
// parts in cfg stay the caller's.
func New(cfg Config) (*Line, error) {
	if cfg.Device == nil || cfg.Conn == nil || cfg.Machine == nil {
		return nil, fmt.Errorf("make line: %w: device, connection and machine are needed", ErrConfig)
	}
	if n := len(cfg.Device.Queues()); n == 0 || n >= wire.Queues {
		return nil, fmt.Errorf("make line: %w: device has %d queues, 1 to %d are possible",
			ErrConfig, n, wire.Queues-1)
	}
	if cfg.Keepalive == 0 {
		cfg.Keepalive = defaultKeepalive
	}
	if cfg.Keepalive < 0 {
		return nil, fmt.Errorf("make line: %w: keepalive %v is negative", ErrConfig, cfg.Keepalive)
	}
	if cfg.DSCP.Value > maxDSCP {
		return nil, fmt.Errorf("make line: %w: DSCP %d is above %d", ErrConfig, cfg.DSCP.Value, maxDSCP)
	}
	if cfg.Cipher == nil {
		cfg.Cipher = seal.AES256GCM
	}
	if cfg.Pad != nil {
		if err := cfg.Pad.check(); err != nil {
			return nil, fmt.Errorf("make line: %w", err)
		}
	}
	l := &Line{cfg: cfg, log: cfg.Log, began: time.Now(), open: newWorker(), own: newWorker()}
	if l.log == nil {
		l.log = slog.New(slog.DiscardHandler)
	}
	if r, ok := cfg.Conn.(roaming); ok && r.Roams() {
		l.roaming = r
	}
	for range cfg.Device.Queues() {
		l.seals = append(l.seals, newWorker())
	}
	if cfg.Pad != nil {
		l.classes = cfg.Pad.classes()
	}
	l.receiving.Store(&receptions{})
	l.inbox.init()
	l.snapshot.State = cfg.Machine.State()
	return l, nil
}

// Run carries traffic until parent ends, which is no error, or the device or the
// connection breaks. It closes both and clears the machine. Call it once. It may
// raise GOMAXPROCS, see [fdwait.MakeRoom].
func (l *Line) Run(parent context.Context) error {
	defer fdwait.MakeRoom(len(l.seals) + 1)()
	ctx, cancel := context.WithCancelCause(parent)
	defer cancel(nil)
	var loops sync.WaitGroup
	loop := func(what string, f func() error) {
		loops.Go(func() {
			if err := f(); err != nil {
				cancel(fmt.Errorf("%s: %w", what, err))
			}
			cancel(errEnded)
		})
	}
	queues := l.cfg.Device.Queues()
	for i, q := range queues {
		loop("read from TUN", func() error { return l.sealLoop(l.seals[i], i, q) })
	}
	loop("read from network", func() error { return l.openLoop(queues[0]) })
	loops.Go(func() { l.owner(ctx) })
	<-ctx.Done()
	err := errors.Join(l.cfg.Device.Close(), l.cfg.Conn.Close())
	loops.Wait()
	l.calls.Wait()
	l.end()
	if cause := context.Cause(ctx); parent.Err() == nil && !errors.Is(cause, errEnded) {
		err = errors.Join(cause, err)
	}
	if err != nil {
		return fmt.Errorf("run line: %w", err)
	}
	return nil
}

// end wipes what is left when no goroutine runs any more.
func (l *Line) end() {
	l.sending.Store(nil)
	for _, r := range *l.receiving.Swap(&receptions{}) {
		r.clear()
	}
	l.inbox.clear()
	l.cfg.Machine.Clear()
	if l.cfg.Pad != nil {
		l.cfg.Pad.Machine.Clear()
	}
}

// Rekey asks for a new epoch. It returns at once; the outcome shows in Stats
// and in the log.
func (l *Line) Rekey() { l.inbox.put(func(m *mail) { m.rekey = true }) }

// Restored says that the machine was restored from a snapshot: a second copy
// of this memory may seal with the same keys, so all of them are dropped and
// new ones agreed. It returns at once.
func (l *Line) Restored() { l.inbox.put(func(m *mail) { m.restored = true }) }

// closed tells whether err is the end that Close brings.
func closed(err error) bool { return errors.Is(err, os.ErrClosed) || errors.Is(err, errClosed) }
