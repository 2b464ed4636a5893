package tun

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"sync"
	"sync/atomic"

	"github.com/quietline/quietline/tunnel"
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
	in     chan []byte
}

// NewMemory returns a memory device of so many queues.
func NewMemory(name string, mtu, queues int) *Memory {
	m := &Memory{name: name, out: make(chan []byte, memoryDepth), closed: make(chan struct{})}
	m.mtu.Store(int64(mtu))
	for range queues {
		m.queues = append(m.queues, &memoryQueue{m, make(chan []byte, memoryDepth)})
	}
	return m
}

// Inject is the host sending packet through queue number queue. It keeps no
// slice of the caller. [ErrFull] means that the packet is lost.
func (m *Memory) Inject(queue int, packet []byte) error {
	if mtu := int(m.mtu.Load()); len(packet) > mtu {
		return fmt.Errorf("inject packet of %d bytes: above the MTU of %d", len(packet), mtu)
	}
	select {
	case <-m.closed:
		return os.ErrClosed
	default:
	}
	select {
	case m.queues[queue].in <- bytes.Clone(packet):
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
	return tunnel.Caps{Name: m.name, Backend: "memory", MTU: int(m.mtu.Load()), Reason: "a test"}
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
	var p []byte
	select {
	case <-q.device.closed:
		return 0, os.ErrClosed
	case p = <-q.in:
	}
	for n := 0; ; {
		f := &frames[n]
		f.Data = append(f.Data[:0], p...)
		f.GSO = tunnel.GSO{}
		if n++; n == len(frames) {
			return n, nil
		}
		select {
		case p = <-q.in:
		default:
			return n, nil
		}
	}
}

// WriteBatch implements [tunnel.Queue].
func (q *memoryQueue) WriteBatch(frames []tunnel.Frame) (int, error) {
	for i, f := range frames {
		select {
		case <-q.device.closed:
			return i, os.ErrClosed
		default:
		}
		select {
		case q.device.out <- bytes.Clone(f.Data):
		default:
			return i, ErrFull
		}
	}
	return len(frames), nil
}
