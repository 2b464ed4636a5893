package config

import (
	"strings"
	"testing"
)

// TestRules gives each rule texts that it takes, with what becomes of them, and
// texts that it refuses.
func TestRules(t *testing.T) {
	long := strings.Repeat("x", 300)
	for _, tt := range []struct {
		rule    string
		takes   map[string]string
		refuses []string
	}{
		{"fingerprint", map[string]string{"0a1b 2c3d 0a1b 2c3d 0a1b 2c3d 0a1b 2c3d": "0a1b 2c3d 0a1b 2c3d 0a1b 2c3d 0a1b 2c3d"},
			[]string{"", "0a1b", "0A1B 2c3d 0a1b 2c3d 0a1b 2c3d 0a1b 2c3d", "0a1b2c3d0a1b2c3d0a1b2c3d0a1b2c3d"}},
		{"name", map[string]string{"kme-tokyo": "kme-tokyo", "a": "a", "0.b_c": "0.b_c"},
			[]string{"", ".", "..", "a b", "a/b", "-a", "東京", long, "a\n", "a:b"}},
		{"sae", map[string]string{"line-tokyo": "line-tokyo", "東京 1": "東京 1", "a/b": "a/b"},
			[]string{"", long, "a\x00", "a\tb", "\xff"}},
		{"path", map[string]string{"a": "/x/a", "/a": "/a", "../b//c": "/b/c", "./": "/x"},
			[]string{"", "a\x00b"}},
		{"socket", map[string]string{"a.sock": "/x/a.sock"}, []string{"", long}},
		{"address", map[string]string{"0.0.0.0:1": "0.0.0.0:1", "[::1]:2": "[::1]:2",
			"kme.example:8443": "kme.example:8443", "a:0": "a:0"},
			[]string{"", "a", ":1", "a:", "a:b", "a:65536", "a:-1", "::1:2", "unix:/a"}},
		{"channel", map[string]string{"unix:/a": "unix:///a", "unix:///a": "unix:///a",
			"unix:a": "unix:///x/a", "1.2.3.4:5": "1.2.3.4:5"}, []string{"", "unix:", "unix://", ":1"}},
		{"metrics", map[string]string{"127.0.0.1:0": "127.0.0.1:0", "[::1]:9": "[::1]:9",
			"127.8.9.1:1": "127.8.9.1:1", "unix:m": "unix:///x/m"},
			[]string{"", "localhost:1", "0.0.0.0:1", ":1", "192.0.2.1:1", "[::]:1", "unix:"}},
		{"driver", map[string]string{"unix:///a": "unix:///a", "unix:b": "unix:///x/b"},
			[]string{"", "/a", "a", "exec:///bin/true", "unix:", "%"}},
		{"https", map[string]string{"https://a": "https://a", "https://a:1/": "https://a:1/"},
			[]string{"", "a", "http://a", "https://", "https://u@a", "https://a/b", "https://a?b",
				"https://a#b", "https://a b"}},
		{"interface", map[string]string{"ql0": "ql0", "a.b-c_d": "a.b-c_d"},
			[]string{"", "sixteen-bytes-xy", "a/b", "a b", "..", "-x"}},
		{"pin", map[string]string{strings.Repeat("Ab", 32): strings.Repeat("ab", 32)},
			[]string{"", "ab", strings.Repeat("zz", 32), strings.Repeat("ab", 33)}},
		{"preset", map[string]string{"metro": "metro", "bench": "bench"}, []string{"", "Metro"}},
	} {
		rule := rules[tt.rule]
		if rule == nil {
			t.Fatalf("no rule %q", tt.rule)
		}
		d := newDecoder("/x/site.yaml")
		for text, want := range tt.takes {
			if got, err := rule(d, text); err != nil || got != want {
				t.Errorf("%s(%q) = %q, %v, want %q", tt.rule, text, got, err, want)
			}
		}
		for _, text := range tt.refuses {
			if got, err := rule(d, text); err == nil {
				t.Errorf("%s(%q) = %q, want a refusal", tt.rule, text, got)
			} else if len(err.Error()) < 10 {
				t.Errorf("%s(%q) says only %q", tt.rule, text, err)
			}
		}
	}
}

// TestRulesAreStable: what a rule made of a text it takes again, unchanged, so
// that a file written from a Site reads back equal.
func TestRulesAreStable(t *testing.T) {
	for rule, text := range map[string]string{"path": "a/../b", "socket": "s", "channel": "unix:c",
		"metrics": "unix:m", "driver": "unix:d", "pin": strings.Repeat("AB", 32)} {
		once, err := rules[rule](newDecoder("/x/site.yaml"), text)
		if err != nil {
			t.Fatal(err)
		}
		twice, err := rules[rule](newDecoder("/elsewhere/site.yaml"), once)
		if err != nil || twice != once {
			t.Errorf("%s: %q became %q, then %q, %v", rule, text, once, twice, err)
		}
	}
}

func TestPick(t *testing.T) {
	s := &Site{Links: []Link{{ID: "real"}, {ID: "a", Simulator: &Simulator{}}},
		Lines: []Line{{ID: "x"}, {ID: "y"}}}
	if l, err := s.SimulatedLink(""); err != nil || l != &s.Links[1] {
		t.Errorf("the only simulated link: %v, %v", l, err)
	}
	if l, err := s.Line("y"); err != nil || l != &s.Lines[1] {
		t.Errorf("line y: %v, %v", l, err)
	}
	for _, tt := range []struct{ err, want string }{
		{errorOf(s.SimulatedLink("real")), `has no simulated link "real"; it has a`},
		{errorOf(s.Line("")), "has more than one line: x, y"},
		{errorOf(s.Line("z")), `has no line "z"; it has x, y`},
		{errorOf(new(Site).Line("")), "has no line"},
	} {
		if !strings.Contains(tt.err, tt.want) {
			t.Errorf("got %q, want %q", tt.err, tt.want)
		}
	}
}

func errorOf[T any](_ T, err error) string {
	if err == nil {
		return "no error"
	}
	return err.Error()
}
