package wire

import "errors"

// Errors of the parsers. All but ErrMTU mean: drop the datagram.
var (
	ErrShort     = errors.New("datagram is too short")
	ErrType      = errors.New("datagram type is not known")
	ErrFlags     = errors.New("header flags are not known")
	ErrQueue     = errors.New("queue number is out of range")
	ErrKind      = errors.New("record kind is not known")
	ErrNotPacket = errors.New("record holds no whole IP packet")
	ErrControl   = errors.New("control record says nothing that is known")
	ErrSlice     = errors.New("record holds no slice of a super-frame")
	ErrMTU       = errors.New("path MTU is too small for a line")
)
