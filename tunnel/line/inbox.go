package line

import (
	"bytes"
	"sync"

	"github.com/quietline/quietline/tunnel"
	"github.com/quietline/quietline/tunnel/pad"
	"github.com/quietline/quietline/tunnel/rekey"
)

// maxDatagrams is how many handshake datagrams wait for the machine. One
// handshake has six at most (four messages, two of them in two fragments), so
// ten ends' worth: beyond that it is a flood, and the peer repeats.
const maxDatagrams = 64

// loadDatagrams is how many handshake datagrams may wait before the machine
// asks strangers for a cookie (handshake.md 4.3).
const loadDatagrams = 32

// maxControls is how many CONTROL records wait: the peer repeats what matters.
const maxControls = 64

// mail is what has come for the owner.
type mail struct {
	heard     []uint32 // first: it may switch the sending epoch
	answers   []*rekey.KeyAnswer
	datagrams []datagram
	controls  [][]byte // bodies of CONTROL records, authentic
	pads      []*pad.Answer
	stray     bool // a record named pad that is not held
	rekey     bool
	restored  bool
}

// datagram is one of the handshake, and who sent it, as far as that may change.
type datagram struct {
	data []byte
	from Endpoint
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
func (b *inbox) datagram(d []byte, from Endpoint) (ok bool) {
	b.put(func(m *mail) {
		if ok = len(m.datagrams) < maxDatagrams; ok {
			m.datagrams = append(m.datagrams, datagram{bytes.Clone(d), from})
		}
	})
	return ok
}

// control puts a copy of the body of a CONTROL record; false if there is no room.
func (b *inbox) control(body []byte) (ok bool) {
	b.put(func(m *mail) {
		if ok = len(m.controls) < maxControls; ok {
			m.controls = append(m.controls, bytes.Clone(body))
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
	m := b.take()
	var keys []tunnel.Key
	for _, a := range m.answers {
		keys = append(keys, a.Keys...)
	}
	for _, a := range m.pads {
		keys = append(keys, a.Keys...)
	}
	for _, k := range keys {
		k.Bits.Clear()
	}
}
