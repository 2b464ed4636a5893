package etsi014

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"sync"

	"github.com/quietline/quietline/secret"
)

// answer is a response ready to be written. It owns its buffer; write clears
// it.
type answer struct {
	code       int
	body       []byte // of whole, after room
	whole      []byte
	room       int // for an answer's head before its body
	keys, bits int // delivered by the body
}

// Header values that every answer shares. No cache may keep an answer: it
// holds keys, or a state that the next call changes.
var (
	jsonType  = []string{"application/json"}
	noStore   = []string{"no-store"}
	noSniff   = []string{"nosniff"}
	smallBody = sync.Pool{New: func() any { return new([smallSize]byte) }}
)

// headRoom holds the head of an answer with keys; it has some 170 bytes.
const headRoom = 512

// smallSize holds an answer of up to 150 keys of 256 bits, or 20 of 4,096; a
// record of TLS holds no more (RFC 8446 section 5.1).
const smallSize = 16 << 10

// write sends the answer and wipes its body. An answer with keys goes to the
// connection in one piece with its head, past the buffers of net/http, and
// crypto/tls seals it into a buffer of its own: no copy is left. On a
// connection that is not of Serve net/http's buffers keep copies; flushing
// tells whether the answer left.
func (a answer) write(w http.ResponseWriter, r *http.Request, over *begun) error {
	h := w.Header()
	h["Content-Type"], h["Cache-Control"], h["X-Content-Type-Options"] = jsonType, noStore, noSniff
	h["Content-Length"] = []string{strconv.Itoa(len(a.body))}
	defer a.free()
	if a.keys > 0 && over != nil && over.conn != nil {
		return a.writePast(w, over.conn)
	}
	w.WriteHeader(a.code)
	if r.Method == http.MethodHead {
		return nil
	}
	if _, err := w.Write(a.body); err != nil {
		return fmt.Errorf("write answer: %w", err)
	}
	if a.keys > 0 {
		if err := http.NewResponseController(w).Flush(); err != nil {
			return fmt.Errorf("write answer: %w", err)
		}
	}
	return nil
}

// writePast has net/http write the head, which the connection holds, and hand
// the body to the connection itself.
func (a answer) writePast(w http.ResponseWriter, c *conn) error {
	from, ok := w.(io.ReaderFrom)
	if !ok {
		return fmt.Errorf("write answer: %w", errCopied)
	}
	c.holds = true
	defer func() { c.holds, c.held = false, c.held[:0] }()
	w.WriteHeader(a.code)
	if err := http.NewResponseController(w).Flush(); err != nil {
		return fmt.Errorf("write answer: %w", err)
	}
	body := &keyBody{a: a}
	if _, err := from.ReadFrom(body); err != nil {
		return fmt.Errorf("write answer: %w", err)
	}
	if !body.sent { // a HEAD, or a code without a body: neither has keys
		return fmt.Errorf("write answer: %w", errCopied)
	}
	return nil
}

func (a answer) free() {
	secret.Wipe(a.body)
	if len(a.whole) == smallSize {
		smallBody.Put((*[smallSize]byte)(a.whole))
	}
}

// bodyBuffer returns a buffer with room for a head and n bytes.
func bodyBuffer(n int) []byte {
	if headRoom+n <= smallSize {
		return smallBody.Get().(*[smallSize]byte)[:]
	}
	return make([]byte, headRoom+n)
}

// keyAnswer encodes a container that holds want keys, and clears it. The
// buffer is measured first, because a buffer that grows leaves copies.
func keyAnswer(c Container, want int) (answer, error) {
	defer c.Clear()
	if len(c.Keys) != want {
		return answer{}, fmt.Errorf("encode container: %d keys where %d were asked", len(c.Keys), want)
	}
	var ext []byte
	if c.Extension != nil {
		b, err := json.Marshal(c.Extension)
		if err != nil {
			return answer{}, fmt.Errorf("encode container extension: %w", err)
		}
		ext = b
	}
	a := answer{code: http.StatusOK, keys: len(c.Keys), room: headRoom}
	a.whole = bodyBuffer(containerLen(c, ext))
	a.body = appendContainer(a.whole[headRoom:headRoom], c, ext)
	for _, k := range c.Keys {
		a.bits += 8 * k.Bits.Len()
	}
	return a, nil
}

// The pieces of a Key container (table 10) around its values.
const (
	pieceOpen  = `{"keys":[`
	pieceID    = `{"key_ID":"`
	pieceKey   = `","key":"`
	pieceNext  = `"},`
	pieceLast  = `"}`
	pieceExt   = `],"key_container_extension":`
	pieceClose = `]}`
)

// containerLen is the most that appendContainer appends.
func containerLen(c Container, ext []byte) int {
	n := len(pieceOpen) + len(pieceExt) + len(ext) + len(pieceClose)
	for _, k := range c.Keys {
		n += len(pieceID) + 36 + len(pieceKey) + len(pieceNext)
		n += base64.StdEncoding.EncodedLen(k.Bits.Len())
	}
	return n
}

// appendContainer appends a Key container, its extension already encoded.
func appendContainer(b []byte, c Container, ext []byte) []byte {
	b = append(b, pieceOpen...)
	for i, k := range c.Keys {
		b = append(b, pieceID...)
		b, _ = k.ID.AppendText(b)
		b = append(b, pieceKey...)
		b = base64.StdEncoding.AppendEncode(b, k.Bits.Expose())
		if i < len(c.Keys)-1 {
			b = append(b, pieceNext...)
		} else {
			b = append(b, pieceLast...)
		}
	}
	if ext == nil {
		return append(b, pieceClose...)
	}
	b = append(append(b, pieceExt...), ext...)
	return append(b, '}')
}

// wireStatus is table 8 in the standard's words and order.
type wireStatus struct {
	SourceKME  KMEID          `json:"source_KME_ID"`
	TargetKME  KMEID          `json:"target_KME_ID"`
	Master     SAEID          `json:"master_SAE_ID"`
	Slave      SAEID          `json:"slave_SAE_ID"`
	KeySize    int            `json:"key_size"`
	Stored     int            `json:"stored_key_count"`
	MaxKeys    int            `json:"max_key_count"`
	PerRequest int            `json:"max_key_per_request"`
	MaxSize    int            `json:"max_key_size"`
	MinSize    int            `json:"min_key_size"`
	MaxTargets int            `json:"max_SAE_ID_count"`
	Extension  map[string]any `json:"status_extension,omitempty"`
}

func statusAnswer(s Status) (answer, error) {
	b, err := json.Marshal(wireStatus{
		SourceKME: s.SourceKME, TargetKME: s.TargetKME, Master: s.Initiator, Slave: s.Target,
		KeySize: s.KeySizeBits, Stored: s.StoredKeys, MaxKeys: s.MaxKeys,
		PerRequest: s.MaxKeysPerRequest, MaxSize: s.MaxKeySizeBits, MinSize: s.MinKeySizeBits,
		MaxTargets: s.MaxTargets, Extension: s.Extension,
	})
	if err != nil {
		return answer{}, fmt.Errorf("encode status: %w", err)
	}
	return answer{code: http.StatusOK, body: b}, nil
}

// wireError is table 13.
type wireError struct {
	Message string              `json:"message"`
	Details []map[string]string `json:"details,omitempty"`
}

func errorAnswer(code int, message string, details []map[string]string) answer {
	b, err := json.Marshal(wireError{Message: message, Details: details})
	if err != nil { // strings and maps of strings always encode
		panic(err)
	}
	return answer{code: code, body: b}
}
