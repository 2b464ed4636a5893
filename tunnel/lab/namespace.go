package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"

	"golang.org/x/sys/unix"
)

// Namespace is a network namespace, held by a file descriptor: it ends when
// that is closed and nothing lives in it any more. Safe for concurrent use.
type Namespace struct {
	name string
	file *os.File
}

// threadNet is the network namespace of the calling OS thread.
const threadNet = "/proc/thread-self/ns/net"

// NewNamespace makes a namespace with nothing but a loopback interface, which
// is up. The name is for messages only.
func NewNamespace(name string) (*Namespace, error) {
	home, err := Current()
	if err != nil {
		return nil, err
	}
	defer home.Close()
	var ns *Namespace
	// Do brings the thread back home whatever happens in between.
	err = home.Do(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return setUpLimit("make network namespace", err)
		}
		file, err := os.Open(threadNet)
		if err != nil {
			return err
		}
		ns = &Namespace{name, file}
		return loopbackUp()
	})
	if err != nil {
		if ns != nil {
			_ = ns.Close()
		}
		return nil, fmt.Errorf("make namespace %s: %w", name, err)
	}
	return ns, nil
}

// Current is the namespace of the calling thread.
func Current() (*Namespace, error) {
	file, err := os.Open(threadNet)
	if err != nil {
		return nil, fmt.Errorf("open network namespace: %w", err)
	}
	return &Namespace{"current", file}, nil
}

// Name is the name given to NewNamespace.
func (ns *Namespace) Name() string { return ns.name }

// Close lets go of the namespace.
func (ns *Namespace) Close() error { return ns.file.Close() }

// Do runs f on an OS thread that is in ns. Sockets, netlink handles and TUN
// devices that f opens, and processes that it starts, belong to ns and stay
// there; goroutines that f starts do not.
func (ns *Namespace) Do(f func() error) (err error) {
	runtime.LockOSThread()
	home, err := os.Open(threadNet)
	if err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("open network namespace: %w", err)
	}
	defer home.Close()
	if err := enter(ns.file); err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("enter namespace %s: %w", ns.name, err)
	}
	defer func() {
		if back := enter(home); back != nil {
			// The thread stays locked, so that it ends with this goroutine
			// and nobody runs on it by mistake.
			err = errors.Join(err, fmt.Errorf("leave namespace %s: %w", ns.name, back))
			return
		}
		runtime.UnlockOSThread()
	}()
	return f()
}

func enter(f *os.File) error { return unix.Setns(int(f.Fd()), unix.CLONE_NEWNET) }

// Start starts cmd as a process in ns.
func (ns *Namespace) Start(cmd *exec.Cmd) error { return ns.Do(cmd.Start) }

// Dial connects from ns. The address must be numeric: a resolver would ask
// from elsewhere.
func (ns *Namespace) Dial(ctx context.Context, network, address string) (c net.Conn, err error) {
	if err := numeric(network, address); err != nil {
		return nil, err
	}
	err = ns.Do(func() error {
		c, err = new(net.Dialer).DialContext(ctx, network, address)
		return err
	})
	return c, err
}

// Listen listens in ns.
func (ns *Namespace) Listen(network, address string) (ln net.Listener, err error) {
	err = ns.Do(func() error {
		ln, err = net.Listen(network, address)
		return err
	})
	return ln, err
}

// ListenPacket opens a datagram socket in ns.
func (ns *Namespace) ListenPacket(network, address string) (c net.PacketConn, err error) {
	err = ns.Do(func() error {
		c, err = net.ListenPacket(network, address)
		return err
	})
	return c, err
}

// numeric refuses an address that a resolver would have to look up. With a
// numeric one the net package opens the socket on the calling goroutine.
func numeric(network, address string) error {
	if network == "unix" {
		return nil
	}
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return err
	}
	if net.ParseIP(host) == nil {
		return fmt.Errorf("dial %s: the address is not numeric", address)
	}
	return nil
}
