package daemon

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/quietline/quietline/cmd/internal/config"
	"github.com/quietline/quietline/cmd/internal/pki"
	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/etsi014/etsitest"
)

// pages is a log that one goroutine writes and another reads.
type pages struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (p *pages) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.b.Write(b)
}

func (p *pages) count(text string) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return strings.Count(p.b.String(), text)
}

// load draws at tokyo and collects at kochi without pause, every second time
// over new connections, until it is told to end.
type load struct {
	mu     sync.Mutex
	served int
	over   bool
}

func (l *load) run(t *testing.T, draw, collect *etsi014.Client) {
	for n := 0; ; n++ {
		drawn, err := draw.Keys(t.Context(), etsi014.KeyRequest{
			Targets: []etsi014.SAEID{"sae-kochi"}, Number: 1})
		if err == nil {
			var got etsi014.Container
			got, err = collect.KeysByID(t.Context(), etsi014.IDRequest{Initiator: "sae-tokyo",
				IDs: []etsi014.KeyID{drawn.Keys[0].ID}})
			if err == nil && !bytes.Equal(got.Keys[0].Bits.Expose(), drawn.Keys[0].Bits.Expose()) {
				err = errors.New("the two sites hold different keys")
			}
			got.Clear()
		}
		drawn.Clear()
		if err != nil {
			t.Errorf("request %d was lost: %v", n, err)
		}
		l.mu.Lock()
		l.served++
		over := l.over || err != nil
		l.mu.Unlock()
		if over {
			return
		}
		if n%2 == 0 {
			draw.Close()
			collect.Close()
		}
	}
}

func (l *load) count() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.served
}

// TestReloadUnderLoad changes all that may change of two running key managers,
// on SIGHUP and by the files alone, while keys are drawn and collected.
func TestReloadUnderLoad(t *testing.T) {
	var log pages
	l := newLit(t, 256, 16<<10, func(tokyo, kochi *Env) {
		tokyo.File = filepath.Join(filepath.Dir(tokyo.Site.State), "tokyo.yaml")
		tokyo.Site.KME.ClientDeny = filepath.Join(filepath.Dir(tokyo.Site.State), "denied")
		write(t, tokyo.Site.KME.ClientDeny, nil)
		write(t, tokyo.File, siteFile(t, tokyo.Site))
		tokyo.Log = slog.New(slog.NewTextHandler(&log, nil))
	})
	var work load
	var ends sync.WaitGroup
	defer ends.Wait()
	for range 2 {
		draw, collect := l.client(t, "sae-tokyo", l.tokyoDoor), l.client(t, "sae-kochi", l.kochiDoor)
		ends.Go(func() { work.run(t, draw, collect) })
	}
	defer func() { work.mu.Lock(); work.over = true; work.mu.Unlock() }()
	goesOn := func() {
		before := work.count()
		await(t, "the load goes on", func() bool { return work.count() > before+4 || t.Failed() })
	}
	file := filepath.Join(filepath.Dir(l.tokyo.State), "tokyo.yaml")
	for i := range 8 {
		l.renewDoor(t, "tokyo-door")
		next := *l.tokyo
		next.SAEs = append([]config.SAE{}, l.tokyo.SAEs...)
		if i%2 == 0 { // the other SAE leaves, and comes again
			next.SAEs = without(next.SAEs, "other-tokyo")
		}
		write(t, file, siteFile(t, &next))
		before := log.count("site file loaded")
		if err := unix.Kill(os.Getpid(), unix.SIGHUP); err != nil {
			t.Fatal(err)
		}
		await(t, "the site file is loaded", func() bool { return log.count("site file loaded") > before })
		_, err := l.client(t, "other-tokyo", l.tokyoDoor).Status(t.Context(), "sae-kochi")
		if gone := errors.Is(err, etsi014.ErrDenied); gone != (i%2 == 0) {
			t.Errorf("round %d: an SAE that left or came again: %v", i, err)
		}
		goesOn()
	}
	serial := l.shown(t)
	l.renewDoor(t, "tokyo-door")
	await(t, "the door shows the new certificate without a signal",
		func() bool { return l.shown(t) != serial })
	goesOn()
	if n := log.count("not loaded"); n != 0 {
		t.Errorf("%d loads failed", n)
	}
	l.deny(t, "other-tokyo")
	goesOn()
}

// deny puts an SAE's certificate on tokyo's list, which ends its connection.
func (l *lit) deny(t *testing.T, sae string) {
	t.Helper()
	c, err := tls.Dial("tcp", l.tokyoDoor, l.certificates(t, sae).Client())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Write([]byte("GET / HTTP/1.1\r\nHost: x\r\n\r\n")); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Read(make([]byte, 4096)); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(l.path(sae + ".crt"))
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(text)
	pin := sha256.Sum256(block.Bytes)
	write(t, l.tokyo.KME.ClientDeny, []byte("# stolen\n"+hex.EncodeToString(pin[:])+"\n"))
	// Long before the two minutes of an idle connection.
	if err := c.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	for {
		if _, err := c.Read(make([]byte, 4096)); err != nil {
			if errors.Is(err, os.ErrDeadlineExceeded) {
				t.Error("a denied SAE keeps its connection")
			}
			return
		}
	}
}

// shown is the serial number of the certificate that tokyo's door shows.
func (l *lit) shown(t *testing.T) string {
	t.Helper()
	c, err := tls.Dial("tcp", l.tokyoDoor, l.certificates(t, "sae-tokyo").Client())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	return c.ConnectionState().PeerCertificates[0].SerialNumber.String()
}

func (l *lit) renewDoor(t *testing.T, name string) {
	t.Helper()
	issued, err := l.root.Issue(pki.Request{CommonName: name, Life: time.Hour, Server: true,
		IPs: []netip.Addr{netip.MustParseAddr("127.0.0.1")}})
	if err == nil {
		err = issued.Save(l.path(name+".crt"), l.path(name+".key"))
	}
	if err != nil {
		t.Fatal(err)
	}
}

func without(saes []config.SAE, id string) (rest []config.SAE) {
	for _, a := range saes {
		if a.ID != id {
			rest = append(rest, a)
		}
	}
	return rest
}

// siteFile renders a site as the file that the daemon reads again.
func siteFile(t *testing.T, s *config.Site) []byte {
	t.Helper()
	text, err := s.YAML()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := config.Parse("site.yaml", text); err != nil {
		t.Fatal(err)
	}
	return text
}

func write(t *testing.T, path string, data []byte) {
	t.Helper()
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestDoorFollowsItsSite: what a reload takes over, and what it says of the
// rest.
func TestDoorFollowsItsSite(t *testing.T) {
	a, b := simSites(t)
	addKMEs(t, a.Site, b.Site)
	file := filepath.Join(t.TempDir(), "site.yaml")
	var log pages
	twin := filepath.Join(t.TempDir(), "ca")
	text, err := os.ReadFile(a.Site.KME.PeerCA)
	if err != nil {
		t.Fatal(err)
	}
	write(t, twin, text)
	d, err := openDoor(a.Site, slog.New(slog.NewTextHandler(&log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	var behind *config.Site // what the key manager took over last
	d.behind = func(_ context.Context, s *config.Site) error { behind = s; return nil }
	change := func(f func(*config.Site)) {
		text := siteFile(t, a.Site)
		s, err := config.Parse("site.yaml", text)
		if err != nil {
			t.Fatal(err)
		}
		f(s)
		write(t, file, siteFile(t, s))
	}
	for _, tt := range []struct {
		name   string
		change func(*config.Site)
		told   []string // in the log
		rules  int      // SAEs that the door knows afterwards
	}{
		{"nothing", func(*config.Site) {}, nil, 2},
		{"profile", func(s *config.Site) { s.SAEs[0].Profile = "arnika" }, nil, 2},
		{"SAE leaves", func(s *config.Site) { s.SAEs = without(s.SAEs, "other-tokyo") }, nil, 1},
		{"CRL that is not there", func(s *config.Site) { s.KME.ClientCRL = "/none" },
			[]string{"site file not loaded", "load CRL /none"}, 1},
		{"one root", func(s *config.Site) { s.KME.ClientCA = twin },
			[]string{"site file not loaded", ErrOneRoot.Error()}, 1},
		{"new SAE", func(s *config.Site) {
			s.SAEs = append(s.SAEs, config.SAE{ID: "osaka", KME: "kme-tokyo",
				Identity: config.Identity{CN: "osaka"}})
		}, nil, 3},
		{"limits", func(s *config.Site) { s.SAEs[0].Limits.Reserve, s.KME.MaxKeys = 10, 16 }, nil, 2},
		{"address", func(s *config.Site) { s.KME.Listen = "127.0.0.1:9" },
			[]string{"takes effect at the next start", "listeners, peers"}, 2},
		{"no kme", func(s *config.Site) { *s = config.Site{Version: 1, Site: "x", State: "/x"} },
			[]string{"site file not loaded", ErrNoKME.Error()}, 2},
	} {
		log.mu.Lock()
		log.b.Reset()
		log.mu.Unlock()
		change(tt.change)
		d.reload(t.Context(), file)
		for _, want := range tt.told {
			if log.count(want) == 0 {
				t.Errorf("%s: the log lacks %q: %s", tt.name, want, log.b.String())
			}
		}
		if len(tt.told) == 0 && log.count("level=WARN") != 0 {
			t.Errorf("%s: %s", tt.name, log.b.String())
		}
		if n := d.live.Stats().Rules; n != tt.rules {
			t.Errorf("%s: the door knows %d SAEs, want %d", tt.name, n, tt.rules)
		}
		if behind != nil && behind != d.loaded {
			t.Errorf("%s: the key manager has other SAEs than the door", tt.name)
		}
		if got := d.profile("sae-tokyo").Name; (got == "arnika") != (tt.name == "profile") {
			t.Errorf("%s: profile %s", tt.name, got)
		}
	}
	if got := d.profile("sae-kochi"); got != etsi014.DefaultProfile {
		t.Errorf("an SAE of another site has the profile %+v", got)
	}
}

// TestDoorShowsTwoCertificates: an RSA pair beside the ECDSA one, for a client
// that can do only RSA.
func TestDoorShowsTwoCertificates(t *testing.T) {
	a, b := simSites(t)
	root := addKMEs(t, a.Site, b.Site)
	l := &lit{tokyo: a.Site, root: root}
	k := a.Site.KME
	k.SecondCertificate, k.SecondKey = l.path("rsa.crt"), l.path("rsa.key")
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	ca := etsitest.NewCA(t, "door CA")
	etsitest.WriteFiles(t, filepath.Dir(a.Site.State), "rsa", ca.Issue(t, etsitest.Leaf{
		Server: true, Key: key, IPs: []net.IP{net.IPv4(127, 0, 0, 1)}}))
	d, err := openDoor(a.Site, testLog(t))
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		suite uint16
		want  x509.PublicKeyAlgorithm
	}{
		{tls.TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384, x509.RSA},
		{tls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384, x509.ECDSA},
	} {
		here, there := net.Pipe()
		done := make(chan error, 1)
		go func() { done <- tls.Server(there, d.live.Server()).Handshake() }()
		cfg := l.certificates(t, "sae-tokyo").Client()
		cfg.MaxVersion, cfg.CipherSuites = tls.VersionTLS12, []uint16{tt.suite}
		cfg.InsecureSkipVerify = true // the RSA pair is of another root
		cfg.VerifyConnection = nil
		c := tls.Client(here, cfg)
		if err := errors.Join(c.Handshake(), <-done); err != nil {
			t.Fatal(err)
		}
		if got := c.ConnectionState().PeerCertificates[0].PublicKeyAlgorithm; got != tt.want {
			t.Errorf("the door shows %v, want %v", got, tt.want)
		}
		_ = here.Close()
		_ = there.Close()
	}
}

func TestHeldConnections(t *testing.T) {
	a, b := simSites(t)
	addKMEs(t, a.Site, b.Site)
	d := &keyDoor{site: a.Site, log: testLog(t)}
	var files unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &files); err != nil {
		t.Fatal(err)
	}
	room := int(min(files.Cur, 1<<30)) - otherFiles
	for _, tt := range []struct{ wanted, want int }{
		{20, 20}, {1 << 30, room}, {0, min(room, defaultHeld)},
	} {
		a.Site.KME.MaxConnections = tt.wanted
		if n := d.held(); n != tt.want {
			t.Errorf("%d connections of %d, want %d", n, tt.wanted, tt.want)
		}
	}
}
