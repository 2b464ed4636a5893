//go:build linux

package powercut

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Disk is a modelled disk with ext4 on it. Its methods may be called from
// several goroutines.
type Disk struct{ s *server }

// New makes a disk of size bytes, at least 16 MiB, whose flush takes the given
// time; the journal of ext4 takes a part of it. Where the machine has no such
// disk the test is skipped. The test's end removes all of it.
func New(t testing.TB, size int64, flush time.Duration) *Disk {
	t.Helper()
	require(t, Unusable(), "/dev/fuse", "/dev/loop-control")
	return &Disk{start(t, "disk", request{Size: size, Flush: flush})}
}

// Dir is the root folder of the disk's file system. The path stays the same
// over cuts; files opened before a cut stay on the dead disk, where a sync
// fails. It leads through the link /proc/<pid>/root: a program that resolves
// links itself, as SQLite does, ends up elsewhere.
func (d *Disk) Dir() string { return d.s.path("mnt") }

// Cut takes the power away at this moment, with that fraction (0 to 1) of the
// unflushed blocks written, and starts the disk again: when it returns, Dir
// shows what a computer finds after its restart. The seed chooses the blocks.
// No sync that returned before is undone, and none that is under way succeeds;
// processes that use the disk live on and get I/O errors.
func (d *Disk) Cut(fraction float64, seed uint64) (Loss, error) {
	a, err := d.s.ask(request{Op: "cut", Fraction: fraction, Seed: seed})
	if err != nil {
		return Loss{}, fmt.Errorf("cut power: %w", err)
	}
	return a.Loss, nil
}

// diskServer is the second process's side.
type diskServer struct {
	dir   string
	size  int64
	flush time.Duration
	live  *cache
	cuts  int
}

// serveDisk answers until its input ends, which it does also when the test is
// killed, and takes all away.
func serveDisk(in *json.Decoder, out *json.Encoder) error {
	var d diskServer
	defer func() { leave(filepath.Join(d.dir, "mnt"), filepath.Join(d.dir, "disk")) }()
	for {
		var r request
		err := in.Decode(&r)
		if err != nil {
			return err
		}
		var a answer
		switch r.Op {
		case "start":
			d = diskServer{dir: r.Dir, size: r.Size, flush: r.Flush}
			err = d.format()
		case "cut":
			a.Loss, err = d.cut(r.Fraction, r.Seed)
		default:
			err = fmt.Errorf("unknown request %q", r.Op)
		}
		if err != nil {
			a.Err = err.Error()
		}
		if err := out.Encode(a); err != nil {
			return err
		}
	}
}

// format makes the first image and mounts it.
func (d *diskServer) format() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := os.Mkdir(filepath.Join(d.dir, "mnt"), 0o700); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(d.dir, "disk"), nil, 0o600); err != nil {
		return err
	}
	image, err := d.newImage()
	if err != nil {
		return err
	}
	if err := image.Truncate(d.size); err != nil {
		return err
	}
	tool, err := mkfs()
	if err != nil {
		return err
	}
	// No lazy initialisation: its background writes would only add noise.
	msg, err := exec.Command(tool, "-q", "-F", "-b", "4096", "-E",
		"nodiscard,lazy_itable_init=0,lazy_journal_init=0", image.Name()).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %w: %s", tool, err, msg)
	}
	return d.mount(image)
}

func (d *diskServer) newImage() (*os.File, error) {
	name := filepath.Join(d.dir, fmt.Sprintf("image.%d", d.cuts))
	return os.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
}

// mount puts the cache over an image, a loop device over the cache and ext4
// over the device. Mounting replays the journal.
func (d *diskServer) mount(image *os.File) error {
	d.live = newCache(image, d.size, d.flush)
	disk := filepath.Join(d.dir, "disk")
	if err := mountFile(disk, d.live, true); err != nil {
		return err
	}
	loop, err := attachLoop(disk)
	if err != nil {
		return err
	}
	defer loop.Close() // the mount keeps the device
	err = unix.Mount(loop.Name(), filepath.Join(d.dir, "mnt"), "ext4",
		unix.MS_NOATIME|unix.MS_NOSUID|unix.MS_NODEV, "")
	if err != nil {
		return fmt.Errorf("mount ext4: %w", err)
	}
	return nil
}

// cut freezes the disk first and only then lets go of the mounts. They live on
// for whoever still has files open, upon the old image.
func (d *diskServer) cut(fraction float64, seed uint64) (Loss, error) {
	if !(fraction >= 0 && fraction <= 1) {
		return Loss{}, fmt.Errorf("fraction %v is not within 0 to 1", fraction)
	}
	old := d.live
	d.cuts++
	image, err := d.newImage()
	if err != nil {
		return Loss{}, err
	}
	loss, err := old.cutTo(image, fraction, seed)
	if err != nil {
		return Loss{}, err
	}
	for _, name := range []string{"mnt", "disk"} {
		if err := unix.Unmount(filepath.Join(d.dir, name), unix.MNT_DETACH); err != nil {
			return Loss{}, fmt.Errorf("unmount %s: %w", name, err)
		}
	}
	if err := os.Remove(old.durable.Name()); err != nil {
		return Loss{}, err
	}
	return loss, d.mount(image)
}

// attachLoop gives a free loop device the file. The device clears itself when
// its last user is gone; until it is mounted that is the returned file.
func attachLoop(path string) (*os.File, error) {
	back, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	defer unix.Close(back)
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer control.Close()
	for range 100 { // another process may take the free one first
		n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return nil, fmt.Errorf("find loop device: %w", err)
		}
		loop, err := os.OpenFile(fmt.Sprintf("/dev/loop%d", n), os.O_RDWR, 0)
		if err != nil {
			return nil, err
		}
		config := unix.LoopConfig{Fd: uint32(back),
			Info: unix.LoopInfo64{Flags: unix.LO_FLAGS_AUTOCLEAR}}
		if err = unix.IoctlLoopConfigure(int(loop.Fd()), &config); err == nil {
			return loop, nil
		}
		_ = loop.Close()
		if err != unix.EBUSY {
			return nil, fmt.Errorf("set up %s: %w", loop.Name(), err)
		}
	}
	return nil, fmt.Errorf("no loop device is free")
}
