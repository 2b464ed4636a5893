package rekey

import (
	"encoding/binary"
	"fmt"
	"slices"
	"time"

	"github.com/quietline/quietline/tunnel"
)

// The payloads of the four messages (handshake.md 4.5). Boxes end in a tag of
// 16 bytes; integers are big endian; unused bytes are zero and are checked.
//
//	M1  I to R  nonce 32, index 4, ephemeral public key, ct to R's static key, box(c1)
//	M2  R to I  nonce 32, index 4, ct to the ephemeral key, ct to I's static key, box(c2)
//	M3  I to R  box(c3); R's index stands in the header
//	M4  R to I  box(c4); I's index stands in the header
const (
	kindM1 = 1
	kindM2 = 2
	kindM3 = 3
	kindM4 = 4
	// kindCookie is not part of a handshake.
	kindCookie = 5
)

const (
	randomSize = 32
	indexSize  = 4
	// maxKeys is the greatest number of QKD keys in one epoch (handshake.md
	// 4.6). c3 has room for all of them always: its length tells nothing.
	maxKeys = 4
)

// intro is what both ends tell about themselves, in c1 and c2:
//
//	policy 1, floor 1, offer 1, key source state 1, boot_id 16,
//	handshake counter 8, newest epoch number 8, sending index 4
type intro struct {
	policy       Policy
	floor, offer Level
	source       sourceState // of the key source; 0 in c1
	boot         [16]byte    // random at each start
	counter      uint64      // handshakes begun or answered since then
	epoch        uint64      // number of the newest epoch known
	sending      uint32      // index of the epoch we seal with, chosen by the receiver; 0 = none
}

const introSize = 4 + 16 + 8 + 8 + 4

func (p *intro) append(b []byte) []byte {
	b = append(b, byte(p.policy), byte(p.floor), byte(p.offer), byte(p.source))
	b = append(b, p.boot[:]...)
	b = binary.BigEndian.AppendUint64(b, p.counter)
	b = binary.BigEndian.AppendUint64(b, p.epoch)
	return binary.BigEndian.AppendUint32(b, p.sending)
}

func (p *intro) parse(b []byte) error {
	*p = intro{
		policy: Policy(b[0]), floor: Level(b[1]), offer: Level(b[2]), source: sourceState(b[3]),
		boot:    [16]byte(b[4:20]),
		counter: binary.BigEndian.Uint64(b[20:]),
		epoch:   binary.BigEndian.Uint64(b[28:]),
		sending: binary.BigEndian.Uint32(b[36:]),
	}
	if p.policy < PQCOnly || p.policy > OTPStrict || p.floor != p.policy.floor() ||
		p.offer != p.policy.offer() || p.source > sourceDenied {
		return fmt.Errorf("parse intro: policy %d, floor %d, offer %d, source %d",
			b[0], b[1], b[2], b[3])
	}
	return nil
}

// hello is c1: intro, then the identifiers of the chain secrets the initiator
// holds, newest first; zero = none.
type hello struct {
	intro
	chains [2][16]byte
}

const helloSize = introSize + 32

func (p *hello) encode() []byte {
	b := p.intro.append(make([]byte, 0, helloSize))
	return append(append(b, p.chains[0][:]...), p.chains[1][:]...)
}

func (p *hello) decode(b []byte) error {
	if len(b) != helloSize {
		return fmt.Errorf("parse c1: %d bytes", len(b))
	}
	if err := p.intro.parse(b); err != nil {
		return err
	}
	p.chains = [2][16]byte{[16]byte(b[introSize:]), [16]byte(b[introSize+16:])}
	if p.source != 0 {
		return fmt.Errorf("parse c1: source state %d", p.source)
	}
	return nil
}

// welcome is c2: intro, the chain secret to be mixed (zero = none is common,
// the chain starts anew), how long the responder is still busy in
// milliseconds, and how many attempts with new QKD keys it will take.
type welcome struct {
	intro
	chain    [16]byte
	busy     time.Duration
	attempts byte
}

const welcomeSize = introSize + 16 + 4 + 1

func (p *welcome) encode() []byte {
	b := p.intro.append(make([]byte, 0, welcomeSize))
	b = append(b, p.chain[:]...)
	b = binary.BigEndian.AppendUint32(b, milliseconds(p.busy))
	return append(b, p.attempts)
}

func (p *welcome) decode(b []byte) error {
	if len(b) != welcomeSize {
		return fmt.Errorf("parse c2: %d bytes", len(b))
	}
	if err := p.intro.parse(b); err != nil {
		return err
	}
	b = b[introSize:]
	p.chain = [16]byte(b)
	p.busy = time.Duration(binary.BigEndian.Uint32(b[16:])) * time.Millisecond
	p.attempts = b[20]
	return nil
}

// choice is c3: mode 1, sources 1, attempt 1, n 1, epoch 8, round trip in
// milliseconds 4, key_ID 16 each in room for maxKeys. Mode Blocked refuses
// the peer's policy: no epoch shall come of it. Bit 0 of sources says that QKD
// keys from the key manager go in; the high four bits are the state of the
// initiator's key manager. The low four bits of n count the key_IDs of this
// epoch; the high four bits count those after them, of keys that the initiator
// has drawn ahead: the responder may collect them in its own time.
type choice struct {
	mode    Level
	source  sourceState
	attempt byte
	epoch   uint64
	rtt     time.Duration
	ids     []tunnel.KeyID
	ahead   []tunnel.KeyID
}

const (
	choiceSize = 4 + 8 + 4 + 16*maxKeys
	sourceQKD  = 1 // bit of sources: QKD keys from the key manager
)

func (p *choice) encode() []byte {
	var sources byte
	if len(p.ids) > 0 {
		sources = sourceQKD
	}
	sources |= byte(p.source) << 4
	b := append(make([]byte, 0, choiceSize), byte(p.mode), sources, p.attempt,
		byte(len(p.ids)|len(p.ahead)<<4))
	b = binary.BigEndian.AppendUint64(b, p.epoch)
	b = binary.BigEndian.AppendUint32(b, milliseconds(p.rtt))
	for _, id := range slices.Concat(p.ids, p.ahead) {
		b = append(b, id[:]...)
	}
	return b[:choiceSize]
}

func (p *choice) decode(b []byte) error {
	if len(b) != choiceSize {
		return fmt.Errorf("parse c3: %d bytes", len(b))
	}
	n, all := int(b[3]&15), int(b[3]&15+b[3]>>4)
	*p = choice{mode: Level(b[0]), source: sourceState(b[1] >> 4), attempt: b[2],
		epoch: binary.BigEndian.Uint64(b[4:]),
		rtt:   time.Duration(binary.BigEndian.Uint32(b[12:])) * time.Millisecond}
	fresh := p.mode == QKD
	if p.mode > QKD || all > maxKeys || fresh != (n > 0) || fresh != (b[1]&15 == sourceQKD) ||
		!fresh && b[1]&15 != 0 || p.source > sourceDenied || p.attempt == 0 || !allZero(b[16+16*all:]) {
		return fmt.Errorf("parse c3: mode %d, sources %d, attempt %d, %d keys", b[0], b[1], b[2], n)
	}
	var ids []tunnel.KeyID
	for i := range all {
		id := tunnel.KeyID(b[16+16*i:])
		if slices.Contains(ids, id) {
			return fmt.Errorf("parse c3: a key_ID stands twice")
		}
		ids = append(ids, id)
	}
	p.ids, p.ahead = ids[:n:n], ids[n:]
	return nil
}

// refusal is the status of c4; accepted is zero.
type refusal uint8

const (
	accepted refusal = iota
	refusedUnknown
	refusedDown
	refusedPolicy
	refusedReused
	refusedBusy
)

var refusalNames = [...]string{"ok", "peer's key manager does not know the key",
	"peer's key manager is down", "peer refuses the policy", "peer has seen the key before",
	"peer is busy"}

func (r refusal) String() string { return refusalNames[r] }

// verdict is c4: status 1, reserved 3, epoch 8, wait in milliseconds 4.
type verdict struct {
	status refusal
	epoch  uint64
	wait   time.Duration
}

const verdictSize = 16

func (p *verdict) encode() []byte {
	b := append(make([]byte, 0, verdictSize), byte(p.status), 0, 0, 0)
	b = binary.BigEndian.AppendUint64(b, p.epoch)
	return binary.BigEndian.AppendUint32(b, milliseconds(p.wait))
}

func (p *verdict) decode(b []byte) error {
	if len(b) != verdictSize || b[0] > byte(refusedBusy) || !allZero(b[1:4]) {
		return fmt.Errorf("parse c4: %d bytes", len(b))
	}
	*p = verdict{status: refusal(b[0]), epoch: binary.BigEndian.Uint64(b[4:]),
		wait: time.Duration(binary.BigEndian.Uint32(b[12:])) * time.Millisecond}
	return nil
}

// milliseconds rounds up, so that a wait is never cut short.
func milliseconds(d time.Duration) uint32 {
	ms := (max(d, 0) + time.Millisecond - 1) / time.Millisecond
	return uint32(min(ms, 1<<32-1))
}

// clear1 is the clear part of M1 or M2: two byte strings follow nonce and
// index, of the sizes the suite gives them.
type opening struct {
	random []byte // N_I or N_R, 32 bytes
	index  uint32
	first  []byte // M1: ephemeral public key; M2: ct to it
	second []byte // M1: ct to R's static key; M2: ct to I's
	box    []byte
}

func (p *opening) encode() []byte {
	b := append([]byte(nil), p.random...)
	b = binary.BigEndian.AppendUint32(b, p.index)
	b = append(append(b, p.first...), p.second...)
	return append(b, p.box...)
}

func (p *opening) decode(b []byte, first, second, box int) error {
	const head = randomSize + indexSize
	if len(b) != head+first+second+box+tagSize {
		return fmt.Errorf("parse message: %d bytes", len(b))
	}
	p.random, p.index = b[:randomSize], binary.BigEndian.Uint32(b[randomSize:])
	p.first, b = b[head:head+first], b[head+first:]
	p.second, p.box = b[:second], b[second:]
	if p.index == 0 {
		return fmt.Errorf("parse message: index 0")
	}
	return nil
}

// bind mixes the clear part into the transcript.
func (p *opening) bind(t *transcript) {
	t.mixHash(p.random)
	t.mixHash(binary.BigEndian.AppendUint32(nil, p.index))
	t.mixHash(p.first)
	t.mixHash(p.second)
}
