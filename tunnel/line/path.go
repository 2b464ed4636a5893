package line

import (
	"errors"
	"time"

	"golang.org/x/sys/unix"

	"github.com/quietline/quietline/tunnel"
	"github.com/quietline/quietline/tunnel/fdwait"
	"github.com/quietline/quietline/tunnel/wire"
)

// batch is how many frames are read from a TUN queue at once. With frames of
// 64 KiB it is also what bounds the memory of a queue, at about 2 MiB.
const batch = 32

// frameLen is the largest frame of a TUN device: an IP packet, or a
// super-frame that the kernel keeps below the same limit.
const frameLen = 65535

// maxSegments is how many datagrams a burst may have: UDP_MAX_SEGMENTS of
// linux/udp.h, before it was raised.
const maxSegments = 64

// lead is what is left free before a frame in its buffer: the prefix of the
// first record goes there.
const lead = wire.PrefixLen

// sealLoop carries packets from TUN queue number n to the network until the
// device closes.
func (l *Line) sealLoop(w *worker, n int, queue tunnel.Queue) error {
	o := newOutbound(l, w, n+1)
	for {
		frames := o.reset()
		got, err := queue.ReadBatch(frames)
		if err != nil {
			if closed(err) {
				return nil
			}
			return err
		}
		o.batch(frames[:got])
		fdwait.GiveWay()
	}
}

// openLoop carries packets from the network to a TUN queue until the
// connection closes.
func (l *Line) openLoop(queue tunnel.Queue) error {
	in := newInbound(l, queue)
	buf := make([]byte, 0, 1<<16)
	for {
		burst := Burst{Data: buf}
		if err := l.cfg.Conn.Read(&burst, !in.pending()); err != nil {
			if closed(err) {
				return nil
			}
			return err
		}
		in.burst(burst)
		fdwait.GiveWay()
	}
}

// unsentReason says why a burst was not sent.
func unsentReason(err error) reason {
	if errors.Is(err, unix.EMSGSIZE) {
		return oversize
	}
	return unsent
}

// hear notes that authentic records have come.
func (l *Line) hear() { l.lastHeard.Store(max(1, int64(time.Since(l.began)))) }
