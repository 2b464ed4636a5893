// Package rekey agrees the epoch keys of a line: a handshake of four messages
// that mixes X25519 or P-384, ML-KEM, a link secret, the chain of earlier
// epochs and QKD keys named by key_ID into keys that hold if any one of them
// holds, and the rekeying that repeats it make-before-break.
//
// [Machine] is a pure state machine: it does no I/O and reads no clock. Its
// caller owns it in one goroutine and keeps in mind:
//   - call Step at the start, at every input, and at Output.Wake;
//   - obey an Output in the order of its fields;
//   - give every KeyRequest exactly one KeyAnswer, an error too;
//   - clear the secrets of an Epoch when it is retired, and the Machine's by
//     Clear;
//   - seal nothing before the first Output.Send and after an Output.Stop.
package rekey

import (
	"net/netip"
	"time"

	"github.com/quietline/quietline/secret"
	"github.com/quietline/quietline/tunnel"
)

// Input is one thing that happened. Any combination of fields may be set.
type Input struct {
	Datagram []byte         // a handshake datagram from the peer's endpoint; not kept
	From     netip.AddrPort // where Datagram came from
	Keys     *KeyAnswer     // answer to an earlier Output.Request, exactly one for each
	Load     bool           // more than 32 handshake datagrams wait behind this one
	Rekey    bool           // the operator asks for a new epoch
	// Restored says that the machine we run on was restored from a snapshot
	// (its VM generation identifier has changed): all keys are dropped.
	Restored bool
	// Heard is the receive index of an epoch in which an authenticated data
	// record of the peer has just arrived for the first time; 0 = none.
	Heard uint32
	// Sent is the number of bytes sealed so far in the sending epoch; 0 = unknown.
	Sent uint64
}

// KeyRequest asks the caller to draw (New) or collect (IDs) QKD keys. With
// neither it is a probe: the key source's status, an error if it has no key.
type KeyRequest struct {
	ID       uint64 // comes back in the answer
	New      int    // number of keys to draw; 0 = collect IDs, or probe
	IDs      []tunnel.KeyID
	SizeBits int
	Budget   time.Duration // give up after this long
}

// KeyAnswer is the outcome; the machine takes ownership of Keys.
type KeyAnswer struct {
	ID   uint64
	Keys []tunnel.Key
	Err  error // wraps one of tunnel.ErrKey…
}

// Epoch is a pair of direction keys. The caller owns the secrets and clears
// them when the epoch is retired.
type Epoch struct {
	Number    uint64
	RecvIndex uint32       // chosen by us: names the epoch in records we receive
	SendIndex uint32       // chosen by the peer
	RecvKey   secret.Bytes // 32 bytes, direction key; queue keys are derived from it
	RecvIV    secret.Bytes // 12 bytes
	SendKey   secret.Bytes
	SendIV    secret.Bytes
	Level     Level
	KeyIDs    []tunnel.KeyID // QKD keys mixed in; empty = none
	Made      time.Time
}

// Level is what an epoch, or the line, rests on; higher is stronger.
type Level uint8

// Levels, as shown to people.
const (
	Blocked Level = iota // no epoch may carry traffic: packets are dropped
	PQC                  // X25519 + ML-KEM + link secret
	Chained              // PQC, and QKD from an earlier epoch
	QKD                  // PQC, and a fresh QKD key
	OTP                  // as QKD, payload under one-time pad
)

// Output is what the caller must do, in the order of the fields.
type Output struct {
	Install   *Epoch   // accept records of this epoch from now on
	Send      uint32   // seal with the epoch of this receive index from now on; 0 = as before
	Confirm   bool     // send one empty data record at once: key confirmation, then keepalive
	Retire    []uint32 // receive indexes of epochs to drop and clear
	Stop      bool     // seal nothing until the next Send: the line is blocked
	Void      bool     // another copy of this memory may exist: drop what else it may use
	Datagrams [][]byte // to the peer's endpoint, in order
	Request   *KeyRequest
	Events    []Event
	Wake      time.Time // call Step again at this time; zero = no need
}

// Event is something an operator may want to see.
type Event struct {
	Kind   string // constant, lower case: "level", "alarm", "rekey", "key lost"
	Level  Level
	Reason string
}
