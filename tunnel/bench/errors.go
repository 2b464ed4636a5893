package bench

import "errors"

// Errors of a run; each is wrapped with what is missing or wrong.
var (
	// ErrOptions says that a run of such options is not possible.
	ErrOptions = errors.New("bad benchmark options")
	// ErrNeeds says that a program is missing, and how to install it.
	ErrNeeds = errors.New("a program is missing")
	// ErrIperf is what iperf3 says when it cannot measure.
	ErrIperf = errors.New("iperf3")
	// ErrDown says that a contender carries nothing.
	ErrDown = errors.New("no answer through the tunnel")
)
