package wire

import (
	"encoding/binary"
	"fmt"
)

// Types of CONTROL that search the path's MTU: a PROBE asks for an answer and
// has as many zeroes behind its number as make it the size in question; an
// ANSWER repeats the number.
//
//	+---------------+---------------+-------------------------------+
//	| kind 5        | type 2 or 3   | 0                             |
//	+---------------+---------------+-------------------------------+
//	| number of the probe                                           |
//	+---------------------------------------------------------------+
const (
	ControlProbe  = 2
	ControlAnswer = 3
)

// ProbeLen is the length of a record of a PROBE without padding, and of an
// ANSWER.
const ProbeLen = 8

// AppendProbe appends a PROBE of size bytes to b, ProbeLen at least.
func AppendProbe(b []byte, number uint32, size int) []byte {
	b = appendNumber(b, ControlProbe, number)
	return append(b, make([]byte, max(0, size-ProbeLen))...)
}

// AppendAnswer appends an ANSWER to b.
func AppendAnswer(b []byte, number uint32) []byte { return appendNumber(b, ControlAnswer, number) }

func appendNumber(b []byte, kind byte, number uint32) []byte {
	b = append(b, byte(Control), kind, 0, 0)
	return binary.BigEndian.AppendUint32(b, number)
}

// ParseNumber reads the body of a CONTROL of type PROBE or ANSWER, as [Parse]
// returns it. What pads a PROBE is not looked at.
func ParseNumber(body []byte) (number uint32, err error) {
	if len(body) < ProbeLen-1 {
		return 0, ErrShort
	}
	if body[0] != ControlProbe && (body[0] != ControlAnswer || len(body) > ProbeLen-1) ||
		body[1] != 0 || body[2] != 0 {
		return 0, fmt.Errorf("%w: number of type %d, %d bytes", ErrControl, body[0], len(body))
	}
	return binary.BigEndian.Uint32(body[3:]), nil
}
