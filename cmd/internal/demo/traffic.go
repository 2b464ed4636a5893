package demo

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"time"
)

// recordLen is the length of one record of the generated file, and one record
// in sampleEvery is kept as a piece to search for.
const (
	recordLen   = 256
	sampleEvery = 8192
)

// records yields n bytes of made-up patient records with random contents, so
// that both ends can hash them and a capture can be searched for them.
type records struct {
	size, left int
	next       int
	buf        bytes.Buffer
	samples    [][]byte
}

func newRecords(n int) *records { return &records{size: n, left: n} }

func (r *records) Read(p []byte) (int, error) {
	if r.left == 0 {
		return 0, io.EOF
	}
	for r.buf.Len() < len(p) {
		r.record()
	}
	n, _ := r.buf.Read(p[:min(len(p), r.left)])
	r.left -= n
	return n, nil
}

func (r *records) record() {
	random := make([]byte, 96)
	_, _ = rand.Read(random) // never fails: crypto/rand ends the program instead
	start := r.buf.Len()
	fmt.Fprintf(&r.buf, "PATIENT RECORD %08d %x", r.next, random)
	for r.buf.Len() < start+recordLen-1 {
		r.buf.WriteByte('.')
	}
	r.buf.WriteByte('\n')
	if whole := (r.next + 1) * recordLen; r.next%sampleEvery == 0 && whole <= r.size {
		// 48 hexadecimal digits: long enough never to appear by chance, short
		// enough to fall whole into one packet most of the time.
		r.samples = append(r.samples, bytes.Clone(r.buf.Bytes()[start+24:start+72]))
	}
	r.next++
}

// namespace is where a site's sockets are made.
type namespace interface {
	// Do runs f with the calling thread inside the network namespace. Sockets
	// that f makes stay there.
	Do(f func() error) error
}

func listenTCP(ns namespace, addr string) (l net.Listener, err error) {
	err = ns.Do(func() error {
		l, err = net.Listen("tcp", addr)
		return err
	})
	return l, err
}

func dialTCP(ctx context.Context, ns namespace, addr string) (c net.Conn, err error) {
	err = ns.Do(func() error {
		// One address and no fallback dialling: the dialler must not move to a
		// goroutine of its own, which would be outside the namespace.
		d := net.Dialer{Timeout: 3 * time.Second, FallbackDelay: -1}
		c, err = d.DialContext(ctx, "tcp", addr)
		return err
	})
	return c, err
}

func listenUDP(ns namespace, addr string) (c *net.UDPConn, err error) {
	err = ns.Do(func() error {
		at, err := net.ResolveUDPAddr("udp", addr)
		if err != nil {
			return err
		}
		c, err = net.ListenUDP("udp", at)
		return err
	})
	return c, err
}

// transfer is a file sent from one site to the other.
type transfer struct {
	Bytes   int     `json:"bytes"`
	Seconds float64 `json:"seconds"`
	Mbps    float64 `json:"mbit_per_s"`
	SHA256  string  `json:"sha256"`
}

// sendFile sends a file from one namespace to addr in the other and compares
// the SHA-256 of what left with that of what came.
func sendFile(ctx context.Context, from, to namespace, addr string, file *records) (transfer, error) {
	l, err := listenTCP(to, addr)
	if err != nil {
		return transfer{}, err
	}
	defer l.Close()
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()

	type result struct {
		sum [sha256.Size]byte
		err error
	}
	came := make(chan result, 1)
	go func() {
		sum, err := receive(ctx, l)
		came <- result{sum, err}
	}()

	start := time.Now()
	left, err := send(ctx, from, addr, file)
	if err != nil {
		l.Close()
		return transfer{}, errors.Join(err, (<-came).err)
	}
	r := <-came
	if r.err != nil {
		return transfer{}, r.err
	}
	took := time.Since(start)
	if r.sum != left {
		return transfer{}, fmt.Errorf("SHA-256 differs: sent %x, received %x", left, r.sum)
	}
	return transfer{
		Bytes: file.size, Seconds: took.Seconds(),
		Mbps: float64(file.size) * 8 / 1e6 / took.Seconds(), SHA256: fmt.Sprintf("%x", r.sum),
	}, nil
}

func send(ctx context.Context, from namespace, addr string, file *records) (sum [sha256.Size]byte, err error) {
	c, err := dialTCP(ctx, from, addr)
	if err != nil {
		return sum, err
	}
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { c.Close() })
	defer stop()
	h := sha256.New()
	if _, err := io.CopyBuffer(c, io.TeeReader(file, h), make([]byte, 64<<10)); err != nil {
		return sum, fmt.Errorf("send file: %w", err)
	}
	if err := c.(*net.TCPConn).CloseWrite(); err != nil {
		return sum, fmt.Errorf("send file: %w", err)
	}
	// The receiver closes when it has everything: the time counts the last byte.
	_, _ = io.Copy(io.Discard, c)
	h.Sum(sum[:0])
	return sum, nil
}

func receive(ctx context.Context, l net.Listener) (sum [sha256.Size]byte, err error) {
	c, err := l.Accept()
	if err != nil {
		return sum, fmt.Errorf("receive file: %w", err)
	}
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { c.Close() })
	defer stop()
	h := sha256.New()
	if _, err := io.Copy(h, c); err != nil {
		return sum, fmt.Errorf("receive file: %w", err)
	}
	h.Sum(sum[:0])
	return sum, nil
}

// probe is a run of numbered datagrams: round-trip times where they are
// echoed, losses in any case.
type probe struct {
	Sent     int     `json:"sent"`
	Received int     `json:"received"`
	P50Ms    float64 `json:"p50_ms,omitempty"`
	P99Ms    float64 `json:"p99_ms,omitempty"`
}

// Lost is the number of datagrams that did not come.
func (p probe) Lost() int { return p.Sent - p.Received }

// ping sends count datagrams of size bytes, one every interval, to an echo in
// the other namespace and measures the round trips.
func ping(ctx context.Context, from, to namespace, fromAddr, toAddr string, count, size int, interval time.Duration) (probe, error) {
	echo, err := listenUDP(to, toAddr)
	if err != nil {
		return probe{}, err
	}
	defer echo.Close()
	c, err := listenUDP(from, fromAddr)
	if err != nil {
		return probe{}, err
	}
	defer c.Close()
	target := echo.LocalAddr().(*net.UDPAddr)
	go func() { // ends when echo is closed
		b := make([]byte, 2048)
		for {
			n, addr, err := echo.ReadFromUDP(b)
			if err != nil {
				return
			}
			_, _ = echo.WriteToUDP(b[:n], addr)
		}
	}()

	start := time.Now()
	rtt := make(chan []time.Duration, 1)
	go func() { rtt <- collect(c, start, count) }()
	b := make([]byte, size)
	tick := time.NewTicker(interval)
	defer tick.Stop()
	sent := 0
	for ; sent < count && ctx.Err() == nil; sent++ {
		binary.BigEndian.PutUint64(b, uint64(sent))
		binary.BigEndian.PutUint64(b[8:], uint64(time.Since(start)))
		_, _ = c.WriteToUDP(b, target) // a refused datagram counts as lost
		<-tick.C
	}
	_ = c.SetReadDeadline(time.Now().Add(500 * time.Millisecond))
	times := <-rtt
	p := probe{Sent: sent, Received: len(times)}
	if len(times) > 0 {
		slices.Sort(times)
		ms := func(d time.Duration) float64 { return float64(d.Microseconds()) / 1e3 }
		p.P50Ms, p.P99Ms = ms(times[len(times)/2]), ms(times[len(times)*99/100])
	}
	return p, ctx.Err()
}

// collect reads echoes until the deadline on c or until all came.
func collect(c *net.UDPConn, start time.Time, count int) []time.Duration {
	seen := make(map[uint64]bool, count)
	var times []time.Duration
	b := make([]byte, 2048)
	for len(times) < count {
		n, err := c.Read(b)
		if err != nil {
			break
		}
		seq := binary.BigEndian.Uint64(b)
		if n < 16 || seen[seq] {
			continue
		}
		seen[seq] = true
		times = append(times, time.Since(start)-time.Duration(binary.BigEndian.Uint64(b[8:])))
	}
	return times
}
