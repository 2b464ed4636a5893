package tun

import (
	"sync/atomic"

	"github.com/songgao/water"

	"github.com/quietline/quietline/tunnel"
	"github.com/quietline/quietline/tunnel/segment"
)

// device is a TUN device of one queue that moves one plain packet a call.
type device struct {
	ifc  *water.Interface
	link *link
	caps tunnel.Caps // but for the MTU
	mtu  atomic.Int64

	packet []byte // scratch of the writing goroutine
}

// openWater opens the plain back end.
func openWater(cfg Config, reason string) (*device, error) {
	ifc, err := water.New(water.Config{
		DeviceType:             water.TUN,
		PlatformSpecificParams: water.PlatformSpecificParams{Name: cfg.Name},
	})
	if err != nil {
		return nil, err
	}
	cfg.Name = ifc.Name() // the kernel may have filled in a pattern
	l, err := setUp(cfg)
	if err != nil {
		_ = ifc.Close()
		return nil, err
	}
	d := &device{ifc: ifc, link: l}
	d.caps = tunnel.Caps{Name: cfg.Name, Backend: "water", Reason: reason}
	d.mtu.Store(int64(cfg.MTU))
	return d, nil
}

// Queues implements [tunnel.Device]: the device is its one queue.
func (d *device) Queues() []tunnel.Queue { return []tunnel.Queue{d} }

// Caps implements [tunnel.Device].
func (d *device) Caps() tunnel.Caps {
	caps := d.caps
	caps.MTU = int(d.mtu.Load())
	return caps
}

// SetMTU implements [tunnel.Device].
func (d *device) SetMTU(mtu int) error {
	if err := d.link.setMTU(mtu); err != nil {
		return explain(err)
	}
	d.mtu.Store(int64(mtu))
	return nil
}

// Close implements [tunnel.Device].
func (d *device) Close() error {
	d.link.handle.Close()
	return d.ifc.Close()
}

// ReadBatch implements [tunnel.Queue]: it fills the first frame.
func (d *device) ReadBatch(frames []tunnel.Frame) (int, error) {
	if len(frames) == 0 {
		return 0, nil
	}
	f := &frames[0]
	n, err := d.ifc.Read(f.Data[:cap(f.Data)])
	if err != nil {
		return 0, err
	}
	f.Data, f.GSO = f.Data[:n], tunnel.GSO{}
	return 1, nil
}

// WriteBatch implements [tunnel.Queue]: one call a packet. Super-frames, which
// come from a peer whose device has offload, are split here.
func (d *device) WriteBatch(frames []tunnel.Frame) (int, error) {
	for i, f := range frames {
		var err error
		if f.GSO == (tunnel.GSO{}) {
			_, err = d.ifc.Write(f.Data)
		} else {
			err = d.writeSplit(f)
		}
		if err != nil {
			return i, err
		}
	}
	return len(frames), nil
}

func (d *device) writeSplit(f tunnel.Frame) error {
	if d.packet == nil {
		d.packet = make([]byte, 0, maxMTU)
	}
	return segment.Split(f, d.packet, func(p []byte) error {
		_, err := d.ifc.Write(p)
		return err
	})
}
