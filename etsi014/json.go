package etsi014

import (
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"unicode/utf16"
	"unicode/utf8"
)

// maxDepth bounds nesting, as RFC 8259 section 9 allows. The deepest object of
// the standard is three levels; the rest is room for extensions.
const maxDepth = 16

// errJSON is the root of every syntax fault; the texts that wrap it say where
// and what, and never quote the input, which may hold a key.
var errJSON = errors.New("invalid JSON")

// cursor reads one JSON text (RFC 8259) from a buffer it may change: strings
// are decoded in place, so that a key never leaves the buffer that its owner
// clears. It is stricter than encoding/json, after RFC 7493: names compare
// exactly, no member stands twice, no invalid UTF-8, no lone surrogate, and
// integers have neither fraction nor exponent.
type cursor struct {
	b     []byte
	i     int
	depth int
}

func (c *cursor) fail(what string) error {
	return fmt.Errorf("%w: %s at byte %d", errJSON, what, c.i)
}

// peek skips white space and returns the next byte, 0 at the end.
func (c *cursor) peek() byte {
	for ; c.i < len(c.b); c.i++ {
		switch c.b[c.i] {
		case ' ', '\t', '\r', '\n':
		default:
			return c.b[c.i]
		}
	}
	return 0
}

// next consumes want, after white space.
func (c *cursor) next(want byte) error {
	if c.peek() != want || c.i >= len(c.b) {
		return c.fail("expected " + strconv.QuoteRune(rune(want)))
	}
	c.i++
	return nil
}

// end says that nothing but white space follows.
func (c *cursor) end() error {
	if c.peek(); c.i != len(c.b) {
		return c.fail("text after the value")
	}
	return nil
}

// null consumes a null if one stands here.
func (c *cursor) null() bool {
	if c.peek() == 'n' && c.word("null") == nil {
		return true
	}
	return false
}

func (c *cursor) word(w string) error {
	if len(c.b)-c.i < len(w) || string(c.b[c.i:c.i+len(w)]) != w {
		return c.fail("unknown word")
	}
	c.i += len(w)
	return nil
}

// list reads what stands between open and shut, one item at a time.
func (c *cursor) list(open, shut byte, item func() error) error {
	if err := c.next(open); err != nil {
		return err
	}
	if c.depth++; c.depth > maxDepth {
		return c.fail("nesting is too deep")
	}
	defer func() { c.depth-- }()
	if c.peek() == shut {
		c.i++
		return nil
	}
	for {
		if err := item(); err != nil {
			return err
		}
		if c.peek() == shut {
			c.i++
			return nil
		}
		if err := c.next(','); err != nil {
			return err
		}
	}
}

// object calls member for each member; member must read the value.
func (c *cursor) object(member func(name string) error) error {
	var few [12]string // the standard's widest object has 12 members
	seen := few[:0]
	var many map[string]bool
	return c.list('{', '}', func() error {
		name, err := c.str()
		if err != nil {
			return err
		}
		if many == nil && len(seen) == cap(seen) {
			many = make(map[string]bool)
			for _, s := range seen {
				many[s] = true
			}
		}
		for _, s := range seen {
			if s == name {
				return c.fail("a member stands twice")
			}
		}
		if many != nil {
			if many[name] {
				return c.fail("a member stands twice")
			}
			many[name] = true
		} else {
			seen = append(seen, name)
		}
		if err := c.next(':'); err != nil {
			return err
		}
		return member(name)
	})
}

// array calls elem for each element; elem must read it.
func (c *cursor) array(elem func() error) error { return c.list('[', ']', elem) }

// str reads a string that is not secret.
func (c *cursor) str() (string, error) {
	b, err := c.text()
	return string(b), err
}

// text reads a string and decodes it in place: the result lies in the buffer.
func (c *cursor) text() ([]byte, error) {
	if err := c.next('"'); err != nil {
		return nil, err
	}
	start, out := c.i, c.i
	for c.i < len(c.b) {
		switch ch := c.b[c.i]; {
		case ch == '"':
			c.i++
			return c.b[start:out], nil
		case ch < 0x20:
			return nil, c.fail("control character in a string")
		case ch == '\\':
			r, err := c.escape()
			if err != nil {
				return nil, err
			}
			// An escape is never shorter than what it stands for.
			out = len(utf8.AppendRune(c.b[:out], r))
		case ch < utf8.RuneSelf:
			c.b[out] = ch
			out++
			c.i++
		default:
			r, n := utf8.DecodeRune(c.b[c.i:])
			if r == utf8.RuneError && n <= 1 {
				return nil, c.fail("invalid UTF-8")
			}
			out += copy(c.b[out:], c.b[c.i:c.i+n])
			c.i += n
		}
	}
	return nil, c.fail("string without end")
}

// escape reads one escape sequence, or two that form a surrogate pair.
func (c *cursor) escape() (rune, error) {
	c.i++ // the backslash
	if c.i >= len(c.b) {
		return 0, c.fail("string without end")
	}
	ch := c.b[c.i]
	c.i++
	switch ch {
	case '"', '\\', '/':
		return rune(ch), nil
	case 'b':
		return '\b', nil
	case 'f':
		return '\f', nil
	case 'n':
		return '\n', nil
	case 'r':
		return '\r', nil
	case 't':
		return '\t', nil
	case 'u':
	default:
		return 0, c.fail("unknown escape")
	}
	r, err := c.hex4()
	if err != nil || !utf16.IsSurrogate(r) {
		return r, err
	}
	if c.i+1 >= len(c.b) || c.b[c.i] != '\\' || c.b[c.i+1] != 'u' {
		return 0, c.fail("lone surrogate")
	}
	c.i += 2
	low, err := c.hex4()
	if err != nil {
		return 0, err
	}
	if r = utf16.DecodeRune(r, low); r == utf8.RuneError {
		return 0, c.fail("lone surrogate")
	}
	return r, nil
}

func (c *cursor) hex4() (rune, error) {
	if len(c.b)-c.i < 4 {
		return 0, c.fail("short \\u escape")
	}
	var r rune
	for _, ch := range c.b[c.i : c.i+4] {
		switch {
		case ch >= '0' && ch <= '9':
			r = r<<4 | rune(ch-'0')
		case ch >= 'a' && ch <= 'f':
			r = r<<4 | rune(ch-'a'+10)
		case ch >= 'A' && ch <= 'F':
			r = r<<4 | rune(ch-'A'+10)
		default:
			return 0, c.fail("unknown digit in a \\u escape")
		}
	}
	c.i += 4
	return r, nil
}

// number reads a number's text; whole says that it has neither fraction nor
// exponent.
func (c *cursor) number() (text string, whole bool, err error) {
	c.peek()
	start := c.i
	if c.at('-') {
		c.i++
	}
	if c.at('0') {
		c.i++
	} else if !c.digits() {
		return "", false, c.fail("expected a number")
	}
	whole = true
	if c.at('.') {
		c.i, whole = c.i+1, false
		if !c.digits() {
			return "", false, c.fail("expected a digit")
		}
	}
	if c.at('e') || c.at('E') {
		c.i, whole = c.i+1, false
		if c.at('+') || c.at('-') {
			c.i++
		}
		if !c.digits() {
			return "", false, c.fail("expected a digit")
		}
	}
	return string(c.b[start:c.i]), whole, nil
}

func (c *cursor) at(ch byte) bool { return c.i < len(c.b) && c.b[c.i] == ch }

func (c *cursor) digits() bool {
	start := c.i
	for c.i < len(c.b) && c.b[c.i] >= '0' && c.b[c.i] <= '9' {
		c.i++
	}
	return c.i > start
}

// integer reads a number without fraction and exponent that fits an int32:
// no count or size of the standard comes near it.
func (c *cursor) integer() (int, error) {
	text, whole, err := c.number()
	if err != nil {
		return 0, err
	}
	n, err := strconv.ParseInt(text, 10, 32)
	if !whole || err != nil {
		return 0, c.fail("number is not an integer in range")
	}
	return int(n), nil
}

// value reads any value: map[string]any, []any, string, json.Number, bool, nil.
func (c *cursor) value() (any, error) {
	switch ch := c.peek(); ch {
	case '{':
		m := map[string]any{}
		err := c.object(func(name string) (err error) {
			m[name], err = c.value()
			return err
		})
		return m, err
	case '[':
		list := []any{}
		err := c.array(func() error {
			v, err := c.value()
			list = append(list, v)
			return err
		})
		return list, err
	case '"':
		return c.str()
	case 't':
		return true, c.word("true")
	case 'f':
		return false, c.word("false")
	case 'n':
		return nil, c.word("null")
	default:
		text, _, err := c.number()
		return json.Number(text), err
	}
}

// skip reads any value and forgets it.
func (c *cursor) skip() error {
	switch c.peek() {
	case '{':
		return c.object(func(string) error { return c.skip() })
	case '[':
		return c.array(c.skip)
	case '"':
		_, err := c.text()
		return err
	default:
		_, err := c.value()
		return err
	}
}
