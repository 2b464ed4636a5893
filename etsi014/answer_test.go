package etsi014_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"errors"
	"net/http"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/secret"
)

// fixed is a KME that answers the container it was given, or an error.
type fixed struct {
	keys etsi014.Container
	err  error
}

func (f *fixed) Status(
	context.Context, etsi014.Caller, etsi014.SAEID,
) (etsi014.Status, error) {
	return etsi014.Status{Extension: map[string]any{"a": func() {}}}, f.err
}

func (f *fixed) Keys(
	context.Context, etsi014.Caller, etsi014.KeyRequest,
) (etsi014.Container, error) {
	return f.keys, f.err
}

func (f *fixed) KeysByID(
	context.Context, etsi014.Caller, etsi014.IDRequest,
) (etsi014.Container, error) {
	return f.keys, f.err
}

// known is a recognisable key of n bytes.
func known(n int) []byte { return bytes.Repeat([]byte("Qz7!"), n/4+1)[:n] }

func containerOf(sizes ...int) etsi014.Container {
	var c etsi014.Container
	for i, n := range sizes {
		c.Keys = append(c.Keys, etsi014.Key{
			ID: etsi014.KeyID{15: byte(i + 1)}, Bits: secret.Copy(known(n)),
		})
	}
	return c
}

// door calls a handler in memory, as SAE tokyo.
func door(t testing.TB, kme etsi014.KME, log *syncBuffer, w http.ResponseWriter, target string) {
	t.Helper()
	h, err := etsi014.NewHandler(etsi014.HandlerConfig{
		KME: kme, Log: logTo(log),
		Identify: func(*tls.ConnectionState) (etsi014.Caller, error) {
			return etsi014.Caller{SAE: "tokyo"}, nil
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	r, err := http.NewRequest("GET", target, http.NoBody)
	if err != nil {
		t.Fatal(err)
	}
	h.ServeHTTP(w, r)
}

// After an answer neither the container nor the buffer that was written holds
// a key, whether it left or not.
func TestAnswerIsWiped(t *testing.T) {
	for _, size := range []int{32, 512, 64 << 10} {
		for _, fail := range []error{nil, errors.New("broken pipe")} {
			keys := containerOf(size, size)
			exposed := [][]byte{keys.Keys[0].Bits.Expose(), keys.Keys[1].Bits.Expose()}
			var log syncBuffer
			rec := newRecorder()
			rec.fail = fail
			door(t, &fixed{keys: keys}, &log, rec, enc+"?number=2")
			for _, b := range append(exposed, rec.slices...) {
				if len(bytes.Trim(b, "\x00")) != 0 {
					t.Errorf("size %d, write error %v: %d bytes are not wiped", size, fail, len(b))
				}
			}
			if keys.Keys[0].Bits.Len() != 0 {
				t.Error("container is not cleared")
			}
			if lost := strings.Contains(log.String(), "answer not delivered"); lost != (fail != nil) {
				t.Errorf("write error %v: log %s", fail, log.String())
			}
			if fail == nil && (len(rec.slices) != 1 || !json.Valid(rec.copies.Bytes())) {
				t.Errorf("%d writes of %.60s", len(rec.slices), rec.copies.String())
			}
		}
	}
}

// A KME that breaks its contract is down, and its keys are cleared.
func TestShortListIsNoAnswer(t *testing.T) {
	keys := containerOf(32)
	var log syncBuffer
	rec := newRecorder()
	door(t, &fixed{keys: keys}, &log, rec, enc+"?number=2")
	if rec.code != 503 || keys.Keys[0].Bits.Len() != 0 {
		t.Errorf("got %d %s", rec.code, rec.copies.String())
	}
	keys = containerOf(32)
	keys.Extension = map[string]any{"f": func() {}}
	door(t, &fixed{keys: keys}, &log, rec, enc)
	if rec.code != 503 || keys.Keys[0].Bits.Len() != 0 {
		t.Errorf("extension: got %d %s", rec.code, rec.copies.String())
	}
	if door(t, &fixed{}, &log, rec, "/api/v1/keys/kochi/status"); rec.code != 503 {
		t.Errorf("status: got %d", rec.code)
	}
}

// Whatever a container holds, encoding/json reads the same from the answer.
func TestContainerEncoding(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		sizes := rapid.SliceOfN(rapid.IntRange(1, 600), 1, 20).Draw(rt, "sizes")
		keys := containerOf(sizes...)
		var ext map[string]any
		if rapid.Bool().Draw(rt, "extension") {
			ext = map[string]any{"acme_x": "<&>\u2028", "acme_y": []any{true, nil}}
		}
		keys.Extension = ext
		type wireKey struct {
			ID  string `json:"key_ID"`
			Key []byte `json:"key"`
		}
		type wire struct {
			Keys      []wireKey      `json:"keys"`
			Extension map[string]any `json:"key_container_extension"`
		}
		want := wire{Extension: ext}
		for _, k := range keys.Keys {
			want.Keys = append(want.Keys, wireKey{k.ID.String(), bytes.Clone(k.Bits.Expose())})
		}
		rec := newRecorder()
		var log syncBuffer
		door(t, &fixed{keys: keys}, &log, rec, enc+"?number="+strconv.Itoa(len(sizes)))
		var got wire
		d := json.NewDecoder(&rec.copies)
		d.DisallowUnknownFields()
		if err := d.Decode(&got); err != nil {
			rt.Fatal(err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			rt.Fatal(diff)
		}
	})
}

// No print verb, logger or encoder shows a key of any public type.
func TestNothingPrintsKeys(t *testing.T) {
	keys := containerOf(32)
	raw := string(known(32))
	forms := []string{
		raw, base64.StdEncoding.EncodeToString([]byte(raw)), hexText(raw), decimalText(raw),
	}
	req := etsi014.KeyRequest{Targets: []etsi014.SAEID{"kochi"}}
	for _, v := range []any{keys, &keys, keys.Keys, keys.Keys[0], &keys.Keys[0], req,
		etsi014.Observation{}, struct{ C etsi014.Container }{keys}, map[string]any{"k": keys}} {
		for _, text := range printed(t, v) {
			for _, form := range forms {
				if strings.Contains(text, form) {
					t.Errorf("%T shows its key: %s", v, text)
				}
			}
		}
	}
}
