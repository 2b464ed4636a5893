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
)

// The exchange is three frames each way over one TLS connection, each a 4-byte
// length, big-endian, and that many bytes of JSON:
//
//	joiner  → join     card, clock
//	inviter → answer   card, link secret, seed        or refused
//	joiner  → confirm  (stored here)
//	inviter → done
//
// Every frame carries the HMAC that package's comment describes.
const (
	kindJoin    = "join"
	kindAnswer  = "answer"
	kindConfirm = "confirm"
	kindDone    = "done"
	kindRefused = "refused"
)

// Bounds of the exchange.
const (
	maxFrame     = 1 << 20 // a card has 15 KiB, a seed 64 KiB, base64 twice
	exchangeTime = 20 * time.Second
	maxSkew      = time.Hour // pki dates certificates back by as much
	maxGuests    = 8         // connections at a time
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
	f, err := readFrame(c.conn)
	if err != nil {
		return err
	}
	if f.Kind == kindRefused { // of the pinned certificate's owner, so it needs no secret
		return fmt.Errorf("%w: %s", ErrRefused, printable(f.Body))
	}
	if !hmac.Equal(f.MAC, c.mac(f.Kind, f.Body)) {
		return fmt.Errorf("%w: number %s; it is another token's or damaged, ask for a new one",
			ErrSecret, c.token.Number())
	}
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
	out := make([]rune, 0, 300)
	for _, r := range string(b[:min(len(b), 600)]) {
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
// ends ([ErrExpired]) or ctx does. tell is given each refusal and each step;
// it is called by several goroutines, one at a time. Serve closes the listener
// and returns when all its goroutines have ended.
func (inv *Invitation) Serve(ctx context.Context, ln net.Listener, tell func(string)) error {
	ctx, stop := context.WithDeadline(ctx, inv.token.Expires)
	defer stop()
	g := &guests{inv: inv, tell: tell, slots: make(chan struct{}, maxGuests), done: stop}
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

	mu   sync.Mutex // guards inv and tell
	tell func(string)
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
		err = g.talk(c)
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
func (g *guests) talk(c *channel) error {
	var body joinBody
	if err := c.receive(kindJoin, &body); err != nil {
		if errors.Is(err, ErrSecret) {
			c.refuse(err)
		}
		return err
	}
	a, err := g.admit(&body)
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

func (g *guests) admit(body *joinBody) (*answer, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	now := time.Now()
	if skew := now.Sub(time.Unix(body.Clock, 0)); skew.Abs() > maxSkew {
		return nil, fmt.Errorf("%w: %s says %s, %s says %s; set the wrong one, then repeat the command",
			ErrClock, g.inv.token.From, stamp(now), g.inv.token.To, stamp(time.Unix(body.Clock, 0)))
	}
	if g.inv.state.Done {
		return nil, fmt.Errorf("%w: it is done with; run at %s: quietline pki invite %s --again",
			ErrUsed, g.inv.token.From, g.inv.token.To)
	}
	c, err := g.inv.accept(body.Card, now)
	if err != nil {
		return nil, err
	}
	g.tell(fmt.Sprintf("%s answers with fingerprint %s", c.Site, g.inv.state.Bound))
	return g.inv.answer()
}

// Run makes the exchange with the inviter and configures this site. After a
// fault the same call completes it.
func (j *Joining) Run(ctx context.Context) error {
	err := j.run(ctx)
	var op *net.OpError
	if j.state.Stored && errors.As(err, &op) && op.Op == "dial" {
		return nil // all is stored here, and the inviter has gone: it had confirmed
	}
	if err != nil {
		return fmt.Errorf("join %s: %w", j.token.From, err)
	}
	return nil
}

func (j *Joining) run(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, exchangeTime)
	defer cancel()
	raw, err := new(net.Dialer).DialContext(ctx, "tcp", j.token.Address.String())
	if err != nil {
		return err
	}
	defer raw.Close()
	_ = raw.SetDeadline(time.Now().Add(exchangeTime))
	conn := tls.Client(raw, &tls.Config{MinVersion: tls.VersionTLS13,
		CurvePreferences: []tls.CurveID{tls.X25519MLKEM768},
		// The token pins the certificate itself; no name and no clock is trusted.
		InsecureSkipVerify: true, VerifyConnection: j.checkPin})
	c, err := newChannel(ctx, conn, j.token)
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
	var a answer
	if err := c.receive(kindAnswer, &a); err != nil {
		return err
	}
	if err := j.store(&a); err != nil {
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

// checkPin holds the certificate that the other side shows against the token.
func (j *Joining) checkPin(cs tls.ConnectionState) error {
	if got := pin(cs.PeerCertificates[0]); got != j.token.Pin {
		return fmt.Errorf("%w: %s shows the certificate %x (issuer %q), the token pins %x; somebody "+
			"stands between, or the invitation was made anew: ask for a new token", ErrFingerprint,
			j.token.Address, got[:8], cs.PeerCertificates[0].Issuer, j.token.Pin[:8])
	}
	return nil
}
