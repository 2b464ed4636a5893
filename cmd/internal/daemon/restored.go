package daemon

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"os"

	"golang.org/x/sys/unix"
)

// newGeneration is what Linux says to user space, since 6.8, when the virtual
// machine it runs in was restored from a snapshot or cloned
// (Documentation/ABI/testing/sysfs-driver-vmgenid, drivers/virt/vmgenid.c).
var newGeneration = []byte("NEW_VMGENID=1")

// kernelEvents is the multicast group of what the kernel itself sends on
// NETLINK_KOBJECT_UEVENT (lib/kobject_uevent.c).
const kernelEvents = 1

// watchRestore calls restored when the kernel says that the machine was
// restored. Where that cannot be heard, a jump of the clock is all there is to
// see it by.
func watchRestore(restored func(), log *slog.Logger) part {
	return func(ctx context.Context) error {
		events, err := listenEvents()
		if err != nil {
			log.Info("restored machines are known by the clock alone", "err", err)
			<-ctx.Done()
			return nil
		}
		defer context.AfterFunc(ctx, func() { _ = events.Close() })()
		watchEvents(events, restored, log)
		<-ctx.Done()
		return nil
	}
}

// listenEvents opens a socket from which each read gives one event.
func listenEvents() (*os.File, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK,
		unix.NETLINK_KOBJECT_UEVENT)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK,
		Groups: kernelEvents}); err != nil {
		_ = unix.Close(fd)
		return nil, os.NewSyscallError("bind", err)
	}
	return os.NewFile(uintptr(fd), "uevent"), nil
}

// watchEvents reads until events closes.
func watchEvents(events *os.File, restored func(), log *slog.Logger) {
	buf := make([]byte, 8192) // an event has 2,048 bytes at most (UEVENT_BUFFER_SIZE)
	for {
		n, err := events.Read(buf)
		switch {
		case errors.Is(err, unix.ENOBUFS):
			continue // some were lost: nothing to read them by
		case err != nil:
			return
		}
		if isRestore(buf[:n]) {
			log.Warn("machine was restored from a snapshot: all keys are dropped")
			restored()
		}
	}
}

// isRestore tells whether an event, fields that end in zero bytes, is that of
// a new generation.
func isRestore(event []byte) bool {
	for field := range bytes.SplitSeq(event, []byte{0}) {
		if bytes.Equal(field, newGeneration) {
			return true
		}
	}
	return false
}
