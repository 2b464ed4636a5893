package tun

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync/atomic"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/quietline/quietline/tunnel"
	"github.com/quietline/quietline/tunnel/fdwait"
	"github.com/quietline/quietline/tunnel/segment"
)

// vnetLen is the length of struct virtio_net_hdr, which stands before every
// packet of a device with IFF_VNET_HDR (linux/virtio_net.h).
const vnetLen = 10

// Features of linux/if_tun.h, each a step that an older kernel may refuse.
const (
	featCsum = unix.TUN_F_CSUM
	featTSO  = unix.TUN_F_TSO4 | unix.TUN_F_TSO6
	featECN  = unix.TUN_F_TSO_ECN
	featUSO  = unix.TUN_F_USO4 | unix.TUN_F_USO6 // Linux 6.2
)

// fast is a TUN device that hands over super-frames whole, by one queue or
// several.
type fast struct {
	link   *link
	queues []tunnel.Queue // of *fastQueue
	caps   tunnel.Caps    // but for the MTU
	mtu    atomic.Int64
	split  atomic.Uint64 // frames that went in as finished packets

	offload Offload
	closed  atomic.Bool
}

// fastQueue is one descriptor of the device. The kernel keeps a flow on the
// queue on which its answers come in. One goroutine reads and one writes, so
// each side has scratch of its own.
type fastQueue struct {
	device  *fast
	file    *fdwait.Descriptor
	in, out ioState
}

// ioState is the scratch of one side: the arguments of its system call.
type ioState struct {
	header [vnetLen]byte
	iov    [2]unix.Iovec
	packet []byte // a segment, when the kernel refuses a super-frame
}

// openFast opens the offload back end.
func openFast(cfg Config) (*fast, error) {
	n, whyQueues := cfg.queues()
	d := &fast{offload: cfg.Offload}
	features, why := 0, ""
	for len(d.queues) < n {
		file, name, f, w, err := openVnet(cfg, n > 1, len(d.queues) > 0, features)
		if err != nil {
			return nil, errors.Join(err, d.closeQueues())
		}
		q := &fastQueue{device: d, file: file}
		q.in.iov[0].Base, q.out.iov[0].Base = &q.in.header[0], &q.out.header[0]
		q.in.iov[0].SetLen(vnetLen)
		q.out.iov[0].SetLen(vnetLen)
		d.queues = append(d.queues, q)
		cfg.Name, features, why = name, f, w
	}
	l, err := setUp(cfg)
	if err != nil {
		return nil, errors.Join(err, d.closeQueues())
	}
	l.fitSuperFrames(cfg.MTU)
	d.link = l
	d.caps = tunnel.Caps{Name: cfg.Name, Backend: "fast", Offload: features&featTSO != 0,
		UDP: features&featUSO != 0, Reason: why + "; " + whyQueues}
	d.mtu.Store(int64(cfg.MTU))
	return d, nil
}

func (d *fast) closeQueues() (err error) {
	for _, q := range d.queues {
		err = errors.Join(err, q.(*fastQueue).file.Close())
	}
	return err
}

// step is a set of offloads.
type step struct {
	features int
	why      string
}

// steps are the sets of offloads to ask for, the best first.
func (o Offload) steps() []step {
	switch {
	case o.NoChecksum:
		return []step{{0, "checksum offload is switched off, and the others with it"}}
	case o.NoTSO && o.NoUSO:
		return []step{{featCsum, "TCP and UDP offload are switched off"}, {0, "kernel takes no offload"}}
	case o.NoTSO:
		// The kernel ties UDP's to TCP's (set_offload of drivers/net/tun.c).
		return []step{{featCsum, "TCP offload is switched off, and UDP's with it"},
			{0, "kernel takes no offload"}}
	}
	list := []step{
		{featCsum | featTSO | featECN | featUSO, "kernel takes TCP, ECN and UDP offload"},
		{featCsum | featTSO | featECN, "kernel takes TCP and ECN offload, not UDP"},
		{featCsum | featTSO, "kernel takes TCP offload, neither ECN nor UDP"},
		{0, "kernel takes no offload"},
	}
	if o.NoUSO {
		list = list[1:]
		list[0].why = "kernel takes TCP and ECN offload; UDP offload is switched off"
	}
	return list
}

// openVnet makes an interface with a virtio header and as many offloads as the
// kernel takes, or opens one more queue of it, with the features that it has.
func openVnet(cfg Config, multi, more bool, has int) (d *fdwait.Descriptor, made string,
	features int, why string, err error) {
	fd, err := unix.Open(node, unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, "", 0, "", &os.PathError{Op: "open", Path: node, Err: err}
	}
	defer func() {
		if err != nil {
			_ = unix.Close(fd)
		}
	}()
	ifr, err := unix.NewIfreq(cfg.Name)
	if err != nil {
		return nil, "", 0, "", err
	}
	flags := uint16(unix.IFF_TUN | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if multi {
		flags |= unix.IFF_MULTI_QUEUE
	}
	ifr.SetUint16(flags)
	if err = unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err != nil {
		return nil, "", 0, "", fmt.Errorf("make interface with virtio header: %w", err)
	}
	list := cfg.Offload.steps()
	if more {
		list = slices.DeleteFunc(list, func(s step) bool { return s.features != has })
	}
	for _, s := range list {
		if err = unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, s.features); err == nil {
			d, err = fdwait.Own(fd)
			return d, ifr.Name(), s.features, s.why, err
		}
	}
	return nil, "", 0, "", fmt.Errorf("set offload: %w", err)
}

// Queues implements [tunnel.Device].
func (d *fast) Queues() []tunnel.Queue { return d.queues }

// Caps implements [tunnel.Device].
func (d *fast) Caps() tunnel.Caps {
	caps := d.caps
	caps.MTU = int(d.mtu.Load())
	return caps
}

// SetMTU implements [tunnel.Device].
func (d *fast) SetMTU(mtu int) error {
	if err := d.link.setMTU(mtu); err != nil {
		return explain(err)
	}
	d.link.fitSuperFrames(mtu)
	d.mtu.Store(int64(mtu))
	return nil
}

// Close implements [tunnel.Device].
func (d *fast) Close() error {
	if !d.closed.Swap(true) {
		d.link.handle.Close()
	}
	return d.closeQueues() // waits until nobody reads
}

// enough is how many bytes a batch has at least before it is handed over though
// the device holds more: half a super-frame. What has been read is then still
// in the processor's nearest cache when it is sealed, and it is on its way
// while the next is read.
const enough = 1 << 15

// ReadBatch implements [tunnel.Queue]: it waits for one frame and takes what
// else is there, until the frames are full or there is enough. The calls do not
// block, so they need no hand-over of the processor: RawSyscall.
func (q *fastQueue) ReadBatch(frames []tunnel.Frame) (got int, err error) {
	fd, open := q.file.Enter()
	if !open {
		return 0, os.ErrClosed
	}
	defer q.file.Leave()
	s := &q.in
	for total := 0; got < len(frames) && total < enough; {
		f := &frames[got]
		buf := f.Data[:cap(f.Data)]
		s.iov[1].Base = unsafe.SliceData(buf)
		s.iov[1].SetLen(len(buf))
		n, _, errno := syscall.RawSyscall(unix.SYS_READV, fd, uintptr(unsafe.Pointer(&s.iov[0])), 2)
		switch {
		case errno == unix.EINTR:
			continue
		case errno == unix.EAGAIN && got > 0:
			return got, nil
		case errno == unix.EAGAIN:
			if !q.file.Readable() {
				return 0, os.ErrClosed
			}
			continue
		case errno != 0 && got > 0:
			return got, nil // it comes again
		case errno != 0:
			return 0, os.NewSyscallError("read", errno)
		case n <= vnetLen:
			continue // no packet
		}
		f.Data = buf[:n-vnetLen]
		f.GSO = readHeader(&s.header)
		got++
		total += len(f.Data)
	}
	return got, nil
}

// readHeader reads struct virtio_net_hdr, which is in the host's byte order.
func readHeader(h *[vnetLen]byte) tunnel.GSO {
	return tunnel.GSO{
		Flags:      h[0],
		Type:       h[1],
		HeaderLen:  binary.NativeEndian.Uint16(h[2:]),
		Size:       binary.NativeEndian.Uint16(h[4:]),
		CsumStart:  binary.NativeEndian.Uint16(h[6:]),
		CsumOffset: binary.NativeEndian.Uint16(h[8:]),
	}
}

func writeHeader(h *[vnetLen]byte, g tunnel.GSO) {
	h[0], h[1] = g.Flags, g.Type
	binary.NativeEndian.PutUint16(h[2:], g.HeaderLen)
	binary.NativeEndian.PutUint16(h[4:], g.Size)
	binary.NativeEndian.PutUint16(h[6:], g.CsumStart)
	binary.NativeEndian.PutUint16(h[8:], g.CsumOffset)
}

// WriteBatch implements [tunnel.Queue]: one call a frame. A super-frame that
// the kernel refuses (regressions in its checks have been seen in the field)
// goes in as packets.
func (q *fastQueue) WriteBatch(frames []tunnel.Frame) (int, error) {
	fd, open := q.file.Enter()
	if !open {
		return 0, os.ErrClosed
	}
	defer q.file.Leave()
	for i := range frames {
		err := error(unix.EINVAL)
		off := q.device.switchedOff(frames[i].GSO)
		if !off {
			err = q.write(fd, &frames[i])
		}
		if off || err == unix.EINVAL && frames[i].GSO.Type != segment.None {
			q.device.split.Add(1)
			err = q.writeSplit(fd, frames[i])
		}
		if errno, ok := err.(syscall.Errno); ok {
			err = os.NewSyscallError("write", errno)
		}
		if err != nil {
			return i, err
		}
	}
	return len(frames), nil
}

func (q *fastQueue) writeSplit(fd uintptr, f tunnel.Frame) error {
	if q.out.packet == nil {
		q.out.packet = make([]byte, 0, maxMTU)
	}
	return segment.Split(f, q.out.packet, func(p []byte) error {
		return q.write(fd, &tunnel.Frame{Data: p})
	})
}

// write is one call; its error is a syscall.Errno or os.ErrClosed.
func (q *fastQueue) write(fd uintptr, f *tunnel.Frame) error {
	s := &q.out
	writeHeader(&s.header, f.GSO)
	s.iov[1].Base = unsafe.SliceData(f.Data)
	s.iov[1].SetLen(len(f.Data))
	for {
		_, _, errno := syscall.RawSyscall(unix.SYS_WRITEV, fd, uintptr(unsafe.Pointer(&s.iov[0])), 2)
		switch {
		case errno == 0:
			return nil
		case errno == unix.EAGAIN && !q.file.Writable():
			return os.ErrClosed
		case errno != unix.EAGAIN && errno != unix.EINTR:
			return errno
		}
	}
}

// switchedOff tells whether a frame of such a kind is not to go in as it is.
func (d *fast) switchedOff(g tunnel.GSO) bool {
	switch g.Type &^ segment.ECN {
	case segment.None:
		return d.offload.NoChecksum && g.Flags&segment.NeedsChecksum != 0
	case segment.UDP:
		return d.offload.NoUSO || d.offload.NoTSO || d.offload.NoChecksum
	}
	return d.offload.NoTSO || d.offload.NoChecksum
}

// Split is how many frames went in as finished packets, because the kernel
// refused them or their offload is switched off.
func (d *fast) Split() uint64 { return d.split.Load() }
