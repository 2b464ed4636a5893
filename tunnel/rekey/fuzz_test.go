package rekey

import (
	"encoding/binary"
	"testing"
	"time"
)

// FuzzMachine gives an end, in each state of a handshake, a message that is
// well signed and otherwise anything: no panic, no key, no epoch. The fuzzer
// knows real messages to start from.
func FuzzMachine(f *testing.F) {
	w := newWorld(5)
	w.toy = true
	stop := time.Duration(0)
	w.bent = func(e *end) {
		e.trace = func(d []byte) {
			if d != nil {
				f.Add(uint8(stop/(10*time.Millisecond)), d[0], binary.BigEndian.Uint32(d[12:]),
					d[headerSize:len(d)-2*macSize], true)
			}
		}
	}
	w.start(QKDStrict, nil)
	for stop < 60*time.Millisecond {
		w.run(10 * time.Millisecond)
		stop += 10 * time.Millisecond
	}
	f.Fuzz(func(t *testing.T, state, kind uint8, receiver uint32, payload []byte, toI bool) {
		w := newWorld(6) // other randomness than the seeds': nothing real fits
		w.toy = true
		w.start(QKDStrict, nil)
		w.run(time.Duration(state%7) * 10 * time.Millisecond)
		i, r := w.named("I"), w.named("R")
		from, to := i, r
		if toI {
			from, to = r, i
		}
		if receiver%3 == 0 { // aim at an index that is alive
			for index := range to.m.pending {
				receiver = index
			}
			if to.m.init != nil {
				receiver = to.m.init.index
			}
		}
		if len(payload) > maxMessage {
			return
		}
		ds, err := from.m.env.wrap(w.now, message{kind: kind, receiver: receiver, payload: payload})
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range ds {
			out := to.m.Step(w.now, Input{Datagram: d, From: addrOf(from.id)})
			if out.Install != nil || out.Request != nil && state%7 > 0 || out.Send != 0 {
				t.Fatalf("a made-up M%d causes %+v", kind, out)
			}
		}
		w.run(30 * time.Second)
		if w.fault != nil || !w.up() {
			t.Fatalf("the line does not come up beside it: %v", w.fault)
		}
	})
}
