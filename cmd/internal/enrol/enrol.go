// Package enrol makes two sites trust each other: their key managers, and the
// two ends of the line between them.
//
// The main type is [Home], the folder of one site. [Home.Invite] makes an
// [Invitation] with a [Token]; the other site's [Home.Join] takes the token.
// Each sends the other a [Card], signed with the enrolment key of its site
// (Ed25519 and ML-DSA-65, see tunnel/bundle): the root of its key manager's
// certificate, its addresses, its SAE, its end of the line. The inviter adds
// the link secret and, for a simulated link, the seed of its authentication.
//
// On line, the joiner speaks TLS 1.3 with X25519MLKEM768 to the inviter, whose
// certificate the token pins. Request and answer carry an HMAC-SHA-256 under
// the token's secret over the exporter of this very connection (RFC 8446
// section 7.5) and the message: so neither the token alone nor a place on the
// wire is enough. Off line, the same messages lie in files, sealed with
// AES-256-GCM under a key that HKDF makes of the token's secret.
//
// A caller must keep in mind that a token is for one site, once, and short:
// it is bound to the first site that answers, and only that site may ask again
// after a fault. Everything is written so that a command which was killed is
// completed by the same command.
package enrol

import (
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/quietline/quietline/cmd/internal/pki"
	"github.com/quietline/quietline/tunnel/bundle"
)

// Errors of enrolment. Their texts name what was compared and the next step.
var (
	// ErrToken: the text is not a token, or damaged.
	ErrToken = errors.New("token is not valid")
	// ErrExpired: the token's time is over.
	ErrExpired = errors.New("token has expired")
	// ErrUsed: another site has used the token.
	ErrUsed = errors.New("token was used before")
	// ErrFingerprint: the fingerprint is not that of the site's key.
	ErrFingerprint = errors.New("fingerprint is another one")
	// ErrName: a token or card is for another site.
	ErrName = errors.New("site name is another one")
	// ErrSecret: the message was not made with the token's secret.
	ErrSecret = errors.New("message is not made with this token")
	// ErrCard: what a site tells of itself is not usable.
	ErrCard = errors.New("site card is not valid")
	// ErrClock: the clocks of the two sites differ by hours.
	ErrClock = errors.New("clocks differ")
	// ErrExists: the folder holds a site already.
	ErrExists = errors.New("site exists already")
	// ErrNoSite: the folder was not made by quietline init.
	ErrNoSite = errors.New("folder holds no site made by quietline init")
	// ErrRefused: the other site said no.
	ErrRefused = errors.New("the other site refuses")
)

// Card is what one site tells another of itself, in one enrolment.
type Card struct {
	Version    int    `json:"version"`    // 1
	Invitation string `json:"invitation"` // the token's number, hexadecimal
	Role       string `json:"role"`       // inviter or joiner
	Site       string `json:"site"`
	KME        string `json:"kme"`
	// PeerRoot is the root of the KME's certificate towards peers, PEM; under
	// an external CA there may be several.
	PeerRoot string `json:"peer_root"`
	// PeerAddress is where the KME listens for peers.
	PeerAddress netip.AddrPort `json:"peer_address"`
	SAE         string         `json:"sae"` // of the line's end
	// Endpoint is where the line's end receives, Bundle its signed bundle.
	Endpoint netip.AddrPort `json:"endpoint"`
	Bundle   string         `json:"bundle"`
	// Simulated: the QKD link has no photons; all that follows is for it.
	Simulated bool           `json:"simulated"`
	Fibre     netip.AddrPort `json:"fibre"`
	Classical netip.AddrPort `json:"classical"`
	// Link names link and line, Policy and Inner (the addresses inside the
	// line, the inviter's first) are the inviter's choice.
	Link   string       `json:"link"`
	Policy string       `json:"policy"`
	Inner  netip.Prefix `json:"inner"`
}

// cardVersion is the layout of cards and messages.
const cardVersion = 1

// signedCard is a card as it travels.
type signedCard struct {
	Card   []byte `json:"card"`
	Signer []byte `json:"signer"`
	Sig    []byte `json:"signature"`
}

const cardPurpose = "site card"

func signCard(c *Card, s *bundle.Signer) (*signedCard, error) {
	text, err := json.Marshal(c)
	if err != nil {
		return nil, fmt.Errorf("sign card: %w", err)
	}
	sig, err := s.Sign(cardPurpose, text)
	if err != nil {
		return nil, err
	}
	return &signedCard{Card: text, Signer: s.Public(), Sig: sig}, nil
}

// open verifies a card, its fields and its bundle.
func (s *signedCard) open() (*Card, error) {
	if err := bundle.Verify(s.Signer, cardPurpose, s.Card, s.Sig); err != nil {
		return nil, err
	}
	var c Card
	if err := strict(s.Card, &c); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrCard, err)
	}
	b, err := c.check()
	if err != nil {
		return nil, err
	}
	if want, got := bundle.FingerprintOf(s.Signer), b.Fingerprint(); want != got {
		return nil, fmt.Errorf("%w: the bundle is signed by %s, the card by %s", ErrCard, got, want)
	}
	return &c, nil
}

// check tells the first fault of a card.
func (c *Card) check() (*bundle.Bundle, error) {
	bad := func(format string, args ...any) error {
		return fmt.Errorf("%w: of site %q: %s", ErrCard, c.Site, fmt.Sprintf(format, args...))
	}
	switch {
	case c.Version != cardVersion:
		return nil, bad("version %d, this program knows %d; run the same quietline at both sites",
			c.Version, cardVersion)
	case !siteForm.MatchString(c.Site) || c.KME != kmeID(c.Site) || c.SAE != lineSAE(c.Site):
		return nil, bad("names %q and %q do not belong to it", c.KME, c.SAE)
	case !usable(c.PeerAddress) || !usable(c.Endpoint):
		return nil, bad("addresses %v and %v cannot be reached", c.PeerAddress, c.Endpoint)
	case c.Simulated && (!usable(c.Fibre) || !usable(c.Classical)):
		return nil, bad("addresses %v and %v cannot be reached", c.Fibre, c.Classical)
	}
	roots, err := pki.ParseCertificates([]byte(c.PeerRoot))
	if err != nil || len(roots) > maxRoots ||
		slices.ContainsFunc(roots, func(c *x509.Certificate) bool { return !c.IsCA }) {
		return nil, bad("peer_root is not 1 to %d root certificates", maxRoots)
	}
	b, err := bundle.Unmarshal([]byte(c.Bundle))
	if err != nil {
		return nil, bad("%v", err)
	}
	if hex.EncodeToString(b.LinkID[:]) != c.Invitation {
		return nil, bad("the bundle is of line %x, the invitation is %s", b.LinkID, c.Invitation)
	}
	if b.EpochSAE != c.SAE || b.Site != c.Site || b.Endpoint != c.Endpoint.String() {
		return nil, bad("the bundle is of another line: SAE %q, site %q, endpoint %s", b.EpochSAE,
			b.Site, b.Endpoint)
	}
	return b, nil
}

// maxRoots bounds a site's roots: the old and the new of two CAs.
const maxRoots = 4

func usable(a netip.AddrPort) bool {
	return a.IsValid() && a.Port() != 0 && !a.Addr().IsUnspecified() && !a.Addr().IsMulticast()
}

// answer is what the inviter sends.
type answer struct {
	Card *signedCard `json:"card"`
	// Link is the link secret and Seed the authentication seed, base64; the
	// seed only for a simulated link. Both are cleared after use.
	Link wipedText `json:"link_secret"`
	Seed wipedText `json:"auth_seed,omitempty"`
}

// wipedText is a secret as base64 inside a message. It hides itself.
type wipedText []byte

func (w wipedText) MarshalJSON() ([]byte, error) {
	out := append([]byte{'"'}, base64.StdEncoding.AppendEncode(nil, w)...)
	return append(out, '"'), nil
}

func (w *wipedText) UnmarshalJSON(text []byte) error {
	if len(text) < 2 || text[0] != '"' {
		return errors.New("not a text")
	}
	b, err := base64.StdEncoding.Strict().AppendDecode(nil, text[1:len(text)-1])
	*w = b
	return err
}

func (wipedText) String() string   { return "(secret)" }
func (wipedText) GoString() string { return "(secret)" }
