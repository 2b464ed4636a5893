package simulator

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"fmt"

	"github.com/quietline/quietline/hw/distill"
	"github.com/quietline/quietline/simulator/optics"
)

// Bodies of frames on the fibre; the package comment has their layout.
const (
	fibreMagic   = "QLFI"
	fibreVersion = 1
	helloBytes   = 1 + len(fibreMagic) + 1 + 1 + sha256.Size
	creditBytes  = 1 + 8 + 1

	typeHello  = 1
	typeWindow = 2
	typeCredit = 3

	// maxFrame bounds a body: maxWindowPulses twice over, at five bytes.
	maxFrame = 10 * maxWindowPulses
)

// hello opens a fibre connection in both directions.
type hello struct {
	role distill.Role
	link [sha256.Size]byte // linkDigest of the sender's link
}

// linkDigest stands for a link's whole description.
func linkDigest(l optics.Link) ([sha256.Size]byte, error) {
	b, err := json.Marshal(l)
	if err != nil { // NaN and infinities, which Validate refuses
		return [sha256.Size]byte{}, fmt.Errorf("digest link: %w", err)
	}
	return sha256.Sum256(b), nil
}

func appendHello(b []byte, h hello) []byte {
	b = append(b, typeHello)
	b = append(b, fibreMagic...)
	b = append(b, fibreVersion, uint8(h.role))
	return append(b, h.link[:]...)
}

func parseHello(b []byte) (hello, error) {
	if len(b) != helloBytes || b[0] != typeHello || string(b[1:5]) != fibreMagic {
		return hello{}, fmt.Errorf("%w: no greeting", ErrFibre)
	}
	if b[5] != fibreVersion {
		return hello{}, fmt.Errorf("%w: version %d, this program speaks %d",
			ErrFibre, b[5], fibreVersion)
	}
	if b[6] > uint8(distill.Bob) {
		return hello{}, fmt.Errorf("%w: role %d", ErrFibre, b[6])
	}
	h := hello{role: distill.Role(b[6])}
	copy(h.link[:], b[7:])
	return h, nil
}

// credit is what bob answers to windows.
type credit struct {
	windows uint64 // taken from this connection so far
	full    bool   // bob takes no detections, because nobody fetches his blocks
}

func appendCredit(b []byte, c credit) []byte {
	b = append(b, typeCredit)
	b = binary.BigEndian.AppendUint64(b, c.windows)
	if c.full {
		return append(b, 1)
	}
	return append(b, 0)
}

func parseCredit(b []byte) (credit, error) {
	if len(b) != creditBytes || b[0] != typeCredit || b[9] > 1 {
		return credit{}, fmt.Errorf("%w: no credit", ErrFibre)
	}
	return credit{binary.BigEndian.Uint64(b[1:]), b[9] == 1}, nil
}

func appendWindow(b []byte, w optics.Window) []byte {
	return optics.AppendWindow(append(b, typeWindow), w)
}

func parseWindow(b []byte, pulses []optics.Pulse) (optics.Window, error) {
	if len(b) == 0 || b[0] != typeWindow {
		return optics.Window{}, fmt.Errorf("%w: no window", ErrFibre)
	}
	return optics.ParseWindow(b[1:], pulses)
}
