package line

import "time"

// Of the search for the path's MTU, RFC 8899 section 5.1.
const (
	// probeTimeout is PROBE_TIMER: the round trip of a line is below it. The RFC
	// wants 1 s at least.
	probeTimeout = time.Second
	// maxProbes is MAX_PROBES: so many lost in a row are no accident.
	maxProbes = 3
	// confirmEvery is CONFIRMATION_TIMER: how long a path may swallow full
	// packets before it is noticed. The RFC leaves it to the protocol.
	confirmEvery = 30 * time.Second
	// raiseEvery is PMTU_RAISE_TIMER: when a narrow path is tried anew.
	raiseEvery = 600 * time.Second
	// searchStep is the difference that is not worth a probe, bytes: TCP's
	// segments differ by as much as their options do.
	searchStep = 8
)

// phase is what the search is about.
type phase uint8

const (
	proveTop  phase = iota // does what the kernel believes pass?
	proveBase              // it does not: does the least MTU pass?
	proveAny               // nor that: does anything pass?
	narrowing              // between base, which passes, and what does not
	resting                // found; confirmed from time to time
	silent                 // nothing passes, or the peer answers no probes
)

// search finds by probes how large packets pass, as datagram packetization
// layer path MTU discovery does (RFC 8899): the kernel's knowledge comes from
// ICMP, which many networks drop. It starts from what the kernel believes, not
// from the base, so that a healthy path is used in full at once; a path that
// swallows such packets is noticed after maxProbes. Sizes are MTUs of the TUN
// device, in bytes. It does no I/O and reads no clock.
//
// A peer that answers no probe leaves the search silent, and the device with
// what the kernel believes.
type search struct {
	top, base int
	phase     phase
	mtu       int  // to be used
	narrow    bool // not even base passes whole
	low, high int  // while narrowing: low passes, high does not

	size    int       // of the probe under way
	number  uint32    // its number; answers to others are late
	tries   int       // probes of this size; 0 = none is under way
	sent    time.Time // the last of them
	confirm time.Time // resting or silent: when to probe again
	raise   time.Time // resting below top: when to try top again
}

// aim says what the kernel believes to pass, and the least that is worth it. It
// begins anew when that has changed.
func (s *search) aim(top, base int) {
	if top == s.top && base == s.base {
		return
	}
	number := s.number
	*s = search{top: top, base: base, mtu: top, number: number}
}

// step says what probe to send now; size 0 is a probe without padding.
func (s *search) step(now time.Time) (size int, number uint32, send bool) {
	if s.tries > 0 && now.Sub(s.sent) < probeTimeout {
		return 0, 0, false
	}
	if s.tries >= maxProbes {
		s.tries = 0
		s.lost(now)
	}
	if s.tries == 0 {
		if (s.phase == resting || s.phase == silent) && now.Before(s.confirm) {
			return 0, 0, false
		}
		s.choose(now)
	}
	s.tries++
	s.sent = now
	s.number++
	return s.size, s.number, true
}

// choose begins with the next size.
func (s *search) choose(now time.Time) {
	switch s.phase {
	case silent:
		s.phase = proveTop
	case resting:
		if s.mtu < s.top && !s.narrow && !now.Before(s.raise) {
			s.phase = proveTop
		}
	}
	switch s.phase {
	case proveTop:
		s.size = s.top
	case proveBase:
		s.size = s.base
	case proveAny:
		s.size = 0
	case narrowing:
		s.size = (s.low + s.high) / 2
	case resting:
		s.size = s.mtu
		if s.narrow {
			s.size = 0 // base goes in fragments, and proves nothing
		}
	}
}

// answered takes an answer; it is false for one that says nothing new.
func (s *search) answered(number uint32, now time.Time) bool {
	if s.number-number >= uint32(s.tries) {
		return false // of another size, or of none
	}
	s.tries = 0
	switch s.phase {
	case proveTop:
		s.mtu = s.top
		s.rest(now)
	case proveBase:
		s.mtu, s.low = s.base, s.base
		s.narrowed(now)
	case proveAny:
		s.mtu, s.narrow = s.base, true
		s.rest(now)
	case narrowing:
		s.mtu, s.low = s.size, s.size
		s.narrowed(now)
	case resting:
		s.confirm = now.Add(confirmEvery)
	}
	return true
}

// lost draws the conclusion from maxProbes without an answer.
func (s *search) lost(now time.Time) {
	switch s.phase {
	case proveTop:
		s.high = s.top
		s.phase = proveBase
		if s.mtu < s.top {
			// It was tried again, and what passes is known.
			s.rest(now)
			s.confirm = now
		}
	case resting:
		s.phase, s.high = proveBase, s.mtu
		if s.narrow {
			s.fallSilent(now)
		}
	case proveBase:
		s.phase = proveAny
	case narrowing:
		s.high = s.size
		s.narrowed(now)
	case proveAny:
		s.fallSilent(now)
	}
}

// narrowed goes on between low and high, or ends.
func (s *search) narrowed(now time.Time) {
	s.phase = narrowing
	if s.high-s.low <= searchStep {
		s.rest(now)
	}
}

func (s *search) rest(now time.Time) {
	s.phase, s.confirm, s.raise = resting, now.Add(confirmEvery), now.Add(raiseEvery)
}

// fallSilent keeps what is in use: without any answer nothing is known.
func (s *search) fallSilent(now time.Time) {
	s.phase, s.confirm = silent, now.Add(confirmEvery)
}
