package optics

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/quietline/quietline/hw/distill"
)

// Window is what the fibre carried in the slots [From, To) of one generation.
//
// On the wire (all numbers unsigned varints of encoding/binary):
//
//	generation | from | to-from | number of pulses | pulses…
//	pulse = slots since the last pulse or from | (photons-1)<<2 | basis<<1 | bit
//
// The second part of a pulse is one byte.
type Window struct {
	Generation uint64
	From, To   uint64
	Pulses     []Pulse // in rising slot order, inside [From, To)
}

// ErrWindow says that bytes are not a window.
var ErrWindow = errors.New("fibre window is malformed")

// maxPhotons is what the byte of a pulse can say. More photons of one pulse
// than that all reach the detectors as maxPhotons: P(n > 64) < 1e-29 at MaxMu.
const maxPhotons = 64

// MinPulseBytes is the least a pulse takes on the wire.
const MinPulseBytes = 2

// AppendWindow appends w's wire form to b.
func AppendWindow(b []byte, w Window) []byte {
	b = binary.AppendUvarint(b, w.Generation)
	b = binary.AppendUvarint(b, w.From)
	b = binary.AppendUvarint(b, w.To-w.From)
	b = binary.AppendUvarint(b, uint64(len(w.Pulses)))
	next := w.From
	for _, p := range w.Pulses {
		b = binary.AppendUvarint(b, p.Slot-next)
		b = append(b, (min(p.Photons, maxPhotons)-1)<<2|uint8(p.Basis)<<1|p.Bit)
		next = p.Slot + 1
	}
	return b
}

// ParseWindow reads a window from all of b. Its pulses are appended to
// pulses[:0], so that a caller can use one buffer again. It refuses anything
// AppendWindow would not have written.
func ParseWindow(b []byte, pulses []Pulse) (Window, error) {
	var head [4]uint64
	var err error
	for i := range head {
		if head[i], b, err = uvarint(b); err != nil {
			return Window{}, err
		}
	}
	w := Window{Generation: head[0], From: head[1], To: head[1] + head[2]}
	if w.To < w.From {
		return Window{}, fmt.Errorf("%w: slots wrap round", ErrWindow)
	}
	n := head[3]
	if n > head[2] || n > uint64(len(b)/MinPulseBytes) {
		return Window{}, fmt.Errorf("%w: %d pulses in %d slots and %d bytes",
			ErrWindow, n, head[2], len(b))
	}
	w.Pulses = pulses[:0]
	next := w.From
	for range n {
		var gap uint64
		if gap, b, err = uvarint(b); err != nil {
			return Window{}, err
		}
		if gap >= w.To-next || len(b) == 0 {
			return Window{}, fmt.Errorf("%w: pulse outside", ErrWindow)
		}
		p := Pulse{Slot: next + gap, Basis: distill.Basis(b[0] >> 1 & 1), Bit: b[0] & 1,
			Photons: b[0]>>2 + 1}
		b, next = b[1:], p.Slot+1
		w.Pulses = append(w.Pulses, p)
	}
	if len(b) > 0 {
		return Window{}, fmt.Errorf("%w: %d bytes too many", ErrWindow, len(b))
	}
	return w, nil
}

// uvarint reads one number in its shortest form.
func uvarint(b []byte) (uint64, []byte, error) {
	v, n := binary.Uvarint(b)
	if n <= 0 || (n > 1 && b[n-1] == 0) {
		return 0, nil, fmt.Errorf("%w: bad number", ErrWindow)
	}
	return v, b[n:], nil
}
