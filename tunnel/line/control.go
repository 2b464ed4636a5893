package line

import (
	"time"

	"github.com/quietline/quietline/tunnel/rekey"
	"github.com/quietline/quietline/tunnel/wire"
)

// Peer is what the other end last said of its line. It is for people: nothing
// is done because of it.
type Peer struct {
	Level  rekey.Level
	Reason string
	Since  time.Time // when it first said so; zero = it has said nothing
}

// told is what this end has last told the other.
type told struct {
	state wire.State
	index uint32 // of the epoch in which it was said
}

// tell sends the other end our level and why, if it has changed or the epoch
// is new: the other end may have restarted.
func (o *owner) tell() {
	s := o.sending.Load()
	if s == nil {
		return
	}
	say := told{o.say(), s.index}
	if say == o.told {
		return
	}
	if o.seal(say.state.Append(o.body[:0])) {
		o.told = say
	}
}

// say is what there is to tell: a rekey that fails shows before it blocks the
// line, when nothing can be told any more.
func (o *owner) say() wire.State {
	o.mu.Lock()
	defer o.mu.Unlock()
	s := wire.State{Level: uint8(o.snapshot.Level), Reason: o.snapshot.Why}
	if o.snapshot.Failure != "" {
		s.Reason += "; last rekey: " + o.snapshot.Failure
	}
	return s
}

// keepalive says that we are here, and how we are, for the record that said so
// before may have been lost.
func (o *owner) keepalive() {
	o.told = told{}
	o.tell()
}

// confirm sends the empty record that the machine asks for.
func (o *owner) confirm() { o.seal([]byte{byte(wire.Control)}) }

// seal sends a record on the control queue and tells whether it went out.
func (o *owner) seal(record []byte) bool {
	s := o.sending.Load()
	if s == nil {
		return false
	}
	datagram, err := s.sealers[wire.ControlQueue].Seal(o.record[:0], record)
	s.note(wire.ControlQueue)
	if err != nil {
		o.own.drop(spent)
		return false
	}
	if err := o.cfg.Conn.Write(Burst{Data: datagram, Size: len(datagram)}); err != nil {
		o.own.drop(unsent)
		return false
	}
	o.own.datagrams.Add(1)
	o.own.outer.Add(uint64(len(datagram)))
	return true
}

// hearState takes the body of a CONTROL record that is not empty.
func (o *owner) hearState(body []byte) {
	s, err := wire.ParseState(body)
	if err != nil {
		o.own.drop(badRecord)
		return
	}
	o.mu.Lock()
	p := &o.snapshot.peer
	level := rekey.Level(s.Level)
	if p.Since.IsZero() || p.Level != level {
		p.Since = time.Now()
	}
	changed := p.Level != level || p.Reason != s.Reason
	p.Level, p.Reason = level, s.Reason
	o.mu.Unlock()
	if changed {
		o.log.Info("peer's level", "level", level.String(), "reason", s.Reason)
	}
}
