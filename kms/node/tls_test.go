package node

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/quietline/quietline/etsi014"
)

// TestPeerIsTurnedAway: each wrong peer fails in the handshake with one line
// that says what to do.
func TestPeerIsTurnedAway(t *testing.T) {
	ours, theirs := newAuthority(t), newAuthority(t)
	kochi := ours.issue(t, uriPrefix+"kochi")
	for name, c := range map[string]struct {
		files TLSFiles
		spoil func(*tls.Config)
		want  string
	}{
		"another authority": {files: func() TLSFiles {
			f := theirs.issue(t, uriPrefix+"anan")
			f.CA = ours.path
			return f
		}(), want: "not of our KME authority"},
		"our own KME ID":    {files: ours.issue(t, uriPrefix+"kochi"), want: "our own KME ID"},
		"not a peer":        {files: ours.issue(t, uriPrefix+"osaka"), want: "no peer of ours"},
		"should be dialled": {files: ours.issue(t, uriPrefix+"zao"), want: "sorts first dials"},
		"an SAE":            {files: ours.issue(t, "urn:quietline:sae:line"), want: "want urn:quietline:kme:"},
		"no name":           {files: ours.issue(t), want: "0 URI SANs"},
		"two names": {files: ours.issue(t, uriPrefix+"anan", uriPrefix+"osaka"),
			want: "2 URI SANs"},
		"no certificate": {files: ours.issue(t, uriPrefix+"anan"),
			spoil: func(c *tls.Config) { c.Certificates = nil }, want: "certificate"},
		"classical key exchange": {files: ours.issue(t, uriPrefix+"anan"),
			spoil: func(c *tls.Config) { c.CurvePreferences = []tls.CurveID{tls.X25519} },
			want:  "key exchange"},
		"TLS 1.2": {files: ours.issue(t, uriPrefix+"anan"),
			spoil: func(c *tls.Config) { c.MinVersion, c.MaxVersion = tls.VersionTLS12, tls.VersionTLS12 },
			want:  "version"},
		"the right one": {files: ours.issue(t, uriPrefix+"anan")},
	} {
		t.Run(strings.ReplaceAll(name, " ", "-"), func(t *testing.T) {
			server, err := newHub(Config{KME: "kochi", TLS: kochi, Peers: []Peer{{ID: "anan"},
				{ID: "zao"}}}, nil, nil)
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
			go func() { // a pipe has no buffer: the alert must be read
				c := tls.Client(a, client)
				_ = c.HandshakeContext(t.Context())
				_, _ = io.Copy(io.Discard, c)
			}()
			cfg := server.tls.Clone()
			cfg.VerifyConnection = verifier(cfg.RootCAs, "kochi", server.dialsUs)
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
			defer cancel()
			conn := tls.Server(b, cfg)
			defer a.Close()
			err = conn.HandshakeContext(ctx)
			switch {
			case c.want == "" && err != nil:
				t.Errorf("handshake: %v", err)
			case c.want == "" && conn.ConnectionState().CurveID != tls.X25519MLKEM768:
				t.Errorf("key exchange %v", conn.ConnectionState().CurveID)
			case c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)):
				t.Errorf("handshake: %v, want %q in it", err, c.want)
			case err != nil && strings.Contains(err.Error(), "\n"):
				t.Errorf("more than one line: %v", err)
			}
		})
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
	l, err := tls.Listen("tcp", "127.0.0.1:0", server.tls)
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
			_ = c.(*tls.Conn).HandshakeContext(t.Context())
			c.Close()
		}
	}()
	client, err := newHub(Config{KME: "anan", TLS: ca.issue(t, uriPrefix+"anan"),
		Peers: []Peer{{ID: "osaka", Addr: l.Addr().String()}}}, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	_, err = client.dial(t.Context(), "osaka")
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
	empty := good
	empty.CA = good.Key
	for name, c := range map[string]struct {
		files TLSFiles
		self  etsi014.KMEID
		want  string
	}{
		"another KME's": {good, "kochi", `it is KME "anan"'s`},
		"no file":       {TLSFiles{Key: "/nonexistent"}, "anan", "no such file"},
		"exposed key":   {exposed, "anan", "chmod 600"},
		"no authority":  {empty, "anan", "no certificate in it"},
	} {
		if _, err := c.files.config(c.self); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q in it", name, err, c.want)
		}
	}
	if _, err := good.config("kochi"); !errors.Is(err, ErrIdentity) {
		t.Errorf("another KME's certificate: %v, want ErrIdentity", err)
	}
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
