package socket

import (
	"context"
	"sync"
	"time"

	"github.com/quietline/quietline/hw"
)

// maxQueue is how many blocks wait for a key manager that is not there: some
// minutes' worth. Then the oldest go, with an alarm.
const maxQueue = 256

// Queue is a [Source] that a device fills. It is safe for concurrent use.
type Queue struct {
	info hw.Info
	more chan struct{} // something was put in

	mu     sync.Mutex
	blocks []hw.Block
	events []hw.Event
	moreEv chan struct{}
}

// NewQueue returns an empty queue of a device.
func NewQueue(info hw.Info) *Queue {
	return &Queue{info: info, more: make(chan struct{}, 1), moreEv: make(chan struct{}, 1)}
}

// Put adds a block and takes ownership of its bits. It does not wait: when the
// queue is full the oldest block is cleared and an alarm raised.
func (q *Queue) Put(b hw.Block) {
	q.mu.Lock()
	full := len(q.blocks) == maxQueue
	if full {
		q.blocks[0].Bits.Clear()
		q.blocks = q.blocks[1:]
	}
	q.blocks = append(q.blocks, b)
	q.mu.Unlock()
	signal(q.more)
	if full {
		q.Emit(hw.Event{At: time.Now(), Alarm: "block dropped", Detail: "nobody takes blocks"})
	}
}

// Emit adds an event; of more than 64 the oldest go.
func (q *Queue) Emit(e hw.Event) {
	q.mu.Lock()
	q.events = append(q.events, e)
	if len(q.events) > maxEvents {
		q.events = q.events[1:]
	}
	q.mu.Unlock()
	signal(q.moreEv)
}

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// Len is the number of blocks waiting.
func (q *Queue) Len() int {
	q.mu.Lock()
	defer q.mu.Unlock()
	return len(q.blocks)
}

// Clear drops and clears all blocks.
func (q *Queue) Clear() {
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, b := range q.blocks {
		b.Bits.Clear()
	}
	q.blocks = nil
}

// Describe implements [Source].
func (q *Queue) Describe() hw.Info { return q.info }

// Next implements [Source].
func (q *Queue) Next(ctx context.Context) (hw.Block, error) {
	return pop(ctx, q, &q.blocks, q.more)
}

// NextEvent implements [Source].
func (q *Queue) NextEvent(ctx context.Context) (hw.Event, error) {
	return pop(ctx, q, &q.events, q.moreEv)
}

func pop[T any](ctx context.Context, q *Queue, from *[]T, more <-chan struct{}) (T, error) {
	for {
		q.mu.Lock()
		if len(*from) > 0 && ctx.Err() == nil {
			v := (*from)[0]
			*from = (*from)[1:]
			q.mu.Unlock()
			return v, nil
		}
		q.mu.Unlock()
		select {
		case <-ctx.Done():
			var zero T
			return zero, ctx.Err()
		case <-more:
		}
	}
}
