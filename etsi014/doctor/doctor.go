// Package doctor finds out why two ends of ETSI GS QKD 014 do not come
// together: which side refused which certificate, and for what.
//
// [Examine] is all there is. It connects to a KME as an SAE would, takes the
// handshake apart, and names for each [Check] what it found and what to do.
//
// A caller must keep in mind that Examine sends one request that costs no key,
// for a path that no KME has, and that it looks at a server's certificate
// before it is trusted; it sends that request only after it trusts it.
package doctor

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/quietline/quietline/etsi014/identity"
)

// Verdict is the outcome of a check.
type Verdict string

// Verdicts, from good to bad.
const (
	OK   Verdict = "ok"
	Warn Verdict = "warn"
	Fail Verdict = "fail"
)

// Check is one thing that was looked at.
type Check struct {
	Name    string  `json:"check"`
	Verdict Verdict `json:"verdict"`
	Found   string  `json:"found"`
	Hint    string  `json:"hint,omitempty"` // what to do; empty with OK
}

// Config says who examines whom.
type Config struct {
	Addr string // host:port of the KME
	// ServerName is the name the KME's certificate must carry; empty = the
	// host of Addr.
	ServerName string
	// Files are the SAE's certificate and the CA of the KME's.
	Files   identity.Config
	Timeout time.Duration // of the whole examination; 0 = 10 s
}

// patient is one examination.
type patient struct {
	cfg    Config
	checks []Check
	own    tls.Certificate
	roots  *x509.CertPool
	shown  []*x509.Certificate         // what the KME showed, as far as it came to that
	asked  *tls.CertificateRequestInfo // what the KME wants of a client, if it asked
}

func (p *patient) note(name string, v Verdict, hint, found string, args ...any) {
	if v == OK {
		hint = ""
	}
	p.checks = append(p.checks, Check{name, v, fmt.Sprintf(found, args...), hint})
}

// Examine looks at files, connection, both certificates and clocks, in this
// order, and stops where nothing further can be seen. The last check is the
// cause if one failed.
func Examine(ctx context.Context, cfg Config) []Check {
	if cfg.Timeout <= 0 {
		cfg.Timeout = 10 * time.Second
	}
	ctx, cancel := context.WithTimeout(ctx, cfg.Timeout)
	defer cancel()
	p := &patient{cfg: cfg}
	if !p.files() {
		return p.checks
	}
	host, _, err := net.SplitHostPort(cfg.Addr)
	if err != nil {
		p.note("connect", Fail, "give host:port", "%v", err)
		return p.checks
	}
	if p.cfg.ServerName == "" {
		p.cfg.ServerName = host
	}
	var d net.Dialer
	raw, err := d.DialContext(ctx, "tcp", cfg.Addr)
	if err != nil {
		p.note("connect", Fail, "is the KME running, is the port right, does a firewall stand between?",
			"%v", err)
		return p.checks
	}
	defer raw.Close()
	p.note("connect", OK, "", "connected to %s", raw.RemoteAddr())
	if deadline, ok := ctx.Deadline(); ok {
		_ = raw.SetDeadline(deadline)
	}
	if conn, ok := p.shake(ctx, raw); ok {
		p.request(conn)
	}
	return p.checks
}

// files loads what the SAE has and looks at its own certificate.
func (p *patient) files() bool {
	live, err := identity.Open(p.cfg.Files)
	if err != nil {
		p.note("files", Fail, "correct the file that is named", "%v", err)
		return false
	}
	p.note("files", OK, "", "certificate, key and CA file are well")
	c := live.Client()
	p.own, p.roots = c.Certificates[0], c.RootCAs
	leaf := p.own.Leaf
	switch left := time.Until(leaf.NotAfter); {
	case !usable(leaf, x509.ExtKeyUsageClientAuth):
		p.note("own certificate", Fail, "issue it anew with extended key usage clientAuth",
			"%s is not for clients", describe(leaf))
	case left < 14*24*time.Hour:
		p.note("own certificate", Warn, "renew it", "%s ends in %v", describe(leaf),
			left.Round(time.Hour))
	default:
		p.note("own certificate", OK, "", "%s", describe(leaf))
	}
	return true
}

// shake does the handshake without trusting anybody, then judges.
func (p *patient) shake(ctx context.Context, raw net.Conn) (*tls.Conn, bool) {
	conn := tls.Client(raw, &tls.Config{
		ServerName: p.cfg.ServerName, MinVersion: tls.VersionTLS12, NextProtos: []string{"http/1.1"},
		// Nothing is sent before kmeCertificate has verified the chain below:
		// a verification inside the handshake would hide the certificate that
		// the examination is about.
		InsecureSkipVerify: true,
		VerifyConnection: func(cs tls.ConnectionState) error {
			p.shown = cs.PeerCertificates
			return nil
		},
		GetClientCertificate: func(r *tls.CertificateRequestInfo) (*tls.Certificate, error) {
			p.asked = r
			return &p.own, nil
		},
	})
	if err := conn.HandshakeContext(ctx); err != nil {
		if p.shown != nil {
			p.kmeCertificate(p.shown)
		}
		if p.asked != nil {
			p.authorities()
		}
		what, hint := p.explain(err)
		p.note("handshake", Fail, hint, "%s", what)
		return nil, false
	}
	cs := conn.ConnectionState()
	if cs.Version < tls.VersionTLS13 || cs.CurveID != tls.X25519MLKEM768 {
		p.note("handshake", Warn, "TLS 1.3 with X25519MLKEM768 also protects against recorded traffic",
			"%s, %v", tls.VersionName(cs.Version), cs.CurveID)
	} else {
		p.note("handshake", OK, "", "%s, %v", tls.VersionName(cs.Version), cs.CurveID)
	}
	good := p.kmeCertificate(cs.PeerCertificates)
	return conn, p.authorities() && good
}

// kmeCertificate judges the KME's chain: date, name, usage, authority.
func (p *patient) kmeCertificate(chain []*x509.Certificate) bool {
	const name = "KME certificate"
	leaf, between := chain[0], x509.NewCertPool()
	for _, c := range chain[1:] {
		between.AddCert(c)
	}
	found := describe(leaf)
	fail := func(hint, format string, args ...any) bool {
		p.note(name, Fail, hint, "we refuse it: %s: %s", fmt.Sprintf(format, args...), found)
		return false
	}
	switch now := time.Now(); {
	case now.After(leaf.NotAfter):
		return fail("renew it at the KME, or correct this machine's clock", "it ended on %s",
			leaf.NotAfter.Format(time.RFC3339))
	case now.Before(leaf.NotBefore):
		return fail("correct this machine's clock, or the KME's when it was issued",
			"it begins on %s", leaf.NotBefore.Format(time.RFC3339))
	}
	if err := leaf.VerifyHostname(p.cfg.ServerName); err != nil {
		return fail("connect by a name that it carries, or issue it with this one as DNS name or IP",
			"it does not carry the name %s", p.cfg.ServerName)
	}
	if !usable(leaf, x509.ExtKeyUsageServerAuth) {
		return fail("issue it anew with extended key usage serverAuth", "it is not for servers")
	}
	_, err := leaf.Verify(x509.VerifyOptions{Roots: p.roots, Intermediates: between})
	if err != nil {
		hint := "put the CA that signed it into our CA file"
		if len(chain) == 1 && !bytes.Equal(leaf.RawIssuer, leaf.RawSubject) {
			hint += ", or let the KME send its intermediate certificates"
		}
		return fail(hint, "%v", err)
	}
	p.note(name, OK, "", "%s", found)
	return true
}

// authorities compares what the KME asks of a client with what we have.
func (p *patient) authorities() bool {
	const name = "client authorities"
	if p.asked == nil {
		p.note(name, Fail, "this is no door of ETSI GS QKD 014, or it is open to everybody",
			"the KME asks for no client certificate")
		return false
	}
	if len(p.asked.AcceptableCAs) == 0 {
		p.note(name, OK, "", "the KME does not say which authorities it takes")
		return true
	}
	var names []string
	for _, raw := range p.asked.AcceptableCAs {
		for _, der := range p.own.Certificate {
			if c, err := x509.ParseCertificate(der); err == nil && bytes.Equal(c.RawIssuer, raw) {
				p.note(name, OK, "", "the KME takes certificates of %s", c.Issuer)
				return true
			}
		}
		names = append(names, nameOf(raw))
	}
	p.note(name, Fail, "give the KME our CA, or take a certificate of one that it takes",
		"the KME takes certificates of %s; ours is of %s", strings.Join(names, "; "),
		p.own.Leaf.Issuer)
	return false
}

// request asks for nothing, which shows in TLS 1.3 whether our certificate was
// taken, and tells the KME's clock.
func (p *patient) request(conn *tls.Conn) {
	const name = "our certificate at the KME"
	_, err := io.WriteString(conn, "GET / HTTP/1.1\r\nHost: "+p.cfg.ServerName+
		"\r\nAccept: application/json\r\nConnection: close\r\n\r\n")
	var resp *http.Response
	if err == nil {
		resp, err = http.ReadResponse(bufio.NewReader(conn), nil)
	}
	if err != nil {
		what, hint := p.explain(err)
		p.note(name, Fail, hint, "%s", what)
		return
	}
	defer resp.Body.Close()
	if resp.StatusCode == http.StatusUnauthorized || resp.StatusCode == http.StatusForbidden {
		leaf := p.own.Leaf
		p.note(name, Fail, "enrol this certificate at the KME by its URI, DNS name, CN or SHA-256",
			"TLS took it, but the KME knows no SAE by it (%s): %s, SHA-256 %x", resp.Status,
			describe(leaf), sha256.Sum256(leaf.Raw))
	} else {
		p.note(name, OK, "", "taken; the KME answers %s", resp.Status)
	}
	p.clock(resp.Header.Get("Date"))
}

// clock compares the clocks by the answer's date (RFC 9110 section 6.6.1).
func (p *patient) clock(date string) {
	at, err := http.ParseTime(date)
	if err != nil {
		p.note("clock", Warn, "compare the clocks by hand", "the KME tells no date")
		return
	}
	// One minute: less troubles no certificate, and a date has whole seconds.
	if off := time.Since(at).Round(time.Second); off.Abs() > time.Minute {
		p.note("clock", Warn, "set both clocks by NTP", "the KME's clock is %v behind ours", off)
	} else {
		p.note("clock", OK, "", "the clocks agree within a minute")
	}
}

// explain says which side broke a connection and why.
func (p *patient) explain(err error) (what, hint string) {
	op := new(net.OpError)
	if !errors.As(err, &op) || op.Op != "remote error" {
		switch text := err.Error(); {
		case strings.Contains(text, "does not look like a TLS handshake"):
			return "the port speaks no TLS", "is it the KME's port, and https there?"
		case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF),
			strings.Contains(text, "reset by peer"):
			return "the KME closed the connection without a reason",
				"look into the KME's log; a proxy or another service may own the port"
		default:
			return fmt.Sprintf("we ended it: %v", err), "see the reason"
		}
	}
	what = fmt.Sprintf("the KME refused: %v", op.Err)
	if strings.Contains(what, "certificate") {
		what += "; ours is " + describe(p.own.Leaf)
	}
	for _, known := range []struct{ alert, hint string }{
		{"unknown certificate authority", "give the KME the CA that signed our certificate"},
		{"expired certificate", "renew our certificate, or correct the KME's clock"},
		{"revoked certificate", "the KME's CRL names our certificate: take a new one"},
		{"certificate required", "the KME got no certificate from us"},
		{"protocol version", "the KME wants another version of TLS"},
		{"handshake failure", "no version, cipher or signature suits both: RSA beside ECDSA may help"},
		{"unsupported certificate", "the KME takes no certificate of this kind: check its key usage"},
		{"bad certificate", "the KME does not take our certificate: authority, usage, or deny list"},
	} {
		if strings.Contains(op.Err.Error(), known.alert) {
			return what, known.hint
		}
	}
	return what, "look into the KME's log"
}

func usable(c *x509.Certificate, usage x509.ExtKeyUsage) bool {
	return len(c.ExtKeyUsage) == 0 || slices.Contains(c.ExtKeyUsage, usage) ||
		slices.Contains(c.ExtKeyUsage, x509.ExtKeyUsageAny)
}
