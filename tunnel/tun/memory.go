package tun

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"sync"
	"sync/atomic"

	"github.com/quietline/quietline/tunnel"
	"github.com/quietline/quietline/tunnel/segment"
)

// memoryDepth is how many packets wait in a queue of a memory device, as in
// the kernel's default TUN queue (TUN_READQ_SIZE, drivers/net/tun.c).
const memoryDepth = 500

// Memory is a device without a kernel: what the host would send is handed to
// Inject, what it would receive is taken from Take. Safe for concurrent use.
type Memory struct {
	name   string
	queues []*memoryQueue
	out    chan []byte
	mtu    atomic.Int64
	once   sync.Once
	closed chan struct{}
}

type memoryQueue struct {
	device *Memory
	in     chan tunnel.Frame
	packet []byte // scratch of the writing goroutine
}

// NewMemory returns a memory device of so many queues.
func NewMemory(name string, mtu, queues int) *Memory {
	m := &Memory{name: name, out: make(chan []byte, memoryDepth), closed: make(chan struct{})}
	m.mtu.Store(int64(mtu))
	for range queues {
		m.queues = append(m.queues, &memoryQueue{device: m,
			in: make(chan tunnel.Frame, memoryDepth)})
	}
	return m
}

// Inject is the host sending packet through queue number queue. It keeps no
// slice of the caller. [ErrFull] means that the packet is lost.
func (m *Memory) Inject(queue int, packet []byte) error {
	if mtu := int(m.mtu.Load()); len(packet) > mtu {
		return fmt.Errorf("inject packet of %d bytes: above the MTU of %d", len(packet), mtu)
	}
	return m.InjectFrame(queue, tunnel.Frame{Data: packet})
}

// InjectFrame is the host sending a super-frame, or a packet whose checksum is
// still to be made, as a kernel with offload does. It keeps no slice of the
// caller.
func (m *Memory) InjectFrame(queue int, f tunnel.Frame) error {
	f.Data = bytes.Clone(f.Data)
	select {
	case <-m.closed:
		return os.ErrClosed
	default:
	}
	select {
	case m.queues[queue].in <- f:
		return nil
	default:
		return ErrFull
	}
}

// Take waits for the next packet that the host would receive. It is the
// caller's.
func (m *Memory) Take(ctx context.Context) ([]byte, error) {
	select {
	case p := <-m.out:
		return p, nil
	case <-m.closed:
		return nil, os.ErrClosed
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// Queues implements [tunnel.Device].
func (m *Memory) Queues() []tunnel.Queue {
	qs := make([]tunnel.Queue, len(m.queues))
	for i, q := range m.queues {
		qs[i] = q
	}
	return qs
}

// Caps implements [tunnel.Device].
func (m *Memory) Caps() tunnel.Caps {
	return tunnel.Caps{Name: m.name, Backend: "memory", Offload: true, UDP: true,
		MTU: int(m.mtu.Load()), Reason: "a test"}
}

// SetMTU implements [tunnel.Device].
func (m *Memory) SetMTU(mtu int) error {
	m.mtu.Store(int64(mtu))
	return nil
}

// Close implements [tunnel.Device].
func (m *Memory) Close() error {
	m.once.Do(func() { close(m.closed) })
	return nil
}

// ReadBatch implements [tunnel.Queue].
func (q *memoryQueue) ReadBatch(frames []tunnel.Frame) (int, error) {
	if len(frames) == 0 {
		return 0, nil
	}
	var got tunnel.Frame
	select {
	case <-q.device.closed:
		return 0, os.ErrClosed
	case got = <-q.in:
	}
	for n := 0; ; {
		f := &frames[n]
		f.Data = append(f.Data[:0], got.Data...)
		f.GSO = got.GSO
		if n++; n == len(frames) {
			return n, nil
		}
		select {
		case got = <-q.in:
		default:
			return n, nil
		}
	}
}

// WriteBatch implements [tunnel.Queue]. Super-frames are split into packets.
func (q *memoryQueue) WriteBatch(frames []tunnel.Frame) (int, error) {
	for i, f := range frames {
		if f.GSO == (tunnel.GSO{}) {
			if err := q.put(f.Data); err != nil {
				return i, err
			}
			continue
		}
		if q.packet == nil {
			q.packet = make([]byte, 0, maxMTU)
		}
		if err := segment.Split(f, q.packet, q.put); err != nil {
			return i, err
		}
	}
	return len(frames), nil
}

func (q *memoryQueue) put(packet []byte) error {
	select {
	case <-q.device.closed:
		return os.ErrClosed
	default:
	}
	select {
	case q.device.out <- bytes.Clone(packet):
		return nil
	default:
		return ErrFull
	}
}
