package tun

import "errors"

// Errors of Open. The message names the way out.
var (
	// ErrNoTUN says that this machine has no /dev/net/tun.
	ErrNoTUN = errors.New("no TUN device on this machine")
	// ErrPermission says that this user may not make a TUN device or set it up.
	ErrPermission = errors.New("not permitted")
	// ErrConfig says that the configuration cannot be meant.
	ErrConfig = errors.New("bad TUN configuration")
)

// ErrFull says that a memory device's queue has no room: the packet is lost,
// as it is in a kernel whose TUN queue is full.
var ErrFull = errors.New("queue is full")
