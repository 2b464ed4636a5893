package line

import (
	"bytes"
	"sync"

	"github.com/quietline/quietline/tunnel/rekey"
)

// maxDatagrams is how many handshake datagrams wait for the machine. One
// handshake has six at most (four messages, two of them in two fragments), so
// ten ends' worth: beyond that it is a flood, and the peer repeats.
const maxDatagrams = 64

// mail is what has come for the owner.
type mail struct {
	heard     []uint32 // first: it may switch the sending epoch
	answers   []*rekey.KeyAnswer
	datagrams [][]byte
	rekey     bool
}

// inbox gathers mail from the other goroutines. None of them waits.
type inbox struct {
	mu    sync.Mutex // guards mail
	mail  mail
	ready chan struct{} // one token: there is mail
}

func (b *inbox) init() { b.ready = make(chan struct{}, 1) }

// put changes the mail by f and wakes the owner.
func (b *inbox) put(f func(*mail)) {
	b.mu.Lock()
	defer b.mu.Unlock()
	f(&b.mail)
	select {
	case b.ready <- struct{}{}:
	default:
	}
}

// datagram puts a copy of a handshake datagram; false if there is no room.
func (b *inbox) datagram(d []byte) (ok bool) {
	b.put(func(m *mail) {
		if ok = len(m.datagrams) < maxDatagrams; ok {
			m.datagrams = append(m.datagrams, bytes.Clone(d))
		}
	})
	return ok
}

// take empties the inbox.
func (b *inbox) take() mail {
	b.mu.Lock()
	defer b.mu.Unlock()
	m := b.mail
	b.mail = mail{}
	return m
}

// clear wipes keys that nobody will use.
func (b *inbox) clear() {
	for _, a := range b.take().answers {
		for _, k := range a.Keys {
			k.Bits.Clear()
		}
	}
}
