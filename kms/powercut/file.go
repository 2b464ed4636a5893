//go:build linux

package powercut

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// Kind is a set of calls on a file.
type Kind uint8

// The calls. A sync is fsync, fdatasync or msync; a read is what the page
// cache did not hold, be it by read or by a page fault, where an error is a
// SIGBUS.
const (
	Write Kind = 1 << iota
	Sync
	Truncate
	Read
)

var kindNames = map[Kind]string{Write: "write", Sync: "sync", Truncate: "truncate", Read: "read"}

// String names a single kind.
func (k Kind) String() string { return kindNames[k] }

// Call is one call that reached the file.
type Call struct {
	Kind   Kind
	Offset int64 // of a write or read; of a truncate the new size
	Bytes  int
	Failed bool
}

// Fault says which call fails and how. The zero Fault lets all succeed.
type Fault struct {
	At      int           // the At-th call of the Kinds from now on, 1 the next; 0 none
	Kinds   Kind          // which calls count; 0 all but reads
	Errno   syscall.Errno // 0 is EIO
	Lasting bool          // every later call of the Kinds fails as well
	Stored  bool          // the call does its work and fails all the same
}

// File is a file whose calls are recorded and can be made to fail, by the
// kernel's answer to the real system call: bbolt takes an *os.File, which
// leaves no other place to stand. Opened, mapped and locked it is an ordinary
// file. Its methods may be called from several goroutines.
type File struct{ s *server }

// NewFile makes an empty file. Where the machine cannot, the test is skipped.
// The test's end removes it; close what has it open before.
func NewFile(t testing.TB) *File {
	t.Helper()
	require(t, unusableFile(), "/dev/fuse")
	return &File{start(t, "file", request{})}
}

// Path is where the file lies. It cannot be renamed or removed, and nothing
// else can be made beside it.
func (f *File) Path() string { return f.s.path("file") }

// Arm sets the fault, counts from zero again and forgets the recorded calls.
func (f *File) Arm(fault Fault) error {
	_, err := f.s.ask(request{Op: "arm", Fault: fault})
	return err
}

// Calls returns the calls since Arm, reads included.
func (f *File) Calls() ([]Call, error) {
	a, err := f.s.ask(request{Op: "calls"})
	return a.Calls, err
}

// faulty is the content of a File, in the second process.
type faulty struct {
	f *os.File

	mu      sync.Mutex
	fault   Fault
	counted int
	calls   []Call
}

// call records one call and does its work, unless its turn to fail has come.
func (c *faulty) call(k Kind, off int64, bytes int, work func() error) syscall.Errno {
	c.mu.Lock()
	defer c.mu.Unlock()
	fails := false
	if kinds := c.fault.Kinds; kinds&k != 0 || kinds == 0 && k != Read {
		c.counted++
		fails = c.fault.At > 0 &&
			(c.counted == c.fault.At || c.fault.Lasting && c.counted > c.fault.At)
	}
	c.calls = append(c.calls, Call{Kind: k, Offset: off, Bytes: bytes, Failed: fails})
	if !fails || c.fault.Stored {
		if err := work(); err != nil && err != io.EOF {
			return syscall.EIO
		}
	}
	switch {
	case !fails:
		return 0
	case c.fault.Errno != 0:
		return c.fault.Errno
	}
	return syscall.EIO
}

func (c *faulty) size() int64 {
	info, err := c.f.Stat()
	if err != nil {
		return 0
	}
	return info.Size()
}

func (c *faulty) read(b []byte, off int64) syscall.Errno {
	return c.call(Read, off, len(b), func() error { _, err := c.f.ReadAt(b, off); return err })
}

func (c *faulty) write(b []byte, off int64) syscall.Errno {
	return c.call(Write, off, len(b), func() error { _, err := c.f.WriteAt(b, off); return err })
}

func (c *faulty) truncate(size int64) syscall.Errno {
	return c.call(Truncate, size, 0, func() error { return c.f.Truncate(size) })
}

// flush has nothing to do: the file underneath outlives every test.
func (c *faulty) flush() syscall.Errno {
	return c.call(Sync, 0, 0, func() error { return nil })
}

// serveFile answers until its input ends.
func serveFile(in *json.Decoder, out *json.Encoder) error {
	var c *faulty
	var dir string
	defer func() { leave(filepath.Join(dir, "file")) }()
	for {
		var r request
		if err := in.Decode(&r); err != nil {
			return err
		}
		var a answer
		switch r.Op {
		case "start":
			dir = r.Dir
			var err error
			if c, err = mountFaulty(r.Dir); err != nil {
				a.Err = err.Error()
			}
		case "arm":
			c.mu.Lock()
			c.fault, c.counted, c.calls = r.Fault, 0, nil
			c.mu.Unlock()
		case "calls":
			c.mu.Lock()
			a.Calls = c.calls
			c.mu.Unlock()
		default:
			a.Err = fmt.Sprintf("unknown request %q", r.Op)
		}
		if err := out.Encode(a); err != nil {
			return err
		}
	}
}

func mountFaulty(dir string) (*faulty, error) {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return nil, fmt.Errorf("make mounts private: %w", err)
	}
	back, err := os.OpenFile(filepath.Join(dir, "back"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	path := filepath.Join(dir, "file")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		return nil, err
	}
	c := &faulty{f: back}
	return c, mountFile(path, c, false)
}
