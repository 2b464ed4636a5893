// Package socket is the door to a device process on the same machine: blocks
// and events over a Unix stream socket, unix:///run/quietline/device.sock.
//
// The main types are [Driver], the key manager's side, and [Serve], the
// device's, which takes what it hands over from a [Source]; [Queue] is a ready
// one.
//
// A caller must keep in mind: the socket carries secret bits in the clear, so
// both sides look at the other's user and speak only to their own or to root;
// the device keeps an unacknowledged block in memory and sends it again to the
// next connection, but not over its own restart; one driver is served at a
// time, the newest.
//
// # Messages
//
// A frame is length u32 of what follows, kind u8, body. Integers are
// little-endian, floats IEEE 754 bits, strings u16 length and UTF-8, times
// nanoseconds since 1970 as i64 with 0 for none.
//
//	kind       from    body
//	1 hello    driver  "QLHW", version u16 = 1
//	2 info     device  version u16; flags u8, bit 0 simulated; block bytes u32;
//	                   vendor, model, serial, randomness
//	3 refuse   device  reason string; then the device closes
//	4 credit   driver  empty: one more block is wanted
//	5 block    device  generation u64; seq u64; qber f64; epsilon f64; flags u8,
//	                   bit 0 simulated; made i64; the rest is the bits
//	6 ack      driver  generation u64; seq u64
//	7 event    device  at i64; alarm; detail; has status u8; then, if 1: flags
//	                   u8, bit 0 up, bit 1 simulated; reason; qber f64; sifted
//	                   f64 bit/s; secret f64 bit/s; authentication bits i64
package socket

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"github.com/quietline/quietline/hw"
	"github.com/quietline/quietline/secret"
)

const (
	magic   = "QLHW"
	version = 1
	// maxFrame bounds a frame: blocks of up to 4 MiB, 2^25 bits, are more
	// than distillation makes.
	maxFrame = 4<<20 + 64

	kindHello  = 1
	kindInfo   = 2
	kindRefuse = 3
	kindCredit = 4
	kindBlock  = 5
	kindAck    = 6
	kindEvent  = 7
)

// ErrProtocol: the other side sent what this protocol does not have.
var ErrProtocol = errors.New("device protocol violated")

// readFrame returns kind and body. The body is the caller's, and may be
// secret.
func readFrame(r io.Reader) (byte, []byte, error) {
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return 0, nil, err
	}
	n := binary.LittleEndian.Uint32(head[:])
	if n < 1 || n > maxFrame {
		return 0, nil, fmt.Errorf("%w: frame of %d bytes", ErrProtocol, n)
	}
	b := make([]byte, n)
	if _, err := io.ReadFull(r, b); err != nil {
		secret.Wipe(b)
		return 0, nil, err
	}
	return b[0], b[1:], nil
}

// frame starts a frame; finish sets its length.
func frame(kind byte) []byte { return []byte{0, 0, 0, 0, kind} }

func finish(b []byte) []byte {
	binary.LittleEndian.PutUint32(b, uint32(len(b)-4))
	return b
}

func appendString(b []byte, s string) []byte {
	s = s[:min(len(s), math.MaxUint16)]
	b = binary.LittleEndian.AppendUint16(b, uint16(len(s)))
	return append(b, s...)
}

func appendFloat(b []byte, v float64) []byte {
	return binary.LittleEndian.AppendUint64(b, math.Float64bits(v))
}

func appendTime(b []byte, t time.Time) []byte {
	var ns int64
	if !t.IsZero() {
		ns = t.UnixNano()
	}
	return binary.LittleEndian.AppendUint64(b, uint64(ns))
}

func flags(bits ...bool) (f byte) {
	for i, v := range bits {
		if v {
			f |= 1 << i
		}
	}
	return f
}

// reader takes a body apart; after a short read it is bad and yields zeros.
type reader struct {
	b   []byte
	bad bool
}

func (r *reader) take(n int) []byte {
	if n > len(r.b) {
		r.bad, r.b = true, nil
		return make([]byte, n)
	}
	p := r.b[:n]
	r.b = r.b[n:]
	return p
}

func (r *reader) u16() uint16 { return binary.LittleEndian.Uint16(r.take(2)) }
func (r *reader) u32() uint32 { return binary.LittleEndian.Uint32(r.take(4)) }
func (r *reader) u64() uint64 { return binary.LittleEndian.Uint64(r.take(8)) }

func (r *reader) float() float64 { return math.Float64frombits(r.u64()) }

// flags reads a byte in which only the lowest n bits may be set.
func (r *reader) flags(n int) byte {
	f := r.take(1)[0]
	r.bad = r.bad || f>>n != 0
	return f
}

func (r *reader) string() string {
	s := string(r.take(int(r.u16())))
	r.bad = r.bad || !utf8.ValidString(s)
	return s
}

func (r *reader) time() time.Time {
	if ns := int64(r.u64()); ns != 0 {
		return time.Unix(0, ns).UTC()
	}
	return time.Time{}
}

func (r *reader) end() error {
	if r.bad || len(r.b) > 0 {
		return fmt.Errorf("%w: malformed message", ErrProtocol)
	}
	return nil
}

func encodeHello() []byte {
	return finish(binary.LittleEndian.AppendUint16(append(frame(kindHello), magic...), version))
}

func decodeHello(b []byte) (v uint16, err error) {
	r := &reader{b: b}
	if string(r.take(len(magic))) != magic {
		r.bad = true
	}
	v = r.u16()
	return v, r.end()
}

func encodeInfo(i hw.Info) []byte {
	b := binary.LittleEndian.AppendUint16(frame(kindInfo), version)
	b = append(b, flags(i.Simulated))
	b = binary.LittleEndian.AppendUint32(b, uint32(i.BlockBytes))
	for _, s := range []string{i.Vendor, i.Model, i.Serial, i.Randomness} {
		b = appendString(b, s)
	}
	return finish(b)
}

func decodeInfo(b []byte) (i hw.Info, err error) {
	r := &reader{b: b}
	if v := r.u16(); !r.bad && v != version {
		return i, fmt.Errorf("%w: version %d, this program knows %d", hw.ErrRefused, v, version)
	}
	i.Simulated = r.flags(1) == 1
	i.BlockBytes = int(r.u32())
	i.Vendor, i.Model, i.Serial, i.Randomness = r.string(), r.string(), r.string(), r.string()
	return i, r.end()
}

func encodeBlock(k hw.Block) []byte {
	b := binary.LittleEndian.AppendUint64(frame(kindBlock), k.Generation)
	b = binary.LittleEndian.AppendUint64(b, k.Seq)
	b = appendFloat(appendFloat(b, k.QBER), k.Epsilon)
	b = appendTime(append(b, flags(k.Simulated)), k.Made)
	// One allocation for the bits, so that one wipe reaches them.
	out := make([]byte, 0, len(b)+k.Bits.Len())
	return finish(append(append(out, b...), k.Bits.Expose()...))
}

// decodeBlock copies the bits into a secret of their own.
func decodeBlock(b []byte) (k hw.Block, err error) {
	r := &reader{b: b}
	k.Generation, k.Seq = r.u64(), r.u64()
	k.QBER, k.Epsilon = r.float(), r.float()
	k.Simulated = r.flags(1) == 1
	k.Made = r.time()
	if r.bad || len(r.b) == 0 {
		return hw.Block{}, fmt.Errorf("%w: malformed block", ErrProtocol)
	}
	k.Bits = secret.Copy(r.b)
	return k, nil
}

func encodeAck(generation, seq uint64) []byte {
	b := binary.LittleEndian.AppendUint64(frame(kindAck), generation)
	return finish(binary.LittleEndian.AppendUint64(b, seq))
}

func decodeAck(b []byte) (generation, seq uint64, err error) {
	r := &reader{b: b}
	generation, seq = r.u64(), r.u64()
	return generation, seq, r.end()
}

func encodeEvent(e hw.Event) []byte {
	b := appendTime(frame(kindEvent), e.At)
	b = appendString(appendString(b, e.Alarm), e.Detail)
	if e.Status == nil {
		return finish(append(b, 0))
	}
	s := e.Status
	b = appendString(append(b, 1, flags(s.Up, s.Simulated)), s.Reason)
	b = appendFloat(appendFloat(appendFloat(b, s.QBER), s.SiftedBPS), s.SecretBPS)
	return finish(binary.LittleEndian.AppendUint64(b, uint64(s.AuthBits)))
}

func decodeEvent(b []byte) (e hw.Event, err error) {
	r := &reader{b: b}
	e.At, e.Alarm, e.Detail = r.time(), r.string(), r.string()
	if r.flags(1) == 1 {
		f := r.flags(2)
		e.Status = &hw.Status{Up: f&1 == 1, Simulated: f&2 == 2, Reason: r.string(),
			QBER: r.float(), SiftedBPS: r.float(), SecretBPS: r.float(), AuthBits: int64(r.u64())}
	}
	return e, r.end()
}

// checkPeer refuses, with hw.ErrRefused, a peer that runs neither as our user
// nor as root (SO_PEERCRED, unix(7)).
func checkPeer(c *net.UnixConn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return fmt.Errorf("look at peer: %w", err)
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil || credErr != nil {
		return fmt.Errorf("look at peer: %w", errors.Join(err, credErr))
	}
	return allowed(int(cred.Uid), os.Geteuid())
}

func allowed(peer, own int) error {
	if peer != 0 && peer != own {
		return fmt.Errorf("%w: the other side runs as user %d, not as %d or root",
			hw.ErrRefused, peer, own)
	}
	return nil
}
