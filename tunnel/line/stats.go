package line

import (
	"net/netip"
	"sync/atomic"
	"time"

	"github.com/quietline/quietline/tunnel"
	"github.com/quietline/quietline/tunnel/pad"
	"github.com/quietline/quietline/tunnel/rekey"
)

// Stats is what a line has done and how it is.
type Stats struct {
	rekey.State             // level, since, why, epoch, age …
	Handshakes  rekey.Stats // of the rekey machine

	EpochKeys int       // QKD keys in the sending epoch
	EpochSent uint64    // bytes sealed in it
	LastKey   time.Time // when an epoch with a QKD key came into use; zero = never
	Alarms    uint64
	LastAlarm string

	Sent     Traffic
	Received Traffic
	Drops    map[string]uint64 // packets and datagrams by reason; all reasons are there
	Keys     KeyStats

	Pad *PadStats // nil = no one-time pad

	LastHeard time.Time // authentic record of the peer; zero = never
	PeerAlive bool      // heard within three keepalives
	Peer      Peer      // what the peer says of its line
	Device    tunnel.Caps
	// SendOffload and ReceiveOffload tell whether bursts cross the kernel in
	// one call on the UDP socket now.
	SendOffload, ReceiveOffload bool
	// Buffers are the socket's; the zero value if it does not tell.
	Buffers Buffers
	// Remote is where the peer is now; the zero value if the socket does not
	// tell. Moves is how often it has changed.
	Remote netip.AddrPort
	Moves  uint64
	// PathMTU is the largest outer packet that is sent, in bytes, or that the
	// kernel would let pass; 0 if the socket does not tell. PathProven says that
	// the peer has answered a probe of that size.
	PathMTU    int
	PathProven bool
}

// Traffic counts one direction.
type Traffic struct {
	Packets    uint64 // inner IP packets
	Bytes      uint64 // in them
	Datagrams  uint64 // outer data datagrams, keepalives included
	OuterBytes uint64 // UDP payload of them
}

func (t *Traffic) add(w *worker) {
	t.Packets += w.packets.Load()
	t.Bytes += w.bytes.Load()
	t.Datagrams += w.datagrams.Load()
	t.OuterBytes += w.outer.Load()
}

// KeyStats counts what went over to the key manager.
type KeyStats struct {
	Drawn     uint64            // keys
	Collected uint64            // keys
	Failures  map[string]uint64 // calls: "empty", "unknown", "denied", "down"
}

// reason is why a packet or a datagram was dropped.
type reason int

const (
	blocked      reason = iota // no epoch may carry traffic
	notIP                      // the TUN device handed over no IP packet
	oversize                   // larger than a datagram, or than the path takes
	spent                      // the key has sealed all it may
	unsent                     // the socket refused
	malformed                  // no datagram of this protocol
	unknownEpoch               // retired, or a stranger's
	tooOld                     // behind the replay window
	replayed                   // seen before
	forged                     // tag does not fit
	badRecord                  // authentic, but no record that is built
	unwritten                  // the TUN device refused
	congested                  // marked on the way, and the sender cannot hear it (RFC 6040)
	noPad                      // no one-time pad, and the policy wants it
	unpadded                   // payload without the pad that the policy wants
	padBlock                   // pad that is not held: void, or retired
	crowded                    // more handshake datagrams or CONTROL records than are taken
	reasons
)

var reasonNames = [reasons]string{
	blocked: "blocked", notIP: "not_ip", oversize: "oversize", spent: "key_spent",
	unsent: "send_failed", malformed: "malformed", unknownEpoch: "unknown_epoch",
	tooOld: "too_old", replayed: "replayed", forged: "forged", badRecord: "bad_record",
	noPad: "no_pad", unpadded: "not_padded", padBlock: "pad_block",
	unwritten: "tun_refused", congested: "congested", crowded: "handshake_queue",
}

// count is a counter that one goroutine writes, alone on its cache line.
type count struct {
	atomic.Uint64
	_ [56]byte
}

// worker is what a goroutine of the packet path counts.
type worker struct {
	packets, bytes, datagrams, outer atomic.Uint64
	drops                            [reasons]atomic.Uint64
	_                                [64]byte // workers share no cache line
}

func newWorker() *worker { return &worker{} }

func (w *worker) drop(why reason) { w.drops[why].Add(1) }

// snapshot is the owner's part of Stats.
type snapshot struct {
	rekey.State
	handshakes rekey.Stats
	epochKeys  int
	lastKey    time.Time
	alarms     uint64
	lastAlarm  string
	peer       Peer
	pad        *pad.State // nil = no one-time pad
	keys       KeyStats
	pathMTU    int
	proven     bool
}

// Stats returns what the line has done and how it is, at any time.
func (l *Line) Stats() Stats {
	l.mu.Lock()
	snap := l.snapshot
	failures := map[string]uint64{"empty": 0, "unknown": 0, "denied": 0, "down": 0}
	for k, v := range snap.keys.Failures {
		failures[k] = v
	}
	l.mu.Unlock()
	s := Stats{State: snap.State, Handshakes: snap.handshakes, EpochKeys: snap.epochKeys,
		LastKey: snap.lastKey, Alarms: snap.alarms, LastAlarm: snap.lastAlarm, Keys: snap.keys, Peer: snap.peer,
		Drops: map[string]uint64{}, Device: l.cfg.Device.Caps()}
	s.Keys.Failures = failures
	s.PathMTU, s.PathProven = snap.pathMTU, snap.proven
	s.Pad = l.padStats(snap.pad)
	if c, ok := l.cfg.Conn.(interface{ Offload() (send, receive bool) }); ok {
		s.SendOffload, s.ReceiveOffload = c.Offload()
	}
	if c, ok := l.cfg.Conn.(interface{ Buffers() Buffers }); ok {
		s.Buffers = c.Buffers()
	}
	if c, ok := l.cfg.Conn.(interface{ Remote() netip.AddrPort }); ok {
		s.Remote, s.Moves = c.Remote(), l.moves.Load()
	}
	if e := l.sending.Load(); e != nil {
		s.EpochSent = e.total()
	}
	s.Received.add(l.open)
	s.Sent.add(l.own)
	for _, w := range l.seals {
		s.Sent.add(w)
	}
	for _, w := range append([]*worker{l.open, l.own}, l.seals...) {
		for why := range w.drops {
			s.Drops[reasonNames[why]] += w.drops[why].Load()
		}
	}
	if ns := l.lastHeard.Load(); ns != 0 {
		s.LastHeard = l.began.Add(time.Duration(ns))
		s.PeerAlive = time.Since(s.LastHeard) <= deadAfter*l.cfg.Keepalive
	}
	return s
}
