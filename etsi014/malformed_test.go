package etsi014_test

import (
	"bufio"
	"crypto/tls"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"
)

const (
	notFound  = "one or more keys specified are not found on KME"
	aUUID     = "bc490419-7d60-487f-adc1-4ddcc177c139"
	badNumber = "number shall be an integer of at least 1"
	badSize   = "size shall be an integer of at least 1"
)

var long292 = strings.Repeat("a", 292)

// badRequests is what a door must refuse, with its exact answer.
var badRequests = []struct {
	sae, method, target, body string
	code                      int
	message                   string
}{
	{"nobody", "GET", enc, "", 401, "caller is not entitled"},
	{"nobody", "GET", "/", "", 401, "caller is not entitled"},
	{"tokyo", "GET", "/", "", 404, "no such path"},
	{"tokyo", "GET", "/api/v1/keys/kochi", "", 404, "no such path"},
	{"tokyo", "GET", "/api/v1/keys/kochi/enc_keys/", "", 404, "no such path"},
	{"tokyo", "GET", "//api/v1/keys/kochi/enc_keys", "", 404, "no such path"},
	{"tokyo", "GET", "/api/v2/keys/kochi/enc_keys", "", 404, "no such path"},
	{"tokyo", "GET", "/api/v1/keys/a/b/enc_keys", "", 404, "no such path"},
	{"tokyo", "GET", "/api/v1/keys/../keys/kochi/enc_keys", "", 404, "no such path"},
	{"tokyo", "GET", "/API/v1/keys/kochi/enc_keys", "", 404, "no such path"},
	{"tokyo", "OPTIONS", "*", "", 404, "no such path"},
	{"tokyo", "HEAD", enc, "", 405, ""},
	{"tokyo", "HEAD", "/api/v1/keys/kochi/status", "", 405, ""},
	{"tokyo", "PUT", enc, "{}", 405, "method is not allowed here"},
	{"tokyo", "DELETE", dec, "", 405, "method is not allowed here"},
	{"tokyo", "OPTIONS", enc, "", 405, "method is not allowed here"},
	{"tokyo", "POST", "/api/v1/keys/kochi/status", "{}", 405, "method is not allowed here"},
	{"tokyo", "GET", "/api/v1/keys//status", "", 400,
		"SAE ID shall have 1 to 291 characters of valid UTF-8"},
	{"tokyo", "GET", "/api/v1/keys/" + long292 + "/enc_keys", "", 400,
		"SAE ID shall have 1 to 291 characters of valid UTF-8"},
	{"tokyo", "GET", "/api/v1/keys/a%ff/enc_keys", "", 400,
		"SAE ID shall have 1 to 291 characters of valid UTF-8"},
	{"tokyo", "GET", "/api/v1/keys/a%0Ab/enc_keys", "", 400,
		"SAE ID shall have no control characters"},
	{"tokyo", "GET", enc + "?size=257", "", 400, "size shall be a multiple of 8"},
	{"tokyo", "POST", enc, `{"size":257}`, 400, "size shall be a multiple of 8"},
	{"tokyo", "GET", enc + "?size=56", "", 400, "size shall be from 64 to 4096 bits"},
	{"tokyo", "GET", enc + "?size=4104", "", 400, "size shall be from 64 to 4096 bits"},
	{"tokyo", "GET", enc + "?number=0", "", 400, badNumber},
	{"tokyo", "GET", enc + "?number=", "", 400, badNumber},
	{"tokyo", "GET", enc + "?number=-1", "", 400, badNumber},
	{"tokyo", "GET", enc + "?number=%2B1", "", 400, badNumber},
	{"tokyo", "GET", enc + "?number=1.0", "", 400, badNumber},
	{"tokyo", "GET", enc + "?number=99999999999", "", 400, badNumber},
	{"tokyo", "GET", enc + "?number=1025", "", 400, "number shall be an integer from 1 to 1024"},
	{"tokyo", "GET", enc + "?number=1&number=1", "", 400, "number shall stand once in the query"},
	{"tokyo", "GET", enc + "?number=%zz", "", 400, "query is not valid"},
	{"tokyo", "GET", enc + "?a;b", "", 400, "query is not valid"},
	{"tokyo", "GET", "/api/v1/keys/kochi/status?a;b", "", 400, "query is not valid"},
	{"tokyo", "GET", enc + "?size=256&key_size=128", "", 400, "size and key_size differ"},
	{"tokyo", "GET", enc + "?extension_mandatory=x", "", 400,
		"extension_mandatory is no query parameter: use POST with a body"},
	{"tokyo", "GET", enc + "?additional_slave_SAE_IDs=osaka", "", 400,
		"additional_slave_SAE_IDs is no query parameter: use POST with a body"},
	{"tokyo", "GET", enc, `{"number":1}`, 400, "a GET carries no body: use POST"},
	{"tokyo", "POST", enc, `{"number":"1"}`, 400, badNumber},
	{"tokyo", "POST", enc, `{"number":1.0}`, 400, badNumber},
	{"tokyo", "POST", enc, `{"number":1e0}`, 400, badNumber},
	{"tokyo", "POST", enc, `{"number":true}`, 400, badNumber},
	{"tokyo", "POST", enc, `{"number":0}`, 400, badNumber},
	{"tokyo", "POST", enc, `{"size":-8}`, 400, badSize},
	{"tokyo", "POST", enc, `{"size":[256]}`, 400, badSize},
	{"tokyo", "POST", enc, `{"number":1,"number":2}`, 400,
		"invalid JSON: a member stands twice at byte 20"},
	{"tokyo", "POST", enc, `{"number":1} {}`, 400,
		"invalid JSON: text after the value at byte 13"},
	{"tokyo", "POST", enc, `{"number":1`, 400, "invalid JSON: expected ',' at byte 11"},
	{"tokyo", "POST", enc, `[]`, 400, "body shall be a JSON object"},
	{"tokyo", "POST", enc, `null`, 400, "body shall be a JSON object"},
	{"tokyo", "POST", enc, `number=1`, 400, "body shall be a JSON object"},
	{"tokyo", "POST", enc, " ", 400, "body shall be a JSON object"},
	{"tokyo", "POST", enc, strings.Repeat(" ", 65536) + "{}", 400,
		"body shall have at most 65536 bytes"},
	{"tokyo", "POST", enc, `{"additional_slave_SAE_IDs":["osaka","kochi"]}`, 400,
		"a slave SAE is named twice"},
	{"tokyo", "POST", enc, `{"additional_slave_SAE_IDs":"osaka"}`, 400,
		"additional_slave_SAE_IDs shall be an array of strings"},
	{"tokyo", "POST", enc, `{"additional_slave_SAE_IDs":[1]}`, 400,
		"additional_slave_SAE_IDs shall be an array of strings"},
	{"tokyo", "POST", enc, `{"additional_slave_SAE_IDs":["a","b","c","d"]}`, 400,
		"additional_slave_SAE_IDs names too many SAEs"},
	{"tokyo", "POST", enc, `{"extension_mandatory":[{"acme_x":1}]}`, 400,
		"not all extension_mandatory parameters are supported"},
	{"tokyo", "POST", enc, `{"extension_mandatory":{"acme_x":1}}`, 400,
		"extension_mandatory shall be an array of objects"},
	{"tokyo", "POST", enc, `{"extension_optional":["x"]}`, 400,
		"extension_optional shall be an array of objects"},
	{"kochi", "GET", dec, "", 400, "key_IDs shall hold 1 to 1024 key_IDs"},
	{"kochi", "POST", dec, `{"key_IDs":[]}`, 400, "key_IDs shall hold 1 to 1024 key_IDs"},
	{"kochi", "GET", dec + "?key_ID=x", "", 400, "key_ID shall be a UUID"},
	{"kochi", "GET", dec + "?key_ID=" + aUUID + "&key_ID=" + aUUID, "", 400,
		"key_ID shall stand once in the query"},
	{"kochi", "GET", dec + "?key_IDs=" + aUUID, "", 400,
		"key_IDs is no query parameter: use POST with a body"},
	{"kochi", "GET", dec + "?key_ID=" + aUUID, "", 400, notFound},
	{"kochi", "POST", dec, `{"key_IDs":[{"key_ID":"` + aUUID + `"}]}`, 400, notFound},
	{"kochi", "POST", dec, `{"key_IDs":["` + aUUID + `"]}`, 400,
		"key_IDs shall be an array of objects"},
	{"kochi", "POST", dec, `{"key_IDs":[{}]}`, 400, "key_IDs shall hold objects with a key_ID"},
	{"kochi", "POST", dec, `{"key_IDs":[{"key_ID":1}]}`, 400, "key_ID shall be a string"},
	{"kochi", "POST", dec, `{"key_IDs":[{"key_ID":"` + aUUID + `"},{"key_ID":"` +
		strings.ToUpper(aUUID) + `"}]}`, 400, "a key_ID is named twice"},
	// Paths.
	{"tokyo", "GET", "/api/v1/keys", "", 404, "no such path"},
	{"tokyo", "GET", "/api/v1/keys/kochi/enc_key", "", 404, "no such path"},
	{"tokyo", "GET", "/api/v1/keys/kochi/Enc_Keys", "", 404, "no such path"},
	{"tokyo", "GET", "/api/v1/keys/kochi%2Fenc_keys", "", 404, "no such path"},
	{"tokyo", "GET", "/api/v1/keys/kochi/enc_keys%00", "", 404, "no such path"},
	{"tokyo", "GET", "/api/v1/keys/kochi/./enc_keys", "", 404, "no such path"},
	{"tokyo", "GET", "/api/v1/keys/kochi/enc_keys;v=1", "", 404, "no such path"},
	{"tokyo", "POST", "/api/v1/keys/kochi/keys", "{}", 404, "no such path"},
	{"tokyo", "PATCH", "/nothing", "", 404, "no such path"},
	{"tokyo", "GET", "/api/v1/keys/a%C2%85b/status", "", 400,
		"SAE ID shall have no control characters"},
	{"tokyo", "GET", "/api/v1/keys/%00/status", "", 400,
		"SAE ID shall have no control characters"},
	{"tokyo", "GET", "/api/v1/keys/%ed%a0%80/status", "", 400,
		"SAE ID shall have 1 to 291 characters of valid UTF-8"},
	{"tokyo", "GET", "/api/v1/keys/%c0%af/status", "", 400,
		"SAE ID shall have 1 to 291 characters of valid UTF-8"},
	{"tokyo", "POST", "/api/v1/keys/" + long292 + "/dec_keys", "{}", 400,
		"SAE ID shall have 1 to 291 characters of valid UTF-8"},
	// Methods.
	{"tokyo", "TRACE", enc, "", 405, "method is not allowed here"},
	{"tokyo", "PATCH", dec, "{}", 405, "method is not allowed here"},
	{"tokyo", "get", enc, "", 405, "method is not allowed here"},
	{"tokyo", "HEAD", dec + "?key_ID=" + aUUID, "", 405, ""},
	{"nobody", "HEAD", enc, "", 401, ""},
	{"nobody", "BREW", "/", "", 401, "caller is not entitled"},
	// Queries.
	{"tokyo", "GET", enc + "?number=+1", "", 400, badNumber},
	{"tokyo", "GET", enc + "?number=1%00", "", 400, badNumber},
	{"tokyo", "GET", enc + "?number=0x1", "", 400, badNumber},
	{"tokyo", "GET", enc + "?number=%EF%BC%91", "", 400, badNumber},
	{"tokyo", "GET", enc + "?number=1e1", "", 400, badNumber},
	{"tokyo", "GET", enc + "?number=1_0", "", 400, badNumber},
	{"tokyo", "GET", enc + "?size=0", "", 400, badSize},
	{"tokyo", "GET", enc + "?size=18446744073709551872", "", 400, badSize},
	{"tokyo", "GET", enc + "?size=2147483648", "", 400, badSize},
	{"tokyo", "GET", enc + "?size=2147483640", "", 400, "size shall be from 64 to 4096 bits"},
	{"tokyo", "GET", enc + "?size=1", "", 400, "size shall be a multiple of 8"},
	{"tokyo", "GET", enc + "?size=256&size=256", "", 400, "size shall stand once in the query"},
	{"tokyo", "GET", enc + "?key_size=x", "", 400, "key_size shall be an integer of at least 1"},
	{"tokyo", "GET", enc + "?extension_optional=", "", 400,
		"extension_optional is no query parameter: use POST with a body"},
	{"tokyo", "POST", enc + "?extension_mandatory=x", "{}", 400,
		"extension_mandatory is no query parameter: use POST with a body"},
	{"tokyo", "POST", enc + "?number=x", `{"number":1}`, 400, badNumber},
	{"kochi", "GET", dec + "?key_ID=", "", 400, "key_ID shall be a UUID"},
	{"kochi", "GET", dec + "?key_ID={" + aUUID + "}", "", 400, "key_ID shall be a UUID"},
	{"kochi", "GET", dec + "?key_ID=urn:uuid:" + aUUID, "", 400, "key_ID shall be a UUID"},
	{"kochi", "GET", dec + "?key_ID=bc4904197d60487fadc14ddcc177c139", "", 400,
		"key_ID shall be a UUID"},
	{"kochi", "GET", dec + "?key_ID=bc490419-7d60-487f-adc1-4ddcc177c13g", "", 400,
		"key_ID shall be a UUID"},
	{"kochi", "GET", dec + "?key_ID=" + aUUID + "%20", "", 400, "key_ID shall be a UUID"},
	{"kochi", "GET", dec + "?key_ID=" + aUUID + "," + aUUID, "", 400, "key_ID shall be a UUID"},
	{"kochi", "GET", dec + "?key_id=" + aUUID, "", 400, "key_IDs shall hold 1 to 1024 key_IDs"},
	{"kochi", "GET", dec + "?key_ID=%", "", 400, "query is not valid"},
	// Bodies.
	{"tokyo", "POST", enc, `{"number":01}`, 400, badNumber},
	{"tokyo", "POST", enc, `{"number":+1}`, 400, badNumber},
	{"tokyo", "POST", enc, `{"number":-0}`, 400, badNumber},
	{"tokyo", "POST", enc, `{"number":1e400}`, 400, badNumber},
	{"tokyo", "POST", enc, `{"number":4294967297}`, 400, badNumber},
	{"tokyo", "POST", enc, `{"number":NaN}`, 400, badNumber},
	{"tokyo", "POST", enc, `{"number":{}}`, 400, badNumber},
	{"tokyo", "POST", enc, `{"number":1025}`, 400, "number shall be an integer from 1 to 1024"},
	{"tokyo", "POST", enc, `{"size":""}`, 400, badSize},
	{"tokyo", "POST", enc, `{"size":32}`, 400, "size shall be from 64 to 4096 bits"},
	{"tokyo", "POST", enc, `{"size":257,"number":5}`, 400, "size shall be a multiple of 8"},
	{"tokyo", "POST", enc, `{'number':1}`, 400, "invalid JSON: expected '\"' at byte 1"},
	{"tokyo", "POST", enc, `{"number" 1}`, 400, "invalid JSON: expected ':' at byte 10"},
	{"tokyo", "POST", enc, `{"number":1,}`, 400, "invalid JSON: expected '\"' at byte 12"},
	{"tokyo", "POST", enc, `{"number":nul}`, 400, badNumber},
	{"tokyo", "POST", enc, `{"x":nul}`, 400, "invalid JSON: unknown word at byte 5"},
	{"tokyo", "POST", enc, `{"x":"\ud800"}`, 400, "invalid JSON: lone surrogate at byte 12"},
	{"tokyo", "POST", enc, "{\"x\":\"\xff\"}", 400, "invalid JSON: invalid UTF-8 at byte 6"},
	{"tokyo", "POST", enc, "{\"x\":\"\n\"}", 400,
		"invalid JSON: control character in a string at byte 6"},
	{"tokyo", "POST", enc, `{"x":` + strings.Repeat("[", 17) + strings.Repeat("]", 17) + `}`, 400,
		"invalid JSON: nesting is too deep at byte 21"},
	{"tokyo", "POST", enc, "\ufeff{}", 400, "body shall be a JSON object"},
	{"tokyo", "POST", enc, `"{}"`, 400, "body shall be a JSON object"},
	{"tokyo", "POST", enc, `{}{}`, 400, "invalid JSON: text after the value at byte 2"},
	{"tokyo", "POST", enc, "{}\x00", 400, "invalid JSON: text after the value at byte 2"},
	{"tokyo", "POST", enc, `{} // x`, 400, "invalid JSON: text after the value at byte 3"},
	{"tokyo", "POST", enc, `{"additional_slave_SAE_IDs":[""]}`, 400,
		"SAE ID shall have 1 to 291 characters of valid UTF-8"},
	{"tokyo", "POST", enc, `{"additional_slave_SAE_IDs":["` + long292 + `"]}`, 400,
		"SAE ID shall have 1 to 291 characters of valid UTF-8"},
	{"tokyo", "POST", enc, `{"additional_slave_SAE_IDs":["a\u0007"]}`, 400,
		"SAE ID shall have no control characters"},
	{"tokyo", "POST", enc, `{"additional_slave_SAE_IDs":["osaka","osaka"]}`, 400,
		"a slave SAE is named twice"},
	{"tokyo", "POST", enc, `{"additional_slave_SAE_IDs":[["osaka"]]}`, 400,
		"additional_slave_SAE_IDs shall be an array of strings"},
	{"tokyo", "POST", enc, `{"extension_mandatory":[1]}`, 400,
		"extension_mandatory shall be an array of objects"},
	{"tokyo", "POST", enc, `{"extension_mandatory":[{"a":1,"a":2}]}`, 400,
		"invalid JSON: a member stands twice at byte 34"},
	{"tokyo", "POST", enc, `{"extension_optional":true}`, 400,
		"extension_optional shall be an array of objects"},
	{"kochi", "POST", dec, "", 400, "key_IDs shall hold 1 to 1024 key_IDs"},
	{"kochi", "POST", dec, `{}`, 400, "key_IDs shall hold 1 to 1024 key_IDs"},
	{"kochi", "POST", dec, `{"key_IDs":null}`, 400, "key_IDs shall hold 1 to 1024 key_IDs"},
	{"kochi", "POST", dec, `{"key_ids":[{"key_ID":"` + aUUID + `"}]}`, 400,
		"key_IDs shall hold 1 to 1024 key_IDs"},
	{"kochi", "POST", dec, `{"key_IDs":"` + aUUID + `"}`, 400,
		"key_IDs shall be an array of objects"},
	{"kochi", "POST", dec, `{"key_IDs":{"key_ID":"` + aUUID + `"}}`, 400,
		"key_IDs shall be an array of objects"},
	{"kochi", "POST", dec, `{"key_IDs":[{"key_ID":null}]}`, 400, "key_ID shall be a string"},
	{"kochi", "POST", dec, `{"key_IDs":[{"key_ID":""}]}`, 400, "key_ID shall be a UUID"},
	{"kochi", "POST", dec, `{"key_IDs":[{"key_id":"` + aUUID + `"}]}`, 400,
		"key_IDs shall hold objects with a key_ID"},
	{"kochi", "POST", dec, `{"key_IDs":[{"key_ID":"` + aUUID + `","key_ID":"` + aUUID + `"}]}`, 400,
		"invalid JSON: a member stands twice at byte 69"},
	{"kochi", "POST", dec, `{"key_IDs":[{"key_ID":"` + aUUID + `"},null]}`, 400,
		"key_IDs shall be an array of objects"},
	{"kochi", "POST", dec, `[{"key_ID":"` + aUUID + `"}]`, 400, "body shall be a JSON object"},
	{"kochi", "POST", dec, `{"key_IDs":[` + strings.Repeat(`{"key_ID":"`+aUUID+`"},`, 1024) +
		`{"key_ID":"` + aUUID + `"}]}`, 400, "key_IDs shall hold 1 to 1024 key_IDs"},
}

// Each refusal has its exact code and text as JSON, and nothing leaves stock.
func TestMalformedRequests(t *testing.T) {
	w := newWorld(t, nil)
	for _, tc := range badRequests {
		r := w.send(t, tc.sae, tc.method, tc.target, tc.body)
		want := errorBody(tc.message)
		if tc.method == "HEAD" {
			want = ""
		}
		if r.code != tc.code || r.body != want {
			t.Errorf("%s %.80s %.80s:\n got %d %s\nwant %d %s", tc.method, tc.target, tc.body,
				r.code, r.body, tc.code, want)
		}
		for name, want := range map[string]string{
			"Content-Type": "application/json", "Cache-Control": "no-store",
			"X-Content-Type-Options": "nosniff",
		} {
			if got := r.header.Get(name); got != want {
				t.Errorf("%s %.80s: %s is %q", tc.method, tc.target, name, got)
			}
		}
		if r.code == 405 && r.header.Get("Allow") == "" || r.code == 401 &&
			r.header.Get("WWW-Authenticate") == "" {
			t.Errorf("%s %.80s: %d lacks its header", tc.method, tc.target, r.code)
		}
	}
	if got := w.kme.Left(); got != 1000 {
		t.Errorf("%d keys of 1000 are left", got)
	}
}

// What is no HTTP never reaches the door and is answered with an Error
// nevertheless; no key leaves. Bodies that break off are the door's again.
func TestMalformedHTTP(t *testing.T) {
	w := newWorld(t, nil)
	post := "POST " + enc + " HTTP/1.1\r\nHost: kme\r\nConnection: close\r\n"
	for _, tc := range []struct{ name, text, status, body string }{
		{"no HTTP", "hello\r\n\r\n", "400 Bad Request", errorBody("Bad Request")},
		{"no Host", "GET " + enc + " HTTP/1.1\r\n\r\n",
			"400 Bad Request: missing required Host header",
			errorBody("Bad Request: missing required Host header")},
		{"two Hosts", "GET " + enc + " HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
			"400 Bad Request", errorBody("Bad Request")},
		{"bad escape", "GET /api/v1/keys/%zz/enc_keys HTTP/1.1\r\nHost: kme\r\n\r\n",
			"400 Bad Request", errorBody("Bad Request")},
		{"space in the path", "GET /api/v1/keys/a b/enc_keys HTTP/1.1\r\nHost: kme\r\n\r\n",
			"400 Bad Request", errorBody("Bad Request")},
		{"method with a bracket", "G(T " + enc + " HTTP/1.1\r\nHost: kme\r\n\r\n",
			"400 Bad Request", errorBody("Bad Request")},
		{"header without a colon", "GET " + enc + " HTTP/1.1\r\nHost: kme\r\nx\r\n\r\n",
			"400 Bad Request", errorBody("Bad Request")},
		{"header name with a space", "GET " + enc + " HTTP/1.1\r\nHost: kme\r\nx y: z\r\n\r\n",
			"400 Bad Request: invalid header name", errorBody("Bad Request: invalid header name")},
		{"header too large", "GET " + enc + " HTTP/1.1\r\nHost: kme\r\nx: " +
			strings.Repeat("x", 24<<10) + "\r\n\r\n", "431 Request Header Fields Too Large",
			errorBody("Request Header Fields Too Large")},
		{"HTTP/2", "PRI * HTTP/2.0\r\n\r\n", "404 Not Found", errorBody("no such path")},
		{"HTTP/3", "GET / HTTP/3.0\r\nHost: kme\r\n\r\n",
			"505 HTTP Version Not Supported: unsupported protocol version",
			errorBody("HTTP Version Not Supported: unsupported protocol version")},
		{"negative length", post + "Content-Length: -1\r\n\r\n", "400 Bad Request",
			errorBody("Bad Request")},
		{"two lengths", post + "Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
			"400 Bad Request", errorBody("Bad Request")},
		{"unknown transfer coding", post + "Transfer-Encoding: zip\r\n\r\n",
			"501 Not Implemented", errorBody("Unsupported transfer encoding")},
		{"bad chunk", post + "Transfer-Encoding: chunked\r\n\r\nzz\r\n", "400 Bad Request",
			errorBody("body ended early")},
		{"body breaks off", post + "Content-Length: 9\r\n\r\n{}", "400 Bad Request",
			errorBody("body ended early")},
		{"chunks without end", post + "Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n",
			"400 Bad Request", errorBody("body ended early")},
	} {
		conn, err := tls.Dial("tcp", w.addr, w.tls("tokyo"))
		if err != nil {
			t.Fatal(err)
		}
		_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
		if _, err := io.WriteString(conn, tc.text); err != nil {
			t.Fatal(tc.name, err)
		}
		if err := conn.CloseWrite(); err != nil {
			t.Fatal(tc.name, err)
		}
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Errorf("%s: %v", tc.name, err)
			continue
		}
		body, err := io.ReadAll(resp.Body)
		if err != nil || resp.Status != tc.status || string(body) != tc.body ||
			resp.Header.Get("Content-Type") != "application/json" {
			t.Errorf("%s: got %q %q, %v", tc.name, resp.Status, body, err)
		}
		_ = conn.Close()
	}
	if got := w.kme.Left(); got != 1000 {
		t.Errorf("%d keys of 1000 are left", got)
	}
}
