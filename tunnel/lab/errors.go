package lab

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// LimitError says which limit of this machine stands in the way of a lab, and
// the way out.
type LimitError struct {
	Limit string // e.g. "user.max_user_namespaces is 0"
	Hint  string // e.g. "try sudo"
	Err   error  // what the kernel said; nil if it was not asked
}

// Error implements error with limit, cause and hint.
func (e *LimitError) Error() string {
	if e.Err == nil {
		return fmt.Sprintf("enter lab: %s; %s", e.Limit, e.Hint)
	}
	return fmt.Sprintf("enter lab: %s: %v; %s", e.Limit, e.Err, e.Hint)
}

// Unwrap returns what the kernel said.
func (e *LimitError) Unwrap() error { return e.Err }

// Errors of the lab's parts.
var (
	// ErrOutside says that something needs the inside of a lab.
	ErrOutside = errors.New("not inside a lab")
	// ErrCapture says that a file is no capture of this package.
	ErrCapture = errors.New("not a packet capture")
)

const (
	hintSudo      = "try sudo"
	hintContainer = "try sudo; in a container: --privileged, or --cap-add SYS_ADMIN" +
		" --cap-add NET_ADMIN --device /dev/net/tun with its seccomp filter off"
)

// cloneLimit names the limit behind a refused clone into new namespaces.
func cloneLimit(err error) *LimitError {
	switch {
	case sysctl("user/max_user_namespaces") == "0":
		return &LimitError{"user.max_user_namespaces is 0", "try sudo, or raise it", err}
	case sysctl("kernel/unprivileged_userns_clone") == "0":
		return &LimitError{"kernel.unprivileged_userns_clone is 0", "try sudo, or set it to 1", err}
	case errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EUSERS):
		return &LimitError{"too many namespaces on this machine (user.max_*_namespaces)",
			hintSudo, err}
	case errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS):
		return &LimitError{"this kernel has no such namespaces", "use another kernel", err}
	}
	return &LimitError{"this process may not make namespaces (seccomp filter or security module)",
		hintContainer, err}
}

// setUpLimit names the limit behind a namespace that exists, but in which we
// have no rights.
func setUpLimit(what string, err error) *LimitError {
	if sysctl("kernel/apparmor_restrict_unprivileged_userns") == "1" {
		return &LimitError{"AppArmor takes the rights from unprivileged user namespaces" +
			" (kernel.apparmor_restrict_unprivileged_userns is 1)",
			"try sudo, or set it to 0", fmt.Errorf("%s: %w", what, err)}
	}
	return &LimitError{"no rights in the new namespaces (security module?)", hintContainer,
		fmt.Errorf("%s: %w", what, err)}
}

// tunLimit names the limit behind a TUN device that cannot be made.
func tunLimit(err error) *LimitError {
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		return &LimitError{"no TUN device on this machine",
			"try: modprobe tun; in a container: --device /dev/net/tun", err}
	case errors.Is(err, unix.EACCES):
		return &LimitError{"this user may not open /dev/net/tun", hintSudo, err}
	}
	return &LimitError{"no TUN device can be made in the new namespaces", hintContainer, err}
}

// sysctl reads a kernel setting; "" where the kernel does not have it.
func sysctl(name string) string {
	b, err := os.ReadFile("/proc/sys/" + name)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}
