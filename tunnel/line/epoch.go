package line

import (
	"fmt"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/quietline/quietline/secret"
	"github.com/quietline/quietline/tunnel/rekey"
	"github.com/quietline/quietline/tunnel/seal"
	"github.com/quietline/quietline/tunnel/wire"
)

// sending is the sending half of an epoch: a sealer for each queue, used by
// that queue's goroutine alone. Sealer 0 is the owner's.
type sending struct {
	index   uint32 // our receive index: the epoch's name towards the machine
	sealers []*seal.Sealer
	sealed  []count // bytes, by queue; written by the queue's goroutine
}

// newSending makes the sealers of an epoch for the control queue and so many
// TUN queues.
func newSending(c seal.Cipher, e *rekey.Epoch, queues int) (*sending, error) {
	s := &sending{index: e.RecvIndex, sealed: make([]count, queues+1)}
	for q := range queues + 1 {
		sealer, err := seal.NewSealer(c, e.SendKey, e.SendIV, e.SendIndex, uint16(q))
		if err != nil {
			return nil, fmt.Errorf("set up sending in epoch %d: %w", e.Number, err)
		}
		s.sealers = append(s.sealers, sealer)
	}
	return s, nil
}

// note makes the volume of a queue known to the owner.
func (s *sending) note(queue int) { s.sealed[queue].Store(s.sealers[queue].Sealed()) }

// total is the number of bytes sealed in the epoch.
func (s *sending) total() uint64 {
	var n uint64
	for i := range s.sealed {
		n += s.sealed[i].Load()
	}
	return n
}

// receiving is the receiving half of an epoch. How many queues the peer has is
// not known; an opener is made when the first record of its queue comes.
type receiving struct {
	index uint32
	heard atomic.Bool // an authentic record has come

	lanes [wire.Queues]atomic.Pointer[lane]

	mu      sync.Mutex // guards making lanes, and the secrets
	cipher  seal.Cipher
	key, iv secret.Bytes
}

// lane is a queue of the peer.
type lane struct {
	mu     sync.Mutex // guards opener: several sockets may bring one queue's records
	opener *seal.Opener
	next   uint64 // one above the highest counter opened
}

// newReceiving takes over the receiving secrets of e.
func newReceiving(c seal.Cipher, e *rekey.Epoch) *receiving {
	return &receiving{index: e.RecvIndex, cipher: c, key: e.RecvKey, iv: e.RecvIV}
}

// lane returns the lane of a queue of the peer.
func (r *receiving) lane(queue uint16) (*lane, error) {
	if l := r.lanes[queue].Load(); l != nil {
		return l, nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if l := r.lanes[queue].Load(); l != nil {
		return l, nil
	}
	o, err := seal.NewOpener(r.cipher, r.key, r.iv, queue)
	if err != nil {
		return nil, err // the epoch has been retired in the meantime
	}
	l := &lane{opener: o}
	r.lanes[queue].Store(l)
	return l, nil
}

// open opens a datagram in place and returns the record. newest says that none
// of its queue with a higher counter has come before.
func (r *receiving) open(datagram []byte, h wire.Header) (record []byte, newest bool, err error) {
	l, err := r.lane(h.Queue)
	if err != nil {
		return nil, false, err
	}
	l.mu.Lock()
	record, err = l.opener.Open(datagram[wire.HeaderLen:][:0], datagram, h)
	if newest = err == nil && h.Counter >= l.next; newest {
		l.next = h.Counter + 1
	}
	l.mu.Unlock()
	return record, newest, err
}

// clear wipes the secrets. Openers that were made go with the garbage.
func (r *receiving) clear() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.key.Clear()
	r.iv.Clear()
}

// receptions is the receive table: the epochs whose records are taken, two at
// most. It is replaced as a whole, never changed.
type receptions []*receiving

func (t receptions) find(index uint32) *receiving {
	for _, r := range t {
		if r.index == index {
			return r
		}
	}
	return nil
}

func (t receptions) with(r *receiving) *receptions {
	next := append(slices.Clone(t), r)
	return &next
}

func (t receptions) without(index uint32) *receptions {
	next := slices.DeleteFunc(slices.Clone(t), func(r *receiving) bool { return r.index == index })
	return &next
}
