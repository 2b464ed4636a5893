// Package bundle is what one end of a line must know of the other, as a file
// that two sites exchange, and the secrets that stay at home.
//
// [Bundle] is public: link_id, suite, static KEM key, SAE IDs, endpoint. It is
// one strict text form (Marshal, Unmarshal) that a person can carry and paste.
// Whoever takes one in compares its [Bundle.Fingerprint] with the other site
// over the telephone: the file itself carries no signature in version 1.
//
// [Secrets] are two files of mode 0600 in a folder: the seed of the own static
// KEM key, and the link secret that both sites hold. A caller clears them.
package bundle

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/quietline/quietline/tunnel/rekey"
)

// Version is the format that Marshal writes.
const Version = 1

const (
	begin = "-----BEGIN QUIETLINE BUNDLE-----\n"
	end   = "-----END QUIETLINE BUNDLE-----\n"
	// lineWidth is that of PEM, RFC 7468 section 2.
	lineWidth = 64
	// maxText bounds what Unmarshal reads: three times the largest bundle.
	maxText = 16 << 10
	// maxSAE is the longest SAE ID that real ETSI 014 clients take.
	maxSAE = 291
)

// Bundle is one end of a line, as the other end must know it.
type Bundle struct {
	Version int      `json:"version"` // 1
	LinkID  [16]byte `json:"-"`       // the same at both ends
	Site    string   `json:"site"`    // for people: letters, digits, - and _, 1 to 64

	Suite  rekey.Suite `json:"suite"`
	Static []byte      `json:"-"` // public static KEM key

	// SAE IDs: EpochSAE takes epoch keys, PadSAE one-time pad. They differ, so
	// that raw pad never passes a key derivation. PadSAE may be empty: no pad.
	EpochSAE string `json:"epoch_sae"`
	PadSAE   string `json:"pad_sae,omitempty"`

	// Endpoint is host:port where the end receives; empty if it only calls.
	Endpoint string `json:"endpoint,omitempty"`
}

// wire is the JSON inside the armour. Binary fields are hexadecimal or base64.
type wire struct {
	Bundle
	Link   string `json:"link_id"`
	Static string `json:"static"`
}

// Fingerprint is SHA-256 of the public static key in groups of four digits,
// to be read over the telephone.
func (b *Bundle) Fingerprint() string {
	sum := sha256.Sum256(b.Static)
	text := hex.EncodeToString(sum[:])
	var groups []string
	for i := 0; i < len(text); i += 4 {
		groups = append(groups, text[i:i+4])
	}
	return strings.Join(groups, " ")
}

// Check tells the first fault of a bundle; it wraps [ErrFormat] or [ErrVersion].
func (b *Bundle) Check() error {
	bad := func(format string, args ...any) error {
		return fmt.Errorf("%w: %s", ErrFormat, fmt.Sprintf(format, args...))
	}
	switch {
	case b.Version > Version:
		return fmt.Errorf("%w: %d, this program knows %d", ErrVersion, b.Version, Version)
	case b.Version < 1:
		return bad("version %d", b.Version)
	case b.LinkID == [16]byte{}:
		return bad("link_id is zero")
	case !validSite(b.Site):
		return bad("site %q is not 1 to 64 letters, digits, - or _", b.Site)
	case !validSAE(b.EpochSAE):
		return bad("epoch_sae %q is not 1 to %d printable characters", b.EpochSAE, maxSAE)
	case b.PadSAE != "" && !validSAE(b.PadSAE):
		return bad("pad_sae %q is not 1 to %d printable characters", b.PadSAE, maxSAE)
	case b.PadSAE == b.EpochSAE:
		return bad("epoch_sae and pad_sae are the same")
	}
	if err := rekey.CheckPublic(b.Suite, b.Static); err != nil {
		return fmt.Errorf("%w: static key: %w", ErrFormat, err)
	}
	if b.Endpoint != "" {
		return checkEndpoint(b.Endpoint)
	}
	return nil
}

func validSite(s string) bool {
	if s == "" || len(s) > 64 {
		return false
	}
	return strings.IndexFunc(s, func(r rune) bool {
		return r > unicode.MaxASCII ||
			!unicode.IsLetter(r) && !unicode.IsDigit(r) && r != '-' && r != '_'
	}) < 0
}

func validSAE(s string) bool {
	if s == "" || utf8.RuneCountInString(s) > maxSAE || !utf8.ValidString(s) {
		return false
	}
	return strings.IndexFunc(s, func(r rune) bool { return !unicode.IsPrint(r) }) < 0
}

func checkEndpoint(s string) error {
	host, port, err := net.SplitHostPort(s)
	if err != nil {
		return fmt.Errorf("%w: endpoint: %w", ErrFormat, err)
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil || n == 0 || strconv.FormatUint(n, 10) != port {
		return fmt.Errorf("%w: endpoint %q has no port 1 to 65535", ErrFormat, s)
	}
	if host == "" || len(host) > 253 || strings.ContainsFunc(host, func(r rune) bool {
		return unicode.IsSpace(r) || !unicode.IsPrint(r)
	}) || net.JoinHostPort(host, port) != s {
		return fmt.Errorf("%w: endpoint %q has no host", ErrFormat, s)
	}
	return nil
}

// Marshal writes the one text form of a bundle.
func (b *Bundle) Marshal() ([]byte, error) {
	if err := b.Check(); err != nil {
		return nil, fmt.Errorf("encode bundle: %w", err)
	}
	inner, err := json.Marshal(wire{Bundle: *b, Link: hex.EncodeToString(b.LinkID[:]),
		Static: base64.StdEncoding.EncodeToString(b.Static)})
	if err != nil {
		return nil, fmt.Errorf("encode bundle: %w", err)
	}
	body := base64.StdEncoding.EncodeToString(inner)
	var out bytes.Buffer
	out.WriteString(begin)
	for len(body) > 0 {
		n := min(lineWidth, len(body))
		out.WriteString(body[:n])
		out.WriteByte('\n')
		body = body[n:]
	}
	out.WriteString(end)
	return out.Bytes(), nil
}

// Unmarshal reads what Marshal wrote, and nothing else: no other fields, no
// other order, no text around it.
func Unmarshal(text []byte) (*Bundle, error) {
	b, err := unmarshal(text)
	if err != nil {
		return nil, fmt.Errorf("decode bundle: %w", err)
	}
	return b, nil
}

func unmarshal(text []byte) (*Bundle, error) {
	if len(text) > maxText {
		return nil, fmt.Errorf("%w: %d bytes", ErrFormat, len(text))
	}
	body, ok := bytes.CutPrefix(text, []byte(begin))
	if !ok {
		return nil, fmt.Errorf("%w: first line is not %s", ErrFormat, strings.TrimSpace(begin))
	}
	if body, ok = bytes.CutSuffix(body, []byte(end)); !ok {
		return nil, fmt.Errorf("%w: last line is not %s", ErrFormat, strings.TrimSpace(end))
	}
	digits := string(bytes.ReplaceAll(body, []byte("\n"), nil))
	inner, err := base64.StdEncoding.Strict().DecodeString(digits)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrFormat, err)
	}
	var w wire
	if err := json.Unmarshal(inner, &w); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrFormat, err)
	}
	b := w.Bundle
	if b.Version > Version {
		return nil, b.Check()
	}
	link, err := hex.DecodeString(w.Link)
	if err != nil || len(link) != len(b.LinkID) {
		return nil, fmt.Errorf("%w: link_id", ErrFormat)
	}
	b.LinkID = [16]byte(link)
	if b.Static, err = base64.StdEncoding.Strict().DecodeString(w.Static); err != nil {
		return nil, fmt.Errorf("%w: static key: %w", ErrFormat, err)
	}
	again, err := b.Marshal()
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(again, text) {
		return nil, fmt.Errorf("%w: it has a second form", ErrFormat)
	}
	return &b, nil
}
