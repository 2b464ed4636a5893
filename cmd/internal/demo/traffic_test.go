package demo

import (
	"bytes"
	"context"
	"io"
	"net"
	"strings"
	"testing"
	"time"
)

// here is the namespace the test runs in: traffic on loopback.
type here struct{}

func (here) Do(f func() error) error { return f() }

// freeAddr is a loopback address that nobody listens on.
func freeAddr(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

func TestRecordsAreWhatTheSearchLooksFor(t *testing.T) {
	const size = 3*sampleEvery*recordLen + 100 // a torn record at the end
	r := newRecords(size)
	all, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	if len(all) != size {
		t.Fatalf("read %d bytes, want %d", len(all), size)
	}
	if len(r.samples) != 3 {
		t.Fatalf("%d samples, want 3", len(r.samples))
	}
	for i, s := range r.samples {
		if n := bytes.Count(all, s); n != 1 {
			t.Errorf("sample %d (%q) stands %d times in the file, want once", i, s, n)
		}
	}
	again, err := io.ReadAll(newRecords(size))
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Equal(all, again) {
		t.Error("two files are equal: an old recording would pass for a new one")
	}
}

func TestSendFileComparesBothEnds(t *testing.T) {
	file := newRecords(1 << 20)
	got, err := sendFile(t.Context(), here{}, here{}, freeAddr(t), file)
	if err != nil {
		t.Fatal(err)
	}
	if got.Bytes != 1<<20 || len(got.SHA256) != 64 || got.Mbps <= 0 {
		t.Errorf("transfer = %+v", got)
	}
}

func TestSendFileSeesAChangedByte(t *testing.T) {
	target := freeAddr(t)
	middle, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer middle.Close()
	done := make(chan struct{})
	go func() { // a middlebox that flips one bit; ends with its one connection
		defer close(done)
		in, err := middle.Accept()
		if err != nil {
			return
		}
		defer in.Close()
		out, err := net.Dial("tcp", target)
		if err != nil {
			return
		}
		defer out.Close()
		b := make([]byte, 1000)
		if _, err := io.ReadFull(in, b); err != nil {
			return
		}
		b[500] ^= 1
		_, _ = out.Write(b)
		_, _ = io.Copy(out, in)
		_ = out.(*net.TCPConn).CloseWrite()
		_, _ = io.Copy(in, out)
	}()
	l, err := net.Listen("tcp", target)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	type sums struct{ left, came [32]byte }
	var s sums
	received := make(chan error, 1)
	go func() {
		var err error
		s.came, err = receive(t.Context(), l)
		received <- err
	}()
	s.left, err = send(t.Context(), here{}, middle.Addr().String(), newRecords(1<<16))
	if err != nil {
		t.Fatal(err)
	}
	if err := <-received; err != nil {
		t.Fatal(err)
	}
	<-done
	if s.left == s.came {
		t.Error("a changed byte left both sums equal")
	}
}

func TestSendFileEndsWithItsContext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := sendFile(ctx, here{}, here{}, freeAddr(t), newRecords(1<<20)); err == nil {
		t.Error("a cancelled transfer succeeded")
	}
}

func TestPingCountsWhatCameBack(t *testing.T) {
	p, err := ping(t.Context(), here{}, here{}, "127.0.0.1:0", "127.0.0.1:0", 50, 64, time.Millisecond)
	if err != nil {
		t.Fatal(err)
	}
	if p.Sent != 50 || p.Lost() != 0 {
		t.Errorf("probe = %+v, want 50 sent and none lost on loopback", p)
	}
	if p.P50Ms <= 0 || p.P99Ms < p.P50Ms {
		t.Errorf("round trips p50 %v ms, p99 %v ms", p.P50Ms, p.P99Ms)
	}
}

func TestViewForms(t *testing.T) {
	s := sample{
		SiftedBPS: 512e3, QBER: 0.0123, SecretBPS: 98e3, Stored: [2]int{10, 11},
		Delivered: [2]int{3, 3}, Epoch: 2, EpochAge: 1.25, Level: "QKD", Mbps: 12,
	}
	r := &Report{Verdict: "all held", QBER: 0.0123, FirstKeySeconds: 4, File: transfer{Bytes: 1 << 20}}
	for _, c := range []struct {
		name string
		opt  Options
		want []string
	}{
		{"plain", Options{}, []string{"A TITLE", "sifted 512.0 kbit/s", "QBER 1.23 %", "stored 10/11", "epoch 2 QKD 1.2 s", "SUMMARY  all held"}},
		{"terminal", Options{Terminal: true}, []string{"secret 98.0 kbit/s", "kochi stored 11", "SUMMARY"}},
		{"json", Options{JSON: true}, []string{`"event":"stage"`, `"event":"sample"`, `"qber":0.0123`, `"event":"summary"`, `"verdict":"all held"`}},
	} {
		t.Run(c.name, func(t *testing.T) {
			var out strings.Builder
			c.opt.Out = &out
			v := newView(c.opt, time.Now())
			v.stage("x", "a title")
			v.show(s, 0)
			v.line("a note")
			v.summary(r)
			for _, want := range c.want {
				if !strings.Contains(out.String(), want) {
					t.Errorf("output lacks %q:\n%s", want, out.String())
				}
			}
			if c.opt.JSON {
				for line := range strings.Lines(out.String()) {
					if !strings.HasPrefix(line, "{") || !strings.HasSuffix(line, "}\n") {
						t.Errorf("not one object per line: %q", line)
					}
				}
			}
		})
	}
}
