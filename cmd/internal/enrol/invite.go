package enrol

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"github.com/quietline/quietline/cmd/internal/config"
	"github.com/quietline/quietline/cmd/internal/pki"
	"github.com/quietline/quietline/hw/distill"
	"github.com/quietline/quietline/secret"
	"github.com/quietline/quietline/tunnel/bundle"
)

// Bounds of an invitation's life. Minutes are two people on a telephone; days
// are a person with a stick on a train.
const (
	MinLife     = time.Minute
	DefaultLife = 15 * time.Minute
	MaxLife     = 7 * 24 * time.Hour
)

// Invitation is one open invitation, as it lies in enrol/invite-<site>/. Its
// folder holds the token, the certificate that the token pins, and the secrets
// that the answer carries.
type Invitation struct {
	home  *Home
	dir   string
	token *Token
	pair  *pki.Pair
	state invitationState
}

type invitationState struct {
	// Bound is the fingerprint of the site that used the token and that a
	// person confirmed; "" = none yet.
	Bound string `json:"bound"`
	// Expect is that fingerprint, if it was known beforehand; "" = ask.
	Expect string `json:"expect,omitempty"`
	// Refused is the last site that had the token and was turned away.
	Refused *refusal `json:"refused,omitempty"`
	// Done: that site confirmed.
	Done   bool         `json:"done"`
	Port   uint16       `json:"port"` // UDP, of the line
	Policy string       `json:"policy"`
	Inner  netip.Prefix `json:"inner"`
}

// Terms are what the inviter decides about an invitation.
type Terms struct {
	Site    string        // who is invited
	Life    time.Duration // MinLife to MaxLife
	Policy  string        // of the line
	Offline bool          // by files; else the inviter listens
	Again   bool          // also if the site has joined before
	// Fingerprint of the invited site, as a person there read it out; "" = it
	// is asked for when the site answers.
	Fingerprint string
}

// Files of an invitation.
const (
	tokenFile = "token.secret"
	stateFile = "state.json"
	pairFile  = "door.pem"
	linkFile  = bundle.LinkFile
	seedFile  = "auth.seed"
)

// Invite opens an invitation, or finds the one to the same site that is still
// open: so the command can be repeated after a fault. One that has expired
// makes room for a new one.
func (h *Home) Invite(terms Terms, now time.Time) (*Invitation, error) {
	fail := func(err error) (*Invitation, error) {
		return nil, fmt.Errorf("invite %s: %w", terms.Site, err)
	}
	switch {
	case !siteForm.MatchString(terms.Site):
		return fail(fmt.Errorf("%w: expected letters, digits, - and _, at most 40", ErrName))
	case terms.Site == h.plan.Site:
		return fail(fmt.Errorf("%w: it is this site's own", ErrName))
	case terms.Life < MinLife || terms.Life > MaxLife:
		return fail(fmt.Errorf("a life of %v is outside %v to %v", terms.Life, MinLife, MaxLife))
	}
	inv := &Invitation{home: h, dir: h.Path("enrol", "invite-"+terms.Site)}
	err := inv.load()
	switch {
	case err == nil && inv.state.Done && !terms.Again:
		if err := inv.confirm(); err != nil { // it may have been interrupted
			return fail(err)
		}
		return inv, nil
	case err == nil && !inv.state.Done && now.Before(inv.token.Expires) &&
		inv.token.Address.IsValid() != terms.Offline:
		if terms.Fingerprint != "" && spoken(terms.Fingerprint) != inv.state.Expect {
			inv.state.Expect = spoken(terms.Fingerprint)
			if err := inv.keepState(); err != nil {
				return fail(err)
			}
		}
		return inv, nil
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return fail(err)
	}
	if err := destroy(inv.dir); err != nil { // expired, done, or never whole
		return fail(err)
	}
	if err := inv.create(terms, now); err != nil {
		return fail(err)
	}
	return inv, nil
}

// create writes a new invitation; the token last, so that a token means a
// whole one.
func (inv *Invitation) create(terms Terms, now time.Time) error {
	h := inv.home
	if err := os.MkdirAll(inv.dir, 0o700); err != nil {
		return err
	}
	t := newToken(h.plan.Site, terms.Site, now.Add(terms.Life))
	print, err := hex.DecodeString(clean(h.Fingerprint()))
	if err != nil {
		return err
	}
	copy(t.Fingerprint[:], print)
	if !terms.Offline {
		t.Address = netip.AddrPortFrom(h.plan.Address, joinPort)
		if err := inv.makeDoor(t, terms.Life); err != nil {
			return err
		}
	}
	if err := inv.makeSecrets(); err != nil {
		return err
	}
	inv.state = invitationState{Policy: terms.Policy, Expect: spoken(terms.Fingerprint)}
	line := linkName(h.plan.Site, terms.Site)
	if inv.state.Port, err = h.freePort(line); err != nil {
		return err
	}
	if inv.state.Inner, err = h.innerOf(line); err != nil {
		return err
	}
	if err := inv.keepState(); err != nil {
		return err
	}
	inv.token = t
	return writeFile(filepath.Join(inv.dir, tokenFile), []byte(t.Text()))
}

// makeDoor makes the certificate that this one token pins, under a root that
// is thrown away: nothing but the pin says whose it is.
func (inv *Invitation) makeDoor(t *Token, life time.Duration) error {
	ca, err := pki.NewCA("enrolment "+t.Number(), life)
	if err != nil {
		return err
	}
	issued, err := ca.Issue(pki.Request{CommonName: "enrolment " + t.Number(),
		IPs: []netip.Addr{inv.home.plan.Address}, Server: true, Life: life})
	if err != nil {
		return err
	}
	inv.pair = issued.Pair()
	t.Pin = pin(inv.pair.Chain[0])
	return inv.pair.Save(filepath.Join(inv.dir, pairFile))
}

func (inv *Invitation) makeSecrets() error {
	link := secret.New(32)
	defer link.Clear()
	_, _ = rand.Read(link.Expose()) // never fails, see crypto/rand
	if err := writeSecret(filepath.Join(inv.dir, linkFile), link); err != nil {
		return err
	}
	if inv.home.plan.Device != Simulated {
		return nil
	}
	seed, err := distill.NewAuthSeed(rand.Reader)
	if err != nil {
		return err
	}
	defer seed.Clear()
	return writeFile(filepath.Join(inv.dir, seedFile), seed.Expose())
}

// inner draws the addresses inside a line: four of 169.254/16 (RFC 3927),
// which no hospital routes.
func inner() netip.Prefix {
	var b [2]byte
	_, _ = rand.Read(b[:])
	// 169.254.1.0 to 169.254.254.255 are for hosts to use (section 2.1).
	addr := netip.AddrFrom4([4]byte{169, 254, 1 + b[0]%254, b[1]&^3 + 1})
	return netip.PrefixFrom(addr, 30)
}

// linkName names link and line of two sites, whoever invited whom.
func linkName(a, b string) string { return min(a, b) + "-" + max(a, b) }

// innerOf is the prefix that the line to a site has, or a new one: what stands
// in routes and firewalls outlives an enrolment.
func (h *Home) innerOf(line string) (netip.Prefix, error) {
	now, err := config.Load(h.SiteFile())
	if err != nil {
		return netip.Prefix{}, err
	}
	for _, l := range now.Lines {
		if l.ID == line && len(l.TUN.Addresses) == 1 && l.TUN.Addresses[0].Bits() == 30 {
			p := l.TUN.Addresses[0]
			return netip.PrefixFrom(p.Masked().Addr().Next(), 30), nil
		}
	}
	return inner(), nil
}

func (inv *Invitation) load() error {
	state, err := os.ReadFile(filepath.Join(inv.dir, stateFile))
	if err != nil {
		return err
	}
	if err := strict(state, &inv.state); err != nil || inv.state.Done {
		return err
	}
	text, err := secret.ReadFile(filepath.Join(inv.dir, tokenFile), maxToken)
	if err != nil {
		return err
	}
	defer text.Clear()
	if inv.token, err = ParseToken(string(text.Expose())); err != nil {
		return err
	}
	if inv.token.Address.IsValid() {
		inv.pair, err = pki.LoadPair(filepath.Join(inv.dir, pairFile))
	}
	return err
}

func (inv *Invitation) keepState() error {
	text, err := json.Marshal(inv.state)
	if err != nil {
		return err
	}
	return writeFile(filepath.Join(inv.dir, stateFile), text)
}

// Token is what the other site needs.
func (inv *Invitation) Token() *Token { return inv.token }

// Done tells whether the other site has joined and confirmed; there is no
// token then.
func (inv *Invitation) Done() bool { return inv.state.Done }

// Bound is the fingerprint of the site that used the token; "" = none yet.
func (inv *Invitation) Bound() string { return inv.state.Bound }

// card is this site's card of the invitation.
func (inv *Invitation) card() (*Card, error) {
	static, err := inv.home.staticKey(inv.token.To)
	if err != nil {
		return nil, err
	}
	c, err := inv.home.card(inv.token, inviter, static, inv.state.Port)
	if err != nil {
		return nil, err
	}
	c.Link, c.Policy, c.Inner = linkName(inv.token.From, inv.token.To), inv.state.Policy, inv.state.Inner
	return c, nil
}

// answer is what the joiner gets; the caller clears it.
func (inv *Invitation) answer() (*answer, error) {
	c, err := inv.card()
	if err != nil {
		return nil, err
	}
	signed, err := signCard(c, inv.home.sign)
	if err != nil {
		return nil, err
	}
	b, err := inv.secrets()
	if err != nil {
		return nil, err
	}
	defer b.clear()
	a := &answer{Card: signed, Link: append([]byte{}, b.link.Expose()...)}
	if b.seed.Len() > 0 {
		a.Seed = append([]byte{}, b.seed.Expose()...)
	}
	return a, nil
}

func (a *answer) clear() {
	secret.Wipe(a.Link)
	secret.Wipe(a.Seed)
}

func (inv *Invitation) secrets() (*bond, error) {
	link, err := bundle.ReadSecret(filepath.Join(inv.dir, linkFile))
	if err != nil {
		return nil, err
	}
	b := &bond{link: link}
	if inv.home.plan.Device == Simulated {
		if b.seed, err = secret.ReadFile(filepath.Join(inv.dir, seedFile), maxSeed); err != nil {
			link.Clear()
			return nil, err
		}
	}
	return b, nil
}

// maxSeed bounds an authentication seed, bytes.
const maxSeed = 1 << 20

func (b *bond) clear() {
	b.link.Clear()
	b.seed.Clear()
}

// Ask lets a person say which fingerprint somebody at a site read out over the
// telephone. It is called once at a time, and waits for the person or ctx.
type Ask func(ctx context.Context, site string) (heard string, err error)

// examine verifies a joiner's card and holds it against the token. It returns
// the fingerprint of the site that signed it.
func (inv *Invitation) examine(s *signedCard, now time.Time) (c *Card, print string, err error) {
	if err := inv.token.expired(now); err != nil && inv.state.Bound == "" {
		return nil, "", err
	}
	if s == nil {
		return nil, "", fmt.Errorf("%w: none came", ErrCard)
	}
	if c, err = s.open(); err != nil {
		return nil, "", err
	}
	if err := inv.home.fit(inv.token, c, joiner, inv.token.To); err != nil {
		return nil, "", err
	}
	print = bundle.FingerprintOf(s.Signer)
	if inv.state.Bound != "" && inv.state.Bound != print {
		return nil, "", inv.refuse(c.Site, print, pki.Advise(fmt.Errorf("%w: by the site with fingerprint %s, "+
			"this one has %s", ErrUsed, inv.state.Bound, print), fmt.Sprintf("if that was not %s, run at "+
			"%s: quietline pki revoke --site %s", inv.token.To, inv.token.From, inv.token.To)), now)
	}
	return c, print, nil
}

// refuse keeps why a site that has the token is turned away: a person asks
// later, with [Inspect].
func (inv *Invitation) refuse(site, print string, why error, now time.Time) error {
	inv.state.Refused = &refusal{Site: site, Print: print, Reason: why.Error(), At: now.UTC().Truncate(time.Second)}
	if err := inv.keepState(); err != nil {
		return errors.Join(why, err)
	}
	return why
}

// settle binds the token to the site with a fingerprint, if a person heard the
// same one. Nothing was told to that site before, and nothing is written.
func (inv *Invitation) settle(site, print, heard string, now time.Time) error {
	if spoken(heard) != spoken(print) {
		return inv.refuse(site, print, pki.Advise(fmt.Errorf("%w: the machine that answers as %s has %s, the "+
			"person at %s read %q", ErrFingerprint, site, print, inv.token.From, heard), fmt.Sprintf(
			"mistyped: repeat pki join; else somebody has the token: at %s, quietline pki revoke --site %s",
			inv.token.From, site)), now)
	}
	inv.state.Bound = print
	if r := inv.state.Refused; r != nil && r.Print == print { // it was mistyped before
		inv.state.Refused = nil
	}
	return inv.keepState()
}

// accept configures this site for the one that settle bound. Repeated, it does
// the same again.
func (inv *Invitation) accept(c *Card) error {
	mine, err := inv.card()
	if err != nil {
		return err
	}
	b, err := inv.secrets()
	if err != nil {
		return err
	}
	defer b.clear()
	b.mine, b.theirs = mine, c
	return inv.home.apply(b)
}

// confirm ends the invitation: its secrets are removed.
func (inv *Invitation) confirm() error {
	inv.state.Done = true
	if err := inv.keepState(); err != nil {
		return err
	}
	for _, f := range []string{tokenFile, linkFile, seedFile, pairFile} {
		if err := destroy(filepath.Join(inv.dir, f)); err != nil {
			return err
		}
	}
	return secret.SyncDir(inv.dir)
}
