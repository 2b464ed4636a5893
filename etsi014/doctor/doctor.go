// Package doctor finds out why two ends of ETSI GS QKD 014 do not come
// together: which side refused which certificate, and for what.
//
// [Examine] is all there is. It connects to a KME as an SAE would, takes the
// handshake apart, and names for each [Check] what it found and what to do:
// all faults that can be seen, not the first. Without a certificate of its own
// or without the KME's CA it looks at the rest, and says what it could not.
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
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/quietline/quietline/secret"
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
	// Cert and Key are the PEM files of the SAE's certificate, leaf first, and
	// its key, which may be one file; both empty = none is shown.
	Cert, Key string
	CA        string        // PEM file, the CA of the KME's; empty = not known
	Timeout   time.Duration // of the whole examination; 0 = 10 s
}

// patient is one examination.
type patient struct {
	cfg    Config
	checks []Check
	own    tls.Certificate             // Leaf is nil without one
	roots  *x509.CertPool              // nil without the KME's CA
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
// order, and stops where nothing further can be seen. A name stands in several
// checks if several faults were found under it.
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

// files loads what the SAE has. Each file that cannot be used is told, and the
// examination ends.
func (p *patient) files() bool {
	good := true
	fail := func(err error) {
		good = false
		p.note("files", Fail, "correct the file that is named", "%v", err)
	}
	if p.cfg.Cert == "" && p.cfg.Key == "" {
		p.note("own certificate", Warn, "give --cert and --key to see whether the KME takes it",
			"none was given: not checked are our certificate at the KME, and the clocks")
	} else if own, err := loadPair(p.cfg.Cert, p.cfg.Key); err != nil {
		fail(err)
	} else {
		p.own = own
	}
	if p.cfg.CA == "" {
		p.note("KME authority", Warn, "give --ca, the CA of the KME's certificate",
			"none was given: not checked is who signed the KME's certificate")
	} else if roots, err := loadRoots(p.cfg.CA); err != nil {
		fail(err)
	} else {
		p.roots = roots
	}
	if good && (p.own.Leaf != nil || p.roots != nil) {
		p.note("files", OK, "", "what was given can be read")
	}
	if good && p.own.Leaf != nil {
		p.ownCertificate(p.own.Leaf)
	}
	return good
}

// loadPair reads a certificate and its key, whatever its dates.
func loadPair(cert, key string) (tls.Certificate, error) {
	text, err := secret.ReadFile(key, maxFile)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("load key: %w", err)
	}
	defer text.Clear()
	chain, err := os.ReadFile(cert)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("load certificate: %w", err)
	}
	defer secret.Wipe(chain) // it may be the same file
	c, err := tls.X509KeyPair(chain, text.Expose())
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("load certificate %s with its key %s: %w; name the "+
			"pair that was made together", cert, key, err)
	}
	return c, nil
}

// maxFile bounds key files, bytes; a chain of four RSA-4096 certificates with
// its key has 12 KiB.
const maxFile = 1 << 20

func loadRoots(path string) (*x509.CertPool, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("load CA file: %w", err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(text) {
		return nil, fmt.Errorf("load CA file %s: no PEM certificate is in it", path)
	}
	return roots, nil
}

// ownCertificate judges what we show.
func (p *patient) ownCertificate(leaf *x509.Certificate) {
	now := time.Now()
	good := true
	fail := func(hint, format string, args ...any) {
		good = false
		p.note("own certificate", Fail, hint, "%s: %s", fmt.Sprintf(format, args...), describe(leaf))
	}
	if now.After(leaf.NotAfter) {
		fail("renew it, or correct this machine's clock", "it expired on %s, here it is %s",
			leaf.NotAfter.UTC().Format(stampForm), now.UTC().Format(stampForm))
	}
	if now.Before(leaf.NotBefore) {
		fail("correct this machine's clock", "it is not valid before %s, here it is %s",
			leaf.NotBefore.UTC().Format(stampForm), now.UTC().Format(stampForm))
	}
	if !usable(leaf, x509.ExtKeyUsageClientAuth) {
		fail("issue it anew with extended key usage clientAuth", "it is not for clients")
	}
	left := time.Until(leaf.NotAfter)
	switch {
	case !good:
	case left < (leaf.NotAfter.Sub(leaf.NotBefore))/6:
		// Renewal is due at two thirds of a life: a sixth is half of what is left then.
		p.note("own certificate", Warn, "renew it", "%s ends in %v", describe(leaf),
			left.Round(time.Hour))
	default:
		p.note("own certificate", OK, "", "%s", describe(leaf))
	}
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
			return &p.own, nil // empty without one: TLS then shows none
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
	return conn, p.authorities() && good && p.own.Leaf != nil
}

// kmeCertificate judges the KME's chain and notes every fault of it: dates,
// name, usage, authority.
func (p *patient) kmeCertificate(chain []*x509.Certificate) bool {
	const name = "KME certificate"
	leaf, now := chain[0], time.Now()
	found, good := describe(leaf), true
	fail := func(hint, format string, args ...any) {
		good = false
		p.note(name, Fail, hint, "we refuse it: %s: %s", fmt.Sprintf(format, args...), found)
	}
	if now.After(leaf.NotAfter) {
		fail("renew it at the KME, or correct this machine's clock", "it ended on %s, here it is %s",
			leaf.NotAfter.UTC().Format(time.RFC3339), now.UTC().Format(time.RFC3339))
	}
	if now.Before(leaf.NotBefore) {
		fail("correct this machine's clock, or the KME's when it was issued",
			"it begins on %s, here it is %s", leaf.NotBefore.UTC().Format(time.RFC3339),
			now.UTC().Format(time.RFC3339))
	}
	if err := leaf.VerifyHostname(p.cfg.ServerName); err != nil {
		fail("connect by a name that it carries, or issue it with this one as DNS name or IP",
			"it does not carry the name %s", p.cfg.ServerName)
	}
	if !usable(leaf, x509.ExtKeyUsageServerAuth) {
		fail("issue it anew with extended key usage serverAuth", "it is not for servers")
	}
	if p.roots != nil {
		if what, hint := p.path(chain); what != "" {
			fail(hint, "%s", what)
		}
	}
	switch {
	case good && p.roots == nil:
		p.note(name, Warn, "give --ca to see who signed it", "good as far as can be seen: %s", found)
	case good:
		p.note(name, OK, "", "%s", found)
	}
	return good && p.roots != nil
}

// path tells where the way from a leaf to a root of ours breaks; "" = nowhere.
// It is built for the time nearest to now at which the leaf is valid: its dates
// are another fault.
func (p *patient) path(chain []*x509.Certificate) (what, hint string) {
	leaf, top := chain[0], chain[0]
	between := x509.NewCertPool()
	for _, c := range chain[1:] {
		between.AddCert(c)
		if top.CheckSignatureFrom(c) == nil {
			top = c
		}
	}
	at := time.Now()
	if at.After(leaf.NotAfter) {
		at = leaf.NotAfter
	} else if at.Before(leaf.NotBefore) {
		at = leaf.NotBefore
	}
	_, err := leaf.Verify(x509.VerifyOptions{Roots: p.roots, Intermediates: between, CurrentTime: at,
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
	if err == nil {
		return "", ""
	}
	hint = "put the CA that signed it into our CA file"
	if !bytes.Equal(top.RawIssuer, top.RawSubject) {
		hint += ", or let the KME send its intermediate certificate " + strconv.Quote(top.Issuer.String())
	}
	return fmt.Sprintf("the way from it to our CA file breaks at the issuer %q: %v", top.Issuer, err), hint
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
	if p.own.Leaf == nil {
		var takes []string
		for _, raw := range p.asked.AcceptableCAs {
			takes = append(takes, nameOf(raw))
		}
		p.note(name, OK, "", "the KME takes certificates of %s", strings.Join(takes, "; "))
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
	if p.own.Leaf == nil {
		what += "; we showed no certificate"
	} else if strings.Contains(what, "certificate") {
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
