package etsi014

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync/atomic"
	"time"

	"github.com/quietline/quietline/secret"
)

// ClientConfig says where a [Client] finds its KME. URLs and TLS are required.
type ClientConfig struct {
	// URLs are base URLs, "https://kme.example:8443", with or without a path
	// before /api/v1. A second one is another address of the same KME or of
	// its stand-by; it is used while the first cannot be reached.
	URLs []string
	// TLS is asked for every new connection, so that renewed certificates take
	// effect. An empty ServerName is filled from the URL. The configuration
	// must carry the SAE's certificate and the CA that signs the KME's.
	TLS func() *tls.Config
	// KME, if not empty, is who must answer: the certificate of every
	// connection must name it, as the URI KMEURI, as a DNS name or as the
	// common name, and so must Status (clauses 5.1 and 6.1). Empty: whoever
	// holds the certificate of the URL's host.
	KME KMEID
	// Timeout bounds one call over all addresses; 0 = 10 s.
	Timeout time.Duration
	// DialTimeout bounds connection and handshake with one address; 0 = 3 s.
	DialTimeout time.Duration
	// Dial opens the connection under TLS; nil = net.Dialer. A caller inside a
	// network namespace brings its own.
	Dial func(ctx context.Context, network, addr string) (net.Conn, error)
	Log  *slog.Logger // nil discards
}

// Client draws keys from a KME. It is safe for concurrent use, keeps
// connections open between calls, follows no redirect and uses no proxy.
//
// Keys are asked by POST only, because net/http repeats a GET by itself when a
// kept connection breaks, and a repeated enc_keys burns a key. For the same
// reason the client goes on to the next address only if no connection came up,
// hence no request left; Status, which burns nothing, is also repeated when
// its answer is lost. A lost answer to Keys is an error, and its keys are lost.
type Client struct {
	bases []*url.URL
	http  http.Client
	idle  func()
	log   *slog.Logger
	kme   KMEID         // "" = any
	good  atomic.Uint32 // index into bases of the last address that answered
}

// maxAnswer bounds an answer: 1,024 keys of 4,096 bits need 780 KiB.
const maxAnswer = 1 << 20

// NewClient checks the configuration and opens nothing.
func NewClient(cfg ClientConfig) (*Client, error) {
	if len(cfg.URLs) == 0 || cfg.TLS == nil {
		return nil, errors.New("make client: URLs and TLS are required")
	}
	c := &Client{log: cfg.Log, kme: cfg.KME}
	if c.log == nil {
		c.log = slog.New(slog.DiscardHandler)
	}
	for _, s := range cfg.URLs {
		u, err := url.Parse(s)
		if err != nil {
			return nil, fmt.Errorf("make client: %w", err)
		}
		if u.Scheme != "https" || u.Host == "" || u.RawQuery != "" || u.Fragment != "" || u.User != nil {
			return nil, fmt.Errorf("make client: %s is no base URL like https://host:port", u.Redacted())
		}
		c.bases = append(c.bases, u)
	}
	if cfg.Timeout <= 0 {
		cfg.Timeout = 10 * time.Second
	}
	if cfg.DialTimeout <= 0 {
		cfg.DialTimeout = 3 * time.Second
	}
	var http1 http.Protocols
	http1.SetHTTP1(true)
	transport := &http.Transport{
		DialTLSContext:      dialer(cfg),
		Protocols:           &http1,
		DisableCompression:  true,
		MaxIdleConnsPerHost: 8,
		// Less than a server's two minutes, so that the client closes first.
		IdleConnTimeout: 90 * time.Second,
	}
	c.idle = transport.CloseIdleConnections
	c.http = http.Client{
		Transport:     transport,
		Timeout:       cfg.Timeout,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	return c, nil
}

// Close drops idle connections. Running calls end by their contexts.
func (c *Client) Close() { c.idle() }

// unreached wraps a fault before the first byte of a request could leave.
type unreached struct{ err error }

func (u *unreached) Error() string { return u.err.Error() }
func (u *unreached) Unwrap() error { return u.err }

// dialer connects and shakes hands, and marks every fault as unreached.
func dialer(cfg ClientConfig) func(context.Context, string, string) (net.Conn, error) {
	return func(ctx context.Context, network, addr string) (net.Conn, error) {
		ctx, cancel := context.WithTimeout(ctx, cfg.DialTimeout)
		defer cancel()
		dial := cfg.Dial
		if dial == nil {
			dial = new(net.Dialer).DialContext
		}
		conn, err := dial(ctx, network, addr)
		if err != nil {
			return nil, &unreached{err}
		}
		t := cfg.TLS().Clone()
		if t.ServerName == "" {
			t.ServerName, _, _ = net.SplitHostPort(addr)
		}
		if t.GetClientCertificate == nil {
			t.GetClientCertificate = show(t.Certificates)
		}
		secured := tls.Client(wiping{conn}, t)
		if err := secured.HandshakeContext(ctx); err != nil {
			_ = conn.Close()
			return nil, &unreached{explain(err, ownLeaf(t))}
		}
		if err := confirm(cfg.KME, secured.ConnectionState()); err != nil {
			_ = conn.Close()
			return nil, &unreached{err}
		}
		return wiping{telling{secured, ownLeaf(t)}}, nil
	}
}

// KMEURI is the URI that names a KME in a certificate: urn:quietline:kme: and
// the KME ID, percent-encoded. The standard leaves the field open.
func KMEURI(id KMEID) string { return "urn:quietline:kme:" + url.PathEscape(string(id)) }

// confirm finds the KME ID in a verified certificate; clause 5.1.
func confirm(kme KMEID, cs tls.ConnectionState) error {
	if kme == "" {
		return nil
	}
	leaf, id := cs.PeerCertificates[0], string(kme)
	for _, u := range leaf.URIs {
		if u.String() == KMEURI(kme) {
			return nil
		}
	}
	for _, d := range leaf.DNSNames {
		if strings.EqualFold(d, id) {
			return nil
		}
	}
	if leaf.Subject.CommonName == id {
		return nil
	}
	return fmt.Errorf("certificate does not name KME %s: subject %q, URIs %q, DNS names %q",
		id, leaf.Subject, leaf.URIs, leaf.DNSNames)
}

// Status asks what this SAE and peer can draw; clause 6.1.
func (c *Client) Status(ctx context.Context, peer SAEID) (Status, error) {
	var s Status
	err := c.do(ctx, http.MethodGet, peer, "status", nil, func(b []byte) (err error) {
		if s, err = parseStatus(b); err == nil && c.kme != "" && s.SourceKME != c.kme {
			err = fmt.Errorf("it comes from KME %q", s.SourceKME)
		}
		return err
	})
	if err != nil {
		return Status{}, fmt.Errorf("ask status for SAE %s: %w", peer, err)
	}
	return s, nil
}

// Keys draws new keys for this SAE and req.Targets, of which the first is
// required; clause 6.2. The container holds exactly the number asked, each of
// the size asked, and is the caller's to clear. Errors wrap a sentinel.
func (c *Client) Keys(ctx context.Context, req KeyRequest) (Container, error) {
	body, err := appendKeyRequest(nil, req)
	if err != nil {
		return Container{}, fmt.Errorf("draw keys: %w", err)
	}
	var keys Container
	err = c.do(ctx, http.MethodPost, req.Targets[0], "enc_keys", body, func(b []byte) (err error) {
		if keys, err = parseContainer(b); err != nil {
			return err
		}
		return checkDrawn(keys, req)
	})
	if err != nil {
		keys.Clear()
		return Container{}, fmt.Errorf("draw keys for SAE %s: %w", req.Targets[0], err)
	}
	return keys, nil
}

// KeysByID fetches keys that req.Initiator drew for this SAE; clause 6.3. The
// container holds them in the order asked and is the caller's to clear. Errors
// wrap a sentinel.
func (c *Client) KeysByID(ctx context.Context, req IDRequest) (Container, error) {
	body, err := appendIDRequest(nil, req)
	if err != nil {
		return Container{}, fmt.Errorf("fetch keys: %w", err)
	}
	var keys Container
	err = c.do(ctx, http.MethodPost, req.Initiator, "dec_keys", body, func(b []byte) (err error) {
		if keys, err = parseContainer(b); err != nil {
			return err
		}
		return orderByID(keys, req.IDs)
	})
	if err != nil {
		keys.Clear()
		return Container{}, fmt.Errorf("fetch keys of SAE %s: %w", req.Initiator, err)
	}
	return keys, nil
}

// do sends one request, to one address after the other as far as that can burn
// no key, and hands a good answer to read. The answer's buffer is wiped.
func (c *Client) do(
	ctx context.Context, method string, peer SAEID, call string, body []byte,
	read func([]byte) error,
) error {
	var err error
	first := int(c.good.Load())
	for i := range c.bases {
		at := (first + i) % len(c.bases)
		u := keyURL(c.bases[at], peer, call)
		var again bool
		if again, err = c.once(ctx, method, u, call, body, read); err == nil {
			c.good.Store(uint32(at))
			return nil
		}
		if !again || ctx.Err() != nil {
			return err
		}
		c.log.Info("kme address not reached", "addr", c.bases[at].Host, "err", err)
	}
	return err
}

// keyURL keeps the escaped form: an SAE ID may hold a slash.
func keyURL(base *url.URL, peer SAEID, call string) *url.URL {
	u := *base
	prefix := strings.TrimSuffix(base.EscapedPath(), "/") + "/api/v1/keys/"
	u.RawPath = prefix + url.PathEscape(string(peer)) + "/" + call
	u.Path, _ = url.PathUnescape(u.RawPath)
	return &u
}

// once sends one request to one address. again says that another address may
// be asked without burning a key.
func (c *Client) once(
	ctx context.Context, method string, u *url.URL, call string, body []byte,
	read func([]byte) error,
) (again bool, err error) {
	req, err := http.NewRequestWithContext(ctx, method, u.String(), bytes.NewReader(body))
	if err != nil {
		return false, &Error{Kind: ErrRequest, Cause: err}
	}
	req.Header.Set("Accept", "application/json")
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	lost := method == http.MethodGet // of all calls only status is a GET
	resp, err := c.http.Do(req)
	if err != nil {
		if e := new(unreached); errors.As(err, &e) {
			lost = true
		}
		return lost, transportError(err)
	}
	defer resp.Body.Close()
	b, err := readAnswer(resp)
	defer func() { secret.Wipe(b) }()
	if err != nil {
		return lost, &Error{Kind: ErrDown, Message: "answer was lost", Cause: err}
	}
	if resp.StatusCode != http.StatusOK {
		return false, parseError(resp.StatusCode, call, resp.Header.Get("Retry-After"), b)
	}
	if err := read(b); err != nil {
		return false, &Error{Kind: ErrDown, Message: "answer is not valid", Cause: err}
	}
	return false, nil
}

// transportError names the side that refused: an alert from the other end
// means that it does not take our certificate or our TLS version.
func transportError(err error) error {
	kind := ErrDown
	if op := new(net.OpError); errors.As(err, &op) && op.Op == "remote error" {
		kind = ErrDenied
	}
	if u := new(url.Error); errors.As(err, &u) {
		err = u.Err // the URL stands in the caller's text
	}
	return &Error{Kind: kind, Message: "reach KME", Cause: err}
}

// readAnswer reads a body of at most maxAnswer bytes into one buffer. A buffer
// that was too small is wiped, not left behind.
func readAnswer(resp *http.Response) ([]byte, error) {
	if resp.ContentLength > maxAnswer {
		return nil, fmt.Errorf("answer of %d bytes is too long", resp.ContentLength)
	}
	size := int(resp.ContentLength)
	if size < 0 {
		size = 4 << 10
	}
	b := make([]byte, 0, size+1) // one more, so that the end is seen in the first buffer
	for {
		n, err := resp.Body.Read(b[len(b):cap(b)])
		b = b[:len(b)+n]
		if err == io.EOF {
			return b, nil
		}
		if err != nil {
			return b, err
		}
		if len(b) > maxAnswer {
			return b, fmt.Errorf("answer is longer than %d bytes", maxAnswer)
		}
		if len(b) == cap(b) {
			larger := make([]byte, len(b), 2*cap(b))
			copy(larger, b)
			secret.Wipe(b)
			b = larger
		}
	}
}
