package wire

import (
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"
)

// Types of CONTROL, the first byte of its body.
const (
	ControlState = 1
	// ControlPad is the first of those that package pad knows.
	ControlPad = 16
)

const (
	// maxLevel is the highest level a line can rest on: OTP.
	maxLevel = 4
	// maxReason bounds the reason in a STATE, bytes.
	maxReason = 200
)

// State is what one end tells the other of its line.
type State struct {
	Level  uint8  // 0 BLOCKED to 4 OTP
	Reason string // printable
}

// Append appends the whole record of a STATE to b. A reason that is too long
// is cut at the end of a character, and what cannot be printed left out.
func (s State) Append(b []byte) []byte {
	reason := strings.Map(printable, s.Reason)
	for len(reason) > maxReason {
		_, n := utf8.DecodeLastRuneInString(reason)
		reason = reason[:len(reason)-n]
	}
	b = append(b, byte(Control), ControlState, s.Level, 0)
	return append(b, reason...)
}

func printable(r rune) rune {
	if r == utf8.RuneError || !unicode.IsPrint(r) {
		return -1
	}
	return r
}

// ParseState reads the body of a CONTROL of type STATE, as [Parse] returns it.
// The peer's words go to logs and pages, so nothing unprintable is taken.
func ParseState(body []byte) (State, error) {
	if len(body) < 3 {
		return State{}, ErrShort
	}
	s := State{Level: body[1], Reason: string(body[3:])}
	if body[0] != ControlState || s.Level > maxLevel || body[2] != 0 ||
		len(s.Reason) > maxReason || strings.Map(printable, s.Reason) != s.Reason {
		return State{}, fmt.Errorf("%w: state of level %d, %d bytes", ErrControl, s.Level, len(body))
	}
	return s, nil
}
