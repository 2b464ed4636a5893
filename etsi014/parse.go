package etsi014

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/quietline/quietline/secret"
)

// This file is the client's side of the JSON: requests out, answers in.

// wireKeyRequest is table 9.
type wireKeyRequest struct {
	Number    int         `json:"number,omitempty"`
	Size      int         `json:"size,omitempty"`
	Targets   []SAEID     `json:"additional_slave_SAE_IDs,omitempty"`
	Mandatory []Extension `json:"extension_mandatory,omitempty"`
	Optional  []Extension `json:"extension_optional,omitempty"`
}

// wireIDRequest is table 11.
type wireIDRequest struct {
	IDs []wireID `json:"key_IDs"`
}

type wireID struct {
	ID KeyID `json:"key_ID"`
}

// appendKeyRequest encodes a request after checking what the KME would refuse
// in any case, so that a slip of the caller costs no round trip.
func appendKeyRequest(b []byte, req KeyRequest) ([]byte, error) {
	if len(req.Targets) == 0 {
		return nil, badRequest("a slave SAE is required")
	}
	for _, t := range req.Targets {
		if _, err := ParseSAEID(string(t)); err != nil {
			return nil, err
		}
	}
	if req.Number < 0 || req.SizeBits < 0 {
		return nil, badRequest("number and size shall not be negative")
	}
	if req.SizeBits%8 != 0 {
		return nil, ErrSize
	}
	text, err := json.Marshal(wireKeyRequest{
		Number: req.Number, Size: req.SizeBits, Targets: req.Targets[1:],
		Mandatory: req.Mandatory, Optional: req.Optional,
	})
	if err != nil {
		return nil, &Error{Kind: ErrRequest, Cause: err}
	}
	return append(b, text...), nil
}

func appendIDRequest(b []byte, req IDRequest) ([]byte, error) {
	if _, err := ParseSAEID(string(req.Initiator)); err != nil {
		return nil, err
	}
	if len(req.IDs) == 0 {
		return nil, badRequest("a key_ID is required")
	}
	w := wireIDRequest{IDs: make([]wireID, len(req.IDs))}
	for i, id := range req.IDs {
		w.IDs[i].ID = id
	}
	text, err := json.Marshal(w)
	if err != nil {
		return nil, &Error{Kind: ErrRequest, Cause: err}
	}
	return append(b, text...), nil
}

// parseStatus reads table 8. Every required member must stand there.
func parseStatus(b []byte) (s Status, err error) {
	c := &cursor{b: b}
	texts := map[string]func(string){
		"source_KME_ID": func(v string) { s.SourceKME = KMEID(v) },
		"target_KME_ID": func(v string) { s.TargetKME = KMEID(v) },
		"master_SAE_ID": func(v string) { s.Initiator = SAEID(v) },
		"slave_SAE_ID":  func(v string) { s.Target = SAEID(v) },
	}
	counts := map[string]*int{
		"key_size": &s.KeySizeBits, "stored_key_count": &s.StoredKeys,
		"max_key_count": &s.MaxKeys, "max_key_per_request": &s.MaxKeysPerRequest,
		"max_key_size": &s.MaxKeySizeBits, "min_key_size": &s.MinKeySizeBits,
		"max_SAE_ID_count": &s.MaxTargets,
	}
	err = c.object(func(name string) error {
		if set := texts[name]; set != nil {
			delete(texts, name)
			v, err := c.str()
			set(v)
			return err
		}
		if n := counts[name]; n != nil {
			delete(counts, name)
			v, err := c.integer()
			*n = v
			if err == nil && v < 0 {
				return c.fail("negative count")
			}
			return err
		}
		if name == "status_extension" && c.peek() == '{' {
			v, err := c.value()
			s.Extension, _ = v.(map[string]any)
			return err
		}
		return c.skip()
	})
	if err == nil {
		err = c.end()
	}
	if missing := len(texts) + len(counts); err == nil && missing > 0 {
		err = fmt.Errorf("status lacks %d required members", missing)
	}
	if err != nil {
		return Status{}, err
	}
	return s, nil
}

// parseContainer reads table 10; the caller clears the container also if it
// comes with an error. Key bytes go from b into their own secrets.
func parseContainer(b []byte) (keys Container, err error) {
	c := &cursor{b: b}
	var found bool
	err = c.object(func(name string) error {
		switch name {
		case "keys", "Keys": // table 10 prints the second, every example the first
			if found {
				return c.fail("keys stand twice")
			}
			found = true
			return c.array(func() error {
				k, err := c.key()
				keys.Keys = append(keys.Keys, k)
				return err
			})
		case "key_container_extension":
			if c.peek() == '{' {
				v, err := c.value()
				keys.Extension, _ = v.(map[string]any)
				return err
			}
		}
		return c.skip()
	})
	if err == nil {
		err = c.end()
	}
	if err == nil && !found {
		err = errors.New("container lacks keys")
	}
	return keys, err
}

// key reads one element of keys.
func (c *cursor) key() (k Key, err error) {
	var id, bits bool
	err = c.object(func(name string) error {
		switch name {
		case "key_ID":
			s, err := c.str()
			if err != nil {
				return err
			}
			id = true
			k.ID, err = ParseKeyID(s)
			return err
		case "key":
			text, err := c.text()
			if err != nil {
				return err
			}
			bits = true
			k.Bits, err = decodeKey(text)
			return err
		}
		return c.skip()
	})
	if err == nil && !(id && bits) {
		err = errors.New("a key lacks key_ID or key")
	}
	return k, err
}

// errBase64 stands for the decoder's own error, which tells a position only
// but comes from a place that handles a key.
var errBase64 = errors.New("key is not padded standard base64")

// decodeKey decodes RFC 4648 section 4 base64, whose line breaks are refused,
// into a secret of its own.
func decodeKey(text []byte) (secret.Bytes, error) {
	if len(text) == 0 || len(text)%4 != 0 {
		return secret.Bytes{}, errBase64
	}
	for _, ch := range text {
		if ch == '\r' || ch == '\n' {
			return secret.Bytes{}, errBase64
		}
	}
	n := len(text) / 4 * 3
	for i := 1; i <= 2 && text[len(text)-i] == '='; i++ {
		n--
	}
	s := secret.New(n)
	// Strict decoding into exactly n bytes: the decoder wants room for the
	// padding, so the last quantum goes by a small array.
	last := len(text) - 4
	enc := base64.StdEncoding.Strict()
	var tail [3]byte
	defer secret.Wipe(tail[:])
	at, err := enc.Decode(s.Expose(), text[:last])
	m, err2 := enc.Decode(tail[:], text[last:])
	if err != nil || err2 != nil || at+m != n {
		s.Clear()
		return secret.Bytes{}, errBase64
	}
	copy(s.Expose()[at:], tail[:m])
	return s, nil
}

// checkDrawn says whether a container is what was asked: a short list or a
// wrong size would surface much later as a key that does not fit.
func checkDrawn(keys Container, req KeyRequest) error {
	if want := max(req.Number, 1); len(keys.Keys) != want {
		return fmt.Errorf("%d keys where %d were asked", len(keys.Keys), want)
	}
	seen := make(map[KeyID]bool, len(keys.Keys))
	for _, k := range keys.Keys {
		if req.SizeBits != 0 && 8*k.Bits.Len() != req.SizeBits {
			return fmt.Errorf("key of %d bits where %d were asked", 8*k.Bits.Len(), req.SizeBits)
		}
		if seen[k.ID] {
			return errors.New("a key_ID stands twice")
		}
		seen[k.ID] = true
	}
	return nil
}

// orderByID puts keys into the order asked, which the standard does not
// promise, and refuses any other set.
func orderByID(keys Container, ids []KeyID) error {
	if len(keys.Keys) != len(ids) {
		return fmt.Errorf("%d keys where %d were asked", len(keys.Keys), len(ids))
	}
	at := make(map[KeyID]int, len(ids))
	for i, id := range ids {
		at[id] = i
	}
	sorted := make([]Key, len(ids))
	for _, k := range keys.Keys {
		i, ok := at[k.ID]
		if !ok {
			return errors.New("a key that was not asked, or one twice")
		}
		delete(at, k.ID)
		sorted[i] = k
	}
	copy(keys.Keys, sorted)
	return nil
}

// parseError turns an answer that is not 200 into an [*Error]. It believes the
// code first and the text where the standard fixes it.
func parseError(code int, call, retry string, b []byte) error {
	w := readError(b)
	e := &Error{Message: clip(w.Message), Details: w.Details}
	e.Cause = fmt.Errorf("KME answers %d to %s", code, call)
	switch {
	case code == http.StatusBadRequest:
		e.Kind = ErrRequest
		for _, kind := range []error{ErrUnknownKey, ErrSize, ErrMandatory, ErrUnmet} {
			if strings.EqualFold(strings.TrimRight(w.Message, ". "), kind.Error()) {
				e.Kind = kind
			}
		}
	case code == http.StatusNotFound && call == "dec_keys":
		e.Kind = ErrUnknownKey // so say some KMEs instead of 400
	case code == http.StatusUnauthorized, code == http.StatusForbidden:
		e.Kind = ErrDenied
	case code < 500:
		e.Kind = ErrRequest
	default:
		e.Kind = ErrDown
	}
	if e.Kind == ErrDown {
		for _, d := range w.Details {
			if n, err := strconv.Atoi(d["missing_bits"]); err == nil && n > 0 {
				e.Kind, e.MissingBits = ErrEmpty, n
			}
		}
		if strings.HasPrefix(w.Message, ErrEmpty.Error()) {
			e.Kind = ErrEmpty
		}
		// RFC 9110 section 10.2.3 also allows a date, which no known KME sends.
		if s, err := strconv.ParseUint(retry, 10, 16); err == nil {
			e.RetryAfter = time.Duration(s) * time.Second
		}
	}
	return e
}

// readError reads table 13 as far as it is there: proxies answer with other
// shapes, and some KMEs put other things than strings into details.
func readError(b []byte) (w wireError) {
	var loose struct {
		Message string          `json:"message"`
		Details json.RawMessage `json:"details"`
	}
	if json.Unmarshal(b, &loose) != nil {
		return wireError{}
	}
	w.Message = loose.Message
	if json.Unmarshal(loose.Details, &w.Details) != nil {
		w.Details = nil
	}
	return w
}

// clip bounds a text that comes from outside and may go to a log.
func clip(s string) string {
	const most = 300
	if len(s) > most {
		s = strings.ToValidUTF8(s[:most], "")
	}
	return s
}
