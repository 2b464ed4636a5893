//go:build linux

package powercut

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// content is what a mounted file holds. Offsets and sizes are bytes.
type content interface {
	size() int64
	read(b []byte, off int64) syscall.Errno // fills b; past the end are zeros
	write(b []byte, off int64) syscall.Errno
	flush() syscall.Errno
	truncate(size int64) syscall.Errno
}

// The FUSE kernel protocol, version 7.31: include/uapi/linux/fuse.h. Only what
// one file needs; the mount's root is the file itself.
const (
	opForget      = 2
	opGetattr     = 3
	opSetattr     = 4
	opOpen        = 14
	opRead        = 15
	opWrite       = 16
	opStatfs      = 17
	opRelease     = 18
	opFsync       = 20
	opFlush       = 25
	opInit        = 26
	opInterrupt   = 36
	opDestroy     = 38
	opBatchForget = 42

	inHeader  = 40
	outHeader = 16

	initAsyncRead = 1 << 0
	initBigWrites = 1 << 5
	initMaxPages  = 1 << 22
	openDirectIO  = 1 << 0
	setattrSize   = 1 << 3

	maxWrite = 1 << 20
)

var native = binary.NativeEndian

// fuseFile is a regular file mounted from content.
type fuseFile struct {
	dev    int // /dev/fuse
	c      content
	direct bool // no page cache between: a block device's image
}

// mountFile mounts c on the existing file at path and serves it until the
// kernel lets go of the mount.
func mountFile(path string, c content, direct bool) error {
	// A plain descriptor, not an os.File: the runtime's poller asks each file
	// it is given whether it is ready, which for one of ours is a request to us.
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open /dev/fuse: %w", err)
	}
	opts := fmt.Sprintf("fd=%d,rootmode=100600,user_id=0,group_id=0,allow_other", fd)
	err = unix.Mount("powercut", path, "fuse", unix.MS_NOSUID|unix.MS_NODEV, opts)
	if err != nil {
		_ = unix.Close(fd)
		return fmt.Errorf("mount fuse: %w", err)
	}
	f := &fuseFile{dev: fd, c: c, direct: direct}
	mounted.Go(f.serve)
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return fmt.Errorf("stat mounted file: %w", err)
	}
	connections.Store(unix.Minor(st.Dev), true)
	return nil
}

// mounted counts the connections that the kernel still uses.
var mounted sync.WaitGroup

// leave ends the process after unmounting what stands at the paths, outermost
// first. While a file system is unmounted its disk must be served: a process
// that just exits would wait for itself. Mounts that others still have files
// open on are cut off.
func leave(paths ...string) {
	for _, p := range paths {
		_ = unix.Unmount(p, unix.MNT_DETACH) // not mounted: nothing to do
	}
	done := make(chan struct{})
	go func() { mounted.Wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(5 * time.Second):
		abortAll()
	}
	os.Exit(0)
}

// abortAll makes the kernel give up on every connection of this process.
func abortAll() {
	const control = "/sys/fs/fuse/connections"
	_ = unix.Mount("powercut", control, "fusectl", 0, "")
	connections.Range(func(id, _ any) bool {
		name := fmt.Sprintf("%s/%d/abort", control, id)
		_ = os.WriteFile(name, []byte("1"), 0)
		return true
	})
}

// connections holds the number of each connection made.
var connections sync.Map

// serve ends when the last user of the mount is gone.
func (f *fuseFile) serve() {
	defer unix.Close(f.dev)
	buf := make([]byte, maxWrite+4096)
	for {
		n, err := unix.Read(f.dev, buf)
		switch {
		case errors.Is(err, syscall.ENODEV), errors.Is(err, syscall.ECONNABORTED):
			return
		case errors.Is(err, syscall.EINTR), errors.Is(err, syscall.ENOENT):
			continue // a request was taken back
		case err != nil:
			fmt.Fprintln(os.Stderr, "powercut: read request:", err)
			return
		}
		f.handle(buf[:n])
	}
}

// handle answers one request; a flush takes its time beside the others.
func (f *fuseFile) handle(req []byte) {
	op, unique := native.Uint32(req[4:]), native.Uint64(req[8:])
	body := req[inHeader:]
	switch op {
	case opForget, opBatchForget, opInterrupt:
	case opFsync:
		go func() { f.reply(unique, f.c.flush(), nil) }()
	case opRead:
		b := make([]byte, native.Uint32(body[16:]))
		off := int64(native.Uint64(body[8:]))
		b = b[:max(0, min(int64(len(b)), f.c.size()-off))]
		f.reply(unique, f.c.read(b, off), b)
	case opWrite:
		size := native.Uint32(body[16:])
		errno := f.c.write(body[40:40+size], int64(native.Uint64(body[8:])))
		f.reply(unique, errno, native.AppendUint64(nil, uint64(size)))
	case opSetattr:
		var errno syscall.Errno
		if native.Uint32(body)&setattrSize != 0 {
			errno = f.c.truncate(int64(native.Uint64(body[16:])))
		}
		f.reply(unique, errno, f.attr())
	case opGetattr:
		f.reply(unique, 0, f.attr())
	case opOpen:
		var flags uint64
		if f.direct {
			flags = openDirectIO
		}
		f.reply(unique, 0, native.AppendUint64(make([]byte, 8, 16), flags))
	case opInit:
		f.reply(unique, 0, initReply(native.Uint32(body[8:])))
	case opStatfs:
		f.reply(unique, 0, make([]byte, 80))
	case opFlush, opRelease, opDestroy:
		f.reply(unique, 0, nil)
	default:
		f.reply(unique, syscall.ENOSYS, nil)
	}
}

// initReply is struct fuse_init_out.
func initReply(readahead uint32) []byte {
	b := make([]byte, 64)
	native.PutUint32(b[0:], 7)
	native.PutUint32(b[4:], 31)
	native.PutUint32(b[8:], readahead)
	native.PutUint32(b[12:], initAsyncRead|initBigWrites|initMaxPages)
	native.PutUint16(b[16:], 64) // requests in the background
	native.PutUint16(b[18:], 48) // … from which the kernel slows down
	native.PutUint32(b[20:], maxWrite)
	native.PutUint32(b[24:], 1) // time in ns
	native.PutUint16(b[28:], maxWrite/4096)
	return b
}

// attr is struct fuse_attr_out: a private file of root, valid for one second.
func (f *fuseFile) attr() []byte {
	size := uint64(f.c.size())
	b := make([]byte, 16+88)
	native.PutUint64(b[0:], 1)
	a := b[16:]
	native.PutUint64(a[0:], 1) // inode
	native.PutUint64(a[8:], size)
	native.PutUint64(a[16:], (size+511)/512)
	native.PutUint32(a[60:], syscall.S_IFREG|0o600)
	native.PutUint32(a[64:], 1) // links
	native.PutUint32(a[80:], 4096)
	return b
}

// reply may find that the kernel has taken the request back; then nobody waits.
func (f *fuseFile) reply(unique uint64, errno syscall.Errno, body []byte) {
	if errno != 0 {
		body = nil
	}
	b := make([]byte, outHeader, outHeader+len(body))
	native.PutUint32(b[0:], uint32(outHeader+len(body)))
	native.PutUint32(b[4:], uint32(-int32(errno)))
	native.PutUint64(b[8:], unique)
	_, _ = unix.Write(f.dev, append(b, body...))
}
