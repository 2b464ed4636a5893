// Package distill turns raw detections into secret blocks: sift, estimate,
// reconcile, verify, amplify. It is one state machine per end of a link,
// without I/O, clock or goroutine; the two ends talk over an authenticated
// classical channel that the caller carries.
package distill

import (
	"time"

	"github.com/quietline/quietline/hw"
)

// Basis of a preparation or measurement. Key bits come from Key, the phase
// error is estimated in Test.
type Basis uint8

// The two bases of efficient BB84.
const (
	Key Basis = iota
	Test
)

// Role of an end of the quantum link.
type Role uint8

// Alice prepares, Bob measures.
const (
	Alice Role = iota
	Bob
)

// Preparation is what alice sent in one slot.
type Preparation struct {
	Basis     Basis
	Bit       uint8 // 0 or 1
	Intensity uint8 // index into Config.Intensities
}

// Detection is one click at bob. Double clicks come with a random Bit.
type Detection struct {
	Slot  uint64 // counts pulses of the session
	Basis Basis
	Bit   uint8
}

// Input is what one Step is given; any part may be empty.
type Input struct {
	Detections   []Detection   // bob only: clicks in rising slot order
	Slots        uint64        // bob only: all slots below this one are over
	Preparations []Preparation // alice only: answer to Output.Prepared, same order
	Message      []byte        // one message of the peer, as it came
}

// Output is what one Step asks for. Slices are the caller's to keep.
type Output struct {
	Messages [][]byte      // to the peer, in order
	Prepared []uint64      // alice only: slots whose preparations are wanted next
	Blocks   []hw.Block    // finished: authenticated, verified, amplified; the caller owns and clears Bits
	Alarms   []hw.Event    // QBER above the limit, authentication failed, …
	Wake     time.Duration // call Step again after this long; 0 = no need
}
