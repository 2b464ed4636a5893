package line

import (
	"errors"
	"time"

	"golang.org/x/sys/unix"

	"github.com/quietline/quietline/tunnel"
	"github.com/quietline/quietline/tunnel/seal"
	"github.com/quietline/quietline/tunnel/wire"
)

// batch is how many frames are read from a TUN queue at once.
const batch = 16

// frameLen is the largest frame of a TUN device: an IP packet, or a
// super-frame that the kernel keeps below the same limit.
const frameLen = 65535

// lead is what stands before a packet in its datagram: header and kind.
const lead = wire.HeaderLen + 1

// outbound is the memory of a goroutine that seals: buffers with room around
// the packet, so that it is sealed where it was read.
type outbound struct {
	buffers [][]byte
	frames  []tunnel.Frame
}

func newOutbound() *outbound {
	o := &outbound{frames: make([]tunnel.Frame, batch)}
	for range batch {
		o.buffers = append(o.buffers, make([]byte, lead+frameLen+wire.TagLen))
	}
	return o
}

// reset gives every frame its buffer.
func (o *outbound) reset() []tunnel.Frame {
	for i, b := range o.buffers {
		o.frames[i] = tunnel.Frame{Data: b[lead : lead : lead+frameLen]}
	}
	return o.frames
}

// sealLoop carries packets from TUN queue number n to the network until the
// device closes.
func (l *Line) sealLoop(w *worker, n int, queue tunnel.Queue) error {
	mem := newOutbound()
	for {
		frames := mem.reset()
		got, err := queue.ReadBatch(frames)
		if err != nil {
			if closed(err) {
				return nil
			}
			return err
		}
		// One epoch a batch: what is under way is sealed before a switch.
		epoch := l.sending.Load()
		for i := range frames[:got] {
			l.sealFrame(w, epoch, n+1, mem.buffers[i], len(frames[i].Data))
		}
		if epoch != nil {
			epoch.note(n + 1)
		}
	}
}

// sealFrame seals the packet of n bytes that lies in buf behind its lead, and
// sends it.
func (l *Line) sealFrame(w *worker, epoch *sending, queue int, buf []byte, n int) {
	if epoch == nil {
		w.drop(blocked)
		return
	}
	if !wire.IsPacket(buf[lead:][:n]) {
		w.drop(notIP)
		return
	}
	if lead+n+wire.TagLen > wire.MaxDatagram {
		w.drop(oversize)
		return
	}
	buf[wire.HeaderLen] = byte(wire.Whole)
	record := buf[wire.HeaderLen:][:1+n]
	datagram, err := epoch.sealers[queue].Seal(buf[:0], record)
	if err != nil {
		w.drop(spent)
		return
	}
	if err := l.cfg.Conn.Write(Burst{Data: datagram, Size: len(datagram)}); err != nil {
		if errors.Is(err, unix.EMSGSIZE) {
			w.drop(oversize)
		} else if !closed(err) {
			w.drop(unsent)
		}
		return
	}
	w.packets.Add(1)
	w.bytes.Add(uint64(n))
	w.datagrams.Add(1)
	w.outer.Add(uint64(len(datagram)))
}

// inbound is the memory of a goroutine that opens.
type inbound struct {
	queue  tunnel.Queue
	frames [1]tunnel.Frame
}

// openLoop carries packets from the network to a TUN queue until the
// connection closes.
func (l *Line) openLoop(queue tunnel.Queue) error {
	in := &inbound{queue: queue}
	buf := make([]byte, 0, 1<<16)
	for {
		burst := Burst{Data: buf}
		if err := l.cfg.Conn.Read(&burst); err != nil {
			if closed(err) {
				return nil
			}
			return err
		}
		heard := false
		for data := burst.Data; len(data) > 0; {
			n := min(burst.Size, len(data))
			heard = l.take(in, data[:n:n]) || heard
			data = data[n:]
		}
		if heard {
			l.lastHeard.Store(max(1, int64(time.Since(l.began))))
		}
	}
}

// take handles one datagram and tells whether it was an authentic record.
func (l *Line) take(in *inbound, datagram []byte) bool {
	if wire.IsHandshake(datagram) {
		if !l.inbox.datagram(datagram) {
			l.open.drop(crowded)
		}
		return false
	}
	h, err := wire.ParseHeader(datagram)
	if err != nil {
		l.open.drop(malformed)
		return false
	}
	epoch := l.receiving.Load().find(h.Index)
	if epoch == nil {
		l.open.drop(unknownEpoch)
		return false
	}
	record, err := epoch.open(datagram, h)
	if err != nil {
		l.open.drop(openReason(err))
		return false
	}
	if !epoch.heard.Load() && epoch.heard.CompareAndSwap(false, true) {
		l.inbox.put(func(m *mail) { m.heard = append(m.heard, epoch.index) })
	}
	l.open.datagrams.Add(1)
	l.open.outer.Add(uint64(len(datagram)))
	l.deliver(in, record)
	return true
}

func openReason(err error) reason {
	switch {
	case errors.Is(err, seal.ErrTooOld):
		return tooOld
	case errors.Is(err, seal.ErrReplayed):
		return replayed
	case errors.Is(err, seal.ErrForged):
		return forged
	}
	return unknownEpoch // retired while the datagram was in our hands
}

// deliver hands what an authentic record holds to the host.
func (l *Line) deliver(in *inbound, record []byte) {
	kind, body, err := wire.Parse(record)
	if err != nil {
		l.open.drop(badRecord)
		return
	}
	if kind != wire.Whole {
		return
	}
	in.frames[0] = tunnel.Frame{Data: body}
	if _, err := in.queue.WriteBatch(in.frames[:]); err != nil {
		if !closed(err) {
			l.open.drop(unwritten)
		}
		return
	}
	l.open.packets.Add(1)
	l.open.bytes.Add(uint64(len(body)))
}
