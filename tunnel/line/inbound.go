package line

import (
	"errors"

	"github.com/quietline/quietline/tunnel"
	"github.com/quietline/quietline/tunnel/seal"
	"github.com/quietline/quietline/tunnel/segment"
	"github.com/quietline/quietline/tunnel/wire"
)

// inbound is the state and the memory of a goroutine that opens.
type inbound struct {
	line   *Line
	worker *worker
	queue  tunnel.Queue
	mtu    int             // of the device
	frames [1]tunnel.Frame // scratch: what a call writes

	// The slices in a row that are being joined. A run ends with its
	// super-frame, with a gap, and when nothing that continues it has come
	// already: it never waits.
	run struct {
		header wire.Header // of the record that would continue it
		next   wire.Piece  // of that record
		prefix wire.Prefix // of the last record
		first  int         // index of the slice it began with; -1 = no run
		data   []byte      // headers, then payload
		n      int         // slices
	}
	// The small packets in a row that go to the host in one call; it ends as
	// the run does. Only for a device that takes UDP super-frames.
	row  segment.Row
	rows bool

	grew  bool  // the burst in hand has added to the run or the row
	outer uint8 // TOS of the burst in hand
	came  int   // authentic datagrams of the burst in hand
	bytes int   // in them

	padded []byte // scratch: what a PAD record hides
}

func newInbound(l *Line, queue tunnel.Queue) *inbound {
	in := &inbound{line: l, worker: l.open, queue: queue}
	caps := l.cfg.Device.Caps()
	in.rows, in.mtu = caps.UDP, caps.MTU
	in.run.data = make([]byte, 0, frameLen)
	in.run.first = -1
	return in
}

// pending tells whether a run or a row would go on with what the next burst
// holds, if that is there already. An empty burst hands it over.
func (in *inbound) pending() bool { return in.run.first >= 0 || in.row.Len() > 0 }

// burst takes the datagrams of a burst. What they hold is handed over, but for
// a run or a row that they add to: a network card without segmentation hands
// over each datagram by itself.
func (in *inbound) burst(b Burst) {
	heard := false
	in.grew, in.outer, in.came, in.bytes = false, b.TOS, 0, 0
	in.mtu = in.line.cfg.Device.Caps().MTU // it follows the path
	for data := b.Data; len(data) > 0; {
		n := min(b.Size, len(data))
		heard = in.datagram(data[:n:n]) || heard
		data = data[n:]
	}
	if !in.grew {
		in.endRun()
		in.endRow()
	}
	in.worker.datagrams.Add(uint64(in.came))
	in.worker.outer.Add(uint64(in.bytes))
	if heard {
		in.line.hear()
	}
}

// datagram takes one datagram and tells whether it was an authentic record.
func (in *inbound) datagram(d []byte) bool {
	l, w := in.line, in.worker
	if wire.IsHandshake(d) {
		if !l.inbox.datagram(d, l.sender()) {
			w.drop(crowded)
		}
		return false
	}
	h, err := wire.ParseHeader(d)
	if err != nil {
		w.drop(malformed)
		return false
	}
	epoch := l.receiving.Load().find(h.Index)
	if epoch == nil {
		w.drop(unknownEpoch)
		return false
	}
	record, newest, err := epoch.open(d, h)
	if err != nil {
		w.drop(openReason(err))
		return false
	}
	if !epoch.heard.Load() && epoch.heard.CompareAndSwap(false, true) {
		l.inbox.put(func(m *mail) { m.heard = append(m.heard, epoch.index) })
	}
	if newest && l.roaming != nil {
		l.adopt(epoch)
	}
	in.came++
	in.bytes += len(d)
	if !in.goesOn(h, record) {
		in.record(h, record)
	}
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

// record takes what an authentic record holds.
func (in *inbound) record(h wire.Header, record []byte) {
	kind, body, err := wire.Parse(record)
	switch p := in.line.cfg.Pad; {
	case err != nil:
		in.worker.drop(badRecord)
	case kind == wire.Pad:
		in.unhide(h, record)
	case kind == wire.Control:
		if len(body) > 0 && !in.line.inbox.control(body) {
			in.worker.drop(crowded)
		}
	case p != nil && p.Strict:
		in.worker.drop(unpadded)
	default:
		in.payload(h, kind, body)
	}
}

// payload takes what a record holds for the host.
func (in *inbound) payload(h wire.Header, kind wire.Kind, body []byte) {
	switch kind {
	case wire.Slice:
		piece, packet, err := wire.ParsePiece(body)
		if err != nil {
			in.worker.drop(badRecord)
			return
		}
		in.endRow()
		if in.merge(packet) {
			in.slice(h, piece, packet)
			in.run.prefix = wire.PrefixOf(body)
		}
	case wire.Whole:
		in.endRun()
		in.endRow()
		if !in.merge(body) {
			return
		}
		segment.ClampMSS(body, in.mtu, false)
		in.write(tunnel.Frame{Data: body}, 1)
	case wire.Pack:
		in.endRun()
		in.unpack(body)
	}
}

func (in *inbound) unpack(body []byte) {
	for len(body) > 0 {
		packet, rest, err := wire.NextPacket(body)
		if err != nil {
			in.worker.drop(badRecord)
			return
		}
		if in.merge(packet) {
			in.small(packet)
		}
		body = rest
	}
}

// merge gives a packet the ECN that the network has set outside. It is false if
// the packet is to be dropped for it, and has been counted.
func (in *inbound) merge(packet []byte) bool {
	if in.outer&ecnMask == notECT || mergeECN(packet, in.outer) {
		return true
	}
	in.worker.drop(congested)
	return false
}

// small hands over one packet of a pack, with its neighbours if they are of
// one flow.
func (in *inbound) small(packet []byte) {
	segment.ClampMSS(packet, in.mtu, false)
	if !in.rows {
		in.write(tunnel.Frame{Data: packet}, 1)
		return
	}
	in.grew = true
	if !in.row.Add(packet) {
		in.endRow()
		in.row.Add(packet)
	}
}

func (in *inbound) endRow() {
	if n := in.row.Len(); n > 0 {
		in.write(in.row.Frame(), n)
		in.row.Reset()
	}
}

// goesOn adds a record to the run if it is just the next slice of it, marked
// with the same TOS: most are, and they need no parsing. False means that the
// record has to be looked at.
func (in *inbound) goesOn(h wire.Header, record []byte) bool {
	r := &in.run
	if r.first < 0 || h != r.header || in.line.cfg.Pad != nil ||
		in.outer&ecnMask == ce || in.outer&ecnMask == ect1 ||
		!r.prefix.Continues(record, r.next.Index) {
		return false
	}
	at, size := wire.PrefixLen+int(r.next.GSO.HeaderLen), int(r.next.GSO.Size)
	last := r.next.Index == r.next.Count-1
	n := len(record) - at
	if n > size || n < 1 || n < size && !last || len(r.data)+n > cap(r.data) ||
		tosOf(record[wire.PrefixLen:]) != tosOf(r.data) {
		return false
	}
	in.grew = true
	r.data = append(r.data, record[at:]...)
	r.n++
	r.header.Counter++
	r.next.Index++
	if last {
		in.endRun()
	}
	return true
}

// slice adds a slice to the run that it continues, or begins a run with it.
func (in *inbound) slice(h wire.Header, piece wire.Piece, packet []byte) {
	r := &in.run
	in.grew = true
	header := int(piece.GSO.HeaderLen)
	if r.first < 0 || h != r.header || piece != r.next ||
		len(r.data)+len(packet)-header > cap(r.data) || tosOf(packet) != tosOf(r.data) {
		in.endRun()
		r.first, r.data, r.n = piece.Index, append(r.data[:0], packet...), 0
	} else {
		r.data = append(r.data, packet[header:]...)
	}
	r.n++
	r.header, r.next = h, piece
	r.header.Counter++
	r.next.Index++
	if r.next.Index == piece.Count {
		in.endRun()
	}
}

// endRun hands over the run under way.
func (in *inbound) endRun() {
	r := &in.run
	if r.first < 0 {
		return
	}
	f := tunnel.Frame{Data: r.data, GSO: r.next.GSO}
	if r.n < r.next.Count {
		segment.Cut(&f, r.first, r.next.Index == r.next.Count)
	}
	in.write(f, r.n)
	r.first = -1
}

// write hands a frame of so many packets to the host.
func (in *inbound) write(f tunnel.Frame, packets int) {
	bytes := len(f.Data) + (packets-1)*int(f.GSO.HeaderLen)
	in.frames[0] = f
	if in.line.cfg.Pad != nil { // ICMP of those who seal goes the same way
		in.line.writes.Lock()
		defer in.line.writes.Unlock()
	}
	_, err := in.queue.WriteBatch(in.frames[:])
	switch {
	case err == nil:
		in.worker.packets.Add(uint64(packets))
		in.worker.bytes.Add(uint64(bytes))
	case !closed(err):
		in.worker.drops[unwritten].Add(uint64(packets))
	}
}
