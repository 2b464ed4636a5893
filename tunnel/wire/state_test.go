package wire

import (
	"bytes"
	"errors"
	"strings"
	"testing"
)

func TestState(t *testing.T) {
	long := strings.Repeat("é", 150)
	for _, tt := range []struct {
		in   State
		want string
	}{
		{State{0, "no pad"}, "no pad"},
		{State{4, ""}, ""},
		{State{3, "key manager\nhas no\x1b[31m key\xff"}, "key managerhas no[31m key"},
		{State{2, long}, long[:200]},
		{State{2, "a" + long}, ("a" + long)[:199]},
	} {
		b := tt.in.Append(nil)
		kind, body, err := Parse(b)
		if kind != Control || err != nil {
			t.Fatalf("%x: %v, %v", b, kind, err)
		}
		if got, err := ParseState(body); err != nil || got != (State{tt.in.Level, tt.want}) {
			t.Errorf("%+v became %+v, %v", tt.in, got, err)
		}
	}
}

func TestStateRefused(t *testing.T) {
	good := State{3, "x"}.Append(nil)[1:]
	for name, bad := range map[string][]byte{
		"empty": {}, "short": good[:2], "type": {2, 3, 0}, "level": {1, 5, 0}, "reserved": {1, 3, 1},
		"line end": append(bytes.Clone(good), '\n'), "not UTF-8": append(bytes.Clone(good), 0xff),
		"long": append(bytes.Clone(good), make([]byte, 200)...),
	} {
		if _, err := ParseState(bad); !errors.Is(err, ErrControl) && !errors.Is(err, ErrShort) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzParseState(f *testing.F) {
	f.Add(State{3, "fresh QKD key"}.Append(nil)[1:])
	f.Add([]byte{1, 0, 0})
	f.Fuzz(func(t *testing.T, body []byte) {
		s, err := ParseState(body)
		if err != nil {
			return
		}
		if again := s.Append(nil)[1:]; !bytes.Equal(again, body) {
			t.Errorf("%x reads as %+v and prints as %x", body, s, again)
		}
	})
}
