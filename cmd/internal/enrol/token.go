package enrol

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"regexp"
	"strings"
	"time"

	"github.com/quietline/quietline/cmd/internal/pki"
)

// Token is the right to join, once. Whoever holds its text may use it, so it
// travels to one person and lives for minutes; String hides it.
//
// Its text is "ql1." and, in base64 (RFC 4648 section 5, no padding):
//
//	16 number · 32 secret · 32 pin · 16 fingerprint · 8 end, Unix seconds
//	1+n inviter · 1+n joiner · 1+n address · 4 check
//
// Numbers are big-endian, check is the beginning of SHA-256 of all before it.
// An off-line token has an empty address and a pin of zeros.
type Token struct {
	// ID is the token's number, and the link_id of the line that it makes.
	ID     [16]byte
	Secret [32]byte
	// Pin is SHA-256 of the certificate that the inviter shows.
	Pin [32]byte
	// Fingerprint of the inviter's enrolment key; see bundle.FingerprintOf.
	Fingerprint [16]byte
	Expires     time.Time // to the second
	From, To    string    // names of the two sites
	Address     netip.AddrPort
}

const tokenPrefix = "ql1."

var siteForm = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_-]{0,39}$`)

// Text is the token as it is sent to the other site.
func (t *Token) Text() string {
	b := append(append(append(append([]byte{}, t.ID[:]...), t.Secret[:]...), t.Pin[:]...), t.Fingerprint[:]...)
	b = binary.BigEndian.AppendUint64(b, uint64(t.Expires.Unix()))
	address := ""
	if t.Address.IsValid() {
		address = t.Address.String()
	}
	for _, s := range []string{t.From, t.To, address} {
		b = append(append(b, byte(len(s))), s...)
	}
	sum := sha256.Sum256(b)
	return tokenPrefix + base64.RawURLEncoding.EncodeToString(append(b, sum[:4]...))
}

// maxToken bounds a token's text, characters: the names have 40, an address 60.
const maxToken = 512

// ParseToken reads a token's text, and nothing that has a second form.
func ParseToken(text string) (*Token, error) {
	bad := func(why string) (*Token, error) {
		return nil, fmt.Errorf("read token: %w: %s; copy the whole line that pki invite printed",
			ErrToken, why)
	}
	body, ok := strings.CutPrefix(text, tokenPrefix)
	if !ok || len(text) > maxToken {
		return bad("it does not begin with " + tokenPrefix)
	}
	b, err := base64.RawURLEncoding.Strict().DecodeString(body)
	if err != nil || len(b) < 16+32+32+16+8+3+4 {
		return bad("it is cut or has foreign characters")
	}
	b, check := b[:len(b)-4], b[len(b)-4:]
	if sum := sha256.Sum256(b); string(sum[:4]) != string(check) {
		return bad("it is damaged")
	}
	t := &Token{}
	for _, f := range [][]byte{t.ID[:], t.Secret[:], t.Pin[:], t.Fingerprint[:]} {
		b = b[copy(f, b):]
	}
	seconds := binary.BigEndian.Uint64(b)
	if b = b[8:]; seconds > 1<<40 {
		return bad("its end is not a time")
	}
	t.Expires = time.Unix(int64(seconds), 0).UTC()
	var address string
	for _, s := range []*string{&t.From, &t.To, &address} {
		if len(b) == 0 || len(b) < 1+int(b[0]) {
			return bad("it is cut")
		}
		*s, b = string(b[1:1+int(b[0])]), b[1+int(b[0]):]
	}
	if address != "" {
		if t.Address, err = netip.ParseAddrPort(address); err != nil || !usable(t.Address) {
			return bad("its address is none")
		}
	}
	if len(b) != 0 || !siteForm.MatchString(t.From) || !siteForm.MatchString(t.To) || t.Text() != text {
		return bad("it has a second form")
	}
	return t, nil
}

// newToken draws number and secret.
func newToken(from, to string, expires time.Time) *Token {
	t := &Token{From: from, To: to, Expires: expires.Truncate(time.Second).UTC()}
	_, _ = rand.Read(t.ID[:]) // never fails, see crypto/rand
	_, _ = rand.Read(t.Secret[:])
	return t
}

// Number is the token's number, which may be shown.
func (t *Token) Number() string { return hex.EncodeToString(t.ID[:]) }

// Groups is the fingerprint as people read it.
func (t *Token) Groups() string {
	text := hex.EncodeToString(t.Fingerprint[:])
	var out []string
	for i := 0; i < len(text); i += 4 {
		out = append(out, text[i:i+4])
	}
	return strings.Join(out, " ")
}

// CheckFingerprint holds what a person heard against the token. Spaces,
// colons and case do not matter.
func (t *Token) CheckFingerprint(heard string) error {
	if spoken(heard) != hex.EncodeToString(t.Fingerprint[:]) {
		return pki.Advise(fmt.Errorf("%w: the token says %s, you were told %q", ErrFingerprint,
			t.Groups(), heard), "do not join, and ask "+t.From+" for a new token over another way")
	}
	return nil
}

// spoken is a fingerprint as people type it, without what does not matter.
func spoken(heard string) string {
	return strings.ToLower(strings.NewReplacer(" ", "", ":", "", "-", "").Replace(strings.TrimSpace(heard)))
}

// expired compares the token's end with a clock.
func (t *Token) expired(now time.Time) error {
	if now.Before(t.Expires) {
		return nil
	}
	return pki.Advise(fmt.Errorf("%w: it ended %s, this clock says %s", ErrExpired, stamp(t.Expires),
		stamp(now)), fmt.Sprintf("run at %s: quietline pki invite %s", t.From, t.To))
}

func stamp(t time.Time) string { return t.UTC().Format("2006-01-02 15:04:05 UTC") }

// String hides the token.
func (t *Token) String() string { return "token " + t.Number() + " (secret)" }

// GoString hides the token.
func (t *Token) GoString() string { return t.String() }

// LogValue hides the token.
func (t *Token) LogValue() slog.Value { return slog.StringValue(t.String()) }

// Format hides the token from every verb.
func (t *Token) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, t.String()) }
