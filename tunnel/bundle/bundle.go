// Package bundle is what one end of a line must know of the other, as a file
// that two sites exchange, and the secrets that stay at home.
//
// [Bundle] is public: link_id, suite, static KEM key, SAE IDs, endpoint. It is
// one strict text form (Marshal, Unmarshal) that a person can carry and paste,
// signed by the site's enrolment key ([Signer]): Ed25519 and ML-DSA-65, and
// both must verify. The key comes with the bundle, so whoever takes one in
// compares its [Bundle.Fingerprint] with the one read over the telephone.
//
// Version 1 had no signature; it is refused with [ErrVersion].
//
// [Secrets] are two files of mode 0600 in a folder: the seed of the own static
// KEM key, and the link secret that both sites hold. A caller clears them.
package bundle

import (
	"bytes"
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

// Version is the format that Marshal writes, and the only one that is read.
const Version = 2

const (
	begin = "-----BEGIN QUIETLINE BUNDLE-----\n"
	end   = "-----END QUIETLINE BUNDLE-----\n"
	// lineWidth is that of PEM, RFC 7468 section 2.
	lineWidth = 64
	// maxText bounds what Unmarshal reads: three times the largest bundle.
	maxText = 48 << 10
	// maxSAE is the longest SAE ID that real ETSI 014 clients take.
	maxSAE = 291
)

// Bundle is one end of a line, as the other end must know it.
type Bundle struct {
	Version int      `json:"version"` // 2
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

	// Signer is the site's enrolment key, and Signature its two signatures over
	// all the rest; Sign sets both.
	Signer    []byte `json:"-"`
	Signature []byte `json:"-"`
}

// wire is the JSON inside the armour. Binary fields are hexadecimal or base64.
type wire struct {
	Bundle
	Link   string `json:"link_id"`
	Static string `json:"static"`
	Signer string `json:"signer"`
	Sig    string `json:"signature,omitempty"`
}

// purpose of the signature.
const purpose = "line bundle"

// content is what the signatures cover: the JSON without them.
func (b *Bundle) content() ([]byte, error) { return json.Marshal(b.wire(false)) }

func (b *Bundle) wire(sig bool) wire {
	w := wire{Bundle: *b, Link: hex.EncodeToString(b.LinkID[:]),
		Static: base64.StdEncoding.EncodeToString(b.Static),
		Signer: base64.StdEncoding.EncodeToString(b.Signer)}
	if sig {
		w.Sig = base64.StdEncoding.EncodeToString(b.Signature)
	}
	return w
}

// Sign signs the bundle as it is now; a later change breaks the signature.
func (b *Bundle) Sign(s *Signer) error {
	b.Signer = s.Public()
	text, err := b.content()
	if err == nil {
		b.Signature, err = s.Sign(purpose, text)
	}
	return err
}

// Fingerprint is that of the enrolment key; see [FingerprintOf].
func (b *Bundle) Fingerprint() string { return FingerprintOf(b.Signer) }

// Check tells the first fault of a bundle; it wraps [ErrFormat], [ErrVersion]
// or [ErrSignature].
func (b *Bundle) Check() error {
	bad := func(format string, args ...any) error {
		return fmt.Errorf("%w: %s", ErrFormat, fmt.Sprintf(format, args...))
	}
	switch {
	case b.Version > Version:
		return fmt.Errorf("%w: %d, this program knows %d", ErrVersion, b.Version, Version)
	case b.Version == 1:
		return fmt.Errorf("%w: 1, which has no signature; enrol the line again", ErrVersion)
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
		if err := checkEndpoint(b.Endpoint); err != nil {
			return err
		}
	}
	text, err := b.content()
	if err != nil {
		return fmt.Errorf("%w: %w", ErrFormat, err)
	}
	return Verify(b.Signer, purpose, text, b.Signature)
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
	inner, err := json.Marshal(b.wire(true))
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
	if b.Version > Version || b.Version == 1 {
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
	if b.Signer, err = base64.StdEncoding.Strict().DecodeString(w.Signer); err != nil {
		return nil, fmt.Errorf("%w: signer: %w", ErrFormat, err)
	}
	if b.Signature, err = base64.StdEncoding.Strict().DecodeString(w.Sig); err != nil {
		return nil, fmt.Errorf("%w: signature: %w", ErrFormat, err)
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
