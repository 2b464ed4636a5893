package bench

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"

	"github.com/quietline/quietline/secret"
	"github.com/quietline/quietline/tunnel"
	"github.com/quietline/quietline/tunnel/lab"
	"github.com/quietline/quietline/tunnel/line"
	"github.com/quietline/quietline/tunnel/rekey"
	"github.com/quietline/quietline/tunnel/seal"
	"github.com/quietline/quietline/tunnel/tun"
	"github.com/quietline/quietline/tunnel/wire"
)

// setup tells a process which end of what it is. The secrets are of this run
// and protect nothing: what flows is iperf3's.
type setup struct {
	Kind          string // "line", "copy", "pad" or "plain"
	End           byte   // 0 or 1
	MTU           int    // of the cable
	Local, Remote netip.AddrPort
	Inner         netip.Prefix
	Seed, Peer    []byte // our static seed, the peer's public key
	Link          []byte
}

// ours starts a process an end and tells it by its standard input.
func ours(kind string) func(p *pair) error {
	return func(p *pair) error {
		link := secret.New(32)
		_, _ = rand.Read(link.Expose())
		var seeds, publics [2][]byte
		for i := range seeds {
			seeds[i] = make([]byte, 32)
			_, _ = rand.Read(seeds[i])
			public, err := rekey.Public(rekey.XWing, secret.Copy(seeds[i]))
			if err != nil {
				return err
			}
			publics[i] = public
		}
		for i := range p.ns {
			s := setup{Kind: kind, End: byte(i), MTU: p.opt.MTU, Inner: innerAddr[i], Seed: seeds[i],
				Local:  netip.AddrPortFrom(cableAddr[i].Addr(), outerPort),
				Remote: netip.AddrPortFrom(cableAddr[1-i].Addr(), outerPort),
				Peer:   publics[1-i], Link: link.Expose()}
			if err := p.end(i, s); err != nil {
				return err
			}
		}
		return nil
	}
}

func (p *pair) end(i int, s setup) error {
	text, err := json.Marshal(s)
	if err != nil {
		return err
	}
	in, out, err := os.Pipe()
	if err != nil {
		return err
	}
	defer in.Close()
	cmd := exec.Command(p.opt.Self[0], p.opt.Self[1:]...)
	cmd.Stdin = in
	if err := p.start(i, &p.tunnels, cmd); err != nil {
		_ = out.Close()
		return err
	}
	p.tunnels[len(p.tunnels)-1].stdin = out
	_, err = out.Write(append(text, '\n'))
	return err
}

// End is one end of our own, in a process that [Run] has started: it reads from
// in what to be, and is that until in ends. It works only inside a lab, so that
// nobody mistakes what it does for protection.
func End(ctx context.Context, in io.Reader) error {
	if !lab.Inside() {
		return fmt.Errorf("run end: %w", lab.ErrOutside)
	}
	var s setup
	d := json.NewDecoder(in)
	if err := d.Decode(&s); err != nil {
		return fmt.Errorf("run end: read what to be: %w", err)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() { // ends with the process
		_, _ = io.Copy(io.Discard, in)
		cancel()
	}()
	switch s.Kind {
	case "line":
		return s.run(ctx, rekey.PQCOnly, line.Config{})
	case "copy":
		return s.run(ctx, rekey.PQCOnly, line.Config{
			Cipher: func([]byte) (seal.AEAD, error) { return copier{}, nil }})
	case "pad":
		return s.pad(ctx)
	case "plain":
		return s.plain(ctx)
	}
	return fmt.Errorf("run end: %w: kind %q", ErrOptions, s.Kind)
}

// open makes device and socket.
func (s *setup) open(backend string) (tunnel.Device, line.Conn, error) {
	mtu, err := wire.InnerMTU(s.MTU, s.Remote.Addr())
	if err != nil {
		return nil, nil, err
	}
	dev, err := tun.Open(tun.Config{Name: "ql0", Addresses: []netip.Prefix{s.Inner}, MTU: mtu,
		Backend: backend})
	if err != nil {
		return nil, nil, err
	}
	conn, err := line.DialUDP(s.Local, s.Remote)
	if err != nil {
		return nil, nil, errors.Join(err, dev.Close())
	}
	return dev, conn, nil
}

// run runs a line as the daemon does, with secrets of its own making.
func (s *setup) run(ctx context.Context, policy rekey.Policy, cfg line.Config) error {
	m, err := rekey.New(rekey.Config{StaticSeed: secret.Own(s.Seed), PeerStatic: s.Peer,
		LinkSecret: secret.Own(s.Link), Policy: policy})
	if err != nil {
		return err
	}
	dev, conn, err := s.open("auto")
	if err != nil {
		return err
	}
	cfg.Device, cfg.Conn, cfg.Machine = dev, conn, m
	l, err := line.New(cfg)
	if err != nil {
		return errors.Join(err, dev.Close(), conn.Close())
	}
	return l.Run(ctx)
}

// copier is no cipher: it moves the bytes a cipher would, so that the rest of
// the path can be measured. A tag is zeroes.
type copier struct{}

var errTag = errors.New("record shorter than its tag")

func (copier) Seal(dst, _, plaintext, _ []byte) []byte {
	var tag [wire.TagLen]byte
	return append(append(dst, plaintext...), tag[:]...)
}

func (copier) Open(dst, _, ciphertext, _ []byte) ([]byte, error) {
	n := len(ciphertext) - wire.TagLen
	if n < 0 {
		return nil, errTag
	}
	return append(dst, ciphertext[:n]...), nil
}

// plain forwards each packet by itself as it is: what a tunnel costs that does
// nothing well and nothing at all to the packet.
func (s *setup) plain(ctx context.Context) error {
	dev, conn, err := s.open("water")
	if err != nil {
		return err
	}
	errs := make(chan error, 2)
	go func() { errs <- forwardOut(dev.Queues()[0], conn) }()
	go func() { errs <- forwardIn(conn, dev.Queues()[0]) }()
	select {
	case err = <-errs:
		err = errors.Join(err, dev.Close(), conn.Close())
	case <-ctx.Done():
		err = errors.Join(dev.Close(), conn.Close())
		<-errs
	}
	<-errs
	return err
}

func forwardOut(q tunnel.Queue, conn line.Conn) error {
	buf := make([]byte, 0, 1<<16)
	for {
		frames := [1]tunnel.Frame{{Data: buf}}
		if _, err := q.ReadBatch(frames[:]); err != nil {
			return err
		}
		p := frames[0].Data
		// What does not go out is lost, as on any network.
		_ = conn.Write(line.Burst{Data: p, Size: len(p)})
	}
}

func forwardIn(conn line.Conn, q tunnel.Queue) error {
	buf := make([]byte, 0, 1<<16)
	for {
		b := line.Burst{Data: buf}
		if err := conn.Read(&b, true); err != nil {
			return err
		}
		for data := b.Data; len(data) > 0; {
			n := min(b.Size, len(data))
			// A packet that the host does not take is lost too.
			_, _ = q.WriteBatch([]tunnel.Frame{{Data: data[:n]}})
			data = data[n:]
		}
	}
}
