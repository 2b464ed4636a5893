package peer

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/datadriven"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/kms"
	"github.com/quietline/quietline/kms/storetest"
)

// TestTranscripts plays testdata/*.txt: each line is a command, what it printed
// stands below. Run with -rewrite after a change that is understood.
//
//	boot a                          start a's KME on its disk
//	join | part                     the channel comes up or goes
//	ingest a 1 [flip] [gen=2]       a's device yields block 1
//	deliver [a] [n=1]               hand over the oldest message (to a)
//	all                             hand over until nothing is under way
//	drop | dup | last               lose, double, or move the oldest to the end
//	draw a a1 b1 [n=1] [size=256]   SAE a1 draws at a for b1 (b1+b2 = both)
//	fetch b b1 a1 0 1               SAE b1 fetches keys 0 and 1 that a1 drew
//	wait 2s                         let time pass, ticking when due; BEATs are not shown
//	run 2s                          the same, handing over what comes up
//	crash a | save a | restore a    lose the process; copy or put back the disk
//	give a 1, want a                what the machine does of its own accord
//	show a                          segments and ledger
func TestTranscripts(t *testing.T) {
	datadriven.Walk(t, "testdata", func(t *testing.T, path string) {
		s := newStage()
		datadriven.RunTest(t, path, func(t *testing.T, d *datadriven.TestData) string {
			s.out.Reset()
			for _, line := range strings.Split(d.Cmd+" "+argText(d)+"\n"+d.Input, "\n") {
				if f := strings.Fields(line); len(f) > 0 {
					s.do(t, f)
				}
			}
			if s.out.Len() == 0 {
				return "nothing\n"
			}
			return s.out.String()
		})
	})
}

func argText(d *datadriven.TestData) string {
	var parts []string
	for _, a := range d.CmdArgs {
		if len(a.Vals) == 0 {
			parts = append(parts, a.Key)
		} else {
			parts = append(parts, a.Key+"="+strings.Join(a.Vals, ","))
		}
	}
	return strings.Join(parts, " ")
}

// stage is two machines, their disks, and the messages between them.
type stage struct {
	out   strings.Builder
	now   time.Duration
	m     map[etsi014.KMEID]*Machine
	disk  map[etsi014.KMEID]*storetest.Memory
	saved map[etsi014.KMEID]*storetest.Memory
	fence map[etsi014.KMEID]kms.Fence
	net   []Message
	from  []etsi014.KMEID
	keys  []KeyRef
	next  uint64
	rng   *rand.Rand
}

func newStage() *stage {
	s := &stage{now: time.Second, m: map[etsi014.KMEID]*Machine{},
		disk:  map[etsi014.KMEID]*storetest.Memory{},
		saved: map[etsi014.KMEID]*storetest.Memory{}, fence: map[etsi014.KMEID]kms.Fence{},
		rng: rand.New(rand.NewPCG(1, 2))}
	for _, id := range []etsi014.KMEID{"a", "b"} {
		s.disk[id] = storetest.NewMemory(id)
	}
	return s
}

func peerOf(id etsi014.KMEID) etsi014.KMEID {
	if id == "a" {
		return "b"
	}
	return "a"
}

func (s *stage) printf(format string, args ...any) { fmt.Fprintf(&s.out, format+"\n", args...) }

func option(f []string, name string, def int) int {
	for _, w := range f {
		if v, ok := strings.CutPrefix(w, name+"="); ok {
			if n, err := strconv.Atoi(v); err == nil {
				return n
			}
		}
	}
	return def
}

func (s *stage) do(t *testing.T, f []string) {
	t.Helper()
	at := etsi014.KMEID("")
	if len(f) > 1 {
		at = etsi014.KMEID(f[1])
	}
	switch f[0] {
	case "boot":
		s.boot(t, at)
	case "join":
		s.feed(t, "a", Connected{Peer: "b"})
		s.feed(t, "b", Connected{Peer: "a"})
	case "part":
		s.net, s.from = nil, nil
		s.feed(t, "a", Disconnected{Peer: "b"})
		s.feed(t, "b", Disconnected{Peer: "a"})
	case "ingest":
		s.ingest(t, at, f)
	case "deliver":
		for range option(f, "n", 1) {
			s.deliver(t, at)
		}
	case "all":
		for n := 0; len(s.net) > 0 && n < 200; n++ {
			s.deliver(t, "")
		}
	case "drop":
		s.take(0)
	case "dup":
		s.net, s.from = append(s.net, s.net[0]), append(s.from, s.from[0])
	case "last":
		m, from := s.take(0)
		s.net, s.from = append(s.net, m), append(s.from, from)
	case "draw":
		s.next++
		s.feed(t, at, Draw{Ticket: s.next, Initiator: etsi014.SAEID(f[2]), Targets: saes(f[3]),
			Number: option(f, "n", 1), SizeBits: option(f, "size", 256)})
	case "cancel":
		s.feed(t, at, Cancel{Ticket: uint64(option(f, "ticket", int(s.next)))})
	case "fetch":
		s.fetch(t, at, f)
	case "wait", "run":
		d, err := time.ParseDuration(f[1])
		if err != nil {
			t.Fatal(err)
		}
		s.wait(t, d, f[0] == "run")
	case "crash":
		delete(s.m, at)
	case "save":
		s.saved[at] = s.disk[at].Clone()
	case "restore":
		s.disk[at] = s.saved[at].Clone()
	case "give":
		n := option(f, "n", 1)
		s.poke(t, at, func(m *Machine) { m.giveAway(m.links["l"], n) })
	case "show":
		s.show(at)
	default:
		t.Fatalf("no command %q", f[0])
	}
}

func saes(list string) []etsi014.SAEID {
	var out []etsi014.SAEID
	for _, n := range strings.Split(list, "+") {
		out = append(out, etsi014.SAEID(n))
	}
	return out
}

func (s *stage) boot(t *testing.T, at etsi014.KMEID) {
	t.Helper()
	lease, err := s.disk[at].Lease(t.Context(), "", 0)
	if err != nil {
		t.Fatal(err)
	}
	link, err := s.disk[at].Lease(t.Context(), "l", -1)
	if err != nil {
		t.Fatal(err)
	}
	loop, err := s.disk[at].Lease(t.Context(), kms.Loopback, -1)
	if err != nil {
		t.Fatal(err)
	}
	snap := Snapshot{KME: lease, Links: map[kms.LinkID]kms.Lease{"l": link, kms.Loopback: loop},
		IDKeys: map[kms.LinkID][]byte{}}
	if link.IDKey.Epoch != 0 {
		snap.IDKeys["l"] = link.IDKey.Bytes
	}
	m, err := New(Config{KME: at, Links: []Link{{ID: "l", Peer: peerOf(at)}}, Rand: simRand{s.rng},
		SAEs: map[etsi014.SAEID]etsi014.KMEID{"a1": "a", "a2": "a", "a3": "a", "b1": "b", "b2": "b"}}, snap)
	if err != nil {
		t.Fatal(err)
	}
	m.aheadLeast = 0 // show grants ahead without many calls
	s.m[at], s.fence[at] = m, lease.Fence
	s.feed(t, at, Boot{})
}

func (s *stage) ingest(t *testing.T, at etsi014.KMEID, f []string) {
	t.Helper()
	number, err := strconv.ParseUint(f[2], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	id := kms.SegmentID{Link: "l", Generation: uint64(option(f, "gen", 1)), Number: number}
	block := make([]byte, Reserved+option(f, "slots", 8)*SlotBytes)
	for i := range block {
		block[i] = byte(number) + byte(i)
	}
	if slices.Contains(f, "flip") {
		block[100] ^= 1
	}
	seg, _, err := Cut(id, at, peerOf(at), Weights{}, false, block)
	if err != nil {
		t.Fatal(err)
	}
	s.next++
	s.feed(t, at, Ingested{Ticket: s.next, Segment: seg, Sealed: kms.Sealed{
		Key: kms.Wrapped{Epoch: 1, Bytes: []byte{1}}, Slots: make([]byte, seg.Slots*SlotBytes)}})
}

func (s *stage) fetch(t *testing.T, at etsi014.KMEID, f []string) {
	t.Helper()
	s.next++
	in := Fetch{Ticket: s.next, Target: etsi014.SAEID(f[2]), Initiator: etsi014.SAEID(f[3])}
	for _, w := range f[4:] {
		n, err := strconv.Atoi(w)
		if err != nil || n >= len(s.keys) {
			in.IDs = append(in.IDs, etsi014.KeyID{0xff}) // "unknown"
			continue
		}
		in.IDs = append(in.IDs, s.keys[n].ID)
	}
	s.feed(t, at, in)
}

func (s *stage) take(i int) (Message, etsi014.KMEID) {
	m, from := s.net[i], s.from[i]
	s.net, s.from = slices.Delete(s.net, i, i+1), slices.Delete(s.from, i, i+1)
	return m, from
}

func (s *stage) deliver(t *testing.T, to etsi014.KMEID) {
	t.Helper()
	for i := range s.net {
		if to == "" || s.net[i].To == to {
			m, from := s.take(i)
			if s.m[m.To] != nil {
				s.feed(t, m.To, Received{Peer: from, Data: m.Data})
			}
			return
		}
	}
	s.printf("nothing under way")
}

func (s *stage) wait(t *testing.T, d time.Duration, deliver bool) {
	t.Helper()
	end := s.now + d
	for {
		at := end
		for _, m := range s.m {
			if m.wakeAt > s.now {
				at = min(at, m.wakeAt)
			}
		}
		s.now = at
		for _, id := range []etsi014.KMEID{"a", "b"} {
			if m := s.m[id]; m != nil && m.wakeAt <= s.now {
				s.feed(t, id, Tick{})
			}
		}
		for n := 0; deliver && len(s.net) > 0 && n < 200; n++ {
			s.deliver(t, "")
		}
		if at == end {
			return
		}
	}
}

// poke lets the machine do something that no input asks for.
func (s *stage) poke(t *testing.T, at etsi014.KMEID, f func(*Machine)) {
	t.Helper()
	m := s.m[at]
	var out Output
	m.now, m.out = s.now, &out
	f(m)
	m.tally()
	m.out = nil
	s.release(t, at, out)
}

func (s *stage) feed(t *testing.T, at etsi014.KMEID, in Input) {
	t.Helper()
	m := s.m[at]
	if m == nil {
		return
	}
	if r, ok := in.(Received); ok && r.Data[1] != byte(kBeat) {
		s.printf("%s < %s", at, text(r.Data))
	}
	s.release(t, at, m.Step(s.now, in))
}

// release prints, commits and lets go what a step wants.
func (s *stage) release(t *testing.T, at etsi014.KMEID, out Output) {
	t.Helper()
	for i := range out.Changes {
		c := &out.Changes[i]
		if c.Op == kms.OpLink {
			c.IDKey = kms.Wrapped{Epoch: 1, Bytes: out.IDKeys[c.Segment.Link]}
		}
		if c.Op != kms.OpTally && c.Op != kms.OpRemember {
			s.printf("%s   %s", at, changeText(c))
		}
	}
	var next []Input
	if len(out.Changes) > 0 {
		pos, err := s.disk[at].Commit(context.Background(), s.fence[at], out.Changes)
		if err != nil {
			s.printf("%s   store: %v", at, err)
			delete(s.m, at)
			return
		}
		next = append(next, Durable{pos})
	}
	for _, e := range out.Events {
		s.printf("%s   event: %s", at, strings.TrimSpace(e.Text+" "+e.Reason))
	}
	for _, m := range out.Messages {
		if m.Data[1] != byte(kBeat) {
			s.printf("%s > %s", at, text(m.Data))
		}
		s.net, s.from = append(s.net, m), append(s.from, at)
	}
	for _, a := range out.Answers {
		s.answer(at, a)
	}
	for _, seg := range out.Fill {
		next = append(next, Ingested{Segment: seg, Sealed: kms.Sealed{
			Key: kms.Wrapped{Epoch: 1, Bytes: []byte{1}}, Slots: make([]byte, seg.Slots*seg.SlotBytes)}})
	}
	for _, l := range out.Lookups {
		hash, ok := s.disk[at].HashAt(l.Length)
		next = append(next, Looked{l.Peer, l.Length, hash, ok})
	}
	for _, in := range next {
		s.feed(t, at, in)
	}
}

func (s *stage) answer(at etsi014.KMEID, a Answer) {
	if a.Err != nil {
		var e *etsi014.Error
		if errors.As(a.Err, &e) && e.MissingBits > 0 {
			s.printf("%s = %v, %d bits missing", at, a.Err, e.MissingBits)
			return
		}
		s.printf("%s = %v", at, a.Err)
		return
	}
	if len(a.Keys) == 0 {
		s.printf("%s = stored", at)
		return
	}
	for _, k := range a.Keys {
		n := slices.Index(s.keys, k)
		if n < 0 {
			n = len(s.keys)
			s.keys = append(s.keys, k)
		}
		s.printf("%s = key %d: segment %s slots %d+%d, %d bits", at, n, name(k.Segment), k.First,
			k.Slots, k.SizeBits)
	}
}

func changeText(c *kms.Change) string {
	names := map[kms.Op]string{kms.OpBoot: "boot", kms.OpLink: "id key", kms.OpIngest: "ingest",
		kms.OpConfirm: "confirm", kms.OpGive: "give", kms.OpOpen: "open", kms.OpGrant: "grant",
		kms.OpClaim: "claim", kms.OpExpire: "expire", kms.OpClose: "close", kms.OpFinish: "finish",
		kms.OpVoid: "void", kms.OpNote: "note"}
	w := []string{"commit", names[c.Op]}
	if c.Segment.Number > 0 {
		w = append(w, name(c.Segment))
	}
	switch c.Op {
	case kms.OpBoot:
		w = append(w, fmt.Sprint(c.Incarnation))
	case kms.OpGrant:
		w = append(w, grantText(c.Grant))
	case kms.OpGive:
		w = append(w, "to "+string(c.Owner))
	case kms.OpClaim, kms.OpExpire:
		w = append(w, fmt.Sprintf("%d+%d for %s", c.First, c.Slots, c.SAE))
	}
	if c.Reason != "" {
		w = append(w, "("+c.Reason+")")
	}
	return strings.Join(w, " ")
}

// name is a segment's number, with its pool where that is no link.
func name(id kms.SegmentID) string {
	if id.Link == kms.Loopback {
		return fmt.Sprint("loop", id.Number)
	}
	return fmt.Sprint(id.Number)
}

func grantText(g kms.Grant) string {
	var to []string
	for _, t := range g.Targets {
		to = append(to, string(t))
	}
	return fmt.Sprintf("%d+%d of %d bits, %s to %s", g.First, g.Slots, g.SizeBits, g.Initiator,
		strings.Join(to, " and "))
}

// text is a message as the transcripts show it.
func text(data []byte) string {
	m, err := decode(data)
	if err != nil {
		return err.Error()
	}
	w := []string{m.kind.String()}
	if m.id.Number > 0 {
		w = append(w, fmt.Sprint(m.id.Number))
	}
	switch m.kind {
	case kHello:
		h := m.hello
		w = append(w, fmt.Sprintf("%s/%d to /%d, log %d, knows /%d log %d", h.kme, h.self.Counter,
			h.echo.Counter, h.position.Length, h.known.Incarnation, h.known.Position.Length))
		if h.witness {
			w = append(w, "witness")
		}
		if h.settled {
			w = append(w, "settled")
		}
		if h.forsaken.Length > 0 {
			w = append(w, fmt.Sprintf("forsakes log %d", h.forsaken.Length))
		}
	case kInventory:
		for _, r := range m.runs {
			w = append(w, fmt.Sprintf("%d+%d %s mine=%v", r.number, r.count, r.state, r.mine))
		}
	case kOffer:
		w = append(w, "of "+string(m.offer.Owner))
		if m.have {
			w = append(w, "have yours")
		}
	case kGrant:
		w = append(w, grantText(m.grant))
	case kGrantAck:
		w = append(w, fmt.Sprint("at ", m.first))
	case kMarks, kClose:
		for _, k := range m.marks {
			w = append(w, fmt.Sprintf("%d+%d", k.first, k.slots))
		}
	case kRefuse:
		w = append(w, fmt.Sprintf("%s: %s", m.refused, m.reason))
	}
	return strings.Join(w, " ")
}

func (s *stage) show(at etsi014.KMEID) {
	for _, l := range []*link{s.m[at].links["l"], s.m[at].loop} {
		if l == s.m[at].loop && l.ledger.Ingested == 0 {
			continue
		}
		for _, x := range l.sorted() {
			s.printf("%s: %s %s of %s, %d left", at, name(x.ID), x.State, x.Owner, x.left)
		}
		s.printf("%s: %+v", at, l.ledger)
	}
}
