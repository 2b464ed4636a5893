package simulator

import (
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/quietline/quietline/hw/distill"
)

// inbox reads messages from the classical channel. Its goroutine ends when the
// connection is closed and stop is closed.
type inbox struct {
	f        *framed
	messages chan []byte
	failed   chan error // one error, when the connection is broken
	stop     chan struct{}
}

func newInbox(conn net.Conn) *inbox {
	return &inbox{
		f: newFramed(conn, distill.MaxMessage, classicalSilence), messages: make(chan []byte),
		failed: make(chan error, 1), stop: make(chan struct{}),
	}
}

func (in *inbox) run() {
	for {
		m, err := in.f.read(nil)
		if err != nil {
			in.failed <- fmt.Errorf("read classical channel: %w", err)
			return
		}
		if len(m) == 0 {
			continue // the peer lives
		}
		select {
		case in.messages <- m:
		case <-in.stop:
			return
		}
	}
}

// outbox sends messages on the classical channel in a goroutine of its own:
// the machine must go on reading while the peer does not, or both would wait
// for each other.
type outbox struct {
	f      *framed
	failed chan error    // one error, when the connection is broken
	ended  chan struct{} // closed when run has ended

	mu       sync.Mutex // guards what follows; never held across I/O
	queue    [][]byte
	bytes    int
	over     bool // congested: the connection must go
	finished bool
	more     chan struct{} // holds one token when the queue changed
}

func newOutbox(conn net.Conn) *outbox {
	return &outbox{
		f:      newFramed(conn, distill.MaxMessage, classicalSilence),
		failed: make(chan error, 1),
		ended:  make(chan struct{}),
		more:   make(chan struct{}, 1),
	}
}

// put queues a message, which it takes over.
func (o *outbox) put(m []byte) {
	o.mu.Lock()
	o.queue = append(o.queue, m)
	o.bytes += len(m)
	o.over = o.over || o.bytes > maxBacklog
	o.mu.Unlock()
	o.signal()
}

// finish ends run after what is queued was sent, or the connection broke.
func (o *outbox) finish() {
	o.mu.Lock()
	o.finished = true
	o.mu.Unlock()
	o.signal()
}

// wait waits for the end of run, at most for d.
func (o *outbox) wait(d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-o.ended:
	case <-timer.C:
	}
}

func (o *outbox) signal() {
	select {
	case o.more <- struct{}{}:
	default:
	}
}

// take empties the queue.
func (o *outbox) take() (queue [][]byte, over, finished bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	queue, o.queue, o.bytes = o.queue, nil, 0
	return queue, o.over, o.finished
}

func (o *outbox) run() {
	defer close(o.ended)
	ticker := time.NewTicker(heartbeat)
	defer ticker.Stop()
	for {
		queue, over, finished := o.take()
		if over {
			o.failed <- ErrBacklog
			return
		}
		for _, m := range queue {
			if err := o.f.write(m); err != nil {
				o.failed <- fmt.Errorf("write classical channel: %w", err)
				return
			}
		}
		if finished {
			return
		}
		select {
		case <-o.more:
		case <-ticker.C:
			o.put(nil) // an empty frame: this end lives
		}
	}
}
