package node

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/quietline/quietline/etsi014"
)

// TestPeerIsTurnedAway: each wrong peer fails in the handshake with one line
// that says who it is, what that was held against, and what to do.
func TestPeerIsTurnedAway(t *testing.T) {
	ours, theirs, osaka := newAuthority(t), newAuthority(t), newAuthority(t)
	kochi := ours.issue(t, uriPrefix+"kochi")
	list := filepath.Join(t.TempDir(), "crl.pem")
	gone := ours.issue(t, uriPrefix+"anan")
	ours.revoke(t, list, gone)
	for name, c := range map[string]struct {
		files TLSFiles
		spoil func(*tls.Config)
		want  []string
	}{
		"another authority": {files: theirs.issue(t, uriPrefix+"anan"),
			want: []string{`KME "anan" shows subject "", issuer "CN=KMEs"`, "valid from 20", " UTC",
				"held against the roots recorded for it, " + ours.path + ` ("CN=KMEs")`,
				"unknown authority", "enrol that site again"}},
		"another peer's authority": {files: osaka.issue(t, uriPrefix+"anan"),
			want: []string{`KME "anan" shows`, ours.path,
				`it hangs on a root of KME "muroto", which may not speak for KME "anan"`}},
		"over": {files: ours.issueFor(t, -2*time.Hour, -time.Hour, uriPrefix+"anan"),
			want: []string{"is valid from", "the clock here says", "renew it there"}},
		"not yet valid": {files: ours.issueFor(t, time.Hour, 2*time.Hour, uriPrefix+"anan"),
			want: []string{"is valid from", "the clock here says", "set the clock"}},
		"revoked": {files: gone, want: []string{"revocation list " + list + " names it", "serial "}},
		"our own KME ID": {files: ours.issue(t, uriPrefix+"kochi"),
			want: []string{"our own KME ID", "every KME needs its own", "serial "}},
		"not a peer": {files: ours.issue(t, uriPrefix+"osaka"),
			want: []string{`KME "osaka" is no peer of ours, ours are "anan", "muroto", "zao"`, "enrol"}},
		"should be dialled": {files: ours.issue(t, uriPrefix+"zao"), want: []string{"sorts first dials"}},
		"an SAE": {files: ours.issue(t, "urn:quietline:sae:line"),
			want: []string{"want urn:quietline:kme:", "serial "}},
		"no name": {files: ours.issue(t), want: []string{"0 URI SANs", "serial "}},
		"two names": {files: ours.issue(t, uriPrefix+"anan", uriPrefix+"osaka"),
			want: []string{"2 URI SANs"}},
		"no certificate": {files: ours.issue(t, uriPrefix+"anan"),
			spoil: func(c *tls.Config) { c.Certificates = nil }, want: []string{"certificate"}},
		"classical key exchange": {files: ours.issue(t, uriPrefix+"anan"),
			spoil: func(c *tls.Config) { c.CurvePreferences = []tls.CurveID{tls.X25519} },
			want:  []string{"key exchange"}},
		"TLS 1.2": {files: ours.issue(t, uriPrefix+"anan"),
			spoil: func(c *tls.Config) { c.MinVersion, c.MaxVersion = tls.VersionTLS12, tls.VersionTLS12 },
			want:  []string{"version"}},
		"the right one": {files: ours.issue(t, uriPrefix+"anan")},
	} {
		t.Run(strings.ReplaceAll(name, " ", "-"), func(t *testing.T) {
			files := kochi
			files.CRLs = []string{list}
			server, err := newHub(Config{KME: "kochi", TLS: files, Peers: []Peer{{ID: "anan"},
				{ID: "muroto", CA: osaka.path}, {ID: "zao"}}}, nil, nil)
			if err != nil {
				t.Fatal(err)
			}
			cert, err := tls.LoadX509KeyPair(c.files.Cert, c.files.Key)
			if err != nil {
				t.Fatal(err)
			}
			client := &tls.Config{Certificates: []tls.Certificate{cert}, InsecureSkipVerify: true,
				MinVersion: tls.VersionTLS13}
			if c.spoil != nil {
				c.spoil(client)
			}
			a, b := net.Pipe()
			defer a.Close()
			go func() { // a pipe has no buffer: the alert must be read
				c := tls.Client(a, client)
				if c.HandshakeContext(t.Context()) == nil {
					go func() { _ = (&conn{Conn: c}).greet(greeting{what: anew, life: life{1}}) }()
				}
				_, _ = io.Copy(io.Discard, c)
			}()
			conn, how, err := server.welcome(t.Context(), b)
			switch {
			case c.want == nil && err != nil:
				t.Errorf("welcome: %v", err)
			case c.want == nil && (conn.peer != "anan" || how != anew || conn.life != life{1} ||
				conn.Conn.(*tls.Conn).ConnectionState().CurveID != tls.X25519MLKEM768):
				t.Errorf("welcome: %q, %v", conn.peer, how)
			case c.want != nil && err == nil:
				t.Error("it is welcome")
			case err != nil && strings.Contains(err.Error(), "\n"):
				t.Errorf("more than one line: %v", err)
			}
			for _, w := range c.want {
				if err != nil && !strings.Contains(err.Error(), w) {
					t.Errorf("welcome: %v, want %q in it", err, w)
				}
			}
		})
	}
}

// TestRefusalIsToldOnBothSides: an authority that the other end does not know
// is named in the status of both, with both certificates, and the log of
// neither fills.
func TestRefusalIsToldOnBothSides(t *testing.T) {
	for name, c := range map[string]struct {
		stranger     func(a, b *site) *site
		refuses, who string
	}{
		"the caller's": {func(a, _ *site) *site { return a }, "a caller from 127.0.0.1", "kme-a"},
		"the called":   {func(_, b *site) *site { return b }, "", "kme-b"},
	} {
		t.Run(strings.ReplaceAll(name, " ", "-"), func(t *testing.T) {
			a, b := newPair(t, 4096)
			bad := c.stranger(a, b)
			files := newAuthority(t).issue(t, uriPrefix+string(bad.cfg.KME))
			bad.cfg.TLS.Cert, bad.cfg.TLS.Key = files.Cert, files.Key
			var lines atomic.Int64
			b.cfg.Logger = countingLog(t, "peer is turned away", &lines)
			startPair(t, a, b)
			good := map[*site]*site{a: b, b: a}[bad]
			var there, here string
			defer func() {
				if t.Failed() {
					t.Logf("there: %s\nhere: %s", there, here)
				}
			}()
			eventually(t, "refusals", func() bool {
				there, here = good.Stats().Peers[0].Reason, bad.Stats().Peers[0].Reason
				return strings.Contains(there, `KME "`+c.who+`" shows subject`) &&
					strings.Contains(there, "issuer") && strings.Contains(there, c.refuses) &&
					strings.Contains(there, good.cfg.TLS.CA) && strings.Contains(there, "enrol") &&
					(bad == b || strings.Contains(here, "refuses our certificate") &&
						strings.Contains(here, "issuer"))
			})
			if bad == b { // it hears of it as an alert to a caller that it cannot name
				eventually(t, "log of the called", func() bool { return lines.Load() > 0 })
			}
			for range 20 { // a caller that does not give up
				_, _ = tls.Dial("tcp", b.ListenAddr().String(), a.hub.trust.Load().config())
			}
			if n := lines.Load(); n > refusalsMost {
				t.Errorf("%d lines in the log, at most %d a minute are expected", n, refusalsMost)
			}
		})
	}
}

// TestNoPeersLeft: a KME whose last peer was cut off names the one that still
// knocks.
func TestNoPeersLeft(t *testing.T) {
	ours := newAuthority(t)
	files := ours.issue(t, uriPrefix+"kochi")
	server, err := newHub(Config{KME: "kochi", TLS: files}, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	caller := ours.issue(t, uriPrefix+"anan")
	cert, err := tls.LoadX509KeyPair(caller.Cert, caller.Key)
	if err != nil {
		t.Fatal(err)
	}
	a, b := net.Pipe()
	defer a.Close()
	go func() { // a pipe has no buffer: the alert must be read
		c := tls.Client(a, &tls.Config{Certificates: []tls.Certificate{cert}, InsecureSkipVerify: true,
			MinVersion: tls.VersionTLS13})
		_ = c.HandshakeContext(t.Context())
		_, _ = io.Copy(io.Discard, c)
	}()
	_, _, err = server.welcome(t.Context(), b)
	for _, w := range []string{`KME "anan" is no peer of ours, ours are none`, "subject", "issuer", "enrol that site"} {
		if err == nil || !strings.Contains(err.Error(), w) {
			t.Errorf("welcome: %v, want %q in it", err, w)
		}
	}
}

// TestDialledWrongPeer: the address leads to another KME than configured.
func TestDialledWrongPeer(t *testing.T) {
	ca := newAuthority(t)
	server, err := newHub(Config{KME: "kochi", TLS: ca.issue(t, uriPrefix+"kochi"),
		Peers: []Peer{{ID: "anan"}}}, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, _, _ = server.welcome(t.Context(), c)
			c.Close()
		}
	}()
	client, err := newHub(Config{KME: "anan", TLS: ca.issue(t, uriPrefix+"anan"),
		Peers: []Peer{{ID: "osaka", Addr: l.Addr().String()}, {ID: "kochi"}}}, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	_, _, err = client.dial(t.Context(), client.peers["osaka"], false)
	if err == nil || !strings.Contains(err.Error(), `is KME "kochi", want "osaka"`) {
		t.Errorf("dial: %v", err)
	}
}

func TestOwnCertificateIsChecked(t *testing.T) {
	ca := newAuthority(t)
	good := ca.issue(t, uriPrefix+"anan")
	exposed := ca.issue(t, uriPrefix+"anan")
	if err := os.Chmod(exposed.Key, 0o644); err != nil {
		t.Fatal(err)
	}
	other := newAuthority(t)
	foreign := filepath.Join(t.TempDir(), "foreign.pem")
	other.revoke(t, foreign, other.issue(t, uriPrefix+"kochi"))
	with := func(change func(*TLSFiles)) TLSFiles { f := good; change(&f); return f }
	for name, c := range map[string]struct {
		files TLSFiles
		self  etsi014.KMEID
		want  string
	}{
		"another KME's": {good, "kochi", `it is KME "anan"'s`},
		"no file":       {TLSFiles{Key: "/nonexistent"}, "anan", "no such file"},
		"exposed key":   {exposed, "anan", "chmod 600"},
		"no authority":  {with(func(f *TLSFiles) { f.CA = good.Key }), "anan", "no certificate in it"},
		"foreign list": {with(func(f *TLSFiles) { f.CRLs = []string{foreign} }), "anan",
			"no authority of our peers signed it"},
		"no list": {with(func(f *TLSFiles) { f.CRLs = []string{good.Cert} }), "anan",
			"name a file of revocation lists"},
	} {
		_, err := newHub(Config{KME: c.self, TLS: c.files, Peers: []Peer{{ID: "kochi"}}}, nil, nil)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q in it", name, err, c.want)
		}
	}
	if _, err := loadCertificate(good, "kochi"); !errors.Is(err, ErrIdentity) {
		t.Errorf("another KME's certificate: %v, want ErrIdentity", err)
	}
}

// TestLobby: strangers that say nothing leave when places are needed, those of
// one address first, and a peer among them is not kept out.
func TestLobby(t *testing.T) {
	var l lobby
	come := func(addr string) *visiting {
		v := &visiting{addr: net.TCPAddrFromAddrPort(netip.MustParseAddrPort(addr))}
		l.admit(v)
		return v
	}
	first := come("192.0.2.1:1")
	var same []*visiting
	for i := range 2 * lobbyAddress {
		same = append(same, come(fmt.Sprintf("[2001:db8::%x]:1", i+1)))
	}
	for i, v := range same {
		if want := i < lobbyAddress; v.closed != want {
			t.Errorf("visitor %d of one network: closed %v, want %v", i, v.closed, want)
		}
	}
	for i := range lobbyMost - lobbyAddress - 1 {
		come(fmt.Sprintf("198.51.100.%d:1", i+1))
	}
	if first.closed {
		t.Error("the first left though there was room")
	}
	last := come("203.0.113.1:1")
	if !first.closed || last.closed || len(l.waiting) != lobbyMost {
		t.Errorf("full: first closed %v, last %v, %d wait", first.closed, last.closed, len(l.waiting))
	}
	l.leave(last)
	if len(l.waiting) != lobbyMost-1 {
		t.Error("nobody left")
	}
}

type visiting struct {
	net.Conn
	addr   net.Addr
	closed bool
}

func (v *visiting) RemoteAddr() net.Addr { return v.addr }
func (v *visiting) Close() error         { v.closed = true; return nil }

// TestStrangersDoNotKeepPeersOut: more silent connections than there are
// places, and the peer is there all the same.
func TestStrangersDoNotKeepPeersOut(t *testing.T) {
	a, b := newPair(t, 4096)
	b.start(t)
	for range 3 * lobbyMost {
		c, err := net.Dial("tcp", b.ListenAddr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
	}
	eventually(t, "strangers wait", func() bool {
		b.hub.lobby.mu.Lock()
		defer b.hub.lobby.mu.Unlock()
		return len(b.hub.lobby.waiting) == lobbyAddress // all have one address
	})
	a.cfg.Peers[0].Addr = b.ListenAddr().String()
	a.start(t)
	eventually(t, "session", func() bool { return a.Stats().Peers[0].Up && b.Stats().Peers[0].Up })
}

func TestRefusalsAreFew(t *testing.T) {
	var r refusals
	now := time.Now()
	said := 0
	for i := range 100 {
		if yes, _ := r.say(fmt.Sprint("reason ", i%20), now.Add(time.Duration(i)*time.Second/2)); yes {
			said++
		}
	}
	if said != refusalsMost {
		t.Errorf("%d lines in a minute, want %d", said, refusalsMost)
	}
	if yes, unsaid := r.say("reason 1", now.Add(time.Minute)); !yes || unsaid != 100-refusalsMost {
		t.Errorf("after a minute: %v, %d were left out", yes, unsaid)
	}
}

func FuzzGreeting(f *testing.F) {
	f.Add(greeting{what: anew, life: newLife()}.encode())
	f.Add(greeting{what: refused, reason: strings.Repeat("x", 300)}.encode())
	f.Add([]byte{2})
	f.Fuzz(func(t *testing.T, data []byte) {
		g, err := parseGreeting(data)
		if err == nil && string(g.encode()) != string(data) {
			t.Errorf("%x is read and is not what would be written, %x", data, g.encode())
		}
	})
}

// FuzzFrames: no bytes on the channel make the reader panic or take a message
// longer than allowed.
func FuzzFrames(f *testing.F) {
	f.Add([]byte{0, 0, 0, 1, 9, 0, 0, 0, 0})
	f.Add([]byte{0xff, 0xff, 0xff, 0xff})
	f.Fuzz(func(t *testing.T, data []byte) {
		a, b := net.Pipe()
		go func() { _, _ = a.Write(data); a.Close() }()
		c := &conn{Conn: b}
		total := 0
		if err := c.read(func(m []byte) { total += 4 + len(m) }); err == nil {
			t.Error("the end of the channel is no error")
		}
		if total > len(data) {
			t.Errorf("%d bytes read from %d", total, len(data))
		}
	})
}
