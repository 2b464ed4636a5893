package tun

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
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

// fast is a TUN device that hands over super-frames whole.
type fast struct {
	file  *os.File
	raw   syscall.RawConn
	link  *link
	caps  tunnel.Caps // but for the MTU
	mtu   atomic.Int64
	split atomic.Uint64 // super-frames that the kernel refused
	shut  atomic.Bool

	// One goroutine reads and one writes, so each side has scratch of its own.
	// The functions are stored because a closure made on the way would be an
	// allocation a call.
	in, out ioState
	waiter  *fdwait.Waiter // of the reading goroutine
}

// ioState is the scratch of one side: the arguments and results of its system
// call.
type ioState struct {
	call   func(fd uintptr) bool
	header [vnetLen]byte
	iov    [2]unix.Iovec
	frames []tunnel.Frame
	n      int
	errno  syscall.Errno
	packet []byte // a segment, when the kernel refuses a super-frame
}

// openFast opens the offload back end.
func openFast(cfg Config) (*fast, error) {
	file, name, features, why, err := openVnet(cfg.Name)
	if err != nil {
		return nil, err
	}
	cfg.Name = name
	l, err := setUp(cfg)
	if err != nil {
		_ = file.Close()
		return nil, err
	}
	l.fitSuperFrames(cfg.MTU)
	d := &fast{file: file, link: l}
	d.caps = tunnel.Caps{Name: name, Backend: "fast", Offload: features&featTSO != 0,
		UDP: features&featUSO != 0, Reason: why}
	d.mtu.Store(int64(cfg.MTU))
	if d.waiter, err = fdwait.New(); err == nil {
		d.raw, err = file.SyscallConn()
	}
	if err != nil {
		l.handle.Close()
		_ = file.Close()
		return nil, err
	}
	d.in.call, d.out.call = d.readSome, d.writeSome
	d.in.iov[0].Base, d.out.iov[0].Base = &d.in.header[0], &d.out.header[0]
	d.in.iov[0].SetLen(vnetLen)
	d.out.iov[0].SetLen(vnetLen)
	return d, nil
}

// openVnet makes an interface with a virtio header and as many offloads as the
// kernel takes.
func openVnet(name string) (f *os.File, made string, features int, why string, err error) {
	fd, err := unix.Open(node, unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, "", 0, "", &os.PathError{Op: "open", Path: node, Err: err}
	}
	defer func() {
		if err != nil {
			_ = unix.Close(fd)
		}
	}()
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		return nil, "", 0, "", err
	}
	ifr.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if err = unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err != nil {
		return nil, "", 0, "", fmt.Errorf("make interface with virtio header: %w", err)
	}
	for _, step := range []struct {
		features int
		why      string
	}{
		{featCsum | featTSO | featECN | featUSO, "kernel takes TCP, ECN and UDP offload"},
		{featCsum | featTSO | featECN, "kernel takes TCP and ECN offload, not UDP"},
		{featCsum | featTSO, "kernel takes TCP offload, neither ECN nor UDP"},
		{0, "kernel takes no offload"},
	} {
		if err = unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, step.features); err == nil {
			return os.NewFile(uintptr(fd), node), ifr.Name(), step.features, step.why, nil
		}
	}
	return nil, "", 0, "", fmt.Errorf("set offload: %w", err)
}

// Queues implements [tunnel.Device].
func (d *fast) Queues() []tunnel.Queue { return []tunnel.Queue{d} }

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
	d.shut.Store(true)
	d.waiter.End()
	d.link.handle.Close()
	defer d.waiter.Close()
	return d.file.Close() // waits until nobody reads
}

// ReadBatch implements [tunnel.Queue]: it waits for one frame and takes what
// else is there.
func (d *fast) ReadBatch(frames []tunnel.Frame) (int, error) {
	if len(frames) == 0 {
		return 0, nil
	}
	s := &d.in
	s.frames, s.n, s.errno = frames, 0, 0
	err := d.raw.Read(s.call)
	err = d.result(err, "read", s.errno) // not in one: the call sets errno
	s.frames = nil
	if s.n > 0 {
		return s.n, nil // an error comes again
	}
	if err == nil {
		err = os.ErrClosed // nothing read, nothing wrong: the waiter has ended
	}
	return 0, err
}

// result is the outcome of a system call: err is the runtime's, which names a
// closed file in a way that only it knows.
func (d *fast) result(err error, call string, errno syscall.Errno) error {
	switch {
	case err != nil && d.shut.Load():
		return os.ErrClosed
	case err == nil && errno != 0:
		return os.NewSyscallError(call, errno)
	}
	return err
}

// enough is how many bytes a batch has at least before it is handed over though
// the device holds more: half a super-frame. What has been read is then still
// in the processor's nearest cache when it is sealed, and it is on its way
// while the next is read.
const enough = 1 << 15

// readSome reads until the device is empty, the frames are full or there is
// enough, and waits for the first frame. The calls do not block, so they need no hand-over of the
// processor: RawSyscall.
func (d *fast) readSome(fd uintptr) bool {
	s := &d.in
	for total := 0; s.n < len(s.frames) && total < enough; {
		f := &s.frames[s.n]
		buf := f.Data[:cap(f.Data)]
		s.iov[1].Base = unsafe.SliceData(buf)
		s.iov[1].SetLen(len(buf))
		n, _, errno := syscall.RawSyscall(unix.SYS_READV, fd, uintptr(unsafe.Pointer(&s.iov[0])), 2)
		switch {
		case errno == unix.EINTR:
			continue
		case errno == unix.EAGAIN:
			if s.n > 0 || !d.waiter.Readable(fd) {
				return true
			}
			continue
		case errno != 0:
			s.errno = errno
			return true
		case n <= vnetLen:
			continue // no packet
		}
		f.Data = buf[:n-vnetLen]
		f.GSO = readHeader(&s.header)
		s.n++
		total += len(f.Data)
	}
	return true
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
func (d *fast) WriteBatch(frames []tunnel.Frame) (int, error) {
	for i, f := range frames {
		err := d.write(f)
		if errors.Is(err, unix.EINVAL) && f.GSO.Type != segment.None {
			d.split.Add(1)
			err = d.writeSplit(f)
		}
		if err != nil {
			return i, err
		}
	}
	return len(frames), nil
}

func (d *fast) writeSplit(f tunnel.Frame) error {
	if d.out.packet == nil {
		d.out.packet = make([]byte, 0, maxMTU)
	}
	return segment.Split(f, d.out.packet, func(p []byte) error {
		return d.write(tunnel.Frame{Data: p})
	})
}

func (d *fast) write(f tunnel.Frame) error {
	s := &d.out
	writeHeader(&s.header, f.GSO)
	s.iov[1].Base = unsafe.SliceData(f.Data)
	s.iov[1].SetLen(len(f.Data))
	s.errno = 0
	err := d.raw.Write(s.call)
	s.iov[1].Base = nil
	return d.result(err, "write", s.errno)
}

func (d *fast) writeSome(fd uintptr) bool {
	s := &d.out
	for {
		_, _, s.errno = syscall.RawSyscall(unix.SYS_WRITEV, fd,
			uintptr(unsafe.Pointer(&s.iov[0])), 2)
		if s.errno != unix.EINTR {
			return s.errno != unix.EAGAIN
		}
	}
}

// Split is how many super-frames the kernel refused and got as packets.
func (d *fast) Split() uint64 { return d.split.Load() }
