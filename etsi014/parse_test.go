package etsi014

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"strings"
	"testing"
)

// The parsed keys do not share the answer's buffer: it can be wiped.
func TestParsedKeysOutliveTheAnswer(t *testing.T) {
	b := []byte(`{"keys":[{"key_ID":"bc490419-7d60-487f-adc1-4ddcc177c139","key":"` +
		base64.StdEncoding.EncodeToString([]byte("0123456789")) + `"}]}`)
	keys, err := parseContainer(b)
	if err != nil {
		t.Fatal(err)
	}
	clear(b)
	if got := string(keys.Keys[0].Bits.Expose()); got != "0123456789" {
		t.Errorf("got %q", got)
	}
	if got := keys.Keys[0].ID.String(); got != "bc490419-7d60-487f-adc1-4ddcc177c139" {
		t.Errorf("got %s", got)
	}
}

// Every length of key decodes as encoding/base64 does, into no spare bytes.
func TestDecodeKey(t *testing.T) {
	for n := 1; n < 70; n++ {
		want := bytes.Repeat([]byte{0xa5}, n)
		got, err := decodeKey([]byte(base64.StdEncoding.EncodeToString(want)))
		if err != nil || !bytes.Equal(got.Expose(), want) {
			t.Errorf("%d bytes: got %x, %v", n, got.Expose(), err)
		}
	}
}

func TestParseErrorClipsText(t *testing.T) {
	err := parseError(503, "status", "", []byte(`{"message":"`+strings.Repeat("é", 1000)+`"}`))
	if len(err.Error()) > 400 || !errors.Is(err, ErrDown) {
		t.Errorf("%d bytes: %v", len(err.Error()), err)
	}
}

// Whatever the client takes as a container, encoding/json reads the same from.
func FuzzAnswer(f *testing.F) {
	for _, s := range []string{
		`{"keys":[{"key_ID":"bc490419-7d60-487f-adc1-4ddcc177c139","key":"AAAA"}]}`,
		`{"keys":[{"key":"\/+8=","key_ID":"BC490419-7d60-487f-adc1-4ddcc177c139"}],` +
			`"key_container_extension":{"a":[1]}}`,
		`{"keys":[]}`, `{"keys":[{"key":"AA==AAAA"}]}`, `{"message":"x","details":[{"a":"b"}]}`,
		`{"source_KME_ID":"a","target_KME_ID":"b","master_SAE_ID":"c","slave_SAE_ID":"d",` +
			`"key_size":256,"stored_key_count":1,"max_key_count":2,"max_key_per_request":3,` +
			`"max_key_size":4,"min_key_size":5,"max_SAE_ID_count":0,"status_extension":{}}`,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		_, _ = parseStatus(bytes.Clone(b))
		for _, code := range []int{400, 404, 503} {
			if err := parseError(code, "dec_keys", string(b), bytes.Clone(b)); err.Error() == "" {
				t.Error("an error without a text")
			}
		}
		got, err := parseContainer(bytes.Clone(b))
		defer got.Clear()
		if err != nil {
			return
		}
		var want struct {
			Keys []struct {
				ID  KeyID  `json:"key_ID"`
				Key []byte `json:"key"`
			} `json:"keys"`
		}
		if err := json.Unmarshal(b, &want); err != nil {
			t.Fatalf("encoding/json refuses what we take: %v", err)
		}
		if len(got.Keys) != len(want.Keys) {
			t.Fatalf("%d keys, want %d", len(got.Keys), len(want.Keys))
		}
		for i, k := range got.Keys {
			if k.ID != want.Keys[i].ID || !bytes.Equal(k.Bits.Expose(), want.Keys[i].Key) {
				t.Fatalf("key %d differs", i)
			}
		}
	})
}

func FuzzKeyID(f *testing.F) {
	for _, s := range []string{
		"bc490419-7d60-487f-adc1-4ddcc177c139", "BC490419-7D60-487F-ADC1-4DDCC177C139", "",
		"bc4904197d60487fadc14ddcc177c139", "{bc490419-7d60-487f-adc1-4ddcc177c139}",
		"bc490419-7d60-487f-adc1-4ddcc177c13g", strings.Repeat("-", 36),
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		id, err := ParseKeyID(s)
		if err != nil {
			if id != (KeyID{}) {
				t.Error("an error with a key_ID")
			}
			return
		}
		if !strings.EqualFold(id.String(), s) || id.String() != strings.ToLower(s) {
			t.Errorf("%q became %q", s, id)
		}
	})
}
