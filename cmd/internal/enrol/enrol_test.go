package enrol

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/quietline/quietline/cmd/internal/config"
	"github.com/quietline/quietline/cmd/internal/pki"
	"github.com/quietline/quietline/secret"
	"github.com/quietline/quietline/tunnel/bundle"
)

func plan(site string) Plan {
	return Plan{Site: site, Address: netip.MustParseAddr("127.0.0.1"), Device: Simulated}
}

func newHome(t testing.TB, site string) *Home {
	t.Helper()
	h, err := Create(filepath.Join(t.TempDir(), site), plan(site))
	if err != nil {
		t.Fatal(err)
	}
	return h
}

var terms = Terms{Site: "kochi", Life: DefaultLife, Policy: "qkd-strict"}

func invite(t testing.TB, h *Home, terms Terms) *Invitation {
	t.Helper()
	inv, err := h.Invite(terms, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return inv
}

// open opens the door of an invitation at a port of the kernel's choice, and
// the token for it.
func open(t testing.TB, inv *Invitation) (net.Listener, *Token) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	tok := *inv.token
	tok.Address = netip.MustParseAddrPort(ln.Addr().String())
	return ln, &tok
}

// reads is a person who reads out what is right.
func reads(print string) Ask {
	return func(context.Context, string) (string, error) { return print, nil }
}

// nobody fails if a person is asked.
func nobody(context.Context, string) (string, error) {
	return "", errors.New("a person was asked")
}

// log collects what an inviter tells.
type log struct {
	mu sync.Mutex
	b  strings.Builder
}

func (l *log) tell(s string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.b.WriteString(s + "\n")
}

func (l *log) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// enrol joins b to a and returns what each side said.
func enrol(t testing.TB, a, b *Home) (told string, serve, join error) {
	t.Helper()
	inv := invite(t, a, Terms{Site: b.plan.Site, Life: DefaultLife, Policy: "qkd-strict"})
	ln, tok := open(t, inv)
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	served := make(chan error, 1)
	var l log
	go func() { served <- inv.Serve(ctx, ln, reads(b.Fingerprint()), l.tell) }()
	j, err := b.Join(tok, tok.Groups())
	if err == nil {
		err = j.Run(ctx, func(string) {})
	}
	if err != nil {
		stop()
	}
	serve = <-served
	return l.String(), serve, err
}

// trusted checks that two sites fit together as their daemons see them.
func trusted(t testing.TB, a, b *Home) {
	t.Helper()
	sa, err := config.Load(a.SiteFile())
	if err != nil {
		t.Fatal(err)
	}
	sb, err := config.Load(b.SiteFile())
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []*config.Site{sa, sb} {
		if len(s.Peers) != 1 || len(s.Links) != 1 || len(s.Lines) != 1 || len(s.SAEs) != 2 {
			t.Fatalf("site %s has %d peers, %d links, %d lines, %d SAEs", s.Site, len(s.Peers),
				len(s.Links), len(s.Lines), len(s.SAEs))
		}
	}
	la, lb := sa.Lines[0], sb.Lines[0]
	if la.ID != lb.ID || sa.Links[0].ID != sb.Links[0].ID || la.Policy != lb.Policy {
		t.Errorf("line %q and %q, link %q and %q", la.ID, lb.ID, sa.Links[0].ID, sb.Links[0].ID)
	}
	if la.Endpoints[0].Local != lb.Endpoints[0].Remote || la.Endpoints[0].Remote != lb.Endpoints[0].Local {
		t.Errorf("endpoints %v and %v", la.Endpoints, lb.Endpoints)
	}
	if x, y := la.TUN.Addresses[0], lb.TUN.Addresses[0]; x == y || x.Masked() != y.Masked() {
		t.Errorf("inner addresses %v and %v", x, y)
	}
	x, err := bundle.ReadSecret(la.LinkSecret)
	if err != nil {
		t.Fatal(err)
	}
	y, err := bundle.ReadSecret(lb.LinkSecret)
	if err != nil || !bytes.Equal(x.Expose(), y.Expose()) {
		t.Errorf("link secrets differ, %v", err)
	}
	p, err := os.ReadFile(sa.Links[0].Simulator.AuthSeed)
	if err != nil {
		t.Fatal(err)
	}
	q, err := os.ReadFile(sb.Links[0].Simulator.AuthSeed)
	if err != nil || !bytes.Equal(p, q) || len(p) < 2<<10 {
		t.Errorf("seeds of %d and %d bytes, %v", len(p), len(q), err)
	}
	if la.PeerFingerprint != b.Fingerprint() || lb.PeerFingerprint != a.Fingerprint() {
		t.Error("the site files pin other keys")
	}
	for _, s := range []struct {
		of *Home
		by *config.Site
	}{{a, sb}, {b, sa}} {
		pair, err := pki.LoadPair(s.of.Path("pki", "kme-peer.pem"))
		if err != nil {
			t.Fatal(err)
		}
		roots, err := pki.ReadCertificates(s.by.KME.PeerCA)
		if err != nil {
			t.Fatal(err)
		}
		use := pki.Use{URI: pki.KMEURI(kmeID(s.of.plan.Site)), Server: true, Client: true}
		if err := pki.CheckChain(pair.Chain, roots, pair.Key.Public(), use, time.Now()); err != nil {
			t.Error(err)
		}
	}
}

func TestEnrol(t *testing.T) {
	a, b := newHome(t, "tokyo"), newHome(t, "kochi")
	told, serve, join := enrol(t, a, b)
	if serve != nil || join != nil {
		t.Fatalf("%v, %v\n%s", serve, join, told)
	}
	trusted(t, a, b)
	if !strings.Contains(told, b.Fingerprint()) {
		t.Errorf("the inviter does not show who joined: %q", told)
	}
	// Nothing that the token could be used with is left.
	left, err := filepath.Glob(a.Path("enrol", "invite-kochi", "*"))
	if err != nil || len(left) != 1 {
		t.Errorf("left: %v, %v", left, err)
	}
	if inv := invite(t, a, terms); !inv.Done() {
		t.Error("a repeated invite opens a new invitation by itself")
	}
	// A third site keeps what the first two have.
	c := newHome(t, "osaka")
	if told, serve, join := enrol(t, a, c); serve != nil || join != nil {
		t.Fatalf("%v, %v\n%s", serve, join, told)
	}
	s, err := config.Load(a.SiteFile())
	if err != nil || len(s.Lines) != 2 || s.Lines[0].TUN.Name == s.Lines[1].TUN.Name ||
		s.Lines[0].Endpoints[0].Local == s.Lines[1].Endpoints[0].Local {
		t.Errorf("%+v, %v", s.Lines, err)
	}
	text, err := os.ReadFile(a.SiteFile())
	if err != nil || !strings.Contains(string(text), "# The door for applications") {
		t.Errorf("the comments are gone: %v", err)
	}
	// Enrolled anew: new secrets, and one entry each.
	if inv := invite(t, a, Terms{Site: "kochi", Life: DefaultLife, Policy: "qkd-strict", Again: true}); inv.Done() {
		t.Error("--again finds the old one")
	}
	if told, serve, join := enrol(t, a, b); serve != nil || join != nil {
		t.Fatalf("%v, %v\n%s", serve, join, told)
	}
}

func TestEnrolByFiles(t *testing.T) {
	a, b := newHome(t, "tokyo"), newHome(t, "kochi")
	off := terms
	off.Offline = true
	inv := invite(t, a, off)
	stick := t.TempDir()
	there, back := filepath.Join(stick, "invitation"), filepath.Join(stick, "reply")
	for range 2 { // each command may be repeated
		if err := inv.WriteFile(there); err != nil {
			t.Fatal(err)
		}
		inv = invite(t, a, off)
	}
	text, err := os.ReadFile(there)
	if err != nil || bytes.Contains(text, []byte("tokyo")) {
		t.Errorf("the stick can be read without the token: %v", err)
	}
	for range 2 {
		j, err := b.Join(inv.token, inv.token.Groups())
		if err != nil {
			t.Fatal(err)
		}
		if err := j.RunFiles(there, back, time.Now()); err != nil {
			t.Fatal(err)
		}
	}
	print, err := inv.ReadReply(t.Context(), back, reads(b.Fingerprint()))
	if err != nil || print != b.Fingerprint() {
		t.Fatalf("%q, %v", print, err)
	}
	trusted(t, a, b)
}

// TestRefusals: each says what was compared with what and what to do, at the
// side where a person sees it.
func TestRefusals(t *testing.T) {
	for name, tc := range map[string]struct {
		run  func(a, b *Home) error
		want error
		says []string
	}{
		"token used twice": {func(a, b *Home) error {
			inv := invite(t, a, terms)
			return twice(t, inv, b, newHome(t, "kochi"))
		}, ErrUsed, []string{"the site with fingerprint", "quietline pki revoke --site kochi"}},
		"token expired": {func(a, b *Home) error {
			inv := invite(t, a, terms)
			_, _, err := inv.examine(nil, time.Now().Add(time.Hour))
			return err
		}, ErrExpired, []string{"it ended", "this clock says", "quietline pki invite kochi"}},
		"expired file": {func(a, b *Home) error {
			inv := invite(t, a, terms)
			j, err := b.Join(inv.token, inv.token.Groups())
			if err != nil {
				return err
			}
			return j.RunFiles("none", "none", time.Now().Add(time.Hour))
		}, ErrExpired, []string{"quietline pki invite kochi"}},
		"wrong link secret": {func(a, b *Home) error { // another token's: bundle and card do not fit
			inv, other := invite(t, a, terms), *invite(t, a, terms).token
			other.Secret[0] ^= 1
			file := filepath.Join(t.TempDir(), "f")
			if err := inv.WriteFile(file); err != nil {
				return err
			}
			j, err := b.Join(&other, other.Groups())
			if err != nil {
				return err
			}
			return j.RunFiles(file, file+"r", time.Now())
		}, ErrSecret, []string{"the file and the token of one invitation"}},
		"wrong secret on line": {func(a, b *Home) error {
			inv := invite(t, a, terms)
			return online(t, inv, b, func(tok *Token) { tok.Secret[0] ^= 1 })
		}, ErrRefused, []string{"ask for a new one"}},
		"wrong pin": {func(a, b *Home) error {
			inv := invite(t, a, terms)
			return online(t, inv, b, func(tok *Token) { tok.Pin[0] ^= 1 })
		}, ErrFingerprint, []string{"issuer", "the token pins", "ask for a new token"}},
		"wrong fingerprint heard": {func(a, b *Home) error {
			_, err := b.Join(invite(t, a, terms).token, "0000 1111")
			return err
		}, ErrFingerprint, []string{"you were told", "do not join"}},
		"site made anew": {func(a, b *Home) error {
			inv := invite(t, a, terms)
			return online(t, inv, b, func(tok *Token) { tok.Fingerprint[0] ^= 1 })
		}, ErrFingerprint, []string{"answers with", a0, "somebody stands between"}},
		"wrong name": {func(a, b *Home) error {
			other := terms
			other.Site = "osaka"
			tok := invite(t, a, other).token
			_, err := b.Join(tok, tok.Groups())
			return err
		}, ErrName, []string{`the token is for "osaka", this site is "kochi"`}},
		"itself": {func(a, b *Home) error {
			_, err := a.Invite(Terms{Site: "tokyo", Life: DefaultLife}, time.Now())
			return err
		}, ErrName, []string{"this site's own"}},
		"swapped key": {func(a, b *Home) error {
			inv := invite(t, a, terms)
			tok := inv.token
			j, err := b.Join(tok, tok.Groups())
			if err != nil {
				return err
			}
			_, card, err := j.card()
			if err != nil {
				return err
			}
			card.Signer = a.sign.Public()
			_, _, err = inv.examine(card, time.Now())
			return err
		}, bundle.ErrSignature, []string{"signer"}},
		"real and simulated": {func(a, b *Home) error {
			inv := invite(t, a, terms)
			b.plan.Device = "unix:///dev/qkd"
			return online(t, inv, b, func(*Token) {})
		}, ErrRefused, []string{"simulated device", "quietline init"}},
	} {
		a, b := newHome(t, "tokyo"), newHome(t, "kochi")
		err := tc.run(a, b)
		if !errors.Is(err, tc.want) {
			t.Errorf("%s: %v, want %v", name, err, tc.want)
			continue
		}
		for _, s := range tc.says {
			if !strings.Contains(err.Error(), s) {
				t.Errorf("%s: %v\nlacks %q", name, err, s)
			}
		}
	}
}

const a0 = "the token says"

// online joins with a token that was changed.
func online(t *testing.T, inv *Invitation, b *Home, bend func(*Token)) error {
	ln, tok := open(t, inv)
	bend(tok)
	ctx, stop := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() { served <- inv.Serve(ctx, ln, reads(b.Fingerprint()), func(string) {}) }()
	defer func() { stop(); <-served }()
	j, err := b.Join(tok, tok.Groups())
	if err != nil {
		return err
	}
	return j.Run(ctx, func(string) {})
}

// twice lets two sites of one name use a token.
func twice(t *testing.T, inv *Invitation, first, second *Home) error {
	for i, h := range []*Home{first, second} {
		j, err := h.Join(inv.token, inv.token.Groups())
		if err != nil {
			return err
		}
		_, card, err := j.card()
		if err != nil {
			return err
		}
		for range 2 { // the first may ask again
			c, print, xerr := inv.examine(card, time.Now())
			if err = xerr; err == nil {
				err = errors.Join(inv.settle(c.Site, print, h.Fingerprint(), time.Now()), inv.accept(c))
			}
			if err != nil && i == 0 {
				return fmt.Errorf("the first site: %v", err)
			}
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func TestClock(t *testing.T) {
	g := &guests{inv: invite(t, newHome(t, "tokyo"), terms), tell: func(string) {}}
	for _, hours := range []time.Duration{-3, 3} {
		_, err := g.admit(t.Context(), nil, &joinBody{Clock: time.Now().Add(hours * time.Hour).Unix()})
		if !errors.Is(err, ErrClock) || !strings.Contains(err.Error(), "set the wrong one") {
			t.Errorf("%d hours: %v", hours, err)
		}
	}
}

func TestCreate(t *testing.T) {
	h := newHome(t, "tokyo")
	s, err := config.Load(h.SiteFile())
	if err != nil {
		t.Fatal(err)
	}
	if !s.Lab || s.KME.Listen != "127.0.0.1:8443" {
		t.Errorf("lab %v, door %s", s.Lab, s.KME.Listen)
	}
	if _, err := Create(h.dir, plan("tokyo")); !errors.Is(err, ErrExists) {
		t.Errorf("a second time: %v", err)
	}
	real, err := Create(filepath.Join(t.TempDir(), "x"), Plan{Site: "x", Address: netip.MustParseAddr("2001:db8::1"), Device: "unix:///dev/qkd"})
	if err != nil {
		t.Fatal(err)
	}
	if s, err := config.Load(real.SiteFile()); err != nil || s.Lab {
		t.Errorf("a site with a device accepts simulated links: %v", err)
	}
	deep := filepath.Join(t.TempDir(), strings.Repeat("d", 100))
	if _, err := Create(deep, plan("tokyo")); err == nil || !strings.Contains(err.Error(), "shorter") {
		t.Errorf("a folder too deep for sockets: %v", err)
	}
	for _, p := range []Plan{{}, plan("a b"), {"a", netip.Addr{}, Simulated, ""}, {"a", netip.IPv4Unspecified(), Simulated, ""},
		{"a", netip.MustParseAddr("192.0.2.1"), "ftp://x", ""}, {"a", netip.MustParseAddr("192.0.2.1"), Simulated, "other"}} {
		if _, err := Create(t.TempDir(), p); err == nil {
			t.Errorf("plan %v is taken", p)
		}
	}
	err = filepath.Walk(h.dir, func(path string, info os.FileInfo, err error) error {
		public := strings.HasSuffix(path, ".crt") || strings.HasSuffix(path, ".crl")
		if err == nil && !public && info.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s has mode %v", path, info.Mode())
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

// TestOpenRefuses: what a person could spoil in the folder.
func TestOpenRefuses(t *testing.T) {
	for name, tc := range map[string]struct {
		spoil func(*Home) error
		want  error
	}{
		"no site":      {func(h *Home) error { return os.Remove(h.SiteFile()) }, ErrNoSite},
		"exposed seed": {func(h *Home) error { return os.Chmod(h.seedFile(), 0o644) }, secret.ErrExposed},
		"exposed root": {func(h *Home) error { return os.Chmod(h.Path("pki", "peer-ca.key"), 0o644) }, secret.ErrExposed},
		"swapped root": {func(h *Home) error {
			return os.Rename(h.Path("pki", "admin-ca.key"), h.Path("pki", "sae-ca.key"))
		}, pki.ErrKeyPair},
	} {
		h := newHome(t, "tokyo")
		if err := tc.spoil(h); err != nil {
			t.Fatal(err)
		}
		if _, err := OpenHome(h.SiteFile()); !errors.Is(err, tc.want) {
			t.Errorf("%s: %v, want %v", name, err, tc.want)
		}
	}
}

// TestRefusalsOnBothSides: whoever is refused on line is told what was compared
// with what and what to do, and so is the person at the other site.
func TestRefusalsOnBothSides(t *testing.T) {
	nothing := func(*Token, *Home) {}
	for name, tc := range map[string]struct {
		before      func(t *testing.T, inv *Invitation, tok *Token)
		bend        func(tok *Token, b *Home)
		ask         Ask
		here, there []string // at the joiner, at the inviter
		want        error
		stillOpen   bool // the right site may join afterwards
	}{
		"another secret": {nil, func(tok *Token, _ *Home) { tok.Secret[0] ^= 1 }, nobody,
			[]string{"message is not made with this token", "number", "ask for a new one"},
			[]string{"message is not made with this token", "number", "ask for a new one"}, ErrRefused, true},
		"another certificate": {nil, func(tok *Token, _ *Home) { tok.Pin[0] ^= 1 }, nobody,
			[]string{"shows the certificate", "subject", "issuer", "the token pins", "ask for a new token"},
			[]string{"refused 127.0.0.1", "bad certificate"}, ErrFingerprint, true},
		"a thief": {nil, nothing, reads("0123 4567 89ab cdef 0123 4567 89ab cdef"),
			[]string{"fingerprint is another one", "the machine that answers as kochi has", `the person at tokyo read "0123 4567`,
				"mistyped: repeat pki join", "quietline pki revoke --site kochi"},
			[]string{"refused 127.0.0.1", "fingerprint is another one", "the machine that answers as kochi has"}, ErrRefused, true},
		"nobody there": {nil, nothing, nobody, []string{"a person was asked"}, []string{"a person was asked"},
			ErrRefused, true},
		"used before": {func(t *testing.T, inv *Invitation, tok *Token) {
			other := newHome(t, "kochi")
			j, err := other.Join(tok, tok.Groups())
			if err != nil {
				t.Fatal(err)
			}
			_, card, err := j.card()
			if err != nil {
				t.Fatal(err)
			}
			c, print, err := inv.examine(card, time.Now())
			if err = errors.Join(err, inv.settle(c.Site, print, other.Fingerprint(), time.Now())); err != nil {
				t.Fatal(err)
			}
		}, nothing, nobody, []string{"token was used before", "by the site with fingerprint", "this one has",
			"if that was not kochi, run at tokyo: quietline pki revoke --site kochi"},
			[]string{"token was used before", "by the site with fingerprint", "this one has"}, ErrRefused, false},
		"one real, one simulated": {nil, func(_ *Token, b *Home) { b.plan.Device = "unix:///dev/qkd" }, nobody,
			[]string{"one of kochi and tokyo has a simulated device", "quietline init again at one of them"},
			[]string{"one of kochi and tokyo has a simulated device"}, ErrRefused, false},
		"expired meanwhile": {func(_ *testing.T, inv *Invitation, tok *Token) {
			tok.Expires = time.Now().Add(-time.Minute)
			inv.token.Expires = tok.Expires
		}, nothing, nobody, []string{"token has expired", "it ended", "this clock says", "quietline pki invite kochi"},
			[]string{"token has expired", "it ended", "this clock says", "quietline pki invite kochi"}, ErrExpired, false},
	} {
		t.Run(name, func(t *testing.T) {
			a, b := newHome(t, "tokyo"), newHome(t, "kochi")
			inv := invite(t, a, terms)
			ln, tok := open(t, inv)
			if tc.before != nil {
				tc.before(t, inv, tok)
			}
			before := *tok
			tc.bend(tok, b)
			told, err := attempt(t, inv, ln, tok, b, tc.ask)
			if !errors.Is(err, tc.want) {
				t.Errorf("%v, want %v", err, tc.want)
			}
			for _, w := range tc.here {
				if err == nil || !strings.Contains(err.Error(), w) {
					t.Errorf("here: %v\nlacks %q", err, w)
				}
			}
			for _, w := range tc.there {
				if !strings.Contains(told, w) {
					t.Errorf("there: %s\nlacks %q", told, w)
				}
			}
			if s, err := config.Load(a.SiteFile()); err != nil || len(s.Peers)+len(s.Links)+len(s.Lines) > 0 {
				t.Errorf("tokyo was changed by one who was refused: %v", err)
			}
			if !tc.stillOpen {
				return
			}
			inv = invite(t, a, terms)
			ln, tok = open(t, inv)
			if tok.Secret != before.Secret {
				t.Fatal("another token")
			}
			if told, err := attempt(t, inv, ln, tok, b, reads(b.Fingerprint())); err != nil {
				t.Fatalf("afterwards: %v\n%s", err, told)
			}
			trusted(t, a, b)
		})
	}
}

// attempt lets b join with a token, and returns what was said on both sides.
func attempt(t *testing.T, inv *Invitation, ln net.Listener, tok *Token, b *Home, ask Ask) (told string, join error) {
	t.Helper()
	ctx, stop := context.WithCancel(t.Context())
	served := make(chan error, 1)
	var l log
	go func() { served <- inv.Serve(ctx, ln, ask, l.tell) }()
	j, join := b.Join(tok, tok.Groups())
	if join == nil {
		join = j.Run(ctx, func(string) {})
	}
	if join != nil {
		for limit := time.Now().Add(5 * time.Second); l.String() == "" && time.Now().Before(limit); {
			select {
			case err := <-served:
				served <- err
				limit = time.Time{}
			case <-time.After(time.Millisecond): // the other side tells it a moment later
			}
		}
	}
	stop()
	if err := <-served; join == nil && err != nil {
		t.Error(err)
	} else if errors.Is(err, ErrExpired) {
		l.tell(err.Error())
	}
	return l.String(), join
}

// TestKnownFingerprint: one that was known beforehand asks nobody, and a wrong
// one lets nobody in.
func TestKnownFingerprint(t *testing.T) {
	for name, right := range map[string]bool{"right": true, "wrong": false} {
		a, b := newHome(t, "tokyo"), newHome(t, "kochi")
		known := terms
		if known.Fingerprint = strings.ToUpper(b.Fingerprint()); !right {
			known.Fingerprint = a.Fingerprint()
		}
		inv := invite(t, a, known)
		ln, tok := open(t, inv)
		told, err := attempt(t, inv, ln, tok, b, nobody)
		if (err == nil) != right || !right && !strings.Contains(told, "fingerprint is another one") {
			t.Errorf("%s: %v\n%s", name, err, told)
		}
	}
}
