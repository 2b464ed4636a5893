package lab

import (
	"bytes"
	"container/heap"
	"math/rand/v2"
	"sync"
	"time"
)

// Weather is what a network does to datagrams. Loss, Duplicate and Reorder are
// probabilities from 0 to 1, drawn for each datagram from the seed.
type Weather struct {
	Loss      float64
	Duplicate float64       // the copy follows the original
	Reorder   float64       // held back by HoldBack, so that later ones overtake
	HoldBack  time.Duration // 0 = 5 ms
	Delay     time.Duration // of every datagram
	Jitter    time.Duration // 0 to so much is added to Delay; this reorders too
	Seed      uint64
}

// PathCounts says what has become of the datagrams of a path.
type PathCounts struct {
	Sent, Delivered, Lost, Duplicated, HeldBack uint64
}

// Path is one direction of a network with weather. Safe for concurrent use.
type Path struct {
	deliver func([]byte)

	mu      sync.Mutex // guards all below
	weather Weather
	rng     *rand.Rand
	counts  PathCounts
	waiting waiting
	serial  uint64
	wake    chan struct{} // one token: look at waiting again
	closed  bool
	done    chan struct{}
}

// maxWaiting bounds what a path holds; beyond it datagrams are lost, as in a
// router whose buffer is full.
const maxWaiting = 1 << 16

// NewPath returns a path that hands what arrives to deliver, one datagram at a
// time. deliver owns the slice and must not wait.
func NewPath(w Weather, deliver func(datagram []byte)) *Path {
	if w.HoldBack == 0 {
		w.HoldBack = 5 * time.Millisecond
	}
	p := &Path{
		deliver: deliver,
		weather: w,
		rng:     rand.New(rand.NewPCG(w.Seed, 0x9e3779b97f4a7c15)),
		wake:    make(chan struct{}, 1),
		done:    make(chan struct{}),
	}
	go p.run()
	return p
}

// SetWeather changes the weather for what is sent from now on; the seed stays.
func (p *Path) SetWeather(w Weather) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if w.HoldBack == 0 {
		w.HoldBack = p.weather.HoldBack
	}
	p.weather = w
}

// Send puts a copy of datagram on its way, unless it is lost.
func (p *Path) Send(datagram []byte) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.counts.Sent++
	w := &p.weather
	if p.closed || p.rng.Float64() < w.Loss || len(p.waiting) >= maxWaiting {
		p.counts.Lost++
		return
	}
	delay := w.Delay
	if w.Jitter > 0 {
		delay += time.Duration(p.rng.Int64N(int64(w.Jitter) + 1))
	}
	if p.rng.Float64() < w.Reorder {
		p.counts.HeldBack++
		delay += w.HoldBack
	}
	p.push(datagram, delay)
	if p.rng.Float64() < w.Duplicate {
		p.counts.Duplicated++
		p.push(datagram, delay)
	}
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

func (p *Path) push(datagram []byte, delay time.Duration) {
	p.serial++
	heap.Push(&p.waiting, &traveller{time.Now().Add(delay), p.serial, bytes.Clone(datagram)})
}

// Counts returns what has become of the datagrams so far.
func (p *Path) Counts() PathCounts {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.counts
}

// Close drops what is under way. deliver is not called any more when it
// returns.
func (p *Path) Close() {
	p.mu.Lock()
	if !p.closed {
		p.closed = true
		close(p.wake)
	}
	p.mu.Unlock()
	<-p.done
}

// run delivers in the order of due times.
func (p *Path) run() {
	defer close(p.done)
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		t, pause, closed := p.pop()
		switch {
		case closed:
			return
		case t != nil:
			p.deliver(t.data)
			continue
		}
		timer.Reset(pause)
		select {
		case <-timer.C:
		case <-p.wake:
		}
	}
}

// pop takes the next datagram if it is due, else says when to look again.
func (p *Path) pop() (t *traveller, pause time.Duration, closed bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed || len(p.waiting) == 0 {
		return nil, time.Hour, p.closed
	}
	if pause = time.Until(p.waiting[0].due); pause > 0 {
		return nil, pause, false
	}
	p.counts.Delivered++
	return heap.Pop(&p.waiting).(*traveller), 0, false
}

// traveller is a datagram under way.
type traveller struct {
	due    time.Time
	serial uint64 // keeps the order of those due at once
	data   []byte
}

// waiting is a heap by due time.
type waiting []*traveller

func (w waiting) Len() int { return len(w) }
func (w waiting) Less(i, j int) bool {
	if w[i].due.Equal(w[j].due) {
		return w[i].serial < w[j].serial
	}
	return w[i].due.Before(w[j].due)
}
func (w waiting) Swap(i, j int) { w[i], w[j] = w[j], w[i] }
func (w *waiting) Push(x any)   { *w = append(*w, x.(*traveller)) }
func (w *waiting) Pop() any {
	last := (*w)[len(*w)-1]
	*w = (*w)[:len(*w)-1]
	return last
}
