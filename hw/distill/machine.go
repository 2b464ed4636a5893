package distill

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"slices"
	"time"

	"github.com/quietline/quietline/hw"
	"github.com/quietline/quietline/hw/distill/finite"
	"github.com/quietline/quietline/hw/distill/gf2"
)

const (
	// inFlight is how many blocks bob has open at a time: while one waits for
	// the peer's answer the others go on, so that round trips do not matter.
	inFlight = 4
	// maxPending is how many blocks' worth of detections bob keeps waiting.
	maxPending = 4
	// stallAfter ends a session whose peer leaves a block lie.
	stallAfter = time.Minute
	// authLow is the reserve, bits, below which a block gives more back than
	// it cost: a third of the default seed.
	authLow = 1024 * padBytes * 8
	// authGroups is how many blocks' worth of pads a block then gives.
	authGroups = 8
	// maxTranscript bounds the messages of a block in one direction, bytes,
	// for the bound on a forgery.
	maxTranscript = 1 << 32
)

// Machine is one end of the distillation. It is not safe for concurrent use:
// one goroutine owns it and the slices it is given.
type Machine struct {
	cfg    Config
	events int // detections that make a block
	now    time.Time
	out    *Output
	err    error // final
	stats  Stats

	helloSent, helloGot bool
	generation          uint64
	digest              [32]byte
	shared              []segmentID // newest last; both ends hold these

	open    []*block // rising seq
	nextSeq uint64
	heard   time.Time // when the peer last said something about a block, or one opened
	qber    float64   // of the key basis in the block before, 0 at first

	pending  []Detection // bob: not announced yet
	lastSlot uint64      // bob: slot of the last detection given
	anySlot  bool
	asked    []*part // alice: parts whose preparations are outstanding
}

type segmentID struct{ generation, seq uint64 }

// New returns a machine at the start of a session, or ErrConfig. The first
// Step, even of an empty Input, yields the message that opens it.
func New(cfg Config) (*Machine, error) {
	if cfg.EpsSec == 0 {
		cfg.EpsSec = 1e-9
	}
	if cfg.EpsCor == 0 {
		cfg.EpsCor = 1e-15
	}
	if cfg.EpsAuth == 0 {
		cfg.EpsAuth = 1e-15
	}
	if cfg.MaxQBER == 0 {
		cfg.MaxQBER = 0.11
	}
	if cfg.Rand == nil {
		cfg.Rand = rand.Reader
	}
	if err := cfg.check(); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrConfig, err)
	}
	cfg.Intensities = slices.Clone(cfg.Intensities)
	m := &Machine{cfg: cfg, nextSeq: 1}
	m.events = int(math.Ceil(float64(cfg.BlockBits) / (cfg.KeyBasis * cfg.KeyBasis)))
	m.digest = cfg.digest()
	return m, nil
}

func (c Config) check() error {
	ratio := func(v float64) bool { return v > 0 && v < 1 }
	switch {
	case c.Role > Bob:
		return errors.New("role is neither alice nor bob")
	case len(c.Intensities) != 2:
		return fmt.Errorf("%d intensities; only one decoy, so two, are built", len(c.Intensities))
	case !(c.Intensities[0].Mu > c.Intensities[1].Mu && c.Intensities[1].Mu > 0):
		return errors.New("mean photon numbers must fall and be above 0")
	case !ratio(c.Intensities[0].Probability) || !ratio(c.Intensities[1].Probability) ||
		math.Abs(c.Intensities[0].Probability+c.Intensities[1].Probability-1) > 1e-9:
		return errors.New("probabilities of the intensities must sum to 1")
	case !ratio(c.KeyBasis):
		return errors.New("probability of the key basis must be between 0 and 1")
	case c.BlockBits < 4096 || c.BlockBits > 1<<22:
		return errors.New("block must have 4096 to 4194304 sifted bits")
	case float64(c.BlockBits)/(c.KeyBasis*c.KeyBasis) > 1<<25:
		return errors.New("block needs more than 33554432 detections; raise the key basis")
	case !ratio(c.EpsSec) || !ratio(c.EpsCor) || !ratio(c.EpsAuth):
		return errors.New("epsilons must be between 0 and 1")
	case gf2.Collision(c.BlockBits/4) > c.EpsCor:
		return fmt.Errorf("verification cannot keep epsilon %g", c.EpsCor)
	case gf2.Collision(maxTranscript) > c.EpsAuth:
		return fmt.Errorf("authentication cannot keep epsilon %g", c.EpsAuth)
	case !(c.MaxQBER > 0 && c.MaxQBER < 0.5):
		return errors.New("qber limit must be between 0 and 0.5")
	case c.Auth == nil:
		return errors.New("authentication key is missing")
	}
	return nil
}

// digest is what both ends must have in common.
func (c Config) digest() [32]byte {
	b := []byte("quietline distill 1")
	f := func(v float64) { b = binary.LittleEndian.AppendUint64(b, math.Float64bits(v)) }
	for _, i := range c.Intensities {
		f(i.Mu)
		f(i.Probability)
	}
	for _, v := range []float64{c.KeyBasis, float64(c.BlockBits), c.EpsSec, c.EpsCor,
		c.EpsAuth, c.MaxQBER} {
		f(v)
	}
	if c.Simulated {
		b = append(b, 1)
	}
	return sha256.Sum256(b)
}

// source is the part of the config that lengths are computed from.
func (c Config) source() (s finite.Source) {
	for k, i := range c.Intensities {
		s.Mu[k], s.P[k] = i.Mu, i.Probability
	}
	return s
}

// Step gives the machine what has happened by now and returns what to do. On
// an error the machine is dead (see the errors): the output then holds alarms
// at most, never messages or blocks.
func (m *Machine) Step(now time.Time, in Input) (Output, error) {
	if m.err != nil {
		return Output{}, m.err
	}
	var out Output
	m.now, m.out = now, &out
	err := m.step(in)
	m.out = nil
	if err != nil {
		m.fail(err)
		dropped := out.Blocks
		for _, b := range dropped {
			b.Bits.Clear()
		}
		return Output{Alarms: append(out.Alarms, m.alarmOf(err)...)}, err
	}
	if len(m.open) > 0 {
		out.Wake = stallAfter / 6
	}
	return out, nil
}

func (m *Machine) step(in Input) error {
	if !m.helloSent {
		m.helloSent = true
		h := hello{m.cfg.Role, m.cfg.Generation, m.digest, m.cfg.Auth.Segments()}
		m.out.Messages = append(m.out.Messages, h.encode())
	}
	if err := m.take(in); err != nil {
		return err
	}
	if in.Message != nil {
		if err := m.message(in.Message); err != nil {
			return err
		}
	}
	if m.cfg.Role == Alice {
		if err := m.prepared(in.Preparations); err != nil {
			return err
		}
	} else {
		m.announce()
	}
	for _, b := range m.open {
		if b.expects != 0 && m.now.Sub(m.heard) > stallAfter {
			return fmt.Errorf("%w for %s in block %d", ErrStalled, stallAfter, b.seq)
		}
	}
	return nil
}

// take checks and keeps bob's detections.
func (m *Machine) take(in Input) error {
	if m.cfg.Role == Alice {
		if len(in.Detections) > 0 || in.Slots > 0 {
			return fmt.Errorf("%w: alice was given detections", ErrInput)
		}
		return nil
	}
	if len(in.Preparations) > 0 {
		return fmt.Errorf("%w: bob was given preparations", ErrInput)
	}
	for _, d := range in.Detections {
		if (m.anySlot && d.Slot <= m.lastSlot) || d.Basis > Test || d.Bit > 1 {
			return fmt.Errorf("%w: detection in slot %d", ErrInput, d.Slot)
		}
		m.lastSlot, m.anySlot = d.Slot, true
		if len(m.pending) < maxPending*m.events {
			m.pending = append(m.pending, d)
		} else {
			m.stats.Dropped++
		}
	}
	m.stats.Detections += uint64(len(in.Detections))
	m.stats.Slots = max(m.stats.Slots, in.Slots)
	return nil
}

func (m *Machine) message(raw []byte) error {
	if len(raw) < headBytes || len(raw) > MaxMessage {
		return fmt.Errorf("%w: message of %d bytes", ErrProtocol, len(raw))
	}
	r := &reader{b: raw}
	kind, seq := r.u8(), r.u64()
	if kind == kindHello {
		return m.hello(r)
	}
	if !m.helloGot {
		return fmt.Errorf("%w: message kind %d before hello", ErrProtocol, kind)
	}
	b := m.find(seq)
	if b == nil && m.cfg.Role == Alice && kind == kindAnnounce && seq == m.nextSeq &&
		len(m.open) < inFlight {
		b = m.newBlock()
	}
	if b == nil {
		if seq > 0 && seq < m.nextSeq {
			return nil // the block was closed while this was under way
		}
		return fmt.Errorf("%w: message kind %d for block %d", ErrProtocol, kind, seq)
	}
	m.heard = m.now
	if kind == kindAbort {
		return m.aborted(b, r)
	}
	absorb(b.got, raw, kind)
	ok, err := m.dispatch(b, kind, r)
	if err == nil && !ok {
		err = fmt.Errorf("%w: message kind %d of %d bytes in block %d", ErrProtocol, kind, len(raw), seq)
	}
	return err
}

// dispatch hands a message to its step; false says that it is malformed or not
// the one the block waits for.
func (m *Machine) dispatch(b *block, kind uint8, r *reader) (bool, error) {
	if kind != b.expects {
		return false, nil
	}
	switch kind {
	case kindAnnounce:
		return m.announced(b, r), nil
	case kindSifted:
		return m.sifted(b, r), nil
	case kindBegin:
		return m.begun(b, r), nil
	case kindParities:
		return m.parities(b, r), nil
	case kindDifferences:
		return m.differences(b, r)
	case kindVerify:
		return m.verify(b, r), nil
	case kindVerified:
		if !r.end() {
			return false, nil
		}
		b.expects = 0
		return true, m.amplifyNext()
	case kindAmplify:
		return m.amplify(b, r)
	case kindAccept:
		return m.accepted(b, r)
	case kindAck:
		return m.acked(b, r)
	}
	return false, nil
}

func (m *Machine) hello(r *reader) error {
	var h hello
	if m.helloGot || !h.decode(r) || h.role == m.cfg.Role {
		return fmt.Errorf("%w: bad hello", ErrProtocol)
	}
	if h.digest != m.digest {
		return ErrMismatch
	}
	m.helloGot = true
	m.generation = max(m.cfg.Generation, h.generation)
	return m.share(h.segments)
}

func (m *Machine) find(seq uint64) *block {
	for _, b := range m.open {
		if b.seq == seq {
			return b
		}
	}
	return nil
}

// send adds a message of a block and takes it into the transcript.
func (m *Machine) send(b *block, kind uint8, parts ...[]byte) {
	raw := newMessage(kind, b.seq, parts...)
	absorb(b.sent, raw, kind)
	m.out.Messages = append(m.out.Messages, raw)
}

func (m *Machine) alarm(what, detail string) {
	m.out.Alarms = append(m.out.Alarms, hw.Event{At: m.now, Alarm: what, Detail: detail})
}

func (m *Machine) alarmOf(err error) []hw.Event {
	what := "distillation failed"
	switch {
	case errors.Is(err, ErrAuthentication):
		what = "authentication failed"
	case errors.Is(err, ErrProtocol):
		what = "classical channel disturbed"
	case errors.Is(err, ErrStalled):
		what = "peer is silent"
	case errors.Is(err, ErrMismatch):
		what = "ends are configured differently"
	case errors.Is(err, ErrAuthEmpty), errors.Is(err, ErrRolledBack):
		what = "authentication key unusable"
	}
	return []hw.Event{{At: m.now, Alarm: what, Detail: err.Error()}}
}

// fail makes the machine dead and wipes what it holds.
func (m *Machine) fail(err error) {
	m.err = err
	for _, b := range m.open {
		b.clear()
	}
	clear(m.pending)
	m.open, m.pending, m.asked = nil, nil, nil
}

// close takes a block out and keeps its report.
func (m *Machine) close(b *block, outcome string) {
	b.report.Outcome = outcome
	m.stats.Last = b.report
	m.stats.SiftedBits += uint64(b.keyBits.n)
	m.stats.LeakBits += uint64(b.report.Leak)
	if outcome == outcomeSecret {
		m.stats.Blocks++
	} else {
		m.stats.Aborted++
	}
	b.clear()
	m.open = slices.DeleteFunc(m.open, func(o *block) bool { return o == b })
}

// Stats returns totals up to now. The caller is the goroutine that steps.
func (m *Machine) Stats() Stats {
	s := m.stats
	s.Generation = m.generation
	s.AuthLeft = authLeft(m.cfg.Auth.Segments())
	s.Pending = len(m.pending)
	s.BlockEvents = m.events
	return s
}
