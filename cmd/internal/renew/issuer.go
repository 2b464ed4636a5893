package renew

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/quietline/quietline/cmd/internal/pki"
)

// Path is where a key manager's door renews certificates: POST, a PKCS #10
// request in PEM; the answer is the chain in PEM. The client shows the
// certificate that it wants to replace, and gets one with the same names.
const Path = "/quietline/v1/renew"

// Bounds of a call.
const (
	maxBody  = 64 << 10
	callTime = 20 * time.Second
	// clockHeader carries the authority's clock, Unix seconds.
	clockHeader = "Quietline-Clock"
)

// Local renews from an authority on this machine.
type Local struct{ Authority *pki.Authority }

// Renew implements [Issuer]. The path must be a pair file of the authority.
func (l Local) Renew(_ context.Context, path string, _ *pki.Pair) (*pki.Pair, error) {
	return l.Authority.Renew(strings.TrimSuffix(filepath.Base(path), ".pem"))
}

// Foreign stands for the CA of somebody else: it renews nothing, and says in
// time what a person has to do.
type Foreign struct{}

// Renew implements [Issuer].
func (Foreign) Renew(_ context.Context, path string, old *pki.Pair) (*pki.Pair, error) {
	return nil, pki.Advise(fmt.Errorf("%w: it is due, and was signed by another CA: %s", ErrRefused,
		pki.Describe(old.Chain[0])), "renew it there, or write a request: quietline pki issue --request, "+
		"then --chain; "+path+" is read again when it changes")
}

// step is called between the steps of a renewal, beside [pki.Step]. Only the
// test that kills the process at each puts something else here.
var step = func() {}

// Client renews at a door over mutual TLS.
type Client struct {
	URL string // https://host:port of the door
	// TLS is asked for each call; it shows the pair and knows the door's root.
	TLS func() *tls.Config
}

// Renew implements [Issuer]: the new key is made here and never leaves.
func (c Client) Renew(ctx context.Context, _ string, old *pki.Pair) (*pki.Pair, error) {
	key, text, err := request(old)
	if err != nil {
		return nil, fmt.Errorf("renew certificate: %w", err)
	}
	step()
	answer, err := c.call(ctx, text)
	step()
	if err != nil {
		return nil, fmt.Errorf("renew certificate at %s: %w", c.URL, err)
	}
	chain, err := pki.ParseCertificates(answer)
	if err != nil {
		return nil, fmt.Errorf("renew certificate at %s: %w: %w", c.URL, ErrAnswer, err)
	}
	if !key.PublicKey.Equal(chain[0].PublicKey) {
		return nil, fmt.Errorf("renew certificate at %s: %w: it is for another key", c.URL, ErrAnswer)
	}
	return &pki.Pair{Chain: chain, Key: key}, nil
}

// request makes a new key and the request for its certificate.
func request(old *pki.Pair) (*ecdsa.PrivateKey, []byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	der, err := x509.CreateCertificateRequest(rand.Reader,
		&x509.CertificateRequest{Subject: old.Chain[0].Subject}, key)
	if err != nil {
		return nil, nil, err
	}
	return key, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}), nil
}

func (c Client) call(ctx context.Context, text []byte) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	t := &http.Transport{TLSClientConfig: c.TLS(), DisableKeepAlives: true}
	return post(ctx, &http.Client{Transport: t}, c.URL, text)
}

// post asks and checks the answer and the clocks.
func post(ctx context.Context, client *http.Client, url string, text []byte) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, strings.TrimSuffix(url, "/")+Path,
		bytes.NewReader(text))
	if err != nil {
		return nil, err
	}
	res, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(res.Body, maxBody))
	if err != nil {
		return nil, err
	}
	if seconds, err := strconv.ParseInt(res.Header.Get(clockHeader), 10, 64); err == nil {
		there, now := time.Unix(seconds, 0), time.Now()
		if there.Sub(now).Abs() > maxSkew {
			return nil, fmt.Errorf("%w: here it is %s, at the key manager %s; set the wrong one", ErrClock,
				stamp(now), stamp(there))
		}
	}
	if res.StatusCode == http.StatusNotFound {
		return nil, pki.Advise(fmt.Errorf("%w: the key manager signs no certificates", ErrRefused),
			"renew it at the CA that signed it, or write a request: quietline pki issue --request, then --chain")
	}
	if res.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%w: %s: %s", ErrRefused, res.Status, printable(answer))
	}
	return answer, nil
}

// printable keeps what the authority says from commanding a terminal.
func printable(text []byte) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' {
			return '?'
		}
		return r
	}, string(bytes.TrimSpace(text[:min(len(text), 1000)])))
}

// Handler answers [Client]s at a door that has verified their certificates. Its
// goroutines are those of the server; the authority is used by one at a time.
type Handler struct {
	Authority *pki.Authority
	// Allow says whether the holder of a connection may call at all, for one
	// because its certificate was revoked after the handshake.
	Allow func(*tls.ConnectionState) error
	Log   *slog.Logger // nil = discard

	mu sync.Mutex
}

// ServeHTTP implements [http.Handler]. A refusal says why in plain text: the
// caller has proved who it is.
func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set(clockHeader, strconv.FormatInt(time.Now().Unix(), 10))
	if r.Method != http.MethodPost || r.TLS == nil || len(r.TLS.PeerCertificates) == 0 {
		http.Error(w, "POST a certificate request over mutual TLS", http.StatusBadRequest)
		return
	}
	old := r.TLS.PeerCertificates[0]
	chain, code, err := h.renew(r, old)
	if err != nil {
		if h.Log != nil {
			h.Log.Warn("renewal refused", "addr", r.RemoteAddr, "certificate", pki.Describe(old), "err", err)
		}
		http.Error(w, err.Error(), code)
		return
	}
	if h.Log != nil {
		h.Log.Info("certificate renewed for its holder", "addr", r.RemoteAddr, "subject", old.Subject.String())
	}
	w.Header().Set("Content-Type", "application/x-pem-file")
	_, _ = w.Write(pki.EncodeCertificates(chain))
}

func (h *Handler) renew(r *http.Request, old *x509.Certificate) ([]*x509.Certificate, int, error) {
	if err := h.Allow(r.TLS); err != nil {
		return nil, http.StatusUnauthorized, pki.Advise(fmt.Errorf("%w: %s", err, pki.Describe(old)),
			"look for it in the site file's saes and in the revocation list")
	}
	text, err := io.ReadAll(http.MaxBytesReader(nil, r.Body, maxBody))
	if err != nil {
		return nil, http.StatusBadRequest, err
	}
	csr, err := pki.ParseCSR(text)
	if err != nil {
		return nil, http.StatusBadRequest, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	step()
	defer step()
	cert, err := h.Authority.Resign(old, csr)
	if err != nil {
		return nil, http.StatusForbidden, err
	}
	return []*x509.Certificate{cert}, http.StatusOK, nil
}
