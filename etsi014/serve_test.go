package etsi014_test

import (
	"bytes"
	"crypto/tls"
	"encoding/json"
	"errors"
	"io"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/quietline/quietline/etsi014"
)

// hello records what a client sends first.
func hello(t *testing.T, cfg *tls.Config) []byte {
	t.Helper()
	h := new(firstWrite)
	if err := tls.Client(h, cfg).HandshakeContext(t.Context()); !errors.Is(err, errEnough) {
		t.Fatal(err)
	}
	return h.b
}

var errEnough = errors.New("enough")

// firstWrite is a connection that takes one write.
type firstWrite struct {
	net.Conn
	b []byte
}

func (f *firstWrite) Write(p []byte) (int, error) {
	f.b = bytes.Clone(p)
	return 0, errEnough
}
func (*firstWrite) Close() error                     { return nil }
func (*firstWrite) SetWriteDeadline(time.Time) error { return nil }

// TestHandshakesOfOneAddress floods the door with handshakes that never end:
// no more of them are under way than the bound, and a client of another
// address does not notice.
func TestHandshakesOfOneAddress(t *testing.T) {
	const most, flood = 3, 20
	w := bounded(t, etsi014.Bounds{Handshakes: most})
	first := hello(t, w.tls("tokyo"))
	var answered atomic.Int32
	replied := make(chan net.Conn, flood)
	for range flood {
		c := connect(t, w, "127.0.0.2")
		if _, err := c.Write(first); err != nil {
			t.Fatal(err)
		}
		go func() {
			if n, _ := c.Read(make([]byte, 1)); n > 0 { // of the server's half
				answered.Add(1)
				replied <- c
			}
		}()
	}
	var held []net.Conn
	for range most {
		held = append(held, <-replied)
	}
	for range 3 {
		if _, err := w.client(t, "tokyo").Status(t.Context(), "kochi"); err != nil {
			t.Error(err)
		}
	}
	if n := answered.Load(); n != most {
		t.Errorf("%d handshakes of one address are under way, want %d", n, most)
	}
	_ = held[0].Close()
	<-replied // the next one's turn
}

// TestHTTPWithoutTLS: who forgets the s of https is told so, as JSON.
func TestHTTPWithoutTLS(t *testing.T) {
	w := newWorld(t, nil)
	for _, method := range []string{"GET", "HEAD", "POST", "PUT", "OPTIONS", "DELETE"} {
		c := connect(t, w, "127.0.0.1")
		if _, err := io.WriteString(c, method+" /api/v1/keys/kochi/status HTTP/1.1\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		text, err := io.ReadAll(c)
		if err != nil && len(text) == 0 {
			t.Fatal(err)
		}
		head, body, _ := strings.Cut(string(text), "\r\n\r\n")
		var e struct{ Message string }
		if err := json.Unmarshal([]byte(body), &e); err != nil || e.Message == "" ||
			!strings.HasPrefix(head, "HTTP/1.1 400 ") {
			t.Errorf("%s: %q: %v", method, text, err)
		}
	}
}

// TestForeignBytes: what is neither TLS nor HTTP is not answered as HTTP.
func TestForeignBytes(t *testing.T) {
	w := newWorld(t, nil)
	for name, text := range map[string]string{
		"nothing": "", "SSH": "SSH-2.0-x\r\n", "a torn record": "\x16\x03\x01\x00\x05ab",
	} {
		c := connect(t, w, "127.0.0.1")
		if _, err := io.WriteString(c, text); err != nil {
			t.Fatal(err)
		}
		if err := c.(*net.TCPConn).CloseWrite(); err != nil {
			t.Fatal(err)
		}
		got, _ := io.ReadAll(c)
		if bytes.Contains(got, []byte("HTTP")) {
			t.Errorf("%s: %q", name, got)
		}
	}
}

// TestAnswersAreOneRecord: an answer with keys arrives whole with its head, in
// one record, also when its connection served refusals before.
func TestAnswersAreOneRecord(t *testing.T) {
	w := newWorld(t, nil)
	c, err := tls.Dial("tcp", w.addr, w.tls("tokyo"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for _, tt := range []struct {
		path string
		want string
	}{
		{"/api/v1/keys/kochi/enc_keys?number=3", "HTTP/1.1 200 OK"},
		{"/api/v1/keys/kochi/enc_keys?number=0", "HTTP/1.1 400 Bad Request"},
		{"/api/v1/keys/kochi/enc_keys", "HTTP/1.1 200 OK"},
		{"/api/v1/keys/kochi/enc_keys?number=100", "HTTP/1.1 200 OK"},
		{"/nowhere", "HTTP/1.1 404 Not Found"},
		{"/api/v1/keys/kochi/enc_keys", "HTTP/1.1 200 OK"},
	} {
		if _, err := io.WriteString(c, "GET "+tt.path+" HTTP/1.1\r\nHost: kme\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		record := make([]byte, 16<<10) // the longest there is
		n, err := c.Read(record)
		if err != nil {
			t.Fatal(err)
		}
		head, body, _ := strings.Cut(string(record[:n]), "\r\n\r\n")
		if !strings.HasPrefix(head, tt.want) || !json.Valid([]byte(body)) {
			t.Errorf("%s: %.300q", tt.path, record[:n])
		}
	}
}
