package identity

import (
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"sync"
	"sync/atomic"
	"time"

	"github.com/quietline/quietline/etsi014"
)

// Config names the files and rules of one end. A client leaves Rules empty.
type Config struct {
	// Pairs are this end's certificates, usually one; an RSA and an ECDSA one
	// side by side serve clients that can do only one of them.
	Pairs []Pair
	// CA is a PEM file with the authorities that sign the other ends.
	CA    string
	Rules []Rule
	// CRLs are files of revocation lists, PEM or DER, each signed by an
	// authority of the CA file and not run out. A list that runs out later
	// stays in force until the next load, which then fails; see Stats.
	CRLs []string
	// Deny lists certificates that are refused whatever else is true, by
	// SHA-256 as in ByPin. DenyFiles are text files of the same, one a line; a
	// line that begins with # is a remark. A file that is empty denies nobody,
	// one that is missing is a fault.
	Deny      []string
	DenyFiles []string
}

// Pair is a PEM file with a certificate and its intermediates, leaf first, and
// a PEM file with its key. The key file must have mode 0600.
type Pair struct{ Cert, Key string }

// Live holds what was loaded and swaps it as a whole. It is safe for
// concurrent use.
type Live struct {
	now     atomic.Pointer[state]
	guarded guarded
}

// Stats is what an operator watches.
type Stats struct {
	Expires    time.Time // the earliest end of this end's own certificates
	CRLExpires time.Time // the earliest NextUpdate of the CRLs; zero without one
	Rules      int       // marks that identify an SAE
	Denied     int       // certificates on the deny list
	Revoked    int       // certificates that CRLs name
}

// Stats tells about what is loaded now.
func (l *Live) Stats() Stats {
	s := l.now.Load()
	st := Stats{
		CRLExpires: s.gone.expires, Rules: len(s.table.rules), Denied: len(s.gone.denied),
		Revoked: len(s.gone.marks),
	}
	for _, c := range s.certs {
		if end := c.Leaf.NotAfter; st.Expires.IsZero() || end.Before(st.Expires) {
			st.Expires = end
		}
	}
	return st
}

// state is one loaded configuration; it never changes.
type state struct {
	cfg    Config
	seen   map[string]fs.FileInfo // its files just before they were read
	certs  []tls.Certificate
	roots  *x509.CertPool
	table  *Table
	gone   *revocations
	server *tls.Config

	mu    sync.Mutex // guards known
	known map[[sha256.Size]byte]verdict
}

// verdict is an identification that stays true until the chain expires.
type verdict struct {
	who   etsi014.Caller
	until time.Time
}

// maxKnown bounds the cache of verdicts; beyond it the cache starts anew. It
// is four times the thousand SAEs that one KME is built for.
const maxKnown = 4096

// Open loads a configuration. Every fault names its file and what to do.
func Open(cfg Config) (*Live, error) {
	l := new(Live)
	if err := l.Reload(cfg); err != nil {
		return nil, err
	}
	return l, nil
}

// Reload loads a configuration, all of it or nothing: on an error the old one
// stays. New connections use the new files at once. Connections that live are
// judged anew at their next request, and those of a server under Guard at once.
func (l *Live) Reload(cfg Config) error {
	s, err := load(cfg)
	if err != nil {
		return err
	}
	l.now.Store(s)
	l.sweep()
	return nil
}

// sweep ends guarded connections that are no longer good.
func (l *Live) sweep() {
	l.guarded.sweep(func(cs *tls.ConnectionState) bool {
		_, err := l.Identify(cs)
		return err == nil
	})
}

// Server is the configuration of a KME's door: client certificates demanded
// and verified, TLS 1.2 or higher (clause 5.1), the hybrid X25519MLKEM768
// preferred. It follows every Reload.
func (l *Live) Server() *tls.Config {
	c := common()
	c.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) {
		return l.now.Load().server, nil
	}
	// Not used, because the above always answers; they keep this value safe
	// should somebody clone it without the hook.
	c.ClientAuth, c.ClientCAs = tls.RequireAndVerifyClientCert, x509.NewCertPool()
	return c
}

// Client is the configuration for the next connection of an SAE; it has the
// form that [etsi014.ClientConfig] wants. The caller may change the result.
func (l *Live) Client() *tls.Config {
	s := l.now.Load()
	c := common()
	c.Certificates, c.RootCAs = s.certs, s.roots
	c.VerifyConnection = func(cs tls.ConnectionState) error {
		_, err := s.gone.clean(cs.VerifiedChains)
		return err
	}
	return c
}

// common is what both ends share. Session tickets are off: each connection
// shows its certificate anew, and no ticket key weakens forward secrecy.
func common() *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS12,
		CurvePreferences: []tls.CurveID{
			tls.X25519MLKEM768, tls.X25519, tls.CurveP256, tls.CurveP384,
		},
		NextProtos:             []string{"http/1.1"},
		SessionTicketsDisabled: true,
		// An answer of many keys in few records: small first ones would save
		// time to the first byte, which nobody waits for.
		DynamicRecordSizingDisabled: true,
	}
}

// Identify says who the other end is. It has the form that
// [etsi014.HandlerConfig] wants. The chain is verified against the authorities
// of now, not those of the handshake, so that a reload also reaches
// connections that live; the verdict is kept until the chain expires or the
// next reload. Errors wrap ErrNoCertificate, ErrRevoked, ErrNoMatch or
// ErrAmbiguous.
func (l *Live) Identify(cs *tls.ConnectionState) (etsi014.Caller, error) {
	if cs == nil || len(cs.VerifiedChains) == 0 || len(cs.PeerCertificates) == 0 {
		return etsi014.Caller{}, ErrNoCertificate
	}
	s, now := l.now.Load(), time.Now()
	pin := sha256.Sum256(cs.PeerCertificates[0].Raw)
	if who, ok := s.recall(pin, now); ok {
		return who, nil
	}
	until, err := s.verify(cs.PeerCertificates, now)
	if err != nil {
		return etsi014.Caller{}, err
	}
	sae, err := s.table.Lookup(cs.PeerCertificates[0])
	if err != nil {
		return etsi014.Caller{}, err
	}
	who := etsi014.Caller{SAE: sae, Cert: pin}
	s.remember(pin, verdict{who: who, until: until})
	return who, nil
}

// verify checks a chain of a client and says until when it holds.
func (s *state) verify(chain []*x509.Certificate, now time.Time) (time.Time, error) {
	between := x509.NewCertPool()
	for _, c := range chain[1:] {
		between.AddCert(c)
	}
	chains, err := chain[0].Verify(x509.VerifyOptions{
		Roots: s.roots, Intermediates: between, CurrentTime: now,
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	})
	if err != nil {
		return time.Time{}, fmt.Errorf("%w: %w: %s", ErrNoCertificate, err, describe(chain[0]))
	}
	good, err := s.gone.clean(chains)
	if err != nil {
		return time.Time{}, err
	}
	until := good[0].NotAfter
	for _, c := range good {
		if c.NotAfter.Before(until) {
			until = c.NotAfter
		}
	}
	return until, nil
}

func (s *state) recall(pin [sha256.Size]byte, now time.Time) (etsi014.Caller, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	v, ok := s.known[pin]
	return v.who, ok && now.Before(v.until)
}

func (s *state) remember(pin [sha256.Size]byte, v verdict) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.known) >= maxKnown {
		clear(s.known)
	}
	s.known[pin] = v
}

// load reads everything and reports all faults at once.
func load(cfg Config) (*state, error) {
	s := &state{cfg: cfg.clone(), seen: look(cfg), known: make(map[[sha256.Size]byte]verdict)}
	var faults []error
	if len(cfg.Pairs) == 0 {
		faults = append(faults, errors.New("load identity: no certificate is named"))
	}
	for _, p := range cfg.Pairs {
		c, err := loadPair(p, time.Now())
		if err != nil {
			faults = append(faults, err)
			continue
		}
		s.certs = append(s.certs, c)
	}
	authorities, err := loadAuthorities(cfg.CA)
	if err != nil {
		faults = append(faults, err)
	}
	s.roots = x509.NewCertPool()
	for _, c := range authorities {
		s.roots.AddCert(c)
	}
	// Without authorities every CRL would seem unsigned: one fault is enough.
	if s.gone, err = loadRevocations(s.cfg, authorities, time.Now()); err != nil &&
		len(authorities) > 0 {
		faults = append(faults, err)
	}
	if s.table, err = New(cfg.Rules); err != nil {
		faults = append(faults, err)
	}
	if len(faults) > 0 {
		return nil, errors.Join(faults...)
	}
	s.server = common()
	s.server.Certificates = s.certs
	s.server.ClientAuth, s.server.ClientCAs = tls.RequireAndVerifyClientCert, s.roots
	s.server.VerifyConnection = func(cs tls.ConnectionState) error {
		_, err := s.gone.clean(cs.VerifiedChains)
		return err
	}
	return s, nil
}
