package peer

import (
	"fmt"
	"slices"
	"time"

	"github.com/quietline/quietline/kms"
)

// quietTime is within what stock must flow again and the sites agree.
const quietTime = 50 * time.Second

// quiet stops all faults and demands that stock flows again (L1) and both
// sides agree (I7), within quietTime; one history in eight plays all of it.
func (w *world) quiet() {
	w.faults = false
	w.log("quiet")
	w.calm = w.now
	began, next := w.now, w.now
	for w.now < began+quietTime {
		for _, s := range w.sites {
			if !s.alive && w.now >= s.ready {
				s.boot()
			}
		}
		if !w.linked {
			w.join()
		}
		if w.now >= next {
			next = w.now + time.Second
			if w.seed%8 != 0 && w.settled() {
				return
			}
			w.callers(w.now - began)
		}
		for len(w.net) > 0 && w.net[0].at <= w.now {
			w.deliver()
		}
		w.advance()
	}
	if !w.settled() {
		w.unsettled()
	}
}

// callers is what devices and SAEs do in a second of the quiet part.
func (w *world) callers(since time.Duration) {
	if since < 28*time.Second {
		w.makeBlock()
	}
	for _, s := range w.sites {
		for n := len(s.inbox); n > 0 && since < 30*time.Second; n-- {
			s.ingest()
		}
		if since > 8*time.Second && since < 30*time.Second && w.drawsHere(s.n) {
			s.drawKeys()
		}
		s.fetchKeys()
	}
}

// settled tells whether keys came of what arrived since faults stopped, no draw
// waits, and both sites hold the same.
func (w *world) settled() bool {
	for _, s := range w.sites {
		if len(s.asked) > 0 || w.quietGot[s.n] == 0 && w.drawsHere(s.n) {
			return false
		}
	}
	return slices.EqualFunc(w.sites[0].unopened(), w.sites[1].unopened(), func(a, b *segment) bool {
		return a.ID == b.ID && a.Owner == b.Owner
	})
}

// unsettled fails for what settled misses.
func (w *world) unsettled() {
	for _, s := range w.sites {
		for _, d := range s.asked {
			w.fail("L1: draw %d of %s waits since %v, it is %v", d.Ticket, s.id, d.since, w.now)
		}
		if w.quietGot[s.n] == 0 && w.drawsHere(s.n) {
			w.fail("L1: nothing could be drawn at %s after faults stopped: %s", s.id, s.dump())
		}
	}
	w.fail("I7: the sites disagree:\na holds %s\nb holds %s", w.sites[0].dump(), w.sites[1].dump())
}

// drawsHere: in a third of the histories each only one site has callers in the
// end, so that stock of the other's must come over.
func (w *world) drawsHere(site int) bool { return w.seed%3 == 2 || int(w.seed%3) == site }

// unopened are the confirmed segments, oldest first.
func (s *simSite) unopened() []*segment {
	var out []*segment
	for _, seg := range s.m.links[simLink].segments {
		if seg.State == kms.StateConfirmed {
			out = append(out, seg)
		}
	}
	slices.SortFunc(out, compareAge)
	return out
}

func (s *simSite) dump() string {
	r := s.m.ordered[0]
	text := fmt.Sprintf("up %v, reason %q, segments", r.up(), r.reason)
	for _, seg := range s.unopened() {
		text += fmt.Sprintf(" %d of %s", seg.ID.Number, seg.Owner)
	}
	return text
}
