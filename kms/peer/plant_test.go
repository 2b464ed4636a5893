package peer

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// plant is a bug: a text of a source file and what stands in its place while
// the bug is planted. The replacement asks for the bug's number, so that one
// build serves them all.
type plant struct {
	number   int
	file     string // within kms
	old, new string
}

// TestPlantedBugs builds the simulator from a copy of the sources with all the
// bugs that the protocol's specification lists, and a few more, switches them
// on one by one, and demands that the histories fail for the reason given. Bugs
// 1, 2, 12, 13, 16 and 26 are about the order of writes, commit and release,
// which the simulator plays itself.
func TestPlantedBugs(t *testing.T) {
	if os.Getenv("CI") == "" && os.Getenv("QUIETLINE_LONG") == "" {
		t.Skip("builds the package once more and plays up to a minute; set QUIETLINE_LONG=1")
	}
	bin := buildPlanted(t)
	for _, c := range []struct {
		number int
		name   string
		kind   string // of histories
		caught string // regular expression
	}{
		{0, "none", "crashes", "^PASS"},
		{1, "target answers before fsync", "crashes", "I5: . answers"},
		{2, "claim and audit in separate commits", "crashes", "I5: . answers"},
		{3, "incarnation without nonce or prefix proof", "one-disk-old", "I6: incarnation"},
		{4, "OPEN not bound to the receiver's incarnation", "crashes", "rule 14: . acts on got (OPEN|GRANT)"},
		{5, "stale OPEN-ACK accepted", "crashes", "rule 14: . acts on got OPEN-ACK"},
		{6, "finished segment forgotten and reopened", "crashes", "block number was seen before|L1: "},
		{7, "draw before GRANT-ACK", "crashes", "L: "},
		{8, "grant overwritten by a late duplicate", "crashes", "slots are not granted so"},
		{9, "size absent from the grant", "crashes", "L: "},
		{10, "session checked outside the transaction", "crashes", "store of .:|L: "},
		{11, "weights read live, not from the segment", "crashes", "store of .:|I4:|I7:|L1:"},
		{12, "GIVE sent before durable", "crashes", "I5: . says GIVE"},
		{13, "heartbeat before fsync", "crashes", "I5: . says BEAT"},
		{14, "CLOSE shreds unfetched keys", "crashes", "L: "},
		{15, "retention counted from the grant", "crashes", "L: "},
		{16, "epoch slot overwritten before the commit", "crashes", "epoch keys are"},
		{17, "partly drawn segment keeps its data key", "crashes", "I10:"},
		{18, "one bitmap for all targets", "crashes", "L: |I2:"},
		{19, "dec_keys consumes good IDs when one is bad", "crashes", "I2: a refused fetch|L: "},
		{20, "key bytes reused on retry", "crashes", "already|I1:|keys got"},
		{21, "refused OPEN retried for ever", "crashes", "L1: "},
		{22, "stock cap full of peer-owned segments", "crashes", "L1: nothing could be drawn"},
		{23, "one bitmap for both sides of a loopback pool", "crashes", "L: "},
		{24, "target at the initiator's own KME answered twice", "crashes", "I2: .* twice"},
		{25, "loopback keys named alike in every process", "one-disk-old", "I6: key_ID"},
		{26, "epoch key not synced before the commit", "crashes", "epoch keys are"},
	} {
		t.Run(fmt.Sprintf("%d %s", c.number, c.name), func(t *testing.T) {
			seeds := "1500"
			if c.number == 0 {
				seeds = "20"
			}
			cmd := exec.Command(bin, "-test.run", "^TestSimulated$/^"+c.kind+"$", "-test.v")
			cmd.Env = append(os.Environ(), "QUIETLINE_SEED=", "QUIETLINE_SEEDS="+seeds,
				fmt.Sprint("QUIETLINE_PLANT=", c.number))
			out, err := cmd.CombinedOutput()
			if (err == nil) != (c.number == 0) {
				t.Fatalf("the simulator says %v:\n%s", err, out)
			}
			if !regexp.MustCompile("(?m)" + c.caught).Match(out) {
				t.Errorf("caught for another reason than %q:\n%s", c.caught, out)
			}
		})
	}
}

// buildPlanted compiles this package's tests over a copy with the bugs in.
func buildPlanted(t *testing.T) string {
	t.Helper()
	goTool, err := exec.LookPath("go")
	if err != nil {
		t.Skip("no go command: ", err)
	}
	here, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	root, dir := filepath.Dir(here), t.TempDir()
	texts := map[string]string{}
	for _, pkg := range []string{"peer", "storetest"} {
		name := filepath.Join(pkg, "planted.go")
		texts[name] = "package " + pkg + plantedSource
	}
	for _, p := range plants {
		text, ok := texts[p.file]
		if !ok {
			data, err := os.ReadFile(filepath.Join(root, p.file))
			if err != nil {
				t.Fatal(err)
			}
			text = string(data)
		}
		if n := strings.Count(text, p.old); n != 1 {
			t.Fatalf("bug %d: its place is %d times in %s; bring the plant up to date:\n%s", p.number, n,
				p.file, p.old)
		}
		texts[p.file] = strings.Replace(text, p.old, p.new, 1)
	}
	overlay := struct{ Replace map[string]string }{map[string]string{}}
	for file, text := range texts {
		path := filepath.Join(dir, strings.ReplaceAll(file, "/", "_"))
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		overlay.Replace[filepath.Join(root, file)] = path
	}
	data, err := json.Marshal(overlay)
	if err != nil {
		t.Fatal(err)
	}
	list, bin := filepath.Join(dir, "overlay.json"), filepath.Join(dir, "planted.test")
	if err := os.WriteFile(list, data, 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(goTool, "test", "-c", "-vet=off", "-overlay", list, "-o", bin, ".").
		CombinedOutput()
	if err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	return bin
}

// plantedSource is added to the packages that bugs are planted in.
const plantedSource = `

import (
	"os"
	"strconv"
	"sync"
)

var planted, _ = strconv.Atoi(os.Getenv("QUIETLINE_PLANT"))

// kept holds something back from one call to the next.
var kept sync.Map
`

var plants = []plant{
	{1, "peer/simsite_test.go", `		all := s.step(inputs)
`, `		all := s.step(inputs)
		if planted == 1 {
			for _, a := range all.Answers {
				s.answered(a)
			}
			all.Answers = nil
		}
		for _, m := range all.Messages {
			if planted == 12 && m.Data[1] == byte(kGive) {
				s.lawful(m)
				w.send(1-s.n, m.Data)
			}
		}
		if planted == 13 && len(all.Changes) > 0 {
			if pos, err := s.disk.Clone().Commit(context.Background(), s.fence, all.Changes); err == nil {
				for _, m := range s.m.Step(s.clock(), Durable{pos}).Messages {
					s.lawful(m)
					w.send(1-s.n, m.Data)
				}
			}
		}
`},
	{2, "storetest/memory.go", `	entry, next, err := audit.Append(s.position, s.At, changes, s.commitment)
`, `	if planted == 2 {
		late := slices.DeleteFunc(slices.Clone(changes), func(c kms.Change) bool {
			return c.Op != kms.OpClaim
		})
		changes = slices.DeleteFunc(slices.Clone(changes), func(c kms.Change) bool {
			return c.Op == kms.OpClaim
		})
		if owed, ok := kept.Swap(s, late); ok {
			changes = append(changes, owed.([]kms.Change)...)
		}
	}
	entry, next, err := audit.Append(s.position, s.At, changes, s.commitment)
`},
	{3, "peer/machine.go", `	m.change(kms.Change{Op: kms.OpBoot, Incarnation: counter, Reason: why})
`, `	if planted == 3 {
		m.self.Nonce = [16]byte{7}
	}
	m.change(kms.Change{Op: kms.OpBoot, Incarnation: counter, Reason: why})
`},
	{3, "peer/hello.go", `	if oldDisk && h.known.Position == r.forsaken {
`, `	if planted == 3 || oldDisk && h.known.Position == r.forsaken {
`},
	{3, "peer/hello.go", `	want := r.memory.Position
`, `	want := r.memory.Position
	if planted == 3 {
		want = kms.Position{}
	}
`},
	{4, "peer/receive.go", `	if r.session == (kms.Session{}) || msg.session != r.session ||`,
		`	loose := planted == 4 && (msg.kind == kOpen || msg.kind == kGrant) ||
		planted == 5 && (msg.kind == kOpenAck || msg.kind == kGrantAck)
	if r.session == (kms.Session{}) || msg.session != r.session && !loose ||`},
	{6, "peer/segment.go", `func (l *link) gone(id kms.SegmentID) bool {
`, `func (l *link) gone(id kms.SegmentID) bool {
	if planted == 6 {
		return l.find(id) != nil
	}
`},
	{7, "peer/grant.go", `	sh.coming += n
	if ready {
`, `	sh.coming += n
	if planted == 7 {
		g.acked = true
		sh.coming -= n
		sh.free += n
	}
	if ready {
`},
	{8, "peer/grant.go", `	if have := s.grantAt(g.First); have != nil && sameGrant(have.Grant, g) {
`, `	if planted == 8 && s.grantAt(g.First) != nil {
		m.change(kms.Change{Op: kms.OpGrant, Segment: s.ID, Session: s.Session, Grant: g})
	}
	if have := s.grantAt(g.First); have != nil && sameGrant(have.Grant, g) {
`},
	{9, "peer/grant.go", `	g := msg.grant
`, `	g := msg.grant
	if planted == 9 {
		g.SizeBits = 256
	}
`},
	{10, "peer/machine.go", `	out.Wake, m.out = m.wakeAt, nil
`, `	if planted == 10 {
		before, ok := kept.LoadAndDelete(m)
		if _, fetch := inputs[0].(Fetch); fetch {
			kept.Store(m, Output{Changes: out.Changes, Answers: out.Answers})
			out.Changes, out.Answers = nil, nil
		}
		if ok {
			out.Changes = append(out.Changes, before.(Output).Changes...)
			out.Answers = append(out.Answers, before.(Output).Answers...)
		}
	}
	out.Wake, m.out = m.wakeAt, nil
`},
	{11, "peer/segment.go", `func (m *Machine) owns(s *segment) bool { return s.Owner == m.cfg.KME }
`, `func (m *Machine) owns(s *segment) bool {
	if planted == 11 {
		return s.link.Weights.Owner(s.ID.Number, m.cfg.KME, s.link.remote.id) == m.cfg.KME
	}
	return s.Owner == m.cfg.KME
}
`},
	{14, "peer/close.go", `	if s.State != kms.StateOpen || s.owed > 0 {`,
		`	if s.State != kms.StateOpen || planted != 14 && s.owed > 0 {`},
	{15, "peer/grant.go", `	s.grants = slices.Insert(s.grants, i, x)
`, `	if planted == 15 {
		x.aged = []aged{{x.keys, m.now}}
	}
	s.grants = slices.Insert(s.grants, i, x)
`},
	{16, "peer/simsite_test.go", `	s.disk.slots[(next+1)%2] = next
`, `	s.disk.slots[(next+1)%2] = next
	if planted == 16 {
		s.disk.slots[next%2] = 0
	}
`},
	{17, "peer/close.go", `	s.touched = true
`, `	s.touched = planted != 17
`},
	{18, "peer/grant.go", `	s.grants = slices.Insert(s.grants, i, x)
	return x
`, `	s.grants = slices.Insert(s.grants, i, x)
	for i := range x.roles {
		if planted == 18 {
			x.roles[i].done = x.roles[0].done
		}
	}
	return x
`},
	{19, "peer/draw.go", `	if err != nil {
		m.answer(Answer{Ticket: in.Ticket, Err: err})
		return
	}
	keys := make`, `	if err != nil {
		for _, p := range parts {
			if planted == 19 && !p.role.done.Get(p.key) {
				m.claimSlots(p.grant, p.role.place, in.Target, p.key, 1)
				m.take(p.grant, p.role, p.key, true)
			}
		}
		m.answer(Answer{Ticket: in.Ticket, Err: err})
		return
	}
	keys := make`},
	{20, "peer/draw.go", `		g.drawn += n
		sh.free -= n
`, `		g.drawn += n
		sh.free -= n
		if planted == 20 && d.Ticket%5 == 0 && n > 1 {
			g.drawn--
			sh.free++
		}
`},
	{21, "peer/receive.go", `func (m *Machine) dead(s *segment, told kind) {
`, `func (m *Machine) dead(s *segment, told kind) {
	if planted == 21 && s.State == kms.StateOpen && !s.acked {
		return
	}
`},
	{23, "peer/draw.go", `		m.list(g, g.drawn, g.drawn+n)
`, `		m.list(g, g.drawn, g.drawn+n)
		for i := range g.roles {
			for k := g.drawn; planted == 23 && s.link == m.loop && k < g.drawn+n; k++ {
				g.roles[i].done.Set(k)
			}
		}
`},
	{24, "peer/close.go", `	ro.done.Set(key)
`, `	if planted != 24 || !m.owns(g.seg) {
		ro.done.Set(key)
	}
`},
	{24, "storetest/memory.go", `		if bits.Get(i) {
`, `		if bits.Get(i) && (planted != 24 || c.Role == kms.RoleInitiator) {
`},
	// The two bugs upset what segments count, which is checked too.
	{24, "peer/simcheck_test.go", `	owed, undrawn := 0, 0
`, `	owed, undrawn := 0, 0
	if planted == 20 || planted == 24 {
		return
	}
`},
	{25, "peer/idkey.go", `	m.setIDKey(l, key)
}

func (m *Machine) repeatIDKey(`, `	if planted == 25 && l == m.loop {
		clear(key)
	}
	m.setIDKey(l, key)
}

func (m *Machine) repeatIDKey(`},
	{26, "peer/simsite_test.go", `		s.disk.slots[next%2] = []uint64{s.epoch, torn, 0}[w.rng.IntN(3)]
`, `		s.disk.slots[next%2] = []uint64{s.epoch, torn, 0}[w.rng.IntN(3)]
		if planted == 26 && w.chance(50) {
			s.disk.slots[(next+1)%2] = torn
		}
`},
	{22, "peer/give.go", `func (m *Machine) wanted(l *link, n uint64) {
`, `func (m *Machine) wanted(l *link, n uint64) {
	if planted == 22 {
		return
	}
`},
}
