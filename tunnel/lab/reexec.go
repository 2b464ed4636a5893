package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// The three stages of a program that re-executes itself. They stand one above
// the other as processes:
//
//	outer   as the user started it; waits, and opens what must be outside
//	init    process 1 of the new namespaces: sets them up, reaps orphans
//	inside  the program proper
//
// When the outer ends, the kernel kills init (Pdeathsig) and with it every
// process of the PID namespace.
const (
	stageEnv    = "QUIETLINE_LAB"
	stageInit   = "init"
	stageInside = "inside"
)

// controlFD is the inner end of the socket to the outer process.
const controlFD = 3

// exitLimit is init's exit code after it has reported a LimitError.
const exitLimit = 125

// Options of [Reexec].
type Options struct {
	// TUN says that TUN devices will be made: a machine where that is not
	// possible is refused at once, not half way.
	TUN bool
}

var cloexec sync.Once

// Inside tells whether this process, or one above it, came through Reexec.
func Inside() bool {
	if os.Getenv(stageEnv) != stageInside {
		return false
	}
	cloexec.Do(func() { unix.CloseOnExec(controlFD) })
	return true
}

// Reexec runs this program again, with the same arguments and streams, inside
// new network, mount and PID namespaces, and in a new user namespace unless we
// are root already. It waits and returns the exit code of the inner run, which
// the caller passes to os.Exit. An error is a *[LimitError] where the kernel
// refuses. Call it first thing, whenever [Inside] says no: the program passes
// here twice on its way in.
//
// SIGTERM and SIGHUP go to the inner run. So does SIGINT, as SIGTERM, unless
// it came from the terminal, which tells the inner run itself. The end of ctx
// kills everything inside.
func Reexec(ctx context.Context, opt Options) (int, error) {
	switch os.Getenv(stageEnv) {
	case stageInit:
		return runInit(opt), nil
	case stageInside:
		return 0, fmt.Errorf("enter lab: this is the inside already")
	}
	code, err := runOuter(ctx, os.Geteuid() != 0)
	var limit *LimitError
	if os.Geteuid() == 0 && errors.As(err, &limit) && errors.Is(err, unix.EPERM) {
		// Root without CAP_SYS_ADMIN, as in most containers: a user namespace
		// may still be allowed.
		if again, err2 := runOuter(ctx, true); err2 == nil {
			return again, nil
		}
	}
	return code, err
}

// runOuter starts the init stage and waits for it.
func runOuter(ctx context.Context, user bool) (int, error) {
	// Pdeathsig acts when the thread that started the child ends.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	outer, inner, err := controlPair()
	if err != nil {
		return 0, fmt.Errorf("enter lab: %w", err)
	}
	defer outer.Close()
	cmd := again(stageInit, inner)
	cmd.SysProcAttr = namespaces(user)
	err = cmd.Start()
	_ = inner.Close()
	if err != nil {
		return 0, cloneLimit(err)
	}
	stop := context.AfterFunc(ctx, func() { _ = cmd.Process.Kill() })
	defer stop()
	defer forward(cmd.Process, interruptFromOutside)()
	served := make(chan *LimitError, 1)
	go func() { served <- serve(outer, cmd.Process.Pid) }()
	_ = cmd.Wait()
	if limit := <-served; limit != nil {
		return 0, limit
	}
	return exitCode(cmd.ProcessState.Sys().(syscall.WaitStatus)), nil
}

// again is this program once more, with its arguments and streams.
func again(stage string, control *os.File) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), stageEnv+"="+stage)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.ExtraFiles = []*os.File{control} // becomes controlFD
	return cmd
}

func namespaces(user bool) *syscall.SysProcAttr {
	attr := &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS | syscall.CLONE_NEWPID,
		Pdeathsig:  syscall.SIGKILL,
	}
	if user {
		attr.Cloneflags |= syscall.CLONE_NEWUSER
		attr.UidMappings = []syscall.SysProcIDMap{{HostID: os.Geteuid(), Size: 1}}
		attr.GidMappings = []syscall.SysProcIDMap{{HostID: os.Getegid(), Size: 1}}
	}
	return attr
}

// forward hands the signals that ask us to stop to p, until the returned
// function is called. as says what becomes of a signal; 0 drops it.
func forward(p *os.Process, as func(os.Signal) syscall.Signal) func() {
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for s := range signals {
			if s := as(s); s != 0 {
				_ = p.Signal(s)
			}
		}
	}()
	return func() {
		signal.Stop(signals)
		close(signals)
		<-done
	}
}

// interruptFromOutside passes SIGINT on as SIGTERM, unless the terminal has
// sent it: then every stage has got it already.
func interruptFromOutside(s os.Signal) syscall.Signal {
	if s != syscall.SIGINT {
		return s.(syscall.Signal)
	}
	if group, err := unix.IoctlGetInt(0, unix.TIOCGPGRP); err == nil && group == unix.Getpgrp() {
		return 0
	}
	return syscall.SIGTERM
}

// exitCode is a shell's view of a wait status.
func exitCode(ws syscall.WaitStatus) int {
	if ws.Signaled() {
		return 128 + int(ws.Signal())
	}
	return ws.ExitStatus()
}
