package daemon

import (
	"context"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestWatchEvents feeds events as the kernel frames them: one datagram each.
func TestWatchEvents(t *testing.T) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	ours, kernel := os.NewFile(uintptr(fds[0]), "a"), os.NewFile(uintptr(fds[1]), "b")
	defer ours.Close()
	calls := 0
	for _, event := range []string{
		"add@/devices/x\x00ACTION=add\x00NEW_VMGENID=10\x00",
		"change@/devices/platform/QEMUVGID:00\x00ACTION=change\x00NEW_VMGENID=1\x00SEQNUM=7\x00",
		"change@/devices/y\x00NOT_NEW_VMGENID=1\x00",
	} {
		if _, err := kernel.WriteString(event); err != nil {
			t.Fatal(err)
		}
	}
	_ = kernel.Close() // after the three, the end
	watchEvents(ours, func() { calls++ }, testLog(t))
	if calls != 1 {
		t.Errorf("restored %d times, want once", calls)
	}
}

// TestWatchRestoreEnds with its context, whether or not there is a socket.
func TestWatchRestoreEnds(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- watchRestore(func() {}, testLog(t))(ctx) }()
	cancel()
	select {
	case err := <-done:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("does not end")
	}
}
