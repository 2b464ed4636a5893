package node

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"log/slog"
	"math/big"
	mrand "math/rand/v2"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/hw"
	"github.com/quietline/quietline/kms"
	"github.com/quietline/quietline/kms/keyring"
	"github.com/quietline/quietline/secret"
)

// stream is a hw.Driver that yields the same random blocks at both ends of a
// link, numbered from first, up to a number that tests raise.
type stream struct {
	seed  uint64
	bytes int
	flip  uint64 // block number with one bit flipped; 0 = none
	real  bool   // not simulated
	lies  bool   // not simulated, but its blocks are
	acked func(seq uint64)

	mu     sync.Mutex
	next   uint64
	limit  uint64
	more   chan struct{}
	closed chan struct{}
	once   sync.Once
}

func newStream(seed uint64, first uint64, blockBytes int) *stream {
	return &stream{seed: seed, bytes: blockBytes, next: first, more: make(chan struct{}),
		closed: make(chan struct{})}
}

// allow lets blocks up to number limit (exclusive) come.
func (s *stream) allow(limit uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.limit = limit
	close(s.more)
	s.more = make(chan struct{})
}

func (s *stream) Describe() hw.Info { return hw.Info{Vendor: "test", Simulated: !s.real} }

func (s *stream) ReadBlock(ctx context.Context, b *hw.Block) error {
	for {
		s.mu.Lock()
		more := s.more
		if s.next < s.limit {
			seq := s.next
			s.next++
			s.mu.Unlock()
			*b = hw.Block{Generation: 1, Seq: seq, Bits: secret.Own(s.block(seq)),
				Simulated: !s.real || s.lies}
			return nil
		}
		s.mu.Unlock()
		select {
		case <-more:
		case <-s.closed:
			return hw.ErrClosed
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// block is the bits of a block: both ends compute the same.
func (s *stream) block(seq uint64) []byte {
	var seed [32]byte
	seed[0], seed[1], seed[8], seed[9], seed[10] = byte(s.seed), byte(s.seed>>8), byte(seq),
		byte(seq>>8), byte(seq>>16)
	b := make([]byte, s.bytes)
	_, _ = mrand.NewChaCha8(seed).Read(b)
	if seq == s.flip && s.flip != 0 {
		b[len(b)/2] ^= 1
	}
	return b
}

func (s *stream) Ack(_ context.Context, _, seq uint64) error {
	if s.acked != nil {
		s.acked(seq)
	}
	return nil
}

func (s *stream) Events(ctx context.Context) (hw.Event, error) {
	select {
	case <-ctx.Done():
		return hw.Event{}, ctx.Err()
	case <-s.closed:
		return hw.Event{}, hw.ErrClosed
	}
}

func (s *stream) Close() error { s.once.Do(func() { close(s.closed) }); return nil }

// authority is a certificate authority for KMEs.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	path string
}

func newAuthority(t testing.TB) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "KMEs"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	a := &authority{cert: cert, key: key, path: filepath.Join(t.TempDir(), "ca.pem")}
	writePEM(t, a.path, "CERTIFICATE", der)
	return a
}

func writePEM(t testing.TB, path, kind string, ders ...[]byte) {
	t.Helper()
	var data []byte
	for _, der := range ders {
		data = append(data, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})...)
	}
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
}

// issue makes a certificate with the given URIs.
func (a *authority) issue(t testing.TB, uris ...string) TLSFiles {
	t.Helper()
	return a.issueFor(t, -time.Hour, time.Hour, uris...)
}

// issueFor is issue with a time of validity, counted from now.
func (a *authority) issueFor(t testing.TB, from, until time.Duration, uris ...string) TLSFiles {
	t.Helper()
	dir := t.TempDir()
	f := TLSFiles{Cert: filepath.Join(dir, "kme.crt"), Key: filepath.Join(dir, "kme.key"), CA: a.path}
	a.issueTo(t, f, from, until, uris...)
	return f
}

// issueTo is issueFor into given files.
func (a *authority) issueTo(t testing.TB, f TLSFiles, from, until time.Duration, uris ...string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(time.Now().UnixNano()),
		NotBefore: time.Now().Add(from), NotAfter: time.Now().Add(until),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}}
	for _, u := range uris {
		parsed, err := url.Parse(u)
		if err != nil {
			t.Fatal(err)
		}
		tmpl.URIs = append(tmpl.URIs, parsed)
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, a.cert, &key.PublicKey, a.key)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	writePEM(t, f.Cert, "CERTIFICATE", der)
	writePEM(t, f.Key, "PRIVATE KEY", keyDER)
}

// revoke writes a revocation list that names one certificate.
func (a *authority) revoke(t testing.TB, path string, gone TLSFiles) {
	t.Helper()
	pair, err := tls.LoadX509KeyPair(gone.Cert, gone.Key)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateRevocationList(rand.Reader, &x509.RevocationList{Number: big.NewInt(1),
		ThisUpdate: time.Now().Add(-time.Minute), NextUpdate: time.Now().Add(time.Hour),
		RevokedCertificateEntries: []x509.RevocationListEntry{{SerialNumber: pair.Leaf.SerialNumber,
			RevocationTime: time.Now().Add(-time.Minute)}}}, a.cert, a.key)
	if err != nil {
		t.Fatal(err)
	}
	writePEM(t, path, "X509 CRL", der)
}

// site is one KME of a pair.
type site struct {
	*Node
	cfg    Config
	driver *stream
	cancel context.CancelFunc
	ended  chan error
}

var testSAEs = []SAE{{"sae-a", "kme-a"}, {"sae-a2", "kme-a"}, {"sae-b", "kme-b"},
	{"sae-b2", "kme-b"}}

// newPair makes two KMEs of one link that are not running yet; b listens.
func newPair(t testing.TB, blockBytes int) (a, b *site) {
	t.Helper()
	ca := newAuthority(t)
	make1 := func(self, other etsi014.KMEID) *site {
		dir := t.TempDir()
		root := filepath.Join(dir, "root.key")
		if err := keyring.NewRootKey(root); err != nil {
			t.Fatal(err)
		}
		s := &site{driver: newStream(1, 1, blockBytes)}
		s.cfg = Config{KME: self, Dir: filepath.Join(dir, "state"), RootKey: root, Lab: true,
			TLS:   ca.issue(t, uriPrefix+string(self)),
			Peers: []Peer{{ID: other, Addr: "127.0.0.1:1"}},
			Links: []Link{{ID: "link", Peer: other, Driver: s.driver}},
			SAEs:  testSAEs}
		if testing.Verbose() {
			s.cfg.Logger = slog.New(slog.NewTextHandler(testLog{t}, nil)).With("kme", self)
		}
		return s
	}
	a, b = make1("kme-a", "kme-b"), make1("kme-b", "kme-a")
	b.cfg.Listen = "127.0.0.1:0"
	return a, b
}

// countingLog counts the lines that have a text.
func countingLog(t testing.TB, text string, n *atomic.Int64) *slog.Logger {
	return slog.New(slog.NewTextHandler(writerFunc(func(p []byte) (int, error) {
		if strings.Contains(string(p), text) {
			n.Add(1)
		}
		if testing.Verbose() {
			t.Log(string(p))
		}
		return len(p), nil
	}), nil))
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

type testLog struct{ t testing.TB }

func (l testLog) Write(b []byte) (int, error) { l.t.Log(string(b)); return len(b), nil }

// start opens and runs a site until the test's end.
func (s *site) start(t testing.TB) {
	t.Helper()
	s.startWith(t, func() (*Node, error) { return Open(s.cfg) })
}

// startWith is start with another way to open.
func (s *site) startWith(t testing.TB, open func() (*Node, error)) {
	t.Helper()
	n, err := open()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	s.Node, s.cancel, s.ended = n, cancel, make(chan error, 1)
	go func() { s.ended <- n.Run(ctx) }()
	t.Cleanup(func() { s.stop(t) })
}

// stop ends a site; it may be called twice.
func (s *site) stop(t testing.TB) {
	t.Helper()
	if s.cancel == nil {
		return
	}
	s.cancel()
	s.cancel = nil
	if err := <-s.ended; err != nil {
		t.Errorf("Run: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Errorf("Close: %v", err)
	}
}

// startPair runs both and joins them.
func startPair(t testing.TB, a, b *site) {
	t.Helper()
	b.start(t)
	a.cfg.Peers[0].Addr = b.ListenAddr().String()
	a.start(t)
}

// eventually polls a condition that other goroutines bring about.
func eventually(t testing.TB, what string, cond func() bool) {
	t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for !cond() {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within 20 s", what)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// stored waits until a site's own drawable stock has at least n keys.
func (s *site) stored(t testing.TB, sae, peer etsi014.SAEID, n int) {
	t.Helper()
	eventually(t, "stock", func() bool {
		st, err := s.KME().Status(t.Context(), etsi014.Caller{SAE: sae}, peer)
		return err == nil && st.StoredKeys >= n
	})
}

func segments(st kms.Stats, state kms.State) int { return st.Links[0].Segments[state.String()] }

// long picks a number of rounds: 3 in the short form.
func long(usual, long int) int {
	switch {
	case os.Getenv("QUIETLINE_LONG") == "1":
		return long
	case testing.Short():
		return min(usual, 3)
	}
	return usual
}
