package config

import (
	"cmp"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
)

// Fault is one thing wrong with a site file.
type Fault struct {
	Line int    // counts from 1; 0 when the whole file is meant
	Key  string // path of the key, e.g. "lines[0].policy"; "" for the file
	Text string // what was found, what is expected, what to do
}

// Faults is everything wrong with a site file, in the order of its lines.
type Faults struct {
	File string
	List []Fault
}

// Error gives one line a fault: file:line: key: text.
func (f *Faults) Error() string {
	var b strings.Builder
	for i, fault := range f.List {
		if i > 0 {
			b.WriteByte('\n')
		}
		b.WriteString(f.File)
		if fault.Line > 0 {
			fmt.Fprintf(&b, ":%d", fault.Line)
		}
		b.WriteString(": ")
		if fault.Key != "" {
			b.WriteString(fault.Key + ": ")
		}
		b.WriteString(fault.Text)
	}
	return b.String()
}

// fault notes a fault at a key, the first one of that key only: what follows
// from it would mislead. A key that is not in the file is shown at the line of
// what should hold it.
func (d *decoder) fault(key, format string, args ...any) {
	if slices.ContainsFunc(d.faults, func(f Fault) bool { return f.Key == key }) {
		return
	}
	text := fmt.Sprintf(format, args...)
	d.faults = append(d.faults, Fault{Line: d.line(key), Key: key, Text: text})
}

// line finds where a key stands, or the nearest key around it that does.
func (d *decoder) line(key string) int {
	for {
		if n, ok := d.lines[key]; ok {
			return n
		}
		i := strings.LastIndexAny(key, ".[")
		if i < 0 {
			return d.lines[""]
		}
		key = key[:i]
	}
}

func (d *decoder) err() error {
	if len(d.faults) == 0 {
		return nil
	}
	slices.SortStableFunc(d.faults, func(a, b Fault) int { return cmp.Compare(a.Line, b.Line) })
	return &Faults{File: filepath.Base(d.name), List: d.faults}
}
