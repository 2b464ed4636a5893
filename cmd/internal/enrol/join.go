package enrol

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"github.com/quietline/quietline/cmd/internal/pki"
	"github.com/quietline/quietline/secret"
	"github.com/quietline/quietline/tunnel/bundle"
)

// Joining is this site's side of an enrolment to which it was invited. What it
// has reached lies in enrol/join-<site>.json.
type Joining struct {
	home  *Home
	token *Token
	state joiningState
}

type joiningState struct {
	Invitation string `json:"invitation"`
	Port       uint16 `json:"port"` // UDP, of the line
	// Stored: the other site's answer is applied; only to confirm is left.
	Stored bool `json:"stored"`
	// Refused is why this site was turned away at last; nil once it is stored.
	Refused *refusal `json:"refused,omitempty"`
}

// Join begins, or goes on with, an enrolment. heard is the fingerprint that a
// person at the inviting site read out.
func (h *Home) Join(t *Token, heard string) (*Joining, error) {
	fail := func(err error) (*Joining, error) {
		return nil, fmt.Errorf("join %s: %w", t.From, err)
	}
	if t.To != h.plan.Site {
		return fail(pki.Advise(fmt.Errorf("%w: the token is for %q, this site is %q", ErrName, t.To,
			h.plan.Site), "ask for a token for this name: quietline pki invite "+h.plan.Site))
	}
	if t.From == h.plan.Site {
		return fail(fmt.Errorf("%w: both sites are called %q; one needs another name", ErrName, t.From))
	}
	if err := t.CheckFingerprint(heard); err != nil {
		return fail(err)
	}
	j := &Joining{home: h, token: t}
	text, err := os.ReadFile(j.path())
	if err == nil {
		err = strict(text, &j.state)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fail(err)
	}
	if j.state.Invitation == t.Number() {
		return j, nil
	}
	j.state = joiningState{Invitation: t.Number()}
	if j.state.Port, err = h.freePort(linkName(t.From, t.To)); err != nil {
		return fail(err)
	}
	if err := j.keep(); err != nil {
		return fail(err)
	}
	return j, nil
}

func (j *Joining) path() string { return j.home.Path("enrol", "join-"+j.token.From+".json") }

func (j *Joining) keep() error {
	text, err := json.Marshal(j.state)
	if err != nil {
		return err
	}
	return writeFile(j.path(), text)
}

// Stored tells whether this site is configured already.
func (j *Joining) Stored() bool { return j.state.Stored }

// card is this site's card and its signed form.
func (j *Joining) card() (*Card, *signedCard, error) {
	static, err := j.home.staticKey(j.token.From)
	if err != nil {
		return nil, nil, err
	}
	c, err := j.home.card(j.token, joiner, static, j.state.Port)
	if err != nil {
		return nil, nil, err
	}
	s, err := signCard(c, j.home.sign)
	return c, s, err
}

// store applies the inviter's answer to this site, and clears it.
func (j *Joining) store(a *answer) error {
	defer a.clear()
	theirs, err := j.meet(a.Card)
	if err != nil || j.state.Stored {
		return err
	}
	mine, _, err := j.card()
	if err != nil {
		return err
	}
	if len(a.Link) != 32 || theirs.Simulated != (len(a.Seed) > 0) || len(a.Seed) > maxSeed {
		return fmt.Errorf("%w: link secret of %d bytes, seed of %d", ErrCard, len(a.Link), len(a.Seed))
	}
	b := &bond{mine: mine, theirs: theirs, link: secret.Copy(a.Link), seed: secret.Copy(a.Seed)}
	defer b.clear()
	if err := j.home.apply(b); err != nil {
		return err
	}
	j.state.Stored, j.state.Refused = true, nil
	return j.keep()
}

// meet verifies the inviter's card and holds its signer against the token.
func (j *Joining) meet(s *signedCard) (*Card, error) {
	if s == nil {
		return nil, fmt.Errorf("%w: none came", ErrCard)
	}
	c, err := s.open()
	if err != nil {
		return nil, err
	}
	if got, want := bundle.FingerprintOf(s.Signer), j.token.Groups(); got != want {
		return nil, pki.Advise(fmt.Errorf("%w: %s answers with %s, the token says %s", ErrFingerprint,
			c.Site, got, want), "somebody stands between, or the site was made anew: ask for a new token")
	}
	if err := j.home.fit(j.token, c, inviter, j.token.From); err != nil {
		return nil, err
	}
	if !c.Inner.IsValid() || !c.Inner.Addr().Is4() || c.Inner.Bits() != 30 || c.Link != linkName(c.Site, j.token.To) {
		return nil, fmt.Errorf("%w: inner addresses %v, link %q", ErrCard, c.Inner, c.Link)
	}
	return c, nil
}

func clean(groups string) string { return strings.ReplaceAll(groups, " ", "") }
