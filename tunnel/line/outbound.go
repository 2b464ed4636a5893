package line

import (
	"time"

	"github.com/quietline/quietline/tunnel"
	"github.com/quietline/quietline/tunnel/pad"
	"github.com/quietline/quietline/tunnel/segment"
	"github.com/quietline/quietline/tunnel/wire"
)

// outbound is the state and the memory of a goroutine that seals.
type outbound struct {
	line    *Line
	worker  *worker
	queue   int
	buffers [][]byte
	frames  []tunnel.Frame

	epoch *sending // of the present batch; nil = blocked
	mtu   int      // of the device
	limit int      // bytes of record that fit the path

	// The burst under way: datagrams of equal size in a row, the last of which
	// may be shorter, as UDP_SEGMENT wants them.
	out   []byte
	size  int
	count int
	short bool   // the last is shorter: nothing may follow
	tos   uint8  // of the outer packets: one burst, one class
	inner uint64 // packets in it
	bytes uint64 // in those

	// The small packets that wait for each other, behind the byte of kind.
	// They never wait for what the device does not hold yet.
	pack    []byte
	packed  uint64
	packTOS uint8 // of the outer packet; those of another wait for another record

	header [segment.MaxHeader]byte // of the super-frame in hand

	// Of a line with one-time pad.
	class    *class    // of the frame in hand, and of what waits
	padded   []byte    // scratch: a PAD record
	largest  int       // bucket
	now      time.Time // of the batch
	rejected time.Time // when the host was last told of a refusal
}

func newOutbound(l *Line, w *worker, queue int) *outbound {
	o := &outbound{line: l, worker: w, queue: queue, frames: make([]tunnel.Frame, batch),
		out:  make([]byte, 0, wire.MaxDatagram),
		pack: make([]byte, 1, 1+wire.MaxDatagram)}
	for range batch {
		o.buffers = append(o.buffers, make([]byte, lead+frameLen))
	}
	return o
}

// reset gives every frame its buffer.
func (o *outbound) reset() []tunnel.Frame {
	for i, b := range o.buffers {
		o.frames[i] = tunnel.Frame{Data: b[lead:lead]}
	}
	return o.frames
}

// batch seals and sends frames, which lie in the first buffers. They all go
// out in one epoch, and none stays behind.
func (o *outbound) batch(frames []tunnel.Frame) {
	o.epoch = o.line.sending.Load()
	if o.epoch == nil {
		for _, f := range frames {
			o.worker.drops[blocked].Add(uint64(packets(f)))
		}
		return
	}
	o.mtu = o.line.cfg.Device.Caps().MTU
	o.limit = min(wire.PrefixLen+o.mtu,
		wire.MaxDatagram-wire.HeaderLen-wire.TagLen)
	if o.line.cfg.Pad != nil {
		o.now, o.largest = time.Now(), pad.Largest(o.limit)
	}
	for i := range frames {
		o.frame(o.buffers[i], &frames[i])
	}
	o.closePack()
	o.flush()
	o.epoch.note(o.queue)
}

// packets is the number of packets in a frame that has not been checked.
func packets(f tunnel.Frame) int {
	if g, err := segment.Check(f); err == nil {
		f.GSO = g
		return segment.Count(f)
	}
	return 1
}

// frame takes one frame that lies in buf behind the lead.
func (o *outbound) frame(buf []byte, f *tunnel.Frame) {
	if o.line.cfg.Pad != nil {
		if c := o.line.classify(f.Data); c != o.class {
			o.closePack()
			o.class = c
		}
	}
	if f.GSO.Flags&segment.NeedsChecksum != 0 {
		g, err := segment.Check(*f)
		if err != nil {
			o.worker.drop(notIP)
			return
		}
		f.GSO = g
		if g.Type != segment.None {
			o.slices(buf, f)
			return
		}
	} else if f.GSO.Type != segment.None {
		o.worker.drop(notIP)
		return
	}
	o.packet(buf, f)
}

// packet takes a frame that is one packet.
func (o *outbound) packet(buf []byte, f *tunnel.Frame) {
	if !wire.IsPacket(f.Data) {
		o.worker.drop(notIP)
		return
	}
	if 1+len(f.Data) > o.limit {
		o.worker.drop(oversize)
		return
	}
	unfinished := f.GSO.Flags&segment.NeedsChecksum != 0
	segment.ClampMSS(f.Data, o.mtu, unfinished)
	if small := len(f.Data) <= o.limit/2; small {
		if unfinished {
			segment.Finish(f) // short, and every record byte saved is a datagram later
		}
		o.addPack(f.Data)
		return
	}
	o.closePack()
	if unfinished && wire.PrefixLen+len(f.Data) <= o.limit {
		o.put(buf, 0, wire.Piece{Count: 1, GSO: f.GSO}, len(f.Data))
		return
	}
	if unfinished {
		segment.Finish(f)
	}
	buf[lead-1] = byte(wire.Whole)
	o.seal(buf[lead-1:][:1+len(f.Data)], o.line.cfg.outerTOS(tosOf(f.Data)), 1, len(f.Data))
}

// addPack lets a small packet wait for others, until the batch ends or the
// record is full. A pack of one is a WHOLE.
func (o *outbound) addPack(p []byte) {
	tos := o.line.cfg.outerTOS(tosOf(p))
	if len(o.pack)+len(p) > o.limit || tos != o.packTOS {
		o.closePack()
	}
	o.packTOS = tos
	o.pack = append(o.pack, p...)
	o.packed++
}

func (o *outbound) closePack() {
	if o.packed == 0 {
		return
	}
	o.pack[0] = byte(wire.Pack)
	if o.packed == 1 {
		o.pack[0] = byte(wire.Whole)
	}
	o.seal(o.pack, o.packTOS, o.packed, len(o.pack)-1)
	o.pack, o.packed = o.pack[:1], 0
}

// slices cuts a checked super-frame into records. Prefix and headers of each
// slice are written over the end of the slice before, which has been sealed
// already: so the payload is touched once, by the cipher.
func (o *outbound) slices(buf []byte, f *tunnel.Frame) {
	o.closePack()
	header, size := int(f.GSO.HeaderLen), int(f.GSO.Size)
	if wire.PrefixLen+header+size > o.limit && wire.PrefixLen+len(f.Data) > o.limit {
		o.worker.drops[oversize].Add(uint64(segment.Count(*f)))
		return
	}
	copy(o.header[:], f.Data[:header])
	piece := wire.Piece{Count: segment.Count(*f), GSO: f.GSO}
	for at := 0; piece.Index < piece.Count; at += size {
		n := header + min(size, len(f.Data)-header-at)
		copy(buf[lead+at:], o.header[:header])
		o.put(buf, at, piece, n)
		piece.Index++
	}
}

// put seals a SLICE record: n bytes of headers and slice from place at of the
// frame in buf.
func (o *outbound) put(buf []byte, at int, piece wire.Piece, n int) {
	record := buf[lead+at-wire.PrefixLen:][:wire.PrefixLen+n]
	piece.Put(record)
	o.seal(record, o.line.cfg.outerTOS(tosOf(record[wire.PrefixLen:])), 1, n)
}

// seal adds a record that carries so many packets of so many bytes to the
// burst, and sends the burst before if the record does not fit in.
func (o *outbound) seal(record []byte, tos uint8, packets uint64, bytes int) {
	if o.line.cfg.Pad != nil {
		var ok bool
		if record, ok = o.hide(record, packets); !ok {
			return
		}
	}
	need := wire.HeaderLen + len(record) + wire.TagLen
	if o.count > 0 && (o.short || tos != o.tos || need > o.size || o.count == maxSegments ||
		len(o.out)+need > wire.MaxDatagram) {
		o.flush()
	}
	out, err := o.epoch.sealers[o.queue].Seal(o.out, record)
	if err != nil {
		o.worker.drops[spent].Add(packets)
		return
	}
	o.out = out
	if o.count == 0 {
		o.size, o.tos = need, tos
	}
	o.short = need < o.size
	o.count++
	o.inner += packets
	o.bytes += uint64(bytes)
}

// flush sends the burst.
func (o *outbound) flush() {
	if o.count == 0 {
		return
	}
	w := o.worker
	err := o.line.cfg.Conn.Write(Burst{Data: o.out, Size: o.size, TOS: o.tos})
	switch {
	case err == nil:
		w.packets.Add(o.inner)
		w.bytes.Add(o.bytes)
		w.datagrams.Add(uint64(o.count))
		w.outer.Add(uint64(len(o.out)))
	case !closed(err):
		w.drops[unsentReason(err)].Add(o.inner)
	}
	o.out, o.size, o.count, o.short = o.out[:0], 0, 0, false
	o.inner, o.bytes = 0, 0
}
