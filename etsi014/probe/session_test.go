package probe

import (
	"bytes"
	"encoding/json"
	"net/http"
	"testing"
)

// What a foreign KME answers, read as tolerantly as said.
func TestContainer(t *testing.T) {
	const id = `"key_ID":"bc490419-7d60-487f-adc1-4ddcc177c139"`
	for text, bits := range map[string]int{
		`{"keys":[{` + id + `,"key":"\/\u002b8="}]}`: 16,
		`{"keys":[{` + id + `,"key":"__8"}]}`:        16,
		`{"Keys":[{` + id + `,"key":"AAAA"}]}`:       24,
		`{"keys":[{` + id + `,"key":1234}]}`:         0,
		`{"keys":[{` + id + `,"key":""}]}`:           0,
		`{"keys":[{` + id + `,"key":"\u00zz"}]}`:     0,
		`{"keys":[{` + id + `}]}`:                    0,
		`{"keys":[{"key":"AAAA"}]}`:                  0,
		`{"keys":{}}`:                                0,
		`{"keys":[1]}`:                               0,
		`[]`:                                         0,
		`null`:                                       0,
	} {
		s := new(session)
		list, err := reply{of: s, code: 200, body: []byte(text)}.container()
		if (err == nil) != (bits > 0) || err == nil && list[0].bits != bits {
			t.Errorf("%s: got %+v, %v", text, list, err)
		}
		s.wipe()
		for _, k := range list {
			if len(bytes.Trim(k.text, "\x00")) != 0 {
				t.Errorf("%s: the key's text is not wiped", text)
			}
		}
	}
}

// No answer makes the probe panic, and what it prints of a 200 is no content.
func FuzzReply(f *testing.F) {
	f.Add(200, []byte(`{"keys":[{"key_ID":"a","key":"\/\u002b8="}]}`))
	f.Add(400, []byte(`{"message":"x","details":[{"a":1}]}`))
	f.Add(503, []byte(`{"message":{"a":[null]}}`))
	f.Add(200, []byte(`{"keys":[{"key_ID":1,"key":null},null]}`))
	f.Fuzz(func(t *testing.T, code int, body []byte) {
		r := reply{of: new(session), code: code, header: http.Header{}, body: body}
		list, err := r.container()
		for _, k := range list {
			if err == nil && (k.bits <= 0 || k.bits%8 != 0) {
				t.Errorf("a key of %d bits", k.bits)
			}
		}
		for _, name := range statusMembers {
			_ = wantString(r, name, "x")
			_ = wantCount(r, name, 0)
		}
		if wantRefusal(r, 400, "") == nil && (code != 400 || !json.Valid(body)) {
			t.Errorf("%d %q passes for an Error", code, body)
		}
		_ = wantSame(r, list)
		if code == 200 && len(r.String()) > 60 {
			t.Errorf("prints %q", r.String())
		}
	})
}
