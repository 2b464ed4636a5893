package lab

import (
	"errors"
	"fmt"
	"os"
	"syscall"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// runInit is process 1 of the new namespaces: it sets them up, starts the
// program proper and reaps what that leaves behind. It returns the exit code.
func runInit(opt Options) int {
	unix.CloseOnExec(controlFD)
	control := os.NewFile(controlFD, "control")
	if limit := prepare(opt); limit != nil {
		if err := report(control, limit); err != nil {
			fmt.Fprintln(os.Stderr, limit)
		}
		return exitLimit
	}
	cmd := again(stageInside, control)
	if err := cmd.Start(); err != nil {
		fmt.Fprintln(os.Stderr, "enter lab:", err)
		return exitLimit
	}
	_ = control.Close()
	defer forward(cmd.Process, func(s os.Signal) syscall.Signal {
		if s == syscall.SIGINT {
			return 0 // the terminal's: the program proper has got it too
		}
		return s.(syscall.Signal)
	})()
	return reap(cmd.Process.Pid)
}

// prepare makes mounts, /proc and the loopback interface our own.
func prepare(opt Options) *LimitError {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return setUpLimit("make mounts private", err)
	}
	// A container that covers parts of /proc refuses a new one. The old one
	// serves as well: it only shows process numbers as the outside has them.
	const flags = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	if err := unix.Mount("proc", "/proc", "proc", flags, ""); err != nil &&
		!errors.Is(err, unix.EPERM) && !errors.Is(err, unix.EBUSY) {
		return setUpLimit("mount /proc", err)
	}
	if err := loopbackUp(); err != nil {
		return setUpLimit("bring up the loopback interface", err)
	}
	if opt.TUN {
		if err := tryTUN(); err != nil {
			return tunLimit(err)
		}
	}
	return nil
}

// loopbackUp brings lo up in the namespace of this thread.
func loopbackUp() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	return netlink.LinkSetUp(lo)
}

// tryTUN makes a TUN device and lets it go.
func tryTUN() error {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open /dev/net/tun: %w", err)
	}
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq("qltry%d")
	if err != nil {
		return err
	}
	ifr.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err != nil {
		return fmt.Errorf("make TUN device: %w", err)
	}
	return nil
}

// reap waits for every process until the one called main ends, and returns the
// exit code of that.
func reap(main int) int {
	for {
		var ws syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &ws, 0, nil)
		switch {
		case errors.Is(err, syscall.EINTR):
		case err != nil:
			return exitLimit // no child left, and main not seen: cannot be
		case pid == main && (ws.Exited() || ws.Signaled()):
			return exitCode(ws)
		}
	}
}
