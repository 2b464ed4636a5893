package audit

import (
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/quietline/quietline/kms"
)

func TestEveryChangeHasALine(t *testing.T) {
	at := time.Date(2026, 11, 21, 0, 0, 0, 0, time.UTC)
	lines := Lines(kms.Record{Position: kms.Position{Length: 7}, At: at, Changes: everyChange})
	if len(lines) != len(everyChange) {
		t.Fatalf("%d lines for %d changes", len(lines), len(everyChange))
	}
	for i, l := range lines {
		if l.Action == "" || l.Record != 7 || !l.At.Equal(at) {
			t.Errorf("change %d: %+v", everyChange[i].Op, l)
		}
	}
	grant, err := json.Marshal(lines[6])
	want := `{"record":7,"at":"2026-11-21T00:00:00Z","action":"grant","link":"l","generation":2,` +
		`"segment":9,"first_slot":1,"slots":4,"size_bits":512,"sae":"a","targets":["b","c"],` +
		`"session":"01000000000000000000000000000000"}`
	if err != nil || string(grant) != want {
		t.Errorf("grant: %s, %v\nwant   %s", grant, err, want)
	}
}

func TestFilter(t *testing.T) {
	at := time.Unix(100, 0)
	line := Lines(kms.Record{At: at, Changes: everyChange[6:7]})[0]
	for name, c := range map[string]struct {
		f    Filter
		want bool
	}{
		"all":           {Filter{}, true},
		"initiator":     {Filter{SAE: "a"}, true},
		"target":        {Filter{SAE: "c"}, true},
		"another SAE":   {Filter{SAE: "x"}, false},
		"link":          {Filter{Link: "l"}, true},
		"another link":  {Filter{Link: "m"}, false},
		"action":        {Filter{Action: "grant"}, true},
		"other action":  {Filter{Action: "void"}, false},
		"since":         {Filter{Since: at}, true},
		"since later":   {Filter{Since: at.Add(1)}, false},
		"till then":     {Filter{Till: at}, false},
		"till later":    {Filter{Till: at.Add(1)}, true},
		"all of it":     {Filter{SAE: "b", Link: "l", Action: "grant", Since: at, Till: at.Add(1)}, true},
		"all but a bit": {Filter{SAE: "b", Link: "l", Action: "open"}, false},
	} {
		if got := c.f.Match(line); got != c.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}

func TestVerify(t *testing.T) {
	records := func(numbers ...uint64) iter.Seq2[kms.Record, error] {
		return func(yield func(kms.Record, error) bool) {
			for _, n := range numbers {
				if n == 0 {
					yield(kms.Record{}, fmt.Errorf("record 3: %w", kms.ErrCorrupt))
					return
				}
				if !yield(kms.Record{Position: kms.Position{Length: n}}, nil) {
					return
				}
			}
		}
	}
	for name, c := range map[string]struct {
		numbers []uint64
		good    uint64
		text    string
	}{
		"empty":   {nil, 0, ""},
		"good":    {[]uint64{1, 2, 3}, 3, ""},
		"skipped": {[]uint64{1, 3}, 1, "record 3 follows record 1"},
		"late":    {[]uint64{2}, 0, "record 2 follows record 0"},
		"changed": {[]uint64{1, 2, 0}, 2, "2 records are good"},
	} {
		at, err := Verify(records(c.numbers...))
		if at.Length != c.good || (err == nil) != (c.text == "") {
			t.Errorf("%s: %d records, %v", name, at.Length, err)
		}
		if err != nil && (!errors.Is(err, kms.ErrCorrupt) || !strings.Contains(err.Error(), c.text)) {
			t.Errorf("%s: %v, want %q", name, err, c.text)
		}
	}
}

func TestLineForPeople(t *testing.T) {
	at := time.Date(2026, 11, 21, 1, 2, 3, 4e6, time.UTC)
	lines := Lines(kms.Record{Position: kms.Position{Length: 7}, At: at, Changes: everyChange})
	want := "2026-11-21T01:02:03.004Z #7 grant link=l segment=2/9 slots=1+4 bits=512 sae=a " +
		"target=b target=c"
	if got := lines[6].String(); got != want {
		t.Errorf("%s\nwant %s", got, want)
	}
	for _, l := range lines {
		if strings.Contains(l.String(), "\n") || !slices.Contains(Actions(), l.Action) {
			t.Errorf("action %q, line %q", l.Action, l)
		}
	}
}
