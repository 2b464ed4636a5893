package audit

import (
	"fmt"
	"iter"
	"slices"
	"strings"
	"time"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/kms"
)

// Line is one change of a record as people and programs read it. Slots are
// positions within the segment; no key material stands in a log.
type Line struct {
	Record      uint64          `json:"record"` // number of the record
	At          time.Time       `json:"at"`
	Action      string          `json:"action"`
	Link        kms.LinkID      `json:"link,omitempty"`
	Generation  uint64          `json:"generation,omitempty"`
	Segment     uint64          `json:"segment,omitempty"`
	First       int             `json:"first_slot,omitempty"`
	Slots       int             `json:"slots,omitempty"`
	SizeBits    int             `json:"size_bits,omitempty"`
	SAE         etsi014.SAEID   `json:"sae,omitempty"`     // who got the keys, or was refused
	Targets     []etsi014.SAEID `json:"targets,omitempty"` // of a grant
	Peer        etsi014.KMEID   `json:"peer_kme,omitempty"`
	Owner       etsi014.KMEID   `json:"owner,omitempty"`
	Session     string          `json:"session,omitempty"`
	Incarnation uint64          `json:"incarnation,omitempty"`
	Epoch       uint64          `json:"epoch,omitempty"`
	Simulated   bool            `json:"simulated,omitempty"`
	Count       uint64          `json:"count,omitempty"`
	Reason      string          `json:"reason,omitempty"`
}

// actions are the words for what a record says was done.
var actions = map[kms.Op]string{
	kms.OpBoot: "start", kms.OpLink: "id key", kms.OpIngest: "ingest", kms.OpConfirm: "confirm",
	kms.OpGive: "give", kms.OpOpen: "open", kms.OpGrant: "grant", kms.OpClaim: "deliver",
	kms.OpExpire: "expire", kms.OpClose: "close", kms.OpFinish: "finish", kms.OpVoid: "void",
	kms.OpTurn: "turn epoch", kms.OpNote: "note",
}

// A claim's action tells the side.
const toInitiator, toTarget = "deliver to initiator", "deliver to target"

// Lines are a record's changes, one each.
func Lines(rec kms.Record) []Line {
	lines := make([]Line, 0, len(rec.Changes))
	for _, c := range rec.Changes {
		l := Line{Record: rec.Position.Length, At: rec.At, Action: actions[c.Op],
			Link: c.Segment.Link, Generation: c.Segment.Generation, Segment: c.Segment.Number,
			First: c.First, Slots: c.Slots, SAE: c.SAE, Peer: c.Memory.Peer, Owner: c.Owner,
			Incarnation: c.Incarnation, Epoch: c.Epoch, Count: c.Count, Reason: c.Reason}
		if c.Session != (kms.Session{}) {
			l.Session = c.Session.String()
		}
		switch c.Op {
		case kms.OpIngest:
			l.Owner, l.Slots, l.Simulated = c.Meta.Owner, c.Meta.Slots, c.Meta.Simulated
		case kms.OpGrant:
			l.First, l.Slots, l.SizeBits = c.Grant.First, c.Grant.Slots, c.Grant.SizeBits
			l.SAE, l.Targets = c.Grant.Initiator, c.Grant.Targets
		case kms.OpClaim:
			if c.Role == kms.RoleInitiator {
				l.Action = toInitiator
			} else {
				l.Action = toTarget
			}
		}
		lines = append(lines, l)
	}
	return lines
}

// Filter picks lines. Zero fields pick all.
type Filter struct {
	SAE         etsi014.SAEID // as SAE or among the targets
	Link        kms.LinkID
	Action      string
	Since, Till time.Time // Till exclusive
}

// Match tells whether the filter picks the line.
func (f Filter) Match(l Line) bool {
	named := f.SAE == "" || l.SAE == f.SAE
	for _, t := range l.Targets {
		named = named || t == f.SAE
	}
	return named && (f.Link == "" || l.Link == f.Link) && (f.Action == "" || l.Action == f.Action) &&
		(f.Since.IsZero() || !l.At.Before(f.Since)) && (f.Till.IsZero() || l.At.Before(f.Till))
}

// Verify reads a log to its end and tells how far it goes. The reader (see
// kms.Store.Scan) checks the chain; Verify checks that no record is skipped.
// The error names the first bad record: it wraps kms.ErrCorrupt.
func Verify(log iter.Seq2[kms.Record, error]) (kms.Position, error) {
	var at kms.Position
	for rec, err := range log {
		if err != nil {
			return at, fmt.Errorf("verify audit log: %d records are good: %w", at.Length, err)
		}
		if rec.Position.Length != at.Length+1 {
			return at, fmt.Errorf("verify audit log: record %d follows record %d: %w",
				rec.Position.Length, at.Length, kms.ErrCorrupt)
		}
		at = rec.Position
	}
	return at, nil
}

// Actions are the words that a Line's Action may be, sorted.
func Actions() []string {
	words := []string{toInitiator, toTarget}
	for op, a := range actions {
		if op != kms.OpClaim {
			words = append(words, a)
		}
	}
	slices.Sort(words)
	return words
}

// String is the line for a person: time, record, action, and what is told of
// it as name=value.
func (l Line) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s #%d %s", l.At.UTC().Format("2006-01-02T15:04:05.000Z"), l.Record, l.Action)
	text := func(name, v string) {
		if v != "" {
			fmt.Fprintf(&b, " %s=%s", name, v)
		}
	}
	number := func(name string, v uint64) {
		if v != 0 {
			fmt.Fprintf(&b, " %s=%d", name, v)
		}
	}
	text("link", string(l.Link))
	if l.Segment != 0 || l.Generation != 0 {
		fmt.Fprintf(&b, " segment=%d/%d", l.Generation, l.Segment)
	}
	if l.Slots != 0 {
		fmt.Fprintf(&b, " slots=%d+%d", l.First, l.Slots)
	}
	number("bits", uint64(l.SizeBits))
	text("sae", string(l.SAE))
	for _, t := range l.Targets {
		text("target", string(t))
	}
	text("peer_kme", string(l.Peer))
	text("owner", string(l.Owner))
	number("incarnation", l.Incarnation)
	number("epoch", l.Epoch)
	number("count", l.Count)
	if l.Simulated {
		b.WriteString(" simulated")
	}
	if l.Reason != "" {
		fmt.Fprintf(&b, " reason=%q", l.Reason)
	}
	return b.String()
}
