package etsi014

import (
	"encoding/json"
	"errors"
	"reflect"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func readValue(text string) (any, error) {
	c := &cursor{b: []byte(text)}
	v, err := c.value()
	if err != nil {
		return nil, err
	}
	return v, c.end()
}

func TestCursorValue(t *testing.T) {
	n := func(s string) json.Number { return json.Number(s) }
	for _, tc := range []struct {
		text string
		want any
	}{
		{`{}`, map[string]any{}},
		{` { "a" : [ 1 , -2.5e+3 , 0 ] } `,
			map[string]any{"a": []any{n("1"), n("-2.5e+3"), n("0")}}},
		{`"\"\\\/\b\f\n\r\t"`, "\"\\/\b\f\n\r\t"},
		{`"\u00e9\u20AC\ud83d\ude00é€😀"`, "é€😀é€😀"},
		{`[true,false,null,"",[]]`, []any{true, false, nil, "", []any{}}},
		{`{"a":{"a":1},"b":1}`, map[string]any{"a": map[string]any{"a": n("1")}, "b": n("1")}},
	} {
		got, err := readValue(tc.text)
		if err != nil {
			t.Errorf("%s: %v", tc.text, err)
		}
		if diff := cmp.Diff(tc.want, got); diff != "" {
			t.Errorf("%s: %s", tc.text, diff)
		}
	}
}

func TestCursorRefuses(t *testing.T) {
	wide := `{"m0":0`
	for i := range 20 {
		wide += `,"n` + string(rune('a'+i)) + `":0`
	}
	for _, text := range []string{
		``, ` `, `{`, `}`, `[`, `[1`, `[1,`, `[1,]`, `{"a"}`, `{"a":}`, `{"a":1,}`, `{a:1}`,
		`{} {}`, `{}x`, `nul`, `nulll`, `True`, `01`, `-`, `+1`, `1.`, `.5`, `1e`, `1e+`, `0x10`,
		`NaN`, `Infinity`, `"`, `"\`, `"\x"`, `"\u12"`, `"\u12g4"`, `"\ud83d"`, `"\ud83dx"`,
		`"\ud83d\u0041"`, `"\ude00"`, "\"\xff\"", "\"\xc3\"", "\"a\nb\"", "\"\x00\"",
		`{"a":1,"a":2}`, `{"a":1,"\u0061":2}`, `'a'`, "\ufeff{}", `// c` + "\n" + `{}`,
		wide + `,"nc":1}`, wide + `,"nt":1}`,
		strings.Repeat("[", maxDepth+1) + strings.Repeat("]", maxDepth+1),
	} {
		if v, err := readValue(text); !errors.Is(err, errJSON) {
			t.Errorf("%q: got %v, %v", text, v, err)
		}
		c := &cursor{b: []byte(text)}
		if err := errors.Join(c.skip(), c.end()); err == nil {
			t.Errorf("%q: skipped without an error", text)
		}
	}
	deep := strings.Repeat("[", maxDepth) + strings.Repeat("]", maxDepth)
	if _, err := readValue(deep); err != nil {
		t.Errorf("depth %d: %v", maxDepth, err)
	}
	if _, err := readValue(wide + `}`); err != nil {
		t.Errorf("wide object: %v", err)
	}
}

func TestCursorInteger(t *testing.T) {
	for text, want := range map[string]int{"0": 0, " 256 ": 256, "-8": -8, "2147483647": 1<<31 - 1} {
		c := &cursor{b: []byte(text)}
		if got, err := c.integer(); err != nil || got != want {
			t.Errorf("%s: got %d, %v", text, got, err)
		}
	}
	for _, text := range []string{"1.0", "1e2", "2147483648", `"1"`, "true", "null", "-", "9e999"} {
		c := &cursor{b: []byte(text)}
		if got, err := c.integer(); err == nil {
			t.Errorf("%s: got %d", text, got)
		}
	}
}

// A text is decoded where it stands: nothing of a key is copied elsewhere.
func TestCursorTextInPlace(t *testing.T) {
	buf := []byte(`"AA\/BB"`)
	c := &cursor{b: buf}
	got, err := c.text()
	if err != nil || string(got) != "AA/BB" {
		t.Fatalf("got %q, %v", got, err)
	}
	clear(buf)
	if string(got) != "\x00\x00\x00\x00\x00" {
		t.Errorf("text outlives its buffer: %q", got)
	}
}

// Whatever the cursor takes, encoding/json takes too and reads the same.
func FuzzCursor(f *testing.F) {
	for _, s := range []string{`{"a":[1,2.5e3,"\u00e9\ud83d\ude00"],"b":null}`, `"\/"`, `[[[]]]`,
		`{"a":1,"a":2}`, "\"\xff\"", `-0`, `1E-2`, `tru`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		got, err := readValue(string(b))
		c := &cursor{b: append([]byte(nil), b...)}
		skipErr := c.skip()
		if skipErr == nil {
			skipErr = c.end()
		}
		if (err == nil) != (skipErr == nil) {
			t.Fatalf("value says %v, skip says %v", err, skipErr)
		}
		if err != nil {
			return
		}
		if len(b) == 0 {
			t.Fatal("an empty text was taken")
		}
		d := json.NewDecoder(strings.NewReader(string(b)))
		d.UseNumber()
		var want any
		if err := d.Decode(&want); err != nil {
			t.Fatalf("encoding/json refuses what we take: %v", err)
		}
		if !reflect.DeepEqual(got, want) {
			t.Fatalf("got %#v, want %#v", got, want)
		}
	})
}
