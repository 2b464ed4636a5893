package etsi014_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/quietline/quietline/etsi014"
)

// foreignKME answers every request with one text.
func foreignKME(t *testing.T, w *world, code int, header, body string) *etsi014.Client {
	t.Helper()
	h := http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if name, value, ok := strings.Cut(header, ": "); ok {
			rw.Header().Set(name, value)
		}
		rw.WriteHeader(code)
		_, _ = io.WriteString(rw, body)
	})
	return w.pair(t, serve(t, etsi014.NewServer(h, w.live.Server(), nil)), w.addr)
}

// Answers of other KMEs, good and bad.
func TestForeignAnswers(t *testing.T) {
	const id, other = "00000000-0000-4000-8000-000000000001", "00000000-0000-4000-8000-000000000002"
	key := func(id, key string) string { return `{"key_ID":"` + id + `","key":"` + key + `"}` }
	list := func(keys ...string) string { return `{"keys":[` + strings.Join(keys, ",") + `]}` }
	const k64 = `\/\u002b8AAAAAAAA=` // eight bytes: ff ef 00 …
	w := newWorld(t, nil)
	for _, tc := range []struct {
		name, header, body string
		code               int
		want               error // of enc_keys for one key of 64 bits
	}{
		{"good", "", list(key(id, k64)), 200, nil},
		{"capital Keys, extras", "", `{"Keys":[{"x":{},"key":"` + k64 + `","key_ID":"` +
			strings.ToUpper("0000000a-0000-4000-8000-00000000000f") + `"}],"y":[1]}`, 200, nil},
		{"extension", "", `{"keys":[` + key(id, k64) + `],"key_container_extension":{"a":1}}`, 200, nil},
		{"two keys", "", list(key(id, k64), key(other, k64)), 200, etsi014.ErrDown},
		{"no keys", "", list(), 200, etsi014.ErrDown},
		{"no member", "", `{}`, 200, etsi014.ErrDown},
		{"both spellings", "", `{"keys":[],"Keys":[]}`, 200, etsi014.ErrDown},
		{"wrong size", "", list(key(id, "AAAA")), 200, etsi014.ErrDown},
		{"no padding", "", list(key(id, "AAAAAAAAAAA")), 200, etsi014.ErrDown},
		{"URL alphabet", "", list(key(id, "__AAAAAAAAA=")), 200, etsi014.ErrDown},
		{"padding inside", "", list(key(id, "AA==AAAAAAA=")), 200, etsi014.ErrDown},
		{"loose bits", "", list(key(id, "AAAAAAAAAAB=")), 200, etsi014.ErrDown},
		{"line break", "", list(key(id, `AAAAAAAAAA\nA`)), 200, etsi014.ErrDown},
		{"empty key", "", list(key(id, "")), 200, etsi014.ErrDown},
		{"bad UUID", "", list(key("1", k64)), 200, etsi014.ErrDown},
		{"key missing", "", `{"keys":[{"key_ID":"` + id + `"}]}`, 200, etsi014.ErrDown},
		{"key twice", "", `{"keys":[{"key":"` + k64 + `","key":"` + k64 + `"}]}`, 200, etsi014.ErrDown},
		{"trailing", "", list(key(id, k64)) + "x", 200, etsi014.ErrDown},
		{"HTML", "", `<html>`, 200, etsi014.ErrDown},
		{"empty", "", ``, 200, etsi014.ErrDown},
		{"too long", "", strings.Repeat(" ", 1<<20+2), 200, etsi014.ErrDown},
		{"text of the standard", "", `{"message":"Size shall be a multiple of 8."}`, 400,
			etsi014.ErrSize},
		{"details of numbers", "", `{"message":"not all extension_mandatory parameters are ` +
			`supported","details":[{"a":1}]}`, 400, etsi014.ErrMandatory},
		{"any 400", "", `oops`, 400, etsi014.ErrRequest},
		{"401", "", `{"message":"who?"}`, 401, etsi014.ErrDenied},
		{"403", "", ``, 403, etsi014.ErrDenied},
		{"404", "", ``, 404, etsi014.ErrRequest},
		{"redirect", "Location: https://127.0.0.1:1/", ``, 307, etsi014.ErrRequest},
		{"429", "", ``, 429, etsi014.ErrRequest},
		{"503 empty", "", `{"message":"not enough key material: come again"}`, 503, etsi014.ErrEmpty},
		{"503", "Retry-After: 7", `{"message":"busy"}`, 503, etsi014.ErrDown},
		{"500", "", `<html>`, 500, etsi014.ErrDown},
	} {
		c := foreignKME(t, w, tc.code, tc.header, tc.body)
		req := toKochi
		req.SizeBits = 64
		keys, err := c.Keys(t.Context(), req)
		if !errors.Is(err, tc.want) || (err == nil) != (tc.want == nil) {
			t.Errorf("%s: got %v", tc.name, err)
		}
		if err == nil && !bytes.HasPrefix(keys.Keys[0].Bits.Expose(), []byte{0xff, 0xef, 0}) {
			t.Errorf("%s: got %x", tc.name, keys.Keys[0].Bits.Expose())
		}
		if err != nil && strings.Contains(err.Error(), "8AAAA") {
			t.Errorf("%s: the error shows the key: %v", tc.name, err)
		}
		keys.Clear()
	}
	if w.kme.Left() != 1000 {
		t.Error("an answer other than a broken connection led to the second address")
	}
}

// dec_keys: the order asked whatever the order answered, and no other set.
func TestForeignDecAnswers(t *testing.T) {
	w := newWorld(t, nil)
	ids := []etsi014.KeyID{{15: 1}, {15: 2}}
	key := func(n int) string {
		return fmt.Sprintf(`{"key_ID":"%s","key":"AAA%c"}`, etsi014.KeyID{15: byte(n)}, 'A'+n)
	}
	for _, tc := range []struct {
		code int
		body string
		want error
	}{
		{200, key(2) + "," + key(1), nil},
		{200, key(1) + "," + key(3), etsi014.ErrDown},
		{200, key(1) + "," + key(1), etsi014.ErrDown},
		{200, key(1), etsi014.ErrDown},
		{404, key(1), etsi014.ErrUnknownKey},
	} {
		c := foreignKME(t, w, tc.code, "", `{"keys":[`+tc.body+`]}`)
		keys, err := c.KeysByID(t.Context(), etsi014.IDRequest{Initiator: "kochi", IDs: ids})
		if !errors.Is(err, tc.want) || (err == nil) != (tc.want == nil) {
			t.Errorf("%s: got %v", tc.body, err)
		}
		for i, k := range keys.Keys {
			if k.ID != ids[i] || k.Bits.Expose()[2] != byte(i+1) {
				t.Errorf("%s: key %d is %v", tc.body, i, k.ID)
			}
		}
	}
}

func TestForeignStatus(t *testing.T) {
	w := newWorld(t, nil)
	good := w.send(t, "tokyo", "GET", "/api/v1/keys/kochi/status", "").body
	for _, tc := range []struct {
		body string
		ok   bool
	}{
		{good, true},
		{good[:len(good)-1] + `,"status_extension":{"acme_x":[1]},"more":1}`, true},
		{strings.Replace(good, `"key_size":256`, `"key_size":"256"`, 1), false},
		{strings.Replace(good, `"key_size":256`, `"key_size":-1`, 1), false},
		{strings.Replace(good, `"key_size":256`, `"x":256`, 1), false},
		{good + `{}`, false},
		{`{}`, false},
	} {
		s, err := foreignKME(t, w, 200, "", tc.body).Status(t.Context(), "kochi")
		if (err == nil) != tc.ok || tc.ok && s.KeySizeBits != 256 {
			t.Errorf("%s: got %+v, %v", tc.body, s, err)
		}
	}
}
