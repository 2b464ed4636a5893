package lab

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Recorder writes every packet of one interface to a pcap file, with a ring
// that the kernel fills by itself, so that a fast transfer is captured whole.
type Recorder struct {
	fd      int
	stop    *os.File // closing it ends the recording
	done    chan error
	packets atomic.Uint64
	dropped uint64 // set when done
}

// Layout of the ring, packet(7) TPACKET_V3.
const (
	blockLen  = 1 << 20 // holds the largest packet of all, a super-frame of 64 KiB
	blocks    = 64
	retireMS  = 20 // the kernel hands over a block that is not full after so long
	frameUnit = 2048
	snapLen   = 1 << 18 // pcap: more than any packet has
)

// pcap's link types, from its registry.
const (
	linkEthernet = 1
	linkRaw      = 101
)

// Capture starts recording an interface of ns to a pcap file.
func Capture(ns *Namespace, ifname, path string) (*Recorder, error) {
	var r *Recorder
	err := ns.Do(func() (err error) {
		r, err = capture(ifname, path)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("capture %s in %s: %w", ifname, ns.name, err)
	}
	return r, nil
}

func capture(ifname, path string) (*Recorder, error) {
	link, err := netlink.LinkByName(ifname)
	if err != nil {
		return nil, err
	}
	kind := uint32(linkRaw)
	if link.Attrs().EncapType == "ether" {
		kind = linkEthernet
	}
	fd, ring, err := openRing(link.Attrs().Index)
	if err != nil {
		return nil, err
	}
	file, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		_ = unix.Munmap(ring)
		_ = unix.Close(fd)
		return nil, err
	}
	wake, stop, err := os.Pipe()
	if err != nil {
		_ = file.Close()
		_ = unix.Munmap(ring)
		_ = unix.Close(fd)
		return nil, err
	}
	r := &Recorder{fd: fd, stop: stop, done: make(chan error, 1)}
	go func() {
		defer wake.Close()
		r.done <- r.run(ring, file, kind, int(wake.Fd()))
	}()
	return r, nil
}

// openRing opens a packet socket with a receive ring, bound to an interface
// only when the ring stands, so that nothing else gets into it.
func openRing(index int) (int, []byte, error) {
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, nil, fmt.Errorf("open packet socket: %w", err)
	}
	fail := func(what string, err error) (int, []byte, error) {
		_ = unix.Close(fd)
		return 0, nil, fmt.Errorf("%s: %w", what, err)
	}
	err = unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_VERSION, unix.TPACKET_V3)
	if err != nil {
		return fail("set ring version", err)
	}
	req := unix.TpacketReq3{
		Block_size: blockLen, Block_nr: blocks,
		Frame_size: frameUnit, Frame_nr: blockLen / frameUnit * blocks,
		Retire_blk_tov: retireMS,
	}
	if err := unix.SetsockoptTpacketReq3(fd, unix.SOL_PACKET, unix.PACKET_RX_RING, &req); err != nil {
		return fail("make ring", err)
	}
	ring, err := unix.Mmap(fd, 0, blockLen*blocks, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return fail("map ring", err)
	}
	all := uint16(unix.ETH_P_ALL>>8 | unix.ETH_P_ALL&0xff<<8)
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: index}); err != nil {
		_ = unix.Munmap(ring)
		return fail("bind packet socket", err)
	}
	return fd, ring, nil
}

// Stop ends the recording when what has passed so far is in the file, and
// closes that. Call it once.
func (r *Recorder) Stop() error {
	_ = r.stop.Close()
	return <-r.done
}

// Packets is the number of packets written so far.
func (r *Recorder) Packets() uint64 { return r.packets.Load() }

// Dropped is the number of packets that the ring had no room for. It is known
// after Stop.
func (r *Recorder) Dropped() uint64 { return r.dropped }

// run owns socket, ring and file.
func (r *Recorder) run(ring []byte, file *os.File, kind uint32, wake int) (err error) {
	defer func() {
		stats, serr := unix.GetsockoptTpacketStatsV3(r.fd, unix.SOL_PACKET, unix.PACKET_STATISTICS)
		if serr == nil {
			r.dropped = uint64(stats.Drops)
		}
		err = errors.Join(err, serr, unix.Munmap(ring), unix.Close(r.fd), file.Close())
	}()
	w := bufio.NewWriterSize(file, blockLen)
	if err := writeFileHeader(w, kind); err != nil {
		return err
	}
	fds := []unix.PollFd{
		{Fd: int32(r.fd), Events: unix.POLLIN},
		{Fd: int32(wake), Events: unix.POLLIN},
	}
	next, timeout := 0, -1
	var end time.Time // zero until Stop was called
	for {
		if !end.IsZero() {
			timeout = max(0, int(time.Until(end).Milliseconds()))
		}
		if _, err := unix.Poll(fds, timeout); err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("wait for packets: %w", err)
		}
		if next, err = r.drain(ring, next, w); err != nil {
			return err
		}
		switch {
		case !end.IsZero() && timeout == 0:
			return w.Flush()
		case fds[1].Revents != 0:
			// Stop was called: what has passed is in a block that retires within
			// retireMS. Traffic that goes on does not keep us.
			fds[1].Fd, fds[1].Revents = -1, 0
			end = time.Now().Add(3 * retireMS * time.Millisecond)
		}
	}
}

// drain writes the blocks that are ready, from block next on.
func (r *Recorder) drain(ring []byte, next int, w *bufio.Writer) (int, error) {
	const statusAt = 8 // offsetof(struct tpacket_block_desc, hdr.bh1)
	for {
		block := ring[next*blockLen : (next+1)*blockLen]
		status := (*uint32)(unsafe.Pointer(&block[statusAt]))
		if atomic.LoadUint32(status)&unix.TP_STATUS_USER == 0 {
			return next, nil
		}
		h := (*unix.TpacketHdrV1)(unsafe.Pointer(&block[statusAt]))
		at := h.Offset_to_first_pkt
		for range h.Num_pkts {
			p := (*unix.Tpacket3Hdr)(unsafe.Pointer(&block[at]))
			data := block[at+uint32(p.Mac):][:p.Snaplen]
			if err := writePacket(w, p, data); err != nil {
				return next, err
			}
			r.packets.Add(1)
			at += p.Next_offset
		}
		atomic.StoreUint32(status, unix.TP_STATUS_KERNEL)
		next = (next + 1) % blocks
	}
}

// pcapMagic says pcap with nanoseconds, in the byte order of the writer.
const pcapMagic = 0xa1b23c4d

func writeFileHeader(w *bufio.Writer, kind uint32) error {
	b := binary.LittleEndian.AppendUint32(nil, pcapMagic)
	b = binary.LittleEndian.AppendUint16(b, 2) // version 2.4
	b = binary.LittleEndian.AppendUint16(b, 4)
	b = append(b, make([]byte, 8)...) // time zone and accuracy: unused
	b = binary.LittleEndian.AppendUint32(b, snapLen)
	b = binary.LittleEndian.AppendUint32(b, kind)
	_, err := w.Write(b)
	return err
}

func writePacket(w *bufio.Writer, p *unix.Tpacket3Hdr, data []byte) error {
	var h [16]byte
	binary.LittleEndian.PutUint32(h[0:], p.Sec)
	binary.LittleEndian.PutUint32(h[4:], p.Nsec)
	binary.LittleEndian.PutUint32(h[8:], p.Snaplen)
	binary.LittleEndian.PutUint32(h[12:], p.Len)
	if _, err := w.Write(h[:]); err != nil {
		return err
	}
	_, err := w.Write(data)
	return err
}

// Packet is one packet of a capture.
type Packet struct {
	At   time.Time
	Data []byte // from the Ethernet or IP header on; valid until the next packet
	raw  bool   // Data begins with the IP header
}
