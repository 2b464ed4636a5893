package etsi014_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"io"
	"net/http"
	"net/url"
	"testing"

	"github.com/quietline/quietline/etsi014"
)

// watcher is a KME that checks what the door lets through.
type watcher struct{ t *testing.T }

func (w watcher) Status(
	_ context.Context, who etsi014.Caller, peer etsi014.SAEID,
) (etsi014.Status, error) {
	w.sae(peer)
	return etsi014.Status{Initiator: who.SAE, Target: peer}, nil
}

func (w watcher) sae(id etsi014.SAEID) {
	if _, err := etsi014.ParseSAEID(string(id)); err != nil {
		w.t.Errorf("SAE ID %q came through", id)
	}
}

func (w watcher) Keys(
	_ context.Context, _ etsi014.Caller, r etsi014.KeyRequest,
) (etsi014.Container, error) {
	for _, id := range r.Targets {
		w.sae(id)
	}
	if len(r.Targets) == 0 || r.Number < 1 || r.Number > 1024 || r.SizeBits%8 != 0 ||
		r.SizeBits != 0 && (r.SizeBits < 64 || r.SizeBits > 4096) {
		w.t.Errorf("%+v came through", r)
	}
	var c etsi014.Container
	for range r.Number {
		c.Keys = append(c.Keys, containerOf(8).Keys...)
	}
	return c, nil
}

func (w watcher) KeysByID(
	_ context.Context, _ etsi014.Caller, r etsi014.IDRequest,
) (etsi014.Container, error) {
	w.sae(r.Initiator)
	seen := map[etsi014.KeyID]bool{}
	var c etsi014.Container
	for _, id := range r.IDs {
		if seen[id] {
			w.t.Errorf("%+v came through", r)
		}
		seen[id] = true
		c.Keys = append(c.Keys, containerOf(8).Keys...)
	}
	return c, nil
}

// No request makes the door panic, answer without JSON, or pass on what breaks
// a rule.
func FuzzRequest(f *testing.F) {
	for _, s := range []struct {
		post         bool
		target, body string
	}{
		{false, "/api/v1/keys/kochi/status", ""},
		{false, enc + "?number=2&size=64&key_size=64", ""},
		{true, enc, `{"number":2,"size":256,"additional_slave_SAE_IDs":["a"],` +
			`"extension_mandatory":[{"x":1}],"extension_optional":[{}]}`},
		{false, dec + "?key_ID=" + aUUID, ""},
		{true, dec, `{"key_IDs":[{"key_ID":"` + aUUID + `"}]}`},
		{true, "/api/v1/keys/%2f%e6/dec_keys?a;b", `{"key_IDs":[{"key_ID":null}]}`},
		{false, "//x/%", "{"},
	} {
		f.Add(s.post, s.target, []byte(s.body))
	}
	f.Fuzz(func(t *testing.T, post bool, target string, body []byte) {
		u, err := url.ParseRequestURI(target)
		if err != nil {
			return // net/http answers these
		}
		h, err := etsi014.NewHandler(etsi014.HandlerConfig{
			KME: watcher{t},
			Identify: func(*tls.ConnectionState) (etsi014.Caller, error) {
				return etsi014.Caller{SAE: "tokyo"}, nil
			},
			Profile: func(etsi014.SAEID) etsi014.Profile {
				return etsi014.Profile{BodyOnGET: true, QueryOnPOST: true, KeySizeAlias: true}
			},
		})
		if err != nil {
			t.Fatal(err)
		}
		r := &http.Request{
			Method: "GET", URL: u, Header: http.Header{}, Body: io.NopCloser(bytes.NewReader(body)),
		}
		if post {
			r.Method = "POST"
		}
		rec := newRecorder()
		h.ServeHTTP(rec, r)
		switch rec.code {
		case 200, 400, 404, 405:
		default:
			t.Errorf("code %d", rec.code)
		}
		if !json.Valid(rec.copies.Bytes()) {
			t.Errorf("answer is no JSON: %q", rec.copies.Bytes())
		}
	})
}
