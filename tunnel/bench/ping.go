package bench

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// pinger sends ICMP echo requests (RFC 792) from a blocking socket: the answer
// comes from the far kernel, and no scheduler of ours stands between.
type pinger struct {
	fd  int
	id  uint16
	seq uint16
	buf [256]byte
}

const (
	echoRequest = 8 // RFC 792
	echoReply   = 0
	echoHeader  = 8
	echoData    = 56 // as the ping program sends
	// lostAfter is when an answer is given up; it is also the figure noted.
	lostAfter = time.Second
)

var errLost = errors.New("no answer to a ping")

// newPinger opens a socket in the namespace of this thread.
func newPinger(to netip.Addr) (*pinger, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_ICMP)
	if err != nil {
		return nil, fmt.Errorf("open ICMP socket: %w", err)
	}
	wait := unix.NsecToTimeval(int64(lostAfter))
	err = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &wait)
	if err == nil {
		err = unix.Connect(fd, &unix.SockaddrInet4{Addr: to.As4()})
	}
	if err != nil {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("set up ICMP socket: %w", err)
	}
	return &pinger{fd: fd, id: uint16(rand.Uint32())}, nil
}

func (p *pinger) close() { _ = unix.Close(p.fd) }

// once sends a request and waits for its answer.
func (p *pinger) once() (time.Duration, error) {
	p.seq++
	began := time.Now()
	if err := unix.Send(p.fd, echo(p.id, p.seq), 0); err != nil {
		return 0, fmt.Errorf("%w: %w", errLost, err)
	}
	for {
		n, _, err := unix.Recvfrom(p.fd, p.buf[:], 0)
		took := time.Since(began)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return 0, fmt.Errorf("%w: %w", errLost, err)
		case answers(p.buf[:n], p.id, p.seq):
			return took, nil
		case took > lostAfter: // others' ICMP keeps coming
			return 0, errLost
		}
	}
}

// echo is an echo request.
func echo(id, seq uint16) []byte {
	b := make([]byte, echoHeader+echoData)
	b[0] = echoRequest
	binary.BigEndian.PutUint16(b[4:], id)
	binary.BigEndian.PutUint16(b[6:], seq)
	var sum uint32
	for i := 0; i < len(b); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	sum = sum>>16 + sum&0xffff
	binary.BigEndian.PutUint16(b[2:], ^uint16(sum+sum>>16))
	return b
}

// answers tells whether an IPv4 packet is the echo reply to a request.
func answers(packet []byte, id, seq uint16) bool {
	if len(packet) < 20 {
		return false
	}
	head := int(packet[0]&15) * 4
	if len(packet) < head+echoHeader {
		return false
	}
	b := packet[head:]
	return b[0] == echoReply && binary.BigEndian.Uint16(b[4:]) == id &&
		binary.BigEndian.Uint16(b[6:]) == seq
}

// delays are round trips; one without an answer counts as lostAfter.
type delays []time.Duration

// into notes median and 99th percentile, in microseconds.
func (d delays) into(f Figures, p50, p99 string) {
	slices.Sort(d)
	f[p50], f[p99] = d.at(0.50), d.at(0.99)
}

// at is a quantile by the nearest rank, in microseconds.
func (d delays) at(q float64) float64 {
	return float64(d[min(int(q*float64(len(d))), len(d)-1)]) / float64(time.Microsecond)
}

// ping sends the first request at once and goes on while more says so, which
// is told how many have been sent.
func (p *pair) ping(gap time.Duration, more func(n int) bool) (delays, error) {
	var all delays
	err := p.ns[0].Do(func() error {
		e, err := newPinger(p.target)
		if err != nil {
			return err
		}
		defer e.close()
		for n := 0; n == 0 || more(n); n++ {
			took, err := e.once()
			if err != nil {
				took = lostAfter
			}
			all = append(all, took)
			time.Sleep(gap)
		}
		return nil
	})
	return all, err
}

// await waits until something answers at the far end.
func (p *pair) await(ctx context.Context, within time.Duration) error {
	deadline := time.Now().Add(within)
	for {
		err := p.ns[0].Do(func() error {
			e, err := newPinger(p.target)
			if err != nil {
				return err
			}
			defer e.close()
			_, err = e.once()
			return err
		})
		switch {
		case err == nil:
			return nil
		case ctx.Err() != nil:
			return ctx.Err()
		case time.Now().After(deadline):
			return fmt.Errorf("%w within %s: %w", ErrDown, within, err)
		}
		time.Sleep(20 * time.Millisecond) // an interface that is not there yet fails at once
	}
}
