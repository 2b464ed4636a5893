package bench

import (
	"bytes"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

var reports = []struct {
	name, text string
	want       transfer
	err        string // "" = none
}{
	{"TCP", `{"start":{},"end":{"sum_sent":{"bytes":1250,"retransmits":3},
		"sum_received":{"seconds":2.0,"bytes":1000,"bits_per_second":4000}}}`,
		transfer{bits: 4000, bytes: 1000, retransmits: 3}, ""},
	{"UDP", `{"end":{"sum":{"seconds":2,"bytes":64000,"packets":1000,"lost_packets":400}}}`,
		transfer{packets: 300}, ""},
	{"UDP of a newer iperf3", `{"end":{"sum":{"seconds":1,"packets":10,"lost_packets":1},
		"sum_sent":{"packets":10},"sum_received":{"bytes":576,"packets":10,"lost_packets":1}}}`,
		transfer{packets: 9}, ""},
	{"UDP, all lost", `{"end":{"sum":{"seconds":2,"packets":5,"lost_packets":5}}}`,
		transfer{}, "without a transfer"},
	{"UDP in no time", `{"end":{"sum":{"packets":5}}}`, transfer{}, "without a transfer"},
	{"TCP, nothing came", `{"end":{"sum_sent":{"bytes":9},"sum_received":{"bytes":0}}}`,
		transfer{}, "without a transfer"},
	{"error", `{"start":{},"end":{},"error":"unable to connect to server: Connection refused"}`,
		transfer{}, "Connection refused"},
	{"empty", ``, transfer{}, "read report"},
	{"not JSON", `iperf3: parameter error`, transfer{}, "read report"},
	{"other JSON", `{}`, transfer{}, "without a transfer"},
}

func TestParseIperf(t *testing.T) {
	for _, tt := range reports {
		got, err := parseIperf([]byte(tt.text))
		if diff := cmp.Diff(tt.want, got, cmp.AllowUnexported(transfer{})); diff != "" {
			t.Errorf("%s: %s", tt.name, diff)
		}
		if (err != nil) != (tt.err != "") ||
			err != nil && (!errors.Is(err, ErrIperf) || !strings.Contains(err.Error(), tt.err)) {
			t.Errorf("%s: %v, want %q", tt.name, err, tt.err)
		}
	}
}

func TestNotYet(t *testing.T) {
	for text, want := range map[string]bool{
		"unable to connect to server: Connection refused":              true,
		"the server is busy running a test. try again later":           true,
		"unable to connect to server: Connection reset by peer":        true,
		"unable to receive results: Connection reset by peer":          false,
		"control socket has closed unexpectedly":                       false,
		"unable to connect to server: No route to host":                false,
		"unable to create a new stream: Cannot allocate memory (busy)": false,
	} {
		if got := notYet(fmt.Errorf("%w: %s", ErrIperf, text)); got != want {
			t.Errorf("%s: %v", text, got)
		}
	}
	if notYet(nil) || notYet(errors.New("Connection refused")) {
		t.Error("what iperf3 has not said is taken for its word")
	}
}

func FuzzParseIperf(f *testing.F) {
	for _, r := range reports {
		f.Add([]byte(r.text))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		got, err := parseIperf(b)
		if err == nil && got.packets <= 0 && got.bytes <= 0 {
			t.Errorf("a transfer of nothing: %+v", got)
		}
	})
}

func TestEcho(t *testing.T) {
	b := echo(0x1234, 0x5678)
	var sum uint32
	for i := 0; i < len(b); i += 2 {
		sum += uint32(b[i])<<8 | uint32(b[i+1])
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	if sum != 0xffff { // RFC 1071: with the checksum in place all bits are one
		t.Errorf("checksum: %x", sum)
	}
	ip := append(make([]byte, 24), b...)
	ip[0], ip[24] = 0x46, echoReply
	for _, tt := range []struct {
		name   string
		change func([]byte) []byte
		want   bool
	}{
		{"the answer", func(b []byte) []byte { return b }, true},
		{"a request", func(b []byte) []byte { b[24] = echoRequest; return b }, false},
		{"another's", func(b []byte) []byte { b[28]++; return b }, false},
		{"an earlier one", func(b []byte) []byte { b[31]--; return b }, false},
		{"short", func(b []byte) []byte { return b[:31] }, false},
		{"shorter than IP", func(b []byte) []byte { return b[:19] }, false},
		{"nothing", func([]byte) []byte { return nil }, false},
	} {
		if got := answers(tt.change(bytes.Clone(ip)), 0x1234, 0x5678); got != tt.want {
			t.Errorf("%s: %v", tt.name, got)
		}
	}
}

func FuzzAnswers(f *testing.F) {
	f.Add(append([]byte{0x45}, make([]byte, 27)...))
	f.Add([]byte{0x4f})
	f.Fuzz(func(t *testing.T, b []byte) {
		if answers(b, 1, 2) && (len(b) < 28 || answers(b, 1, 3)) {
			t.Errorf("%x answers", b)
		}
	})
}

func TestQuantiles(t *testing.T) {
	var d delays
	for i := 100; i > 0; i-- {
		d = append(d, time.Duration(i)*time.Microsecond)
	}
	f := Figures{}
	d.into(f, PingIdle50, PingIdle99)
	if f[PingIdle50] != 51 || f[PingIdle99] != 100 {
		t.Errorf("%v", f)
	}
	delays{lostAfter}.into(f, PingIdle50, PingIdle99)
	if f[PingIdle50] != 1e6 || f[PingIdle99] != 1e6 {
		t.Errorf("a lost ping: %v", f)
	}
}

// wgSocket answers one set operation.
func wgSocket(t *testing.T, answer string) (path string, got <-chan string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "wg.sock")
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	said := make(chan string, 1)
	go func() {
		defer ln.Close()
		c, err := ln.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		b := make([]byte, 1000)
		n, _ := c.Read(b)
		said <- string(b[:n])
		_, _ = c.Write([]byte(answer))
	}()
	return path, said
}

func TestConfigureWireguard(t *testing.T) {
	for answer, ok := range map[string]bool{
		"errno=0\n\n": true, "errno=-22\n\n": false, "": false, "errno=0x\n": false,
	} {
		path, got := wgSocket(t, answer)
		err := configure(path, "set=1\nlisten_port=1\n\n")
		if (err == nil) != ok {
			t.Errorf("answer %q: %v", answer, err)
		}
		if sent := <-got; sent != "set=1\nlisten_port=1\n\n" {
			t.Errorf("sent %q", sent)
		}
	}
}

func TestSelfSigned(t *testing.T) {
	cert, key, fingerprint, err := selfSigned("end0")
	if err != nil {
		t.Fatal(err)
	}
	pair, err := tls.X509KeyPair([]byte(cert), []byte(key))
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(pair.Certificate[0])
	if got := strings.ReplaceAll(fingerprint, ":", ""); got != fmt.Sprintf("%x", sum) ||
		strings.Count(fingerprint, ":") != len(sum)-1 {
		t.Errorf("fingerprint %s of %x", fingerprint, sum)
	}
}
