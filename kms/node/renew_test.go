package node

import (
	"context"
	"errors"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/etsi014/etsitest"
	"github.com/quietline/quietline/etsi014/identity"
	"github.com/quietline/quietline/kms"
)

// restDoor serves a site's KME over HTTPS and returns a client of one SAE.
func restDoor(t *testing.T, s *site, ca *etsitest.CA, sae etsi014.SAEID) func(etsi014.SAEID) *etsi014.Client {
	t.Helper()
	dir := t.TempDir()
	caPath := filepath.Join(dir, "ca.crt")
	etsitest.WriteFile(t, caPath, ca.PEM())
	open := func(name string, leaf etsitest.Leaf, rules ...identity.Rule) *identity.Live {
		cert, key := etsitest.WriteFiles(t, dir, name, ca.Issue(t, leaf))
		live, err := identity.Open(identity.Config{Pairs: []identity.Pair{{Cert: cert, Key: key}},
			CA: caPath, Rules: rules})
		if err != nil {
			t.Fatal(err)
		}
		return live
	}
	live := open("door", etsitest.Leaf{IPs: []net.IP{net.IPv4(127, 0, 0, 1)}, Server: true},
		identity.Rule{SAE: sae})
	h, err := etsi014.NewHandler(etsi014.HandlerConfig{KME: s.KME(), Identify: live.Identify})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := etsi014.NewServer(h, live.Server(), nil)
	ended := make(chan error, 1)
	go func() { ended <- srv.ServeTLS(l, "", "") }()
	t.Cleanup(func() {
		_ = srv.Close()
		if err := <-ended; !errors.Is(err, http.ErrServerClosed) {
			t.Errorf("door: %v", err)
		}
	})
	return func(sae etsi014.SAEID) *etsi014.Client {
		me := open(string(sae), etsitest.Leaf{URIs: []string{identity.DefaultURI(sae)}})
		c, err := etsi014.NewClient(etsi014.ClientConfig{URLs: []string{"https://" + l.Addr().String()},
			TLS: me.Client, Timeout: 5 * time.Second})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
}

// shown is the serial number of our certificate on the connection that stands.
func (s *site) shown() string {
	for _, ch := range s.hub.peers {
		ch.mu.Lock()
		defer ch.mu.Unlock()
		if ch.conn != nil {
			return ch.conn.own.cert.Leaf.SerialNumber.String()
		}
	}
	return ""
}

// TestRenewalUnderLoad renews the certificates of both KMEs again and again
// while keys are drawn and fetched over REST at both. No request fails, none
// waits long, each renewal reaches the connection that stands, and the session
// is one and the same.
func TestRenewalUnderLoad(t *testing.T) {
	a, b := newPair(t, 1<<16)
	var sessions atomic.Int64
	a.cfg.Logger = countingLog(t, "session stands", &sessions)
	b.cfg.Logger = a.cfg.Logger
	ca := newAuthority(t)
	for _, s := range []*site{a, b} {
		s.cfg.TLS = ca.issue(t, uriPrefix+string(s.cfg.KME))
	}
	startPair(t, a, b)
	a.driver.allow(200)
	b.driver.allow(200)
	a.stored(t, "sae-a", "sae-b", 4000)
	b.stored(t, "sae-b", "sae-a", 4000)
	saes := etsitest.NewCA(t, "SAEs")
	atA, atB := restDoor(t, a, saes, "sae-a"), restDoor(t, b, saes, "sae-b")
	j := newJournal()
	var wg sync.WaitGroup
	stop := make(chan struct{})
	var slowest, calls atomic.Int64
	load := func(at etsi014.KMEID, from, to *etsi014.Client, initiator, target etsi014.SAEID) {
		for {
			select {
			case <-stop:
				return
			default:
			}
			began := time.Now()
			got, err := from.Keys(t.Context(), etsi014.KeyRequest{Targets: []etsi014.SAEID{target},
				Number: 2, SizeBits: 256})
			if err != nil {
				t.Errorf("draw at %s: %v", at, err)
				return
			}
			j.draw(at, got.Keys)
			twin, err := to.KeysByID(t.Context(), etsi014.IDRequest{Initiator: initiator,
				IDs: []etsi014.KeyID{got.Keys[0].ID, got.Keys[1].ID}})
			if err != nil {
				t.Errorf("fetch of keys drawn at %s: %v", at, err)
				return
			}
			j.fetch(twin.Keys)
			calls.Add(2)
			if took := int64(time.Since(began)); took > slowest.Load() {
				slowest.Store(took) // near enough
			}
		}
	}
	for range 2 {
		ca, cb := atA("sae-a"), atB("sae-b")
		wg.Go(func() { load("kme-a", ca, cb, "sae-a", "sae-b") })
		wg.Go(func() { load("kme-b", cb, ca, "sae-b", "sae-a") })
	}
	const renewals = 20
	for i := range renewals {
		s := []*site{a, b}[i%2]
		before := s.shown()
		ca.issueTo(t, s.cfg.TLS, -time.Hour, time.Hour, uriPrefix+string(s.cfg.KME))
		if err := s.ReloadTLS(); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the connection that stands shows the new certificate", func() bool {
			now := s.shown()
			return now != before && now == s.hub.trust.Load().cert.Leaf.SerialNumber.String()
		})
		done := calls.Load()
		eventually(t, "keys flow", func() bool { return t.Failed() || calls.Load() > done+8 })
	}
	close(stop)
	wg.Wait()
	for _, f := range j.faults {
		t.Error(f)
	}
	if n := sessions.Load(); n != 2 {
		t.Errorf("sessions began %d times in all, want once at each end", n)
	}
	eventually(t, "old connections end", func() bool {
		for _, s := range []*site{a, b} {
			s.hub.mu.Lock()
			n := len(s.hub.all)
			s.hub.mu.Unlock()
			if n != 1 {
				return false
			}
		}
		return true
	})
	if took := time.Duration(slowest.Load()); took > 5*time.Second {
		t.Errorf("the slowest draw with its fetch took %v", took)
	}
	t.Logf("%d renewals, %d requests, none failed; slowest draw with its fetch %v", renewals,
		calls.Load(), time.Duration(slowest.Load()))
}

// TestPeerIsCutOff: a certificate that is good no more ends the connection
// that stands, within seconds, and the reason is in the status.
func TestPeerIsCutOff(t *testing.T) {
	for name, c := range map[string]struct {
		spoil func(t *testing.T, ca *authority, a, b *site)
		want  string
	}{
		"authority removed": {func(t *testing.T, ca *authority, a, b *site) {
			writePEM(t, b.cfg.Peers[0].CA, "CERTIFICATE", newAuthority(t).cert.Raw)
		}, "held against the roots"},
		"authority gone": {func(t *testing.T, ca *authority, a, b *site) {
			remove(t, b.cfg.Peers[0].CA)
		}, "held against the roots"},
		"revoked": {func(t *testing.T, ca *authority, a, b *site) {
			ca.revoke(t, b.cfg.TLS.CRLs[0], a.cfg.TLS)
		}, "names it"},
		"over": {func(*testing.T, *authority, *site, *site) {}, "the clock here says"},
	} {
		t.Run(strings.ReplaceAll(name, " ", "-"), func(t *testing.T) {
			t.Parallel() // they wait
			a, b := newPair(t, 4096)
			ca := newAuthority(t)
			life := time.Hour
			if name == "over" {
				life = 3 * time.Second
			}
			a.cfg.TLS = ca.issueFor(t, -time.Hour, life, uriPrefix+"kme-a")
			a.cfg.TLS.CA = newAuthority(t).path // b has a file of its own there
			a.cfg.Peers[0].CA = ca.path
			b.cfg.TLS = ca.issue(t, uriPrefix+"kme-b")
			b.cfg.TLS.CRLs = []string{filepath.Join(t.TempDir(), "crl.pem")}
			ca.revoke(t, b.cfg.TLS.CRLs[0], ca.issue(t, uriPrefix+"old"))
			b.cfg.Peers[0].CA = filepath.Join(t.TempDir(), "roots.pem")
			writePEM(t, b.cfg.Peers[0].CA, "CERTIFICATE", ca.cert.Raw)
			startPair(t, a, b)
			follow, stop := context.WithCancel(t.Context())
			var wg sync.WaitGroup
			wg.Go(func() { b.FollowTLS(follow, 50*time.Millisecond) })
			defer wg.Wait()
			defer stop()
			eventually(t, "session", func() bool { return a.Stats().Peers[0].Up && b.Stats().Peers[0].Up })
			c.spoil(t, ca, a, b)
			var why string
			eventually(t, "cut", func() bool {
				p := b.Stats().Peers[0]
				why = p.Reason
				return !p.Connected && strings.Contains(p.Reason, c.want)
			})
			eventually(t, "the other end knows", func() bool {
				return strings.Contains(a.Stats().Peers[0].Reason, "refuses our certificate")
			})
			ca.issueTo(t, a.cfg.TLS, -time.Hour, time.Hour, uriPrefix+"kme-a")
			if err := a.ReloadTLS(); err != nil {
				t.Fatal(err)
			}
			if strings.HasPrefix(name, "authority") {
				writePEM(t, b.cfg.Peers[0].CA, "CERTIFICATE", ca.cert.Raw)
			}
			eventually(t, "session with a good certificate", func() bool {
				return a.Stats().Peers[0].Up && b.Stats().Peers[0].Up
			})
			t.Log(why)
		})
	}
}

// TestRefusedRenewalKeepsThePeer: the peer does not know who signed the new
// certificate yet. The connection that stands stays, and moves over as soon as
// the peer does.
func TestRefusedRenewalKeepsThePeer(t *testing.T) {
	a, b := newPair(t, 4096)
	for _, s := range []*site{a, b} {
		s.cfg.TLS.CA = filepath.Join(t.TempDir(), "roots.pem")
	}
	first, next := newAuthority(t), newAuthority(t)
	for _, s := range []*site{a, b} {
		writePEM(t, s.cfg.TLS.CA, "CERTIFICATE", first.cert.Raw)
		first.issueTo(t, s.cfg.TLS, -time.Hour, time.Hour, uriPrefix+string(s.cfg.KME))
	}
	startPair(t, a, b)
	eventually(t, "session", func() bool { return a.Stats().Peers[0].Up && b.Stats().Peers[0].Up })
	for _, s := range []*site{a, b} {
		before := s.shown()
		next.issueTo(t, s.cfg.TLS, -time.Hour, time.Hour, uriPrefix+string(s.cfg.KME))
		if err := s.ReloadTLS(); err != nil {
			t.Fatal(err)
		}
		other := map[*site]*site{a: b, b: a}[s]
		eventually(t, "refusal", func() bool {
			ch := a.hub.peers["kme-b"] // a dials and hears of both
			ch.mu.Lock()
			defer ch.mu.Unlock()
			return strings.Contains(ch.told, map[*site]string{
				a: "refuses our certificate", b: "certificate is refused"}[s])
		})
		for _, r := range []*site{a, b} {
			if !r.Stats().Peers[0].Up {
				t.Fatalf("%s lost its peer: %s", r.cfg.KME, r.Stats().Peers[0].Reason)
			}
		}
		if s.shown() != before {
			t.Error("a refused certificate is on the connection that stands")
		}
		writePEM(t, other.cfg.TLS.CA, "CERTIFICATE", first.cert.Raw, next.cert.Raw)
		if err := other.ReloadTLS(); err != nil {
			t.Fatal(err)
		}
		eventually(t, "move", func() bool { return s.shown() != before && s.shown() != "" })
	}
}

// TestBadFilesKeepTheOldOnes: what cannot be loaded changes nothing.
func TestBadFilesKeepTheOldOnes(t *testing.T) {
	a, b := newPair(t, 4096)
	startPair(t, a, b)
	eventually(t, "session", func() bool { return a.Stats().Peers[0].Up })
	before := a.shown()
	writePEM(t, a.cfg.TLS.Cert, "CERTIFICATE", []byte("half"))
	if err := a.ReloadTLS(); err == nil || !strings.Contains(err.Error(), a.cfg.TLS.Cert) {
		t.Errorf("ReloadTLS: %v", err)
	}
	if a.shown() != before || !a.Stats().Peers[0].Up {
		t.Error("the connection changed")
	}
}

// TestSilentConnectionEnds: a path that swallows everything is given up long
// before TCP would.
func TestSilentConnectionEnds(t *testing.T) {
	a, b := newPair(t, 4096)
	n, err := Open(b.cfg)
	if err != nil {
		t.Fatal(err)
	}
	n.hub.quiet = 200 * time.Millisecond // before anything runs
	b.startWith(t, func() (*Node, error) { return n, nil })
	a.cfg.Peers[0].Addr = b.ListenAddr().String()
	mute, err := newHub(a.cfg, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	c, _, err := mute.dial(t.Context(), mute.peers["kme-b"], false)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetReadDeadline(time.Now().Add(20 * time.Second))
	err = c.read(func([]byte) {})
	var late net.Error
	if errors.As(err, &late) && late.Timeout() {
		t.Error("the connection stands")
	}
	eventually(t, "reason", func() bool {
		return strings.Contains(b.Stats().Peers[0].Reason, "nothing was heard for")
	})
}

// TestPeerComesBackToALargeStock: while a peer was away, more blocks came than
// a queue of messages would hold. They are offered, and keys flow.
func TestPeerComesBackToALargeStock(t *testing.T) {
	a, b := newPair(t, 256)
	b.start(t)
	blocks := long(2500, 9000) // a queue of 8,192 messages was too short once
	b.driver.allow(uint64(blocks) + 1)
	eventually(t, "stock", func() bool { return segments(b.Stats(), kms.StateNew) == blocks })
	a.driver.allow(21)
	a.cfg.Peers[0].Addr = b.ListenAddr().String()
	a.start(t)
	a.stored(t, "sae-a", "sae-b", 10)
	if _, err := a.drawOne(t); err != nil {
		t.Error(err)
	}
}
