package etsi014

import (
	"bytes"
	"crypto/tls"
	"encoding/base64"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/quietline/quietline/secret"
)

// An answer is written into one buffer: growing would leave a copy of keys.
func TestAnswerBufferDoesNotGrow(t *testing.T) {
	for _, n := range []int{1, 7, 60, 200} {
		for _, ext := range []map[string]any{nil, {"acme_x": 1}} {
			c := Container{Extension: ext}
			for range n {
				c.Keys = append(c.Keys, Key{Bits: secret.New(32 + n%3)})
			}
			want := containerLen(c, []byte(`{"acme_x":1}`))
			if ext == nil {
				want = containerLen(c, nil)
			}
			a, err := keyAnswer(c, n)
			if err != nil {
				t.Fatal(err)
			}
			if len(a.body) > want || len(a.whole) != max(headRoom+want, smallSize) ||
				&a.body[0] != &a.whole[headRoom] {
				t.Errorf("%d keys: length %d of %d, measured %d", n, len(a.body), len(a.whole), want)
			}
			a.free()
		}
	}
}

// spy is a KME's answer that remembers every buffer it was read into.
type spy struct {
	io.Reader
	into [][]byte
}

func (s *spy) Read(p []byte) (int, error) {
	n, err := s.Reader.Read(p)
	s.into = append(s.into, p[:n])
	return n, err
}

func (*spy) Close() error { return nil }

type roundTrip func(*http.Request) (*http.Response, error)

func (f roundTrip) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// Whatever comes of an answer, the buffers it was read into are wiped, also
// those that were too small.
func TestClientWipesAnswers(t *testing.T) {
	var keys []string
	for i := range 100 {
		keys = append(keys, fmt.Sprintf(`{"key_ID":"%s","key":"%s"}`, KeyID{byte(i)},
			base64.StdEncoding.EncodeToString(bytes.Repeat([]byte{0xa5}, 64))))
	}
	good := `{"keys":[` + strings.Join(keys, ",") + `]}`
	for name, tc := range map[string]struct {
		code   int
		length int64
		body   io.Reader
		ok     bool
	}{
		"known length":   {200, int64(len(good)), strings.NewReader(good), true},
		"unknown length": {200, -1, strings.NewReader(good), true},
		"small pieces":   {200, -1, iotest.HalfReader(strings.NewReader(good)), true},
		"not valid":      {200, -1, strings.NewReader(good + "x"), false},
		"an error":       {503, -1, strings.NewReader(good), false},
		"breaks off":     {200, -1, iotest.TimeoutReader(strings.NewReader(good)), false},
	} {
		c, err := NewClient(ClientConfig{
			URLs: []string{"https://kme"}, TLS: func() *tls.Config { return nil },
		})
		if err != nil {
			t.Fatal(err)
		}
		s := &spy{Reader: tc.body}
		c.http.Transport = roundTrip(func(r *http.Request) (*http.Response, error) {
			return &http.Response{
				StatusCode: tc.code, ContentLength: tc.length, Body: s, Header: http.Header{}, Request: r,
			}, nil
		})
		got, err := c.Keys(t.Context(), KeyRequest{Targets: []SAEID{"kochi"}, Number: 100})
		if (err == nil) != tc.ok {
			t.Errorf("%s: %v", name, err)
		}
		read := 0
		for _, p := range s.into {
			read += len(p)
			if len(bytes.Trim(p, "\x00")) != 0 {
				t.Errorf("%s: %d bytes are not wiped", name, len(p))
			}
		}
		if read == 0 {
			t.Errorf("%s: nothing was read", name)
		}
		for _, k := range got.Keys {
			if !bytes.Equal(k.Bits.Expose(), bytes.Repeat([]byte{0xa5}, 64)) {
				t.Errorf("%s: a key was wiped with its answer", name)
			}
		}
		got.Clear()
	}
}
