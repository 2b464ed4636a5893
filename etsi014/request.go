package etsi014

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"unicode"
	"unicode/utf8"
)

// maxSAEID is the longest SAE ID in characters. The standard sets no bound;
// 291 is what FortiOS 7.4 lets its user type, the longest of known clients.
const maxSAEID = 291

// ParseSAEID checks an SAE ID: 1 to 291 characters of valid UTF-8, none of
// them a control character. The error is an [*Error] of kind ErrRequest.
func ParseSAEID(s string) (SAEID, error) {
	if s == "" || !utf8.ValidString(s) || utf8.RuneCountInString(s) > maxSAEID {
		return "", badRequest("SAE ID shall have 1 to 291 characters of valid UTF-8")
	}
	for _, r := range s {
		if unicode.IsControl(r) {
			return "", badRequest("SAE ID shall have no control characters")
		}
	}
	return SAEID(s), nil
}

// badRequest is a 400 whose text goes to the client. It must not quote input.
func badRequest(format string, args ...any) error {
	return &Error{Kind: ErrRequest, Message: fmt.Sprintf(format, args...)}
}

// Members of the standard's request objects (tables 9 and 11), and the names a
// GET's query may hold.
const (
	nameNumber    = "number"
	nameSize      = "size"
	nameKeySize   = "key_size"
	nameTargets   = "additional_slave_SAE_IDs"
	nameMandatory = "extension_mandatory"
	nameOptional  = "extension_optional"
	nameKeyIDs    = "key_IDs"
	nameKeyID     = "key_ID"
)

// draft collects a request from query and body before the rules are checked.
// A number of 0 stands for a member that was not there.
type draft struct {
	number, size, alias int
	targets             []SAEID
	mandatory, optional []Extension
	ids                 []KeyID
}

// readKeyRequest reads a Get key request; clause 6.2.
func (h *Handler) readKeyRequest(x *exchange) (KeyRequest, error) {
	d, err := h.readDraft(x, (*draft).keyMember, []string{nameNumber, nameSize},
		[]string{nameTargets, nameMandatory, nameOptional})
	if err != nil {
		return KeyRequest{}, err
	}
	limits, most := h.cfg.Limits, h.maxKeys(x)
	if d.number > most {
		return KeyRequest{}, badRequest("number shall be an integer from 1 to %d", most)
	}
	if d.size%8 != 0 {
		return KeyRequest{}, ErrSize
	}
	if d.size != 0 && (d.size < limits.MinSizeBits || d.size > limits.MaxSizeBits) {
		return KeyRequest{}, badRequest("size shall be from %d to %d bits", limits.MinSizeBits,
			limits.MaxSizeBits)
	}
	targets := append([]SAEID{x.peer}, d.targets...)
	named := make(map[SAEID]bool, len(targets))
	for _, t := range targets {
		if named[t] {
			return KeyRequest{}, badRequest("a slave SAE is named twice")
		}
		named[t] = true
	}
	return KeyRequest{
		Targets: targets, Number: max(d.number, 1), SizeBits: d.size,
		Mandatory: d.mandatory, Optional: d.optional,
	}, nil
}

// readIDRequest reads a Get key with key IDs request; clause 6.3.
func (h *Handler) readIDRequest(x *exchange) (IDRequest, error) {
	d, err := h.readDraft(x, (*draft).idMember, []string{nameKeyID}, []string{nameKeyIDs})
	if err != nil {
		return IDRequest{}, err
	}
	if most := h.maxKeys(x); len(d.ids) == 0 || len(d.ids) > most {
		return IDRequest{}, badRequest("key_IDs shall hold 1 to %d key_IDs", most)
	}
	named := make(map[KeyID]bool, len(d.ids))
	for _, id := range d.ids {
		if named[id] {
			return IDRequest{}, badRequest("a key_ID is named twice")
		}
		named[id] = true
	}
	return IDRequest{Initiator: x.peer, IDs: d.ids}, nil
}

func (h *Handler) maxKeys(x *exchange) int {
	if n := x.profile.MaxKeys; n > 0 {
		return min(n, h.cfg.Limits.MaxKeys)
	}
	return h.cfg.Limits.MaxKeys
}

// readDraft reads the body, then what the query has and the body has not.
// inQuery names what a GET may ask by query, notGET what needs a POST.
func (h *Handler) readDraft(
	x *exchange, member func(*draft, *cursor, string) error, inQuery, notGET []string,
) (*draft, error) {
	query, err := url.ParseQuery(x.r.URL.RawQuery)
	if err != nil {
		return nil, badRequest("query is not valid")
	}
	body, err := h.readBody(x)
	if err != nil {
		return nil, err
	}
	post := x.r.Method == http.MethodPost
	if !post && len(body) > 0 && !x.profile.BodyOnGET {
		return nil, badRequest("a GET carries no body: use POST")
	}
	d := new(draft)
	if len(body) > 0 {
		if err := d.readObject(body, member); err != nil {
			return nil, err
		}
	}
	if x.profile.KeySizeAlias {
		inQuery = append(inQuery[:len(inQuery):len(inQuery)], nameKeySize)
	}
	for _, name := range notGET {
		if query.Has(name) {
			return nil, badRequest("%s is no query parameter: use POST with a body", name)
		}
	}
	for _, name := range inQuery {
		if !query.Has(name) {
			continue
		}
		if post && !x.profile.QueryOnPOST {
			return nil, badRequest("a POST carries no query: use the body")
		}
		if err := d.queryParameter(name, query[name]); err != nil {
			return nil, err
		}
	}
	return d, d.resolveAlias(x.profile)
}

// readBody reads a request's body, which holds no secrets.
func (h *Handler) readBody(x *exchange) ([]byte, error) {
	if e := x.r.Header.Get("Content-Encoding"); e != "" && e != "identity" {
		return nil, badRequest("content encodings are not supported")
	}
	limit := h.cfg.Limits.MaxBody
	b, err := io.ReadAll(http.MaxBytesReader(x.w, x.r.Body, int64(limit)))
	if tooLong := new(http.MaxBytesError); errors.As(err, &tooLong) {
		return nil, badRequest("body shall have at most %d bytes", limit)
	}
	if err != nil {
		return nil, &Error{Kind: ErrRequest, Message: "body ended early", Cause: err}
	}
	return b, nil
}

// readObject reads a body: one JSON object, unknown members passed over, null
// for an optional member the same as none.
func (d *draft) readObject(body []byte, member func(*draft, *cursor, string) error) error {
	c := &cursor{b: body}
	if c.peek() != '{' {
		return badRequest("body shall be a JSON object")
	}
	err := c.object(func(name string) error {
		if c.null() {
			return nil
		}
		return member(d, c, name)
	})
	if err == nil {
		err = c.end()
	}
	if e := new(Error); err == nil || errors.As(err, &e) {
		return err
	}
	return &Error{Kind: ErrRequest, Message: err.Error()}
}

// keyMember reads one member of a Key request; table 9.
func (d *draft) keyMember(c *cursor, name string) (err error) {
	switch name {
	case nameNumber:
		d.number, err = bodyInteger(c, name)
	case nameSize:
		d.size, err = bodyInteger(c, name)
	case nameKeySize:
		d.alias, err = bodyInteger(c, name)
	case nameTargets:
		err = arrayOf(c, name, '"', func() error {
			s, err := c.str()
			if err != nil {
				return err
			}
			id, err := ParseSAEID(s)
			d.targets = append(d.targets, id)
			return err
		})
	case nameMandatory:
		d.mandatory, err = extensions(c, name)
	case nameOptional:
		d.optional, err = extensions(c, name)
	default:
		err = c.skip()
	}
	return err
}

// idMember reads one member of a Key IDs object; table 11. The extension
// objects are reserved, so they are checked for their form and passed over.
func (d *draft) idMember(c *cursor, name string) error {
	switch name {
	case nameKeyIDs:
		return arrayOf(c, name, '{', func() error {
			n := len(d.ids)
			err := c.object(func(name string) error {
				if name != nameKeyID {
					return c.skip()
				}
				if c.peek() != '"' {
					return badRequest("key_ID shall be a string")
				}
				s, err := c.str()
				if err != nil {
					return err
				}
				return d.addID(s)
			})
			if err == nil && len(d.ids) == n {
				return badRequest("key_IDs shall hold objects with a key_ID")
			}
			return err
		})
	default:
		return c.skip()
	}
}

func (d *draft) addID(s string) error {
	id, err := ParseKeyID(s)
	if err != nil {
		return badRequest("key_ID shall be a UUID")
	}
	d.ids = append(d.ids, id)
	return nil
}

// bodyInteger reads a count: an integer of at least 1.
func bodyInteger(c *cursor, name string) (int, error) {
	switch ch := c.peek(); {
	case ch == '-', ch >= '0' && ch <= '9':
		if n, err := c.integer(); err == nil && n > 0 {
			return n, nil
		}
	}
	return 0, badRequest("%s shall be an integer of at least 1", name)
}

// arrayOf reads an array whose elements all begin with first.
func arrayOf(c *cursor, name string, first byte, elem func() error) error {
	what := map[byte]string{'"': "strings", '{': "objects"}[first]
	if c.peek() != '[' {
		return badRequest("%s shall be an array of %s", name, what)
	}
	return c.array(func() error {
		if c.peek() != first {
			return badRequest("%s shall be an array of %s", name, what)
		}
		return elem()
	})
}

func extensions(c *cursor, name string) (list []Extension, err error) {
	err = arrayOf(c, name, '{', func() error {
		v, err := c.value()
		if err != nil {
			return err
		}
		list = append(list, Extension(v.(map[string]any)))
		return nil
	})
	return list, err
}

// queryParameter takes one name of the query unless the body had it.
func (d *draft) queryParameter(name string, values []string) error {
	if len(values) != 1 {
		return badRequest("%s shall stand once in the query", name)
	}
	if name == nameKeyID {
		if len(d.ids) > 0 {
			return nil
		}
		return d.addID(values[0])
	}
	n, err := strconv.ParseUint(values[0], 10, 31)
	if err != nil || n == 0 {
		return badRequest("%s shall be an integer of at least 1", name)
	}
	field := map[string]*int{
		nameNumber: &d.number, nameSize: &d.size, nameKeySize: &d.alias,
	}[name]
	if *field == 0 {
		*field = int(n)
	}
	return nil
}

// resolveAlias reads key_size as size where the profile says so.
func (d *draft) resolveAlias(p Profile) error {
	if !p.KeySizeAlias || d.alias == 0 {
		return nil
	}
	if d.size != 0 && d.size != d.alias {
		return badRequest("size and key_size differ")
	}
	d.size = d.alias
	return nil
}
