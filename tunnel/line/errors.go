package line

import (
	"errors"
	"net"
)

// ErrConfig says that a line cannot be made of the given parts.
var ErrConfig = errors.New("bad line configuration")

// errEnded is the cause of a line's end when nothing went wrong.
var errEnded = errors.New("line has ended")

// errClosed is what the net package returns from a closed socket.
var errClosed = net.ErrClosed
