package peer

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/kms"
	"github.com/quietline/quietline/kms/codec"
)

var someID = kms.SegmentID{Link: "tokyo-kochi", Generation: 3, Number: 1 << 40}

// everyMessage has each kind once, with all its fields set.
var everyMessage = []message{
	{kind: kHello, hello: &hello{kme: "tokyo", self: Incarnation{4, [16]byte{1}},
		echo: Incarnation{5, [16]byte{2}}, position: kms.Position{Length: 6, Hash: [32]byte{3}},
		known:       kms.Memory{Incarnation: 7, Position: kms.Position{Length: 8, Hash: [32]byte{4}}},
		proofLength: 9, proof: [32]byte{5}, witness: true, trustDisks: true, settled: true,
		forsaken: kms.Position{Length: 10, Hash: [32]byte{6}}, refusal: "why",
		links: []linkTerms{{"l", Weights{1, 2}, 11}}}},
	{kind: kIDKey, id: kms.SegmentID{Link: "l"}, key: bytes.Repeat([]byte{7}, IDKeySize)},
	{kind: kIDKeyAck, id: kms.SegmentID{Link: "l"}},
	{kind: kInventory, id: kms.SegmentID{Link: "l", Generation: 2},
		runs: []run{{1, 2, kms.StateNew, true}, {9, 1, kms.StateOpen, false}}},
	{kind: kOffer, id: someID, have: true, offer: kms.Segment{ID: someID, BlockBytes: 1, SlotBytes: 2,
		Slots: 3, Owner: "kochi", Simulated: true, Sent: kms.Tag{8}}},
	{kind: kConfirmed, id: someID},
	{kind: kGive, id: someID},
	{kind: kGiveAck, id: someID},
	{kind: kOpen, id: someID},
	{kind: kOpenAck, id: someID},
	{kind: kGrant, id: someID, grant: kms.Grant{First: 4, Slots: 5, SizeBits: 6, Initiator: "a",
		Targets: []etsi014.SAEID{"b", "c"}}},
	{kind: kGrantAck, id: someID, first: 9},
	{kind: kMarks, id: someID, marks: []mark{{1, 2}, {3, 4}}},
	{kind: kClose, id: someID, marks: []mark{{1, 2}}},
	{kind: kCloseAck, id: someID},
	{kind: kRefuse, id: someID, refused: kOpen, reason: notYet, first: 3},
	{kind: kWant, id: kms.SegmentID{Link: "l"}, count: 16},
	{kind: kBeat, at: kms.Position{Length: 12, Hash: [32]byte{9}}},
}

func decode(data []byte) (*message, error) {
	m := new(message)
	return m, m.decode(data)
}

func TestEveryMessageComesBack(t *testing.T) {
	if len(everyMessage) != int(kEnd)-1 {
		t.Fatalf("%d messages are tested, there are %d", len(everyMessage), kEnd-1)
	}
	for _, m := range everyMessage {
		if m.kind != kHello {
			m.session = kms.Session{0xaa}
		}
		got, err := decode(m.encode())
		if err != nil {
			t.Errorf("%s: %v", m.kind, err)
			continue
		}
		if diff := cmp.Diff(&m, got, cmp.AllowUnexported(message{}, hello{}, linkTerms{}, run{},
			mark{})); diff != "" {
			t.Errorf("%s changed on the way (-want +got):\n%s", m.kind, diff)
		}
		if strings.Contains(m.kind.String(), "?") {
			t.Errorf("message %d has no name", m.kind)
		}
	}
}

// TestDecodeIsStrict: no message may be cut short, be longer, or hold a value
// out of range.
func TestDecodeIsStrict(t *testing.T) {
	for _, m := range everyMessage {
		b := m.encode()
		for n := range b {
			if _, err := decode(b[:n]); !errors.Is(err, codec.ErrFormat) {
				t.Fatalf("%s cut to %d of %d bytes: %v", m.kind, n, len(b), err)
			}
		}
		if _, err := decode(append(b[:len(b):len(b)], 0)); !errors.Is(err, codec.ErrFormat) {
			t.Errorf("%s with a byte more: %v", m.kind, err)
		}
	}
	bad := map[string]message{
		"no target":          {kind: kGrant, grant: kms.Grant{Slots: 1, SizeBits: 8}},
		"too many targets":   {kind: kGrant, grant: kms.Grant{Slots: 1, SizeBits: 8, Targets: make([]etsi014.SAEID, maxTargets+1)}},
		"no slots":           {kind: kGrant, grant: kms.Grant{SizeBits: 8, Targets: []etsi014.SAEID{"b"}}},
		"no size":            {kind: kGrant, grant: kms.Grant{Slots: 1, Targets: []etsi014.SAEID{"b"}}},
		"slot above 31 bits": {kind: kGrantAck, first: 1 << 31},
		"empty run":          {kind: kInventory, runs: []run{{1, 0, kms.StateNew, true}}},
		"run over the end":   {kind: kInventory, runs: []run{{1 << 63, 1 << 63, kms.StateNew, true}}},
		"run of void":        {kind: kInventory, runs: []run{{1, 1, kms.StateVoid, true}}},
		"too many runs":      {kind: kInventory, runs: make([]run, maxRuns+1)},
		"too many marks":     {kind: kMarks, marks: make([]mark, maxMarks+1)},
		"refusal of nothing": {kind: kRefuse, reason: dead},
		"no reason":          {kind: kRefuse, refused: kOpen},
		"unknown reason":     {kind: kRefuse, refused: kOpen, reason: stranger + 1},
		"short key":          {kind: kIDKey, key: make([]byte, IDKeySize-1)},
		"incarnation zero":   {kind: kHello, hello: &hello{kme: "a"}},
		"kind zero":          {},
		"kind unknown":       {kind: kEnd},
	}
	for name, m := range bad {
		if _, err := decode(m.encode()); !errors.Is(err, codec.ErrFormat) {
			t.Errorf("%s: %v, want ErrFormat", name, err)
		}
	}
	b := everyMessage[0].encode()
	b[0] = Version + 1
	if _, err := decode(b); !errors.Is(err, codec.ErrFormat) || !strings.Contains(err.Error(), "version") {
		t.Errorf("another version: %v", err)
	}
}

// TestLongestMessageFits: the bounds of the lists keep messages sendable.
func TestLongestMessageFits(t *testing.T) {
	long := strings.Repeat("l", 64)
	h := &hello{kme: etsi014.KMEID(strings.Repeat("k", 255)), self: Incarnation{Counter: 1},
		refusal: strings.Repeat("r", 255)}
	for range maxLinks {
		h.links = append(h.links, linkTerms{id: kms.LinkID(long)})
	}
	id := kms.SegmentID{Link: kms.LinkID(long)}
	for _, m := range []message{{kind: kHello, hello: h},
		{kind: kInventory, id: id, runs: make([]run, maxRuns)},
		{kind: kClose, id: id, marks: make([]mark, maxMarks)}} {
		if n := len(m.encode()); n > MaxMessage {
			t.Errorf("%s can have %d bytes, at most %d are sent", m.kind, n, MaxMessage)
		}
	}
}

func FuzzDecode(f *testing.F) {
	for _, m := range everyMessage {
		f.Add(m.encode())
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		m, err := decode(data)
		if err != nil {
			return
		}
		if !bytes.Equal(m.encode(), data) {
			t.Errorf("%s is taken and written back otherwise", m.kind)
		}
	})
}

// FuzzReceived: whatever a peer sends, the machine neither panics nor lets its
// ledger or its store get out of step.
func FuzzReceived(f *testing.F) {
	for _, m := range everyMessage {
		f.Add(m.encode(), uint8(0))
	}
	f.Fuzz(func(t *testing.T, data []byte, at uint8) {
		s := newStage()
		for _, line := range []string{"boot a", "boot b", "join", "ingest a 1", "ingest b 1",
			"ingest a 2", "ingest b 2", "all", "draw a a1 b1", "all", "draw b b1 a1", "all"} {
			s.do(t, strings.Fields(line))
		}
		m, err := decode(data)
		if err != nil {
			return
		}
		m.session = s.m["a"].peers["b"].session
		if m.id.Link != "" {
			m.id.Link, m.id.Generation, m.id.Number = "l", 1, 1+uint64(at%3)
			m.offer.ID = m.id
		}
		s.out.Reset()
		s.feed(t, "a", Received{Peer: "b", Data: m.encode()})
		if strings.Contains(s.out.String(), "store:") {
			t.Errorf("the store refused: %s", s.out.String())
		}
		if a := s.m["a"]; a != nil && !a.links["l"].ledger.Balanced() {
			t.Errorf("ledger: %+v", a.links["l"].ledger)
		}
	})
}
