package rekey

import (
	"maps"
	"slices"
	"time"
)

// State is a snapshot for status pages. It holds no secret.
type State struct {
	Policy    Policy
	Scheduled bool // this end starts the handshakes
	Level     Level
	Since     time.Time // of the level
	Why       string

	Epoch      uint64        // number of the sending epoch; 0 = none
	Made       time.Time     // of the sending epoch
	Fresh      time.Time     // when the youngest QKD key that the epoch rests on went in; zero = none
	Chained    int           // epochs since then
	Receive    int           // receive epochs held, 0 to 2
	BlockAt    time.Time     // when the line blocks unless a new epoch comes; zero = no epoch
	RTT        time.Duration // of the last handshake
	Took       time.Duration // our last good handshake, from M1 to M4 with all key managers
	Handshake  string        // what our own handshake is doing; "" = none
	Failure    string        // why our last handshake failed; "" = it did not
	KeyManager string        // what we know of our key manager
	PeerPolicy string        // as the peer proved it; "" = not yet
	Pad        bool          // both ends want payload under one-time pad
	Alarms     []string      // that no good handshake has cleared, sorted
}

// Stats counts since the machine was made.
type Stats struct {
	Started, Completed, Failed, Answered uint64 // handshakes; Answered = M1 answered with M2
	Epochs                               uint64 // epochs that became the sending one
	KeysDrawn, KeysUsed                  uint64 // QKD keys; used = in an epoch
	KeysLost                             uint64 // drawn here and never in an epoch
	KeysMissed                           uint64 // named by the peer and not to be had here
	Resent, Repeated                     uint64 // messages resent; replies given again
	BadForm, BadMAC, BadMessages         uint64 // datagrams, datagrams, messages dropped
	Cookies                              uint64 // M1 fragments dropped for want of a cookie
	KEMs                                 uint64 // KEM operations
}

// Stats returns the counters.
func (m *Machine) Stats() Stats { return m.stats }

var phaseNames = [...]string{sentM1: "waiting for the peer", drawing: "drawing a QKD key",
	sentM3: "waiting for the peer's confirmation"}

// State returns a snapshot as of the last Step.
func (m *Machine) State() State {
	s := State{Policy: m.cfg.Policy, Scheduled: m.scheduled, Level: m.level, Since: m.since,
		Why: m.why, RTT: m.rtt, Took: m.took, Failure: m.failure, KeyManager: m.source.state.String()}
	if m.cur != nil {
		s.Epoch, s.Made, s.BlockAt = m.cur.number, m.cur.made, m.cur.made.Add(m.cfg.HoldMax)
	}
	if c := m.chains[0]; c.qkd && m.cur != nil {
		s.Fresh, s.Chained = c.fresh, c.depth
	}
	for _, e := range [...]*held{m.cur, m.old, m.next} {
		if e != nil {
			s.Receive++
		}
	}
	if m.init != nil {
		s.Handshake = phaseNames[m.init.phase]
	}
	if m.peerIntro.policy != 0 {
		s.PeerPolicy = m.peerIntro.policy.String()
		s.Pad = m.cfg.Policy.Pad() && m.peerIntro.policy.Pad()
	}
	s.Alarms = slices.Sorted(maps.Keys(m.alarms))
	return s
}

// String is the level's name as shown to people.
func (l Level) String() string {
	switch l {
	case PQC:
		return "PQC"
	case Chained:
		return "CHAINED"
	case QKD:
		return "QKD"
	case OTP:
		return "OTP"
	}
	return "BLOCKED"
}
