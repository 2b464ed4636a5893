package socket

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/quietline/quietline/hw"
	"github.com/quietline/quietline/hw/hwtest"
	"github.com/quietline/quietline/secret"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// counted is a queue that counts what was taken from it.
type counted struct {
	*Queue
	taken atomic.Int64
}

func (c *counted) Next(ctx context.Context) (hw.Block, error) {
	b, err := c.Queue.Next(ctx)
	if err == nil {
		c.taken.Add(1)
	}
	return b, err
}

// cutter remembers accepted connections so that a test can break them.
type cutter struct {
	net.Listener
	mu   sync.Mutex
	last net.Conn
}

func (c *cutter) Accept() (net.Conn, error) {
	conn, err := c.Listener.Accept()
	if err == nil {
		c.mu.Lock()
		c.last = conn
		c.mu.Unlock()
	}
	return conn, err
}

func (c *cutter) cut() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.last != nil {
		_ = c.last.Close()
	}
}

// tempPath is short: the address of a Unix socket holds 107 bytes.
func tempPath(t *testing.T) string {
	dir, err := os.MkdirTemp("", "ql")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return filepath.Join(dir, "s")
}

// serve starts Serve and ends it with the test.
func serve(t *testing.T, path string, src Source) *cutter {
	t.Helper()
	l, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	c := &cutter{Listener: l}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- Serve(ctx, c, src) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("serve: %v", err)
		}
	})
	return c
}

func open(t *testing.T, path string) *Driver {
	t.Helper()
	d, err := Open("unix://"+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = d.Close() })
	return d
}

var testInfo = hw.Info{Vendor: "Quietline", Model: "simulator", Serial: "1",
	Randomness: "getrandom", Simulated: true, BlockBytes: 32816}

func TestConformance(t *testing.T) {
	hwtest.Run(t, func(t *testing.T) hwtest.Bench {
		src := &counted{Queue: NewQueue(testInfo)}
		path := tempPath(t)
		c := serve(t, path, src)
		return hwtest.Bench{
			Driver: open(t, path), Info: testInfo, Feed: src.Put, Emit: src.Emit,
			Taken: func() int { return int(src.taken.Load()) }, Cut: c.cut,
		}
	})
}

func read(t *testing.T, d *Driver) hw.Block {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	var b hw.Block
	if err := d.ReadBlock(ctx, &b); err != nil {
		t.Fatal(err)
	}
	return b
}

func TestDriverWaitsForDevice(t *testing.T) {
	path := tempPath(t)
	d := open(t, path)
	if got := d.Describe(); got != (hw.Info{}) {
		t.Errorf("info before the first connection: %+v", got)
	}
	if err := d.Ack(context.Background(), 1, 1); !errors.Is(err, ErrNotConnected) {
		t.Errorf("acknowledge: %v", err)
	}
	got := make(chan hw.Block, 1)
	go func() { got <- read(t, d) }()
	src := NewQueue(testInfo)
	src.Put(hwtest.NewBlock(1, 1, 32))
	serve(t, path, src)
	if b := <-got; b.Seq != 1 {
		t.Errorf("block %d", b.Seq)
	}
}

func TestNewDriverReplacesOld(t *testing.T) {
	path := tempPath(t)
	src := NewQueue(testInfo)
	serve(t, path, src)
	src.Put(hwtest.NewBlock(1, 1, 32))
	first := open(t, path)
	read(t, first)
	_ = first.Close()
	if b := read(t, open(t, path)); b.Seq != 1 {
		t.Errorf("the second driver got block %d", b.Seq)
	}
}

func TestSocketFileIsPrivate(t *testing.T) {
	path := tempPath(t)
	serve(t, path, NewQueue(testInfo))
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if got := info.Mode().Perm(); got != 0o600 {
		t.Errorf("mode is %04o", got)
	}
	if _, err := Listen(path); err == nil || !strings.Contains(err.Error(), "another process") {
		t.Errorf("second listener: %v", err)
	}
}

func TestListenReplacesOnlyStaleSockets(t *testing.T) {
	path := tempPath(t)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	_ = l.Close()
	again, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	_ = again.Close()
	if err := os.WriteFile(path, []byte("a file"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(path); err == nil {
		t.Error("a plain file was replaced")
	}
}

func TestOnlyOwnUserAndRoot(t *testing.T) {
	for _, c := range []struct {
		peer, own int
		ok        bool
	}{{1000, 1000, true}, {0, 1000, true}, {0, 0, true}, {1000, 0, false}, {1001, 1000, false}} {
		err := allowed(c.peer, c.own)
		if (err == nil) != c.ok || (err != nil && !errors.Is(err, hw.ErrRefused)) {
			t.Errorf("user %d at %d: %v", c.peer, c.own, err)
		}
	}
}

func TestAddresses(t *testing.T) {
	for _, bad := range []string{"", "unix://relative/path", "unix:rel", "tcp:///x",
		"unix:///x?y=1", "unix://%zz"} {
		if d, err := Open(bad, nil); err == nil {
			_ = d.Close()
			t.Errorf("%q was accepted", bad)
		}
	}
}

type failing struct{ *Queue }

var errBroken = errors.New("laser is broken")

func (failing) Next(context.Context) (hw.Block, error) { return hw.Block{}, errBroken }

func TestFailedSourceEndsServe(t *testing.T) {
	path := tempPath(t)
	l, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- Serve(context.Background(), l, failing{NewQueue(testInfo)}) }()
	d := open(t, path)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		var b hw.Block
		_ = d.ReadBlock(ctx, &b)
	}()
	if err := <-done; !errors.Is(err, errBroken) {
		t.Errorf("serve ended with %v", err)
	}
	cancel()
	<-ended
}

// A device that refuses, and one of another version, need a person.
func TestRefusalReachesReader(t *testing.T) {
	for name, answer := range map[string][]byte{
		"refuse":  finish(appendString(frame(kindRefuse), "not you")),
		"version": finish(append(frame(kindInfo), 9, 0, 0)),
	} {
		t.Run(name, func(t *testing.T) {
			path := tempPath(t)
			l, err := Listen(path)
			if err != nil {
				t.Fatal(err)
			}
			done := make(chan struct{})
			go func() {
				defer close(done)
				for {
					c, err := l.Accept()
					if err != nil {
						return
					}
					_, _, _ = readFrame(c)
					_, _ = c.Write(answer)
					_ = c.Close()
				}
			}()
			t.Cleanup(func() { _ = l.Close(); <-done })
			d := open(t, path)
			ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
			defer cancel()
			var b hw.Block
			if err := d.ReadBlock(ctx, &b); !errors.Is(err, hw.ErrRefused) {
				t.Errorf("read: %v", err)
			}
		})
	}
}

// Nonsense from a driver ends its connection and nothing else.
func TestNonsenseEndsConnection(t *testing.T) {
	path := tempPath(t)
	src := NewQueue(testInfo)
	serve(t, path, src)
	for _, raw := range [][]byte{
		{}, {1}, {0, 0, 0, 0}, {0xff, 0xff, 0xff, 0xff}, finish(frame(kindCredit)),
		finish(append(frame(kindHello), "QLHW\x02\x00"...)),
		append(encodeHello(), finish(frame(99))...),
		append(encodeHello(), finish(append(frame(kindAck), 1))...),
		append(encodeHello(), bytes.Repeat(finish(frame(kindCredit)), 100)...),
	} {
		c, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = c.Write(raw)
		if len(raw) < 5 {
			_ = c.(*net.UnixConn).CloseWrite()
		}
		_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
		buf := make([]byte, 1024)
		for err == nil {
			_, err = c.Read(buf)
		}
		if errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("% x: connection stays", raw[:min(8, len(raw))])
		}
		_ = c.Close()
	}
	src.Put(hwtest.NewBlock(1, 1, 32))
	if b := read(t, open(t, path)); b.Seq != 1 {
		t.Errorf("block %d", b.Seq)
	}
}

func TestFullQueueDropsOldest(t *testing.T) {
	q := NewQueue(testInfo)
	for i := range uint64(maxQueue + 2) {
		q.Put(hwtest.NewBlock(1, i, 16))
	}
	if q.Len() != maxQueue {
		t.Errorf("%d blocks wait", q.Len())
	}
	b, err := q.Next(context.Background())
	if err != nil || b.Seq != 2 {
		t.Errorf("oldest is %d, %v", b.Seq, err)
	}
	if e, err := q.NextEvent(context.Background()); err != nil || e.Alarm != "block dropped" {
		t.Errorf("event %+v, %v", e, err)
	}
	q.Clear()
	if q.Len() != 0 {
		t.Error("blocks after Clear")
	}
}

func TestNothingPrintsBits(t *testing.T) {
	b := hw.Block{Bits: secret.Own([]byte("SECRETSECRET"))}
	_, err := decodeBlock(encodeBlock(b)[5:20])
	for _, s := range []string{fmt.Sprintf("%v %+v %#v %x", b, b, b, b.Bits), fmt.Sprint(err)} {
		if strings.Contains(s, "SECRET") || strings.Contains(s, "534543524554") {
			t.Errorf("printed: %s", s)
		}
	}
}

// Every parser takes a message only in the one form its encoder gives it.
func FuzzMessages(f *testing.F) {
	f.Add(byte(kindHello), encodeHello()[5:])
	f.Add(byte(kindInfo), encodeInfo(testInfo)[5:])
	f.Add(byte(kindBlock), encodeBlock(hwtest.NewBlock(3, 4, 20))[5:])
	f.Add(byte(kindAck), encodeAck(1, 2)[5:])
	f.Add(byte(kindEvent), encodeEvent(hw.Event{At: time.Unix(1, 1), Alarm: "a"})[5:])
	f.Add(byte(kindEvent), encodeEvent(hw.Event{Status: &hw.Status{Up: true, Reason: "r"}})[5:])
	f.Fuzz(func(t *testing.T, kind byte, body []byte) {
		var again []byte
		var err error
		switch kind {
		case kindHello:
			var v uint16
			if v, err = decodeHello(body); v == version {
				again = encodeHello()
			}
		case kindInfo:
			var i hw.Info
			i, err = decodeInfo(body)
			again = encodeInfo(i)
		case kindBlock:
			var b hw.Block
			b, err = decodeBlock(body)
			again = encodeBlock(b)
		case kindAck:
			var g, s uint64
			g, s, err = decodeAck(body)
			again = encodeAck(g, s)
		case kindEvent:
			var e hw.Event
			e, err = decodeEvent(body)
			again = encodeEvent(e)
		}
		if err == nil && again != nil && !bytes.Equal(again[5:], body) {
			t.Fatalf("kind %d: %x becomes %x", kind, body, again[5:])
		}
		if err != nil && !errors.Is(err, ErrProtocol) && !errors.Is(err, hw.ErrRefused) {
			t.Fatal(err)
		}
	})
}

func TestFrameIsBounded(t *testing.T) {
	_, _, err := readFrame(bytes.NewReader([]byte{0, 0, 0, 0x10, 1}))
	if !errors.Is(err, ErrProtocol) {
		t.Errorf("frame of 256 MiB: %v", err)
	}
	if diff := cmp.Diff([]byte{1, 0, 0, 0, kindCredit}, finish(frame(kindCredit))); diff != "" {
		t.Error(diff)
	}
}
