package wire

import (
	"errors"
	"testing"
)

func TestProbe(t *testing.T) {
	for _, size := range []int{0, ProbeLen, 1440, 9000} {
		record := AppendProbe(nil, 0x01020304, size)
		kind, body, err := Parse(record)
		if err != nil || kind != Control || len(record) != max(size, ProbeLen) {
			t.Fatalf("probe of %d: %v, %d bytes, %v", size, kind, len(record), err)
		}
		if n, err := ParseNumber(body); n != 0x01020304 || err != nil || body[0] != ControlProbe {
			t.Errorf("probe of %d: number %#x, %v", size, n, err)
		}
	}
	_, body, err := Parse(AppendAnswer(nil, 7))
	if n, nerr := ParseNumber(body); n != 7 || err != nil || nerr != nil || body[0] != ControlAnswer {
		t.Errorf("answer: %d, %v, %v", n, err, nerr)
	}
	for name, bad := range map[string][]byte{
		"empty": {}, "short": {ControlProbe, 0, 0, 1, 2, 3},
		"reserved":     {ControlProbe, 1, 0, 1, 2, 3, 4},
		"reserved 2":   {ControlProbe, 0, 1, 1, 2, 3, 4},
		"long answer":  {ControlAnswer, 0, 0, 1, 2, 3, 4, 5},
		"a state":      {ControlState, 0, 0, 1, 2, 3, 4},
		"unknown type": {9, 0, 0, 1, 2, 3, 4},
	} {
		if _, err := ParseNumber(bad); !errors.Is(err, ErrControl) && !errors.Is(err, ErrShort) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzParseNumber(f *testing.F) {
	f.Add(AppendProbe(nil, 1, 100)[1:])
	f.Add(AppendAnswer(nil, 2)[1:])
	f.Fuzz(func(t *testing.T, body []byte) {
		n, err := ParseNumber(body)
		if err != nil {
			return
		}
		again := AppendAnswer(nil, n)
		if body[0] == ControlProbe {
			again = AppendProbe(nil, n, 1+len(body))
		}
		if string(again[1:ProbeLen]) != string(body[:ProbeLen-1]) || len(again) != 1+len(body) {
			t.Errorf("%x became %x", body, again)
		}
	})
}
