package socket

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/quietline/quietline/hw"
	"github.com/quietline/quietline/secret"
)

// helloTimeout bounds the wait for the other side's first message: both are
// processes of one machine.
const helloTimeout = 5 * time.Second

// writeTimeout ends a connection whose other side does not read.
const writeTimeout = 10 * time.Second

// Source is what a device hands over through Serve, which calls each method
// from one goroutine at a time.
type Source interface {
	Describe() hw.Info
	// Next waits for the next block, each once; the caller owns its Bits. A
	// block must not be lost when ctx ends.
	Next(ctx context.Context) (hw.Block, error)
	// NextEvent waits for the next event; one may be lost when ctx ends.
	NextEvent(ctx context.Context) (hw.Event, error)
}

// Listen opens the socket file with mode 0600. It replaces a file nobody
// listens on and refuses one where somebody does.
func Listen(path string) (net.Listener, error) {
	if c, err := net.Dial("unix", path); err == nil {
		_ = c.Close()
		return nil, fmt.Errorf("listen on %s: another process does", path)
	}
	if info, err := os.Lstat(path); err == nil && info.Mode()&os.ModeSocket != 0 {
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("listen on %s: %w", path, err)
		}
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	// Between bind and chmod others can connect; the look at the peer's user
	// refuses them.
	if err := os.Chmod(path, 0o600); err != nil {
		_ = l.Close()
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	return l, nil
}

// server is the state that outlives a connection.
type server struct {
	src  Source
	info hw.Info

	mu   sync.Mutex
	held []hw.Block // handed out by src and not acknowledged, in order
}

// Serve hands over the source's blocks and events to one driver at a time, a
// new connection replacing the old, until ctx ends (nil) or the source or the
// listener fails. It closes the listener and clears what it holds.
func Serve(ctx context.Context, l net.Listener, src Source) error {
	s := &server{src: src, info: src.Describe()}
	defer s.clear()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stop := context.AfterFunc(ctx, func() { _ = l.Close() })
	defer stop()
	defer l.Close()

	end := func() {} // ends the connection before and waits for it
	defer func() { end() }()
	for {
		c, err := l.Accept()
		if ctx.Err() != nil {
			if err == nil {
				_ = c.Close()
			}
			if cause := context.Cause(ctx); !errors.Is(cause, context.Canceled) &&
				!errors.Is(cause, context.DeadlineExceeded) {
				return cause
			}
			return nil
		}
		if err != nil {
			return fmt.Errorf("accept driver: %w", err)
		}
		u, ok := c.(*net.UnixConn)
		if !ok {
			_ = c.Close()
			return errors.New("serve device: listener is not a unix socket's")
		}
		if err := checkPeer(u); err != nil {
			refuse(u, err)
			continue
		}
		end()
		connCtx, stopConn := context.WithCancel(ctx)
		done := make(chan struct{})
		go func() {
			defer close(done)
			if err := s.connection(connCtx, u); err != nil {
				cancel(err)
			}
		}()
		end = func() { stopConn(); <-done }
	}
}

func refuse(c net.Conn, why error) {
	_ = c.SetDeadline(time.Now().Add(helloTimeout))
	_, _ = c.Write(finish(appendString(frame(kindRefuse), why.Error())))
	_ = c.Close()
}

func (s *server) clear() {
	for _, b := range s.held {
		b.Bits.Clear()
	}
}

// connection serves one driver until it goes; the error is the source's.
func (s *server) connection(ctx context.Context, c *net.UnixConn) error {
	defer c.Close()
	_ = c.SetReadDeadline(time.Now().Add(helloTimeout))
	kind, body, err := readFrame(c)
	if err != nil {
		return nil
	}
	v, err := decodeHello(body)
	if kind != kindHello || err != nil || v != version {
		refuse(c, fmt.Errorf("hello of version %d expected", version))
		return nil
	}
	_ = c.SetReadDeadline(time.Time{})

	// Three goroutines: the one that reads, one for blocks, one for events.
	// The first that ends, with whatever error, ends all.
	g, ctx := errgroup.WithContext(ctx)
	stop := context.AfterFunc(ctx, func() { _ = c.Close() })
	defer stop()
	w := &writer{c: c}
	credits := make(chan struct{}, 64)
	g.Go(func() error { return s.listen(ctx, c, credits) })
	g.Go(func() error { return s.blocks(ctx, w, credits) })
	g.Go(func() error { return s.events(ctx, w) })
	err = g.Wait()
	var failed sourceError
	if errors.As(err, &failed) {
		return failed.error
	}
	return nil
}

// sourceError ends the server, not only the connection.
type sourceError struct{ error }

// errGone ends a connection.
var errGone = errors.New("driver is gone")

// writer lets two goroutines write whole frames. The mutex is held while a
// frame goes out, which is what it is for; the deadline bounds it.
type writer struct {
	mu sync.Mutex
	c  net.Conn
}

func (w *writer) write(b []byte) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	_ = w.c.SetWriteDeadline(time.Now().Add(writeTimeout))
	_, err := w.c.Write(b)
	return err
}

func (s *server) listen(ctx context.Context, r io.Reader, credits chan<- struct{}) error {
	for {
		kind, body, err := readFrame(r)
		if err != nil {
			return errGone
		}
		switch {
		case kind == kindCredit && len(body) == 0:
			select {
			case credits <- struct{}{}:
			case <-ctx.Done():
				return errGone
			default:
				return errGone // more credits open than any driver has calls
			}
		case kind == kindAck:
			generation, seq, err := decodeAck(body)
			if err != nil {
				return errGone
			}
			s.forget(generation, seq)
		default:
			return errGone
		}
	}
}

func (s *server) forget(generation, seq uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, b := range s.held {
		if b.Generation == generation && b.Seq == seq {
			b.Bits.Clear()
			s.held = append(s.held[:i], s.held[i+1:]...)
			return
		}
	}
}

// blocks answers each credit: first with what was not acknowledged when the
// connection began, then with what the source makes.
func (s *server) blocks(ctx context.Context, w *writer, credits <-chan struct{}) error {
	s.mu.Lock()
	again := append([]hw.Block(nil), s.held...)
	s.mu.Unlock()
	for {
		select {
		case <-credits:
		case <-ctx.Done():
			return errGone
		}
		raw, err := s.next(ctx, &again)
		if err != nil {
			return err
		}
		err = w.write(raw)
		secret.Wipe(raw)
		if err != nil {
			return errGone
		}
	}
}

// next encodes the next block to send: an old one that is still held, or a new
// one, held from now on.
func (s *server) next(ctx context.Context, again *[]hw.Block) ([]byte, error) {
	if raw := s.oldest(again); raw != nil {
		return raw, nil
	}
	b, err := s.src.Next(ctx)
	if err != nil {
		if ctx.Err() != nil {
			return nil, errGone
		}
		return nil, sourceError{fmt.Errorf("take block: %w", err)}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.held = append(s.held, b)
	return encodeBlock(b), nil
}

func (s *server) oldest(again *[]hw.Block) []byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	for len(*again) > 0 {
		b := (*again)[0]
		*again = (*again)[1:]
		if b.Bits.Len() > 0 { // 0: acknowledged meanwhile
			return encodeBlock(b)
		}
	}
	return nil
}

func (s *server) events(ctx context.Context, w *writer) error {
	// The info goes first, before any event; blocks need a credit, which the
	// driver sends after it.
	if w.write(encodeInfo(s.info)) != nil {
		return errGone
	}
	for {
		e, err := s.src.NextEvent(ctx)
		if err != nil {
			if ctx.Err() != nil {
				return errGone
			}
			return sourceError{fmt.Errorf("take event: %w", err)}
		}
		if w.write(encodeEvent(e)) != nil {
			return errGone
		}
	}
}
