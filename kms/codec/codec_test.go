package codec

import (
	"encoding/binary"
	"errors"
	"testing"
)

func TestRoundTrip(t *testing.T) {
	b := AppendString(nil, "kochi")
	b = AppendBool(b, true)
	b = binary.BigEndian.AppendUint64(b, 7)
	b = AppendString(b, []byte{1, 2})
	r := NewReader(b)
	if s := r.String(); s != "kochi" {
		t.Errorf("String = %q", s)
	}
	if !r.Bool() {
		t.Error("Bool = false")
	}
	if v := r.Uint64(); v != 7 {
		t.Errorf("Uint64 = %d", v)
	}
	if v := r.Bytes(); len(v) != 2 || v[1] != 2 {
		t.Errorf("Bytes = %v", v)
	}
	if err := r.End(); err != nil {
		t.Errorf("End: %v", err)
	}
}

func TestFaultSticks(t *testing.T) {
	for name, read := range map[string]func(*Reader){
		"short number":  func(r *Reader) { r.Uint32() },
		"short string":  func(r *Reader) { _ = r.String() },
		"not a bool":    func(r *Reader) { r.Uint8(); r.Uint8(); r.Bool() },
		"left over":     func(r *Reader) { r.Uint8() },
		"marked":        func(r *Reader) { r.Take(3); r.Fail() },
		"negative take": func(r *Reader) { r.Take(-1) },
	} {
		r := NewReader([]byte{0, 9, 2})
		read(r)
		if err := r.End(); !errors.Is(err, ErrFormat) {
			t.Errorf("%s: End = %v, want ErrFormat", name, err)
		}
		if name != "left over" {
			if r.Take(0) != nil || r.Uint8() != 0 || r.Err() == nil {
				t.Errorf("%s: reads go on after the fault", name)
			}
		}
	}
}
