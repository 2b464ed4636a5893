package enrol

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"github.com/quietline/quietline/cmd/internal/pki"
)

// The exchange goes over one TLS connection in frames, each a 4-byte length,
// big-endian, and that many bytes of JSON; wait only if a person is asked:
//
//	joiner  → join     card, clock
//	inviter → wait     a person there is asked for this site's fingerprint
//	inviter → answer   card, link secret, seed        or refused
//	joiner  → confirm  (stored here)
//	inviter → done
//
// Every frame carries the HMAC that package's comment describes.
const (
	kindJoin    = "join"
	kindWait    = "wait"
	kindAnswer  = "answer"
	kindConfirm = "confirm"
	kindDone    = "done"
	kindRefused = "refused"
)

// Bounds of the exchange.
const (
	maxFrame     = 1 << 20 // a card has 15 KiB, a seed 64 KiB, base64 twice
	exchangeTime = 20 * time.Second
	confirmTime  = 10 * time.Minute // for two people on the telephone
	maxSkew      = time.Hour        // pki dates certificates back by as much
	maxGuests    = 8                // connections at a time
	exporter     = "EXPORTER-quietline-enrolment"
)

// frame is one message.
type frame struct {
	Kind string `json:"kind"`
	Body []byte `json:"body"`
	MAC  []byte `json:"mac"`
}

// joinBody is the body of join.
type joinBody struct {
	Card  *signedCard `json:"card"`
	Clock int64       `json:"clock"` // Unix seconds
}

// channel is a TLS connection with the token's secret.
type channel struct {
	conn  *tls.Conn
	token *Token
	bound []byte // what TLS exports for this connection only
}

// newChannel finishes the handshake.
func newChannel(ctx context.Context, conn *tls.Conn, t *Token) (*channel, error) {
	if err := conn.HandshakeContext(ctx); err != nil {
		return nil, err
	}
	cs := conn.ConnectionState()
	bound, err := cs.ExportKeyingMaterial(exporter, nil, 32)
	return &channel{conn, t, bound}, err
}

// mac is HMAC-SHA-256 under the token's secret over connection, kind and body.
func (c *channel) mac(kind string, body []byte) []byte {
	sum := sha256.Sum256(body)
	m := hmac.New(sha256.New, c.token.Secret[:])
	m.Write(c.bound)
	m.Write(sum[:])
	m.Write([]byte(kind)) // the one part of varying length stands last
	return m.Sum(nil)
}

func (c *channel) send(kind string, v any) error {
	body, err := json.Marshal(v)
	if err != nil {
		return err
	}
	text, err := json.Marshal(frame{kind, body, c.mac(kind, body)})
	if err != nil {
		return err
	}
	_, err = c.conn.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(text))), text...))
	return err
}

// receive reads a frame of one kind into v. A refusal is an error.
func (c *channel) receive(kind string, v any) error {
	f, err := c.next()
	if err != nil {
		return err
	}
	return f.into(kind, v)
}

// next reads a frame and checks who made it.
func (c *channel) next() (*frame, error) {
	f, err := readFrame(c.conn)
	if err != nil {
		return nil, err
	}
	if f.Kind == kindRefused { // of the pinned certificate's owner, so it needs no secret
		return nil, fmt.Errorf("%w: %s", ErrRefused, printable(f.Body))
	}
	if !hmac.Equal(f.MAC, c.mac(f.Kind, f.Body)) {
		return nil, pki.Advise(fmt.Errorf("%w: number %s", ErrSecret, c.token.Number()),
			"it is another token's or damaged, ask for a new one")
	}
	return f, nil
}

// into decodes a frame of one kind.
func (f *frame) into(kind string, v any) error {
	if f.Kind != kind {
		return fmt.Errorf("%w: message %q, expected %q", ErrCard, printable([]byte(f.Kind)), kind)
	}
	if err := strict(f.Body, v); err != nil {
		return fmt.Errorf("%w: %w", ErrCard, err)
	}
	return nil
}

func readFrame(r io.Reader) (*frame, error) {
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return nil, err
	}
	n := binary.BigEndian.Uint32(head[:])
	if n > maxFrame {
		return nil, fmt.Errorf("%w: message of %d bytes", ErrCard, n)
	}
	text := make([]byte, n)
	if _, err := io.ReadFull(r, text); err != nil {
		return nil, err
	}
	var f frame
	if err := strict(text, &f); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrCard, err)
	}
	return &f, nil
}

// printable keeps what the other side says from commanding a terminal.
func printable(b []byte) string {
	out := make([]rune, 0, 600)
	for _, r := range string(b[:min(len(b), 1200)]) {
		if r < ' ' || r > '~' {
			r = '?'
		}
		out = append(out, r)
	}
	return string(out)
}

// refuse tells the other side why.
func (c *channel) refuse(why error) {
	text, err := json.Marshal(frame{kindRefused, []byte(why.Error()), nil})
	if err == nil {
		_, _ = c.conn.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(text))), text...))
	}
}

func pin(c *x509.Certificate) [32]byte { return sha256.Sum256(c.Raw) }

// Serve answers joiners at the listener until one has confirmed, the token
// ends ([ErrExpired]) or ctx does. ask is called before a site is believed,
// unless its fingerprint is known. tell is given each refusal and each step;
// it is called by several goroutines, one at a time. Serve closes the listener
// and returns when all its goroutines have ended.
func (inv *Invitation) Serve(ctx context.Context, ln net.Listener, ask Ask, tell func(string)) error {
	ctx, stop := context.WithDeadline(ctx, inv.token.Expires)
	defer stop()
	g := &guests{inv: inv, ask: ask, tell: tell, slots: make(chan struct{}, maxGuests), done: stop}
	var wg sync.WaitGroup
	defer wg.Wait()
	end := context.AfterFunc(ctx, func() { _ = ln.Close() })
	defer end()
	for {
		conn, err := ln.Accept()
		if ctx.Err() != nil {
			break
		}
		if err != nil {
			return fmt.Errorf("invite %s: %w", inv.token.To, err)
		}
		select {
		case g.slots <- struct{}{}:
			wg.Go(func() { defer func() { <-g.slots }(); g.serve(ctx, conn) })
		default:
			_ = conn.Close()
		}
	}
	wg.Wait()
	if inv.state.Done {
		return nil
	}
	if err := inv.token.expired(time.Now()); err != nil {
		return fmt.Errorf("invite %s: %w", inv.token.To, err)
	}
	return ctx.Err()
}

// guests are those who call during an invitation.
type guests struct {
	inv   *Invitation
	slots chan struct{}
	done  func()
	ask   Ask

	asking sync.Mutex // held while a person is asked
	mu     sync.Mutex // guards inv and tell
	tell   func(string)
}

func (g *guests) serve(ctx context.Context, raw net.Conn) {
	defer raw.Close()
	_ = raw.SetDeadline(time.Now().Add(exchangeTime))
	p := g.inv.pair
	conn := tls.Server(raw, &tls.Config{MinVersion: tls.VersionTLS13,
		CurvePreferences: []tls.CurveID{tls.X25519MLKEM768}, SessionTicketsDisabled: true,
		Certificates: []tls.Certificate{{Certificate: [][]byte{p.Chain[0].Raw}, PrivateKey: p.Key}}})
	c, err := newChannel(ctx, conn, g.inv.token)
	if err == nil {
		err = g.talk(ctx, c)
	}
	if err != nil && !errors.Is(err, io.EOF) {
		g.mu.Lock()
		defer g.mu.Unlock()
		g.tell(fmt.Sprintf("refused %s: %v", raw.RemoteAddr(), err))
	}
	_ = conn.Close()
}

// talk is one connection's exchange. The reason of a refusal is told only to
// whoever holds the token.
func (g *guests) talk(ctx context.Context, c *channel) error {
	var body joinBody
	if err := c.receive(kindJoin, &body); err != nil {
		if errors.Is(err, ErrSecret) {
			c.refuse(err)
		}
		return err
	}
	a, err := g.admit(ctx, c, &body)
	if err != nil {
		c.refuse(err)
		return err
	}
	defer a.clear()
	if err := c.send(kindAnswer, a); err != nil {
		return err
	}
	if err := c.receive(kindConfirm, &struct{}{}); err != nil {
		return err
	}
	g.mu.Lock()
	err = g.inv.confirm()
	g.mu.Unlock()
	if err != nil {
		c.refuse(err)
		return err
	}
	defer g.done()
	return c.send(kindDone, struct{}{})
}

// admit believes a site, if a person does, and configures this one for it.
func (g *guests) admit(ctx context.Context, c *channel, body *joinBody) (*answer, error) {
	card, print, known, err := g.look(body)
	if err != nil {
		return nil, err
	}
	if known != print {
		heard := known
		if heard == "" {
			if heard, err = g.hear(ctx, c, card.Site); err != nil {
				return nil, err
			}
		}
		g.mu.Lock()
		err = g.inv.settle(card.Site, print, heard, time.Now())
		g.mu.Unlock()
		if err != nil {
			return nil, err
		}
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if _, _, err := g.inv.examine(body.Card, time.Now()); err != nil { // another was faster
		return nil, err
	}
	if err := g.inv.accept(card); err != nil {
		return nil, err
	}
	g.tell(fmt.Sprintf("%s answers with fingerprint %s, as its person read", card.Site, print))
	return g.inv.answer()
}

// look judges a card. known is the fingerprint that the site must have: print
// itself if a person has confirmed it, "" if one must be asked.
func (g *guests) look(body *joinBody) (card *Card, print, known string, err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	now := time.Now()
	if skew := now.Sub(time.Unix(body.Clock, 0)); skew.Abs() > maxSkew {
		return nil, "", "", pki.Advise(fmt.Errorf("%w: %s says %s, %s says %s", ErrClock,
			g.inv.token.From, stamp(now), g.inv.token.To, stamp(time.Unix(body.Clock, 0))),
			"set the wrong one, then repeat the command")
	}
	if g.inv.state.Done {
		return nil, "", "", pki.Advise(fmt.Errorf("%w: it is done with", ErrUsed), fmt.Sprintf(
			"run at %s: quietline pki invite %s --again", g.inv.token.From, g.inv.token.To))
	}
	if card, print, err = g.inv.examine(body.Card, now); err != nil {
		return nil, "", "", err
	}
	if g.inv.state.Bound == print {
		return card, print, print, nil
	}
	return card, print, g.inv.state.Expect, nil
}

// hear asks the person here what the one at the other site reads out, while
// that site waits.
func (g *guests) hear(ctx context.Context, c *channel, site string) (string, error) {
	if !g.asking.TryLock() {
		return "", pki.Advise(fmt.Errorf("%w: another machine answers as %s at this moment", ErrUsed, site),
			"if nobody knows of it, let the invitation end and ask for a new token; else repeat pki join")
	}
	defer g.asking.Unlock()
	if err := c.send(kindWait, struct{}{}); err != nil {
		return "", err
	}
	_ = c.conn.SetDeadline(time.Now().Add(confirmTime))
	defer func() { _ = c.conn.SetDeadline(time.Now().Add(exchangeTime)) }()
	ctx, cancel := context.WithTimeout(ctx, confirmTime)
	defer cancel()
	return g.ask(ctx, site)
}

// Run makes the exchange with the inviter and configures this site. After a
// fault the same call completes it. tell is given what the person here must do
// meanwhile.
func (j *Joining) Run(ctx context.Context, tell func(string)) error {
	err := j.run(ctx, tell)
	var op *net.OpError
	dial := errors.As(err, &op) && op.Op == "dial"
	if j.state.Stored && dial {
		return nil // all is stored here, and the inviter has gone: it had confirmed
	}
	if late := j.token.expired(time.Now()); dial && late != nil {
		err = late // the inviter has gone because of it
	}
	if err != nil {
		j.remember(err, time.Now())
		return fmt.Errorf("join %s: %w", j.token.From, err)
	}
	return nil
}

func (j *Joining) run(ctx context.Context, tell func(string)) error {
	short, cancel := context.WithTimeout(ctx, exchangeTime)
	defer cancel()
	raw, err := new(net.Dialer).DialContext(short, "tcp", j.token.Address.String())
	if err != nil {
		return err
	}
	defer raw.Close()
	defer context.AfterFunc(ctx, func() { _ = raw.Close() })()
	_ = raw.SetDeadline(time.Now().Add(exchangeTime))
	conn := tls.Client(raw, &tls.Config{MinVersion: tls.VersionTLS13,
		CurvePreferences: []tls.CurveID{tls.X25519MLKEM768},
		// The token pins the certificate itself; no name and no clock is trusted.
		InsecureSkipVerify: true, VerifyConnection: j.checkPin})
	c, err := newChannel(short, conn, j.token)
	if err != nil {
		return err
	}
	_, card, err := j.card()
	if err != nil {
		return err
	}
	if err := c.send(kindJoin, joinBody{card, time.Now().Unix()}); err != nil {
		return err
	}
	a, err := j.await(c, tell)
	if err != nil {
		return err
	}
	if err := j.store(a); err != nil {
		return err
	}
	if err := c.send(kindConfirm, struct{}{}); err != nil {
		return err
	}
	if err := c.receive(kindDone, &struct{}{}); err != nil {
		return err
	}
	return conn.Close()
}

// await reads the inviter's answer, which takes as long as a person there does.
func (j *Joining) await(c *channel, tell func(string)) (*answer, error) {
	f, err := c.next()
	if err == nil && f.Kind == kindWait {
		_ = c.conn.SetDeadline(time.Now().Add(confirmTime + exchangeTime))
		tell(fmt.Sprintf("%s asks who we are: read this fingerprint to the person there:\n  %s",
			j.token.From, j.home.Fingerprint()))
		f, err = c.next()
	}
	if err != nil {
		return nil, err
	}
	_ = c.conn.SetDeadline(time.Now().Add(exchangeTime))
	a := new(answer)
	if err := f.into(kindAnswer, a); err != nil {
		return nil, err
	}
	return a, nil
}

// checkPin holds the certificate that the other side shows against the token.
func (j *Joining) checkPin(cs tls.ConnectionState) error {
	if got := pin(cs.PeerCertificates[0]); got != j.token.Pin {
		return pki.Advise(fmt.Errorf("%w: %s shows the certificate %x (subject %q, issuer %q), the token "+
			"pins %x", ErrFingerprint, j.token.Address, got[:8], cs.PeerCertificates[0].Subject,
			cs.PeerCertificates[0].Issuer, j.token.Pin[:8]),
			"somebody stands between, or the invitation was made anew: ask for a new token")
	}
	return nil
}
