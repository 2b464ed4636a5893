package config

import (
	"fmt"
	"testing"
)

func TestOuter(t *testing.T) {
	check := func(l Line) (keys []string) {
		d := &decoder{lines: map[string]int{}}
		d.oneOuter("lines[0]", &l)
		for _, f := range d.faults {
			keys = append(keys, f.Key)
		}
		return keys
	}
	good := Line{
		Outer: Outer{DSCP: "copy", ECN: "hide", PathMTU: "kernel", Without: []string{"gso", "gro"}},
		TUN:   TUN{Queues: 16, Without: []string{"tso", "uso", "checksum"}}}
	for _, l := range []Line{{}, good, {Outer: Outer{DSCP: "63"}}, {Outer: Outer{DSCP: "none"}}} {
		if keys := check(l); keys != nil {
			t.Errorf("%+v: faults at %v", l, keys)
		}
	}
	bad := Line{
		Outer: Outer{DSCP: "64", ECN: "drop", PathMTU: "guess", Without: []string{"gso", "tso"}},
		TUN:   TUN{Queues: 17, Without: []string{"gro"}}}
	want := "[lines[0].outer.dscp lines[0].outer.ecn lines[0].outer.path_mtu " +
		"lines[0].outer.without[1] lines[0].tun.without[0] lines[0].tun.queues]"
	if got := fmt.Sprint(check(bad)); got != want {
		t.Errorf("faults at %s, want %s", got, want)
	}
}

func TestClass(t *testing.T) {
	for text, want := range map[string]struct {
		copied bool
		value  uint8
	}{"": {}, "none": {}, "copy": {true, 0}, "46": {false, 46}} {
		if copied, value := (Outer{DSCP: text}).Class(); copied != want.copied || value != want.value {
			t.Errorf("%q: %v, %d", text, copied, value)
		}
	}
}
