package distill

import (
	"fmt"
	"strings"
	"testing"

	"github.com/cockroachdb/datadriven"
)

var kindNames = map[uint8]string{kindHello: "hello", kindAnnounce: "announce", kindSifted: "sifted",
	kindBegin: "begin", kindParities: "parities", kindDifferences: "differences",
	kindVerify: "verify", kindVerified: "verified", kindAmplify: "amplify", kindAccept: "accept",
	kindAck: "ack", kindAbort: "abort"}

// transcript writes down what goes over the channel; runs of parities and
// differences of one block become one line.
type transcript struct {
	lines  []string
	rounds int
	drop   string
	spoil  string
}

func (w *transcript) tamper(to Role, raw []byte) [][]byte {
	name := kindNames[raw[0]]
	if name == "parities" || name == "differences" {
		w.rounds++
		return [][]byte{raw}
	}
	w.flush()
	from := "alice -> bob  "
	if to == Alice {
		from = "bob   -> alice"
	}
	r := reader{b: raw[1:]}
	line := fmt.Sprintf("%s block %d %s, %d bytes", from, r.u64(), name, len(raw))
	switch name {
	case w.drop:
		w.lines = append(w.lines, line+", lost")
		return nil
	case w.spoil:
		w.lines = append(w.lines, line+", last byte changed")
		raw = append([]byte(nil), raw...)
		raw[len(raw)-1] ^= 1
	default:
		w.lines = append(w.lines, line)
	}
	return [][]byte{raw}
}

func (w *transcript) flush() {
	if w.rounds > 0 {
		w.lines = append(w.lines,
			fmt.Sprintf("               %d rounds of parities and differences", w.rounds/2))
		w.rounds = 0
	}
}

// outcome lists what both ends made since the marks.
func outcome(l *link, blocks, alarms [2]int) (lines []string) {
	for role, name := range []string{"alice", "bob"} {
		for _, b := range l.blocks[role][blocks[role]:] {
			lines = append(lines, fmt.Sprintf("%s has block %d/%d: %d bytes, qber %.4f, epsilon %.3g",
				name, b.Generation, b.Seq, b.Bits.Len(), b.QBER, b.Epsilon))
		}
		for _, a := range l.alarms[role][alarms[role]:] {
			lines = append(lines, fmt.Sprintf("%s raises %q: %s", name, a.Alarm, a.Detail))
		}
		if l.errs[role] != nil {
			lines = append(lines, fmt.Sprintf("%s is dead", name))
		}
	}
	return lines
}

// TestTranscripts runs testdata/transcripts: a command, and all that went over
// the channel. `go test -rewrite` writes them anew; commit that only when the
// change is understood.
func TestTranscripts(t *testing.T) {
	t.Parallel()
	datadriven.Walk(t, "testdata/transcripts", func(t *testing.T, path string) {
		var l *link
		datadriven.RunTest(t, path, func(t *testing.T, d *datadriven.TestData) string {
			w := &transcript{}
			d.MaybeScanArgs(t, "lose", &w.drop)
			d.MaybeScanArgs(t, "change", &w.spoil)
			if l == nil {
				l = newLink(t, tinyConfig(), clean, 41)
				l.queue = [2][][]byte{}
			}
			var blocks, alarms [2]int
			for role := range l.ends {
				blocks[role], alarms[role] = len(l.blocks[role]), len(l.alarms[role])
			}
			l.tamper = w.tamper
			switch d.Cmd {
			case "connect":
				generation := 0
				d.ScanArgs(t, "generation", &generation)
				l.restart(uint64(generation))
				l.pump()
			case "blocks":
				n := 1
				var eve string
				d.MaybeScanArgs(t, "n", &n)
				d.MaybeScanArgs(t, "eve", &eve)
				l.phys = clean
				if eve != "" {
					if _, err := fmt.Sscan(eve, &l.phys.eve); err != nil {
						d.Fatalf(t, "%v", err)
					}
				}
				l.run(n)
			case "silence":
				l.now = l.now.Add(2 * stallAfter)
				l.step(Alice, Input{})
				l.step(Bob, Input{})
			case "pool":
				for role, name := range []string{"alice", "bob"} {
					s := l.ends[role].Stats()
					w.lines = append(w.lines, fmt.Sprintf("%s used %d, added %d, has %d bits",
						name, s.AuthUsed, s.AuthAdded, s.AuthLeft))
				}
			default:
				d.Fatalf(t, "unknown command %s", d.Cmd)
			}
			w.flush()
			l.check()
			return strings.Join(append(w.lines, outcome(l, blocks, alarms)...), "\n") + "\n"
		})
	})
}
