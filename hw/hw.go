// Package hw is what the system sees of a QKD device at one site.
//
// The main contract is [Driver]: it yields [Block]s of secret bits and
// [Event]s. Doors in sub-packages speak to real devices or to the simulator;
// hw/hwtest is the suite each must pass; hw/distill makes secret blocks from
// raw detections for devices that do not distil.
//
// A caller must keep in mind: a block is acknowledged only after it is stored
// durably; an unacknowledged block comes again, also after a reconnect; both
// ends of a link see equal blocks under equal (Generation, Seq), though one
// end may miss some.
package hw

import (
	"context"
	"errors"
	"time"

	"github.com/quietline/quietline/secret"
)

// Info describes a device as it describes itself.
type Info struct {
	Vendor, Model, Serial string
	// Randomness names the source of the secret bits' randomness.
	Randomness string
	// Simulated is true when no photon was sent. It travels with every block.
	Simulated bool
	// BlockBytes is the usual length of a block's bits, bytes; a hint.
	BlockBytes int
}

// Block is a run of secret bits that both ends of a link share.
type Block struct {
	Generation uint64       // changes when the device's Seq restarts; never goes back
	Seq        uint64       // counts up within a generation; gaps are allowed
	Bits       secret.Bytes // owned by the receiver of ReadBlock, who clears it
	QBER       float64      // of the sifted bits behind the block, ratio 0 to 0.5; NaN if not told
	Epsilon    float64      // composable security parameter of this block; NaN if not told
	Simulated  bool
	Made       time.Time // when the device finished it; zero if not told
}

// Event is a status report or an alarm of the device.
type Event struct {
	At     time.Time
	Status *Status // set on a report
	Alarm  string  // set on an alarm: constant, lower case
	Detail string
}

// Status is the device's state at one moment. Rates are over the last seconds.
type Status struct {
	Up        bool    // photons arrive and blocks can be made
	Reason    string  // why not, when Up is false
	QBER      float64 // ratio 0 to 0.5; NaN if not known
	SiftedBPS float64 // sifted bits per second
	SecretBPS float64 // secret bits per second
	AuthBits  int64   // pre-shared authentication bits left; -1 if not known
	Simulated bool
}

// Driver is one end of one device. ReadBlock and Events may be called by one
// goroutine each; Ack and Close by any.
type Driver interface {
	Describe() Info
	// ReadBlock waits for the next block and fills b. One call is one credit:
	// a driver sends the device no more requests than calls were made.
	ReadBlock(ctx context.Context, b *Block) error
	// Ack tells the device that the block is durable and may be forgotten.
	Ack(ctx context.Context, generation, seq uint64) error
	// Events waits for the next status report or alarm.
	Events(ctx context.Context) (Event, error)
	// Close ends pending calls with ErrClosed.
	Close() error
}

// Errors of drivers. Any other error is temporary: the caller reconnects.
var (
	// ErrClosed: the driver was closed.
	ErrClosed = errors.New("driver is closed")
	// ErrRefused: the device answers but will not serve us; a person must act.
	ErrRefused = errors.New("device refuses")
)
