package simulator

import "errors"

// Errors of New and SetEve.
var (
	// ErrConfig: a value of Config is out of range.
	ErrConfig = errors.New("bad simulator config")
	// ErrPreset: no preset has this name.
	ErrPreset = errors.New("preset is unknown")
	// ErrNewerState: a newer program wrote the state file. Run that program,
	// or give the end an empty state folder and a new authentication seed.
	ErrNewerState = errors.New("state file is from a newer version")
	// ErrNotAlice: only alice's end has an eavesdropper to set.
	ErrNotAlice = errors.New("this end is not alice")
)

// Errors between the two ends. They end a connection, never Run; the reason
// is in Status and the log.
var (
	// ErrFibre: what came over the fibre is not what the other end sends.
	ErrFibre = errors.New("fibre protocol violated")
	// ErrOtherLink: the two ends simulate different links.
	ErrOtherLink = errors.New("ends simulate different links")
	// ErrGeneration: the peer asks for a generation that is out of reach.
	ErrGeneration = errors.New("generation jumps too far")
	// ErrBacklog: the peer does not read the classical channel.
	ErrBacklog = errors.New("classical channel is congested")
	// ErrSlot: the peer asks about a pulse that was not sent yet.
	ErrSlot = errors.New("slot is in the future")
)
