package etsi014_test

import (
	"bufio"
	"cmp"
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"

	"github.com/quietline/quietline/etsi014"
)

// container is a Key container as a foreign client sees it.
type container struct {
	Keys []struct {
		ID  string `json:"key_ID"`
		Key []byte `json:"key"`
	} `json:"keys"`
}

func decode(t testing.TB, r reply) container {
	t.Helper()
	var c container
	if err := json.Unmarshal([]byte(r.body), &c); r.code != 200 || err != nil {
		t.Fatalf("got %d %s, %v", r.code, r.body, err)
	}
	return c
}

const (
	enc = "/api/v1/keys/kochi/enc_keys"
	dec = "/api/v1/keys/tokyo/dec_keys"
)

func TestStatus(t *testing.T) {
	w := newWorld(t, nil)
	r := w.send(t, "tokyo", "GET", "/api/v1/keys/kochi/status", "")
	want := `{"source_KME_ID":"kme-tokyo","target_KME_ID":"kme-kochi","master_SAE_ID":"tokyo",` +
		`"slave_SAE_ID":"kochi","key_size":256,"stored_key_count":1000,"max_key_count":100000,` +
		`"max_key_per_request":128,"max_key_size":4096,"min_key_size":64,"max_SAE_ID_count":3}`
	if r.code != 200 || r.body != want {
		t.Errorf("got %d %s", r.code, r.body)
	}
	for name, want := range map[string]string{
		"Content-Type": "application/json", "Cache-Control": "no-store",
		"Content-Length": fmt.Sprint(len(want)),
	} {
		if got := r.header.Get(name); got != want {
			t.Errorf("%s is %q", name, got)
		}
	}
}

// The four ways to draw and the two to fetch give the same key to both ends.
func TestKeysBothWays(t *testing.T) {
	w := newWorld(t, nil)
	form := regexp.MustCompile(`^\{"keys":\[(\{"key_ID":"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}",` +
		`"key":"[A-Za-z0-9+/]+={0,2}"\},?)+\]\}$`)
	for _, tc := range []struct {
		method, target, body string
		keys, bits           int
	}{
		{"GET", enc, "", 1, 256},
		{"GET", enc + "?number=3&size=64", "", 3, 64},
		{"GET", enc + "?number=2&unknown=7&key_size=512", "", 2, 512},
		{"POST", enc, "", 1, 256},
		{"POST", enc, "{}", 1, 256},
		{"POST", enc, `{"number":2,"size":4096}`, 2, 4096},
		{"POST", enc, `{"number":128,"size":256,"unknown":[1,{"a":null}]}`, 128, 256},
		{"POST", enc + "?number=9&size=64", `{"number":2}`, 2, 64},
		{"POST", enc, `{"number":null,"size":null,"key_size":128}`, 1, 128},
		{"POST", enc, `{"extension_optional":[{"acme_x":1}],"additional_slave_SAE_IDs":[]}`, 1, 256},
	} {
		r := w.send(t, "tokyo", tc.method, tc.target, tc.body)
		drawn := decode(t, r)
		if !form.MatchString(r.body) {
			t.Errorf("%s %s %s: form of %s", tc.method, tc.target, tc.body, r.body)
		}
		if len(drawn.Keys) != tc.keys || len(drawn.Keys[0].Key)*8 != tc.bits {
			t.Fatalf("%s %s %s: %d keys", tc.method, tc.target, tc.body, len(drawn.Keys))
		}
		// Fetch the first by GET in upper case, the others by POST in
		// reverse: the order asked is the order answered.
		got := decode(t, w.send(t, "kochi", "GET",
			dec+"?key_ID="+strings.ToUpper(drawn.Keys[0].ID), ""))
		if diff := gocmp.Diff(drawn.Keys[:1], got.Keys); diff != "" {
			t.Errorf("GET dec_keys: %s", diff)
		}
		if tc.keys == 1 {
			continue
		}
		var ids []string
		for i := tc.keys - 1; i > 0; i-- {
			ids = append(ids, fmt.Sprintf(`{"key_ID":%q,"key_ID_extension":{}}`, drawn.Keys[i].ID))
		}
		got = decode(t, w.send(t, "kochi", "POST", dec,
			`{"key_IDs_extension":{"a":1},"key_IDs":[`+strings.Join(ids, ",")+`]}`))
		for i := range got.Keys {
			if diff := gocmp.Diff(drawn.Keys[tc.keys-1-i], got.Keys[i]); diff != "" {
				t.Errorf("POST dec_keys, key %d: %s", i, diff)
			}
		}
	}
}

func errorBody(message string) string {
	b, _ := json.Marshal(map[string]string{"message": message})
	return string(b)
}

func TestGzipBodyIsRefused(t *testing.T) {
	w := newWorld(t, nil)
	r := w.send(t, "tokyo", "POST", enc, "{}", "Content-Encoding: gzip")
	if r.code != 400 || r.body != errorBody("content encodings are not supported") {
		t.Errorf("got %d %s", r.code, r.body)
	}
}

// A key goes to its target once, to nobody else, and all or none are given.
func TestDecKeysRules(t *testing.T) {
	w := newWorld(t, nil)
	keys := decode(t, w.send(t, "tokyo", "GET", enc+"?number=2", ""))
	one, two := keys.Keys[0].ID, keys.Keys[1].ID
	ids := func(list ...string) string {
		return `{"key_IDs":[{"key_ID":"` + strings.Join(list, `"},{"key_ID":"`) + `"}]}`
	}
	for _, tc := range []struct {
		sae, target, body string
		code              int
		message           string
	}{
		{"osaka", dec, ids(one), 401, "caller is not entitled"},
		{"tokyo", dec, ids(one), 401, "caller is not entitled"},
		{"kochi", "/api/v1/keys/osaka/dec_keys", ids(one), 401, "caller is not entitled"},
		{"kochi", dec, ids(one, aUUID), 400, notFound},
		{"kochi", dec, ids(two, one), 200, ""},
		{"kochi", dec, ids(one), 400, notFound},
	} {
		r := w.send(t, tc.sae, "POST", tc.target, tc.body)
		if r.code != tc.code || tc.message != "" && r.body != errorBody(tc.message) {
			t.Errorf("%s %s %s: got %d %s", tc.sae, tc.target, tc.body, r.code, r.body)
		}
	}
}

// The body of a POST wins over its query, for key_IDs too.
func TestBodyWinsOverQuery(t *testing.T) {
	w := newWorld(t, nil)
	keys := decode(t, w.send(t, "tokyo", "GET", enc, ""))
	body := `{"key_IDs":[{"key_ID":"` + keys.Keys[0].ID + `"}]}`
	got := decode(t, w.send(t, "kochi", "POST", dec+"?key_ID="+aUUID, body))
	if diff := gocmp.Diff(keys, got); diff != "" {
		t.Error(diff)
	}
}

func TestMulticast(t *testing.T) {
	w := newWorld(t, nil)
	keys := decode(t, w.send(t, "tokyo", "POST", enc, `{"additional_slave_SAE_IDs":["osaka"]}`))
	for _, sae := range []string{"kochi", "osaka"} {
		got := decode(t, w.send(t, sae, "GET", dec+"?key_ID="+keys.Keys[0].ID, ""))
		if diff := gocmp.Diff(keys, got); diff != "" {
			t.Errorf("%s: %s", sae, diff)
		}
	}
}

// The SAE ID is decoded after the path is split.
func TestEscapedSAE(t *testing.T) {
	w := newWorld(t, nil)
	for target, want := range map[string]string{
		"/api/v1/keys/a%2Fb/status":                                       `"slave_SAE_ID":"a/b"`,
		"/api/v1/keys/%E6%9D%B1%E4%BA%AC/status":                          `"slave_SAE_ID":"東京"`,
		"/api/v1/keys/a+b%20c%3f/status":                                  `"slave_SAE_ID":"a+b c?"`,
		"/api/v1/keys/%2e%2e/status":                                      `"slave_SAE_ID":".."`,
		"/%61pi/v1/keys/a%252Fb/%73tatus":                                 `"slave_SAE_ID":"a%2Fb"`,
		"/api/v1/keys/" + strings.Repeat("%F0%9F%98%80", 291) + "/status": `"slave_SAE_ID":"😀`,
	} {
		if r := w.send(t, "tokyo", "GET", target, ""); r.code != 200 || !strings.Contains(r.body, want) {
			t.Errorf("%.80s: got %d %s", target, r.code, r.body)
		}
	}
}

// What a KME may answer, and what of it the caller reads.
func TestKMEErrors(t *testing.T) {
	cause := errors.New("disk sdb7 is full")
	var fail error
	w := newWorld(t, nil)
	w.kme.Fail = func() error { return fail }
	for _, tc := range []struct {
		err   error
		code  int
		body  string
		retry string
	}{
		{etsi014.ErrDenied, 401, errorBody("caller is not entitled"), ""},
		{&etsi014.Error{Kind: etsi014.ErrDenied, Message: "SAE is locked", Cause: cause,
			Details: []map[string]string{{"why": "x"}}}, 401, errorBody("caller is not entitled"), ""},
		{&etsi014.Error{Kind: etsi014.ErrUnknownKey, Message: "the third", Cause: cause}, 400,
			errorBody(notFound), ""},
		{fmt.Errorf("draw: %w", etsi014.ErrSize), 400, errorBody("size shall be a multiple of 8"), ""},
		{etsi014.ErrUnmet, 400,
			errorBody("not all extension_mandatory request options could be met"), ""},
		{&etsi014.Error{Kind: etsi014.ErrRequest, Message: "number is above 128", Cause: cause}, 400,
			errorBody("number is above 128"), ""},
		{etsi014.ErrRequest, 400, errorBody("request is not valid"), ""},
		{&etsi014.Error{Kind: etsi014.ErrEmpty, MissingBits: 512, RetryAfter: 1500 * time.Millisecond},
			503, `{"message":"not enough key material","details":[{"missing_bits":"512"}]}`, "2"},
		{&etsi014.Error{Kind: etsi014.ErrEmpty, Message: "link is down", MissingBits: 8,
			Details: []map[string]string{{"since": "09:00"}}}, 503,
			`{"message":"link is down","details":[{"since":"09:00"},{"missing_bits":"8"}]}`, ""},
		{&etsi014.Error{Kind: etsi014.ErrDown, Cause: cause, RetryAfter: time.Minute}, 503,
			errorBody("key manager cannot serve"), "60"},
		{cause, 503, errorBody("key manager cannot serve"), ""},
		{&etsi014.Error{Kind: cause, Message: "sdb7"}, 503, errorBody("key manager cannot serve"), ""},
	} {
		fail = tc.err
		for _, target := range []string{enc, "/api/v1/keys/kochi/status", dec + "?key_ID=" + aUUID} {
			r := w.send(t, "tokyo", "GET", target, "")
			if r.code != tc.code || r.body != tc.body || r.header.Get("Retry-After") != tc.retry {
				t.Errorf("%v: got %d %s, Retry-After %q", tc.err, r.code, r.body,
					r.header.Get("Retry-After"))
			}
		}
	}
}

// Failed after the keys were taken: the caller gets an error, the keys are
// gone, and nothing puts them back.
func TestLostKeysStayLost(t *testing.T) {
	w := newWorld(t, nil)
	w.kme.Lose = func() error { return etsi014.ErrDown }
	if r := w.send(t, "tokyo", "GET", enc, ""); r.code != 503 {
		t.Errorf("got %d", r.code)
	}
	if got := w.kme.Left(); got != 999 {
		t.Errorf("%d keys are left", got)
	}
}

func TestProfiles(t *testing.T) {
	profile := etsi014.Profile{}
	w := newWorld(t, func(c *etsi014.HandlerConfig) {
		c.Profile = func(sae etsi014.SAEID) etsi014.Profile { return profile }
	})
	for _, tc := range []struct {
		name                 string
		profile              etsi014.Profile
		method, target, body string
		code                 int
		keys, bits           int
		message              string
	}{
		{"letter, query on POST", etsi014.Profile{}, "POST", enc + "?number=2", "", 400, 0, 0,
			"a POST carries no query: use the body"},
		{"letter, unknown query on POST", etsi014.Profile{}, "POST", enc + "?x=2", "", 200, 1, 256, ""},
		{"letter, key_size is unknown", etsi014.Profile{}, "GET", enc + "?key_size=128", "", 200, 1,
			256, ""},
		{"letter, key_size in the body", etsi014.Profile{}, "POST", enc, `{"key_size":128}`, 200, 1,
			256, ""},
		{"alias", etsi014.Profile{KeySizeAlias: true}, "GET", enc + "?key_size=128", "", 200, 1, 128, ""},
		{"alias that is no multiple", etsi014.Profile{KeySizeAlias: true}, "GET",
			enc + "?key_size=129", "", 400, 0, 0, "size shall be a multiple of 8"},
		{"body on GET", etsi014.Profile{BodyOnGET: true}, "GET", enc, `{"number":3}`, 200, 3, 256, ""},
		{"body on GET wins", etsi014.Profile{BodyOnGET: true}, "GET", enc + "?number=2&size=64",
			`{"number":3}`, 200, 3, 64, ""},
		{"fewer keys", etsi014.Profile{MaxKeys: 4}, "GET", enc + "?number=5", "", 400, 0, 0,
			"number shall be an integer from 1 to 4"},
		{"no more keys than the door", etsi014.Profile{MaxKeys: 4000}, "GET", enc + "?number=1025",
			"", 400, 0, 0, "number shall be an integer from 1 to 1024"},
		{"unknown key", etsi014.Profile{UnknownKeyStatus: 404}, "GET", dec + "?key_ID=" + aUUID, "",
			404, 0, 0, notFound},
	} {
		profile = tc.profile
		r := w.send(t, "tokyo", tc.method, tc.target, tc.body)
		if r.code != tc.code || tc.message != "" && r.body != errorBody(tc.message) {
			t.Errorf("%s: got %d %s", tc.name, r.code, r.body)
		}
		if tc.code == 200 {
			c := decode(t, r)
			if len(c.Keys) != tc.keys || 8*len(c.Keys[0].Key) != tc.bits {
				t.Errorf("%s: got %d keys of %d bits", tc.name, len(c.Keys), 8*len(c.Keys[0].Key))
			}
		}
	}
}

// The door tells its observer what it answered, and the log no key.
func TestObservationsAndLog(t *testing.T) {
	var log syncBuffer
	w := newWorld(t, func(c *etsi014.HandlerConfig) { c.Log = logTo(&log) })
	keys := decode(t, w.send(t, "tokyo", "GET", enc+"?number=2", ""))
	w.send(t, "kochi", "GET", dec+"?key_ID="+keys.Keys[0].ID, "")
	w.send(t, "nobody", "GET", enc, "")
	w.send(t, "tokyo", "GET", "/x", "")
	type row struct {
		Call         string
		Code         int
		Caller, Peer etsi014.SAEID
		Keys, Bits   int
		Failed       bool
	}
	var got []row
	for _, o := range w.observations(t) {
		if o.Took <= 0 {
			t.Errorf("took %v", o.Took)
		}
		got = append(got, row{o.Call, o.Code, o.Caller, o.Peer, o.Keys, o.Bits, o.Err != nil})
	}
	// A report follows its answer, so two in a row may change places.
	slices.SortFunc(got, func(a, b row) int {
		return cmp.Or(cmp.Compare(a.Code, b.Code), cmp.Compare(a.Call, b.Call))
	})
	want := []row{
		{"dec_keys", 200, "kochi", "tokyo", 1, 256, false},
		{"enc_keys", 200, "tokyo", "kochi", 2, 512, false},
		{"", 401, "", "", 0, 0, true},
		{"", 404, "tokyo", "", 0, 0, true},
	}
	if diff := gocmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	for _, k := range keys.Keys {
		for _, form := range []string{
			base64.StdEncoding.EncodeToString(k.Key), fmt.Sprintf("%x", k.Key), string(k.Key),
		} {
			if strings.Contains(log.String(), form) {
				t.Errorf("the log shows a key: %s", log.String())
			}
		}
	}
	if !strings.Contains(log.String(), `subject \"CN=nobody\"`) {
		t.Errorf("the log does not name the refused certificate: %s", log.String())
	}
}

func TestNewHandlerWantsItsParts(t *testing.T) {
	if _, err := etsi014.NewHandler(etsi014.HandlerConfig{}); err == nil {
		t.Error("a handler without a KME was made")
	}
}

// A stranger without TLS is a stranger.
func TestPlainHTTPIsDenied(t *testing.T) {
	w := newWorld(t, nil)
	h, err := etsi014.NewHandler(etsi014.HandlerConfig{KME: w.kme, Identify: w.live.Identify})
	if err != nil {
		t.Fatal(err)
	}
	rec := newRecorder()
	r, _ := http.NewRequest("GET", enc, http.NoBody)
	h.ServeHTTP(rec, r)
	if rec.code != 401 || rec.Header().Get("Connection") != "close" {
		t.Errorf("got %d %v", rec.code, rec.Header())
	}
}

// A connection that is too old ends after its answer, not before.
func TestMaxConnAge(t *testing.T) {
	for age, want := range map[time.Duration]bool{time.Nanosecond: true, time.Hour: false} {
		w := newWorld(t, func(c *etsi014.HandlerConfig) { c.Limits.MaxConnAge = age })
		conn, err := tls.Dial("tcp", w.addr, w.tls("tokyo"))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		_, err = fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: kme\r\n\r\n", enc)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Fatal(err)
		}
		_ = resp.Body.Close()
		if resp.StatusCode != 200 || resp.Close != want {
			t.Errorf("age %v: got %d, close %v", age, resp.StatusCode, resp.Close)
		}
	}
}
