package daemon

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/quietline/quietline/cmd/internal/config"
	"github.com/quietline/quietline/cmd/internal/pki"
	"github.com/quietline/quietline/hw/socket"
)

// What is held: as many SAEs as one key manager is built for, ten connections
// each.
const (
	holdSAEs  = 1000
	holdConns = 10000
)

// crowd is a key manager as a process of its own, so that its memory can be
// told from that of its clients, with another in this process behind it.
type crowd struct {
	*lit
	pid int
}

// newCrowd builds the program and runs tokyo's key manager of it.
func newCrowd(t *testing.T) *crowd {
	t.Helper()
	program := filepath.Join(t.TempDir(), "quietline")
	build := exec.CommandContext(t.Context(), "go", "build", "-o", program, "../../quietline")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	a, b := simSites(t)
	c := &crowd{lit: &lit{tokyo: a.Site, kochi: b.Site, root: addKMEs(t, a.Site, b.Site)}}
	for i := range holdSAEs {
		id := fmt.Sprintf("sae-%04d", i)
		c.tokyo.SAEs = append(c.tokyo.SAEs, config.SAE{ID: id, KME: "kme-tokyo",
			Identity: config.Identity{URI: pki.SAEURI(id)}})
		c.kochi.SAEs = append(c.kochi.SAEs, config.SAE{ID: id, KME: "kme-tokyo"})
	}
	for _, s := range []*config.Site{c.tokyo, c.kochi} {
		listener, err := socket.Listen(s.Links[0].Driver[len("unix://"):])
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(start(t, func(ctx context.Context) error {
			return socket.Serve(ctx, listener, &lamp{blocks: 100, bytes: 64 << 10})
		}))
	}
	write(t, c.path("tokyo.yaml"), siteFile(t, c.tokyo))
	daemon := exec.Command(program, "kme", "--config", c.path("tokyo.yaml"))
	daemon.Stderr = io.Discard
	if err := daemon.Start(); err != nil {
		t.Fatal(err)
	}
	c.pid = daemon.Process.Pid
	t.Cleanup(func() {
		_ = daemon.Process.Signal(unix.SIGTERM)
		if err := daemon.Wait(); err != nil {
			t.Errorf("the key manager ended: %v", err)
		}
	})
	await(t, "tokyo listens", func() bool { return kmeStatus(t, a.Site).PeerListen != "" })
	b.Site.Peers = []config.Peer{{KME: "kme-tokyo", Address: kmeStatus(t, a.Site).PeerListen}}
	t.Cleanup(start(t, func(ctx context.Context) error { return KME(ctx, b) }))
	await(t, "tokyo has keys", func() bool {
		k := kmeStatus(t, a.Site)
		return len(k.Links) > 0 && k.Links[0].Drawable > 20e6
	})
	c.tokyoDoor = kmeStatus(t, a.Site).Listen
	return c
}

// memory is the process's resident memory now and at its highest, MiB.
func (c *crowd) memory(t *testing.T) (now, peak int) {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", c.pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		_, _ = fmt.Sscanf(line, "VmRSS: %d kB", &now)
		_, _ = fmt.Sscanf(line, "VmHWM: %d kB", &peak)
	}
	return now >> 10, peak >> 10
}

// good draws keys for a while as a client with a certificate does, over one
// kept connection and then over one a key, and logs what it was like.
func (c *crowd) good(t *testing.T, when string) {
	t.Helper()
	cfg := c.certificates(t, "sae-tokyo").Client()
	cfg.ServerName = "127.0.0.1"
	kept := drive(t, c.tokyoDoor, cfg, 1, 3*time.Second, always(encPath))
	var took []time.Duration
	begin := time.Now()
	for time.Since(begin) < 3*time.Second {
		at := time.Now()
		if body := answer(t, c.tokyoDoor, cfg, encPath); !strings.Contains(string(body), "key_ID") {
			t.Errorf("%s: a good client got %.100s", when, body)
		}
		took = append(took, time.Since(at))
	}
	now, peak := c.memory(t)
	t.Logf("%s: a key over a kept connection: %v; over a new one: %v; memory %d MiB, peak %d MiB",
		when, kept, rateOf(took, time.Since(begin)), now, peak)
	if len(took) == 0 || kept.perSecond == 0 {
		t.Errorf("%s: good clients are not served", when)
	}
}

// nuisance runs n copies of f again and again until its end is called.
func nuisance(n int, f func()) (end func()) {
	over := make(chan struct{})
	var all sync.WaitGroup
	for range n {
		all.Go(func() {
			for {
				select {
				case <-over:
					return
				default:
					f()
				}
			}
		})
	}
	return func() { close(over); all.Wait() }
}

// TestHold holds ten thousand connections of a thousand SAEs, then adds what
// bad clients do. QUIETLINE_LONG=1, -v, two minutes, 20,000 open files.
func TestHold(t *testing.T) {
	if os.Getenv("QUIETLINE_LONG") == "" {
		t.Skip("set QUIETLINE_LONG=1 to hold 10,000 connections (2 min)")
	}
	c := newCrowd(t)
	c.good(t, "alone")
	begin := time.Now()
	held := c.hold(t)
	now, _ := c.memory(t)
	t.Logf("%d connections of %d SAEs stand after %v, memory %d MiB", len(held), holdSAEs,
		time.Since(begin).Round(time.Second), now)
	// Each asks from time to time, as rekeying lines do: the door ends a
	// connection that is idle for two minutes.
	i := 0
	rest := nuisance(1, func() {
		if !held[i].alive() {
			t.Errorf("connection %d was lost", i)
		}
		i = (i + 1) % len(held)
		time.Sleep(5 * time.Millisecond)
	})
	c.good(t, "10,000 held")

	cfg := c.certificates(t, "other-tokyo").Client()
	cfg.ServerName = "127.0.0.1"
	end := nuisance(200, func() { c.slow(cfg) })
	c.good(t, "and 200 slow clients")
	end()
	end = nuisance(8, func() { c.oversized(cfg) })
	c.good(t, "and 8 senders of 1 MiB bodies")
	end()
	end = nuisance(64, func() { c.abandoned(cfg) })
	c.good(t, "and a flood of handshakes, 64 at once")
	end()
	end = nuisance(2, func() { c.silent() })
	c.good(t, "and a flood of silent connections")
	end()

	rest()
	lost := 0
	for _, w := range held {
		if !w.alive() {
			lost++
		}
	}
	t.Logf("%d of %d connections were lost", lost, len(held))
	if lost > 0 {
		t.Errorf("bad clients cost good ones %d connections", lost)
	}
}

// held is one kept connection.
type held struct {
	conn *tls.Conn
	r    *bufio.Reader
}

// alive asks for a status.
func (h *held) alive() bool {
	_ = h.conn.SetDeadline(time.Now().Add(30 * time.Second))
	_, err := io.WriteString(h.conn, "GET /api/v1/keys/sae-kochi/status HTTP/1.1\r\nHost: kme\r\n\r\n")
	if err != nil {
		return false
	}
	resp, err := http.ReadResponse(h.r, nil)
	if err != nil {
		return false
	}
	_, err = io.Copy(io.Discard, resp.Body)
	return err == nil && resp.StatusCode == http.StatusOK
}

func (c *crowd) hold(t *testing.T) []*held {
	t.Helper()
	cfgs := make([]*tls.Config, holdSAEs)
	for i := range cfgs {
		id := fmt.Sprintf("sae-%04d", i)
		issued, err := c.root.Issue(pki.Request{CommonName: id, SAE: id, Client: true, Life: time.Hour})
		if err == nil {
			err = issued.Save(c.path(id+".crt"), c.path(id+".key"))
		}
		if err != nil {
			t.Fatal(err)
		}
		cfgs[i] = c.certificates(t, id).Client()
		cfgs[i].ServerName = "127.0.0.1"
	}
	all := make([]*held, holdConns)
	var workers sync.WaitGroup
	for w := range 16 {
		workers.Go(func() {
			for i := w; i < len(all); i += 16 {
				conn, err := tls.Dial("tcp", c.tokyoDoor, cfgs[i%holdSAEs])
				if err != nil {
					t.Error(err)
					return
				}
				// A small buffer: this process holds the other ends of them all.
				all[i] = &held{conn, bufio.NewReaderSize(conn, 512)}
				if !all[i].alive() {
					t.Errorf("connection %d is not served", i)
					return
				}
			}
		})
	}
	workers.Wait()
	if t.Failed() {
		t.FailNow()
	}
	t.Cleanup(func() {
		for _, h := range all {
			_ = h.conn.NetConn().Close()
		}
	})
	return all
}

// bad clients come from another address of this machine than good ones.
var elsewhere = net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 2)}}

// slow sends a request byte by byte until the door has had enough.
func (c *crowd) slow(cfg *tls.Config) {
	conn, err := tls.DialWithDialer(&elsewhere, "tcp", c.tokyoDoor, cfg)
	if err != nil {
		return
	}
	defer conn.Close()
	for _, b := range []byte("POST " + encPath + " HTTP/1.1\r\nHost: k\r\nContent-Length: 9\r\n\r\n") {
		if _, err := conn.Write([]byte{b}); err != nil {
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
	_, _ = io.Copy(io.Discard, conn) // the body never comes
}

// oversized sends a body that no request needs.
func (c *crowd) oversized(cfg *tls.Config) {
	conn, err := tls.DialWithDialer(&elsewhere, "tcp", c.tokyoDoor, cfg)
	if err != nil {
		return
	}
	defer conn.Close()
	_, err = fmt.Fprintf(conn, "POST %s HTTP/1.1\r\nHost: k\r\nContent-Length: %d\r\n\r\n%s",
		encPath, 1<<20, strings.Repeat(" ", 1<<20))
	if err == nil || errors.Is(err, unix.EPIPE) || errors.Is(err, unix.ECONNRESET) {
		_, _ = io.Copy(io.Discard, conn)
	}
}

// abandoned begins a handshake, lets the door work, and leaves.
func (c *crowd) abandoned(cfg *tls.Config) {
	raw, err := elsewhere.Dial("tcp", c.tokyoDoor)
	if err != nil {
		return
	}
	defer raw.Close()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	bad := cfg.Clone()
	bad.VerifyConnection = func(tls.ConnectionState) error { // the door has signed by now
		return errors.New("no thanks")
	}
	_ = tls.Client(raw, bad).HandshakeContext(ctx)
}

// silent opens 400 connections, says nothing, and leaves.
func (c *crowd) silent() {
	var all []net.Conn
	for range 400 {
		raw, err := elsewhere.Dial("tcp", c.tokyoDoor)
		if err != nil {
			break
		}
		all = append(all, raw)
	}
	time.Sleep(100 * time.Millisecond)
	for _, raw := range all {
		_ = raw.Close()
	}
}
