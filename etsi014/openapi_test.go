package etsi014_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"testing"
	"time"

	"github.com/getkin/kin-openapi/openapi3"
	"github.com/getkin/kin-openapi/openapi3filter"
	"github.com/getkin/kin-openapi/routers"
	"github.com/getkin/kin-openapi/routers/legacy"

	"github.com/quietline/quietline/etsi014"
)

// loadOpenAPI reads the document with an independent implementation.
func loadOpenAPI(t *testing.T, data []byte) (*openapi3.T, routers.Router) {
	t.Helper()
	doc, err := openapi3.NewLoader().LoadFromData(data)
	if err != nil {
		t.Fatal(err)
	}
	if err := doc.Validate(t.Context()); err != nil {
		t.Fatal(err)
	}
	router, err := legacy.NewRouter(doc)
	if err != nil {
		t.Fatal(err)
	}
	return doc, router
}

// check validates one exchange. Identity is TLS's matter, so the security
// scheme is taken as met.
func check(
	t *testing.T, router routers.Router, method, target, body string, r reply,
) (op string, reqErr, respErr error) {
	t.Helper()
	req, err := http.NewRequest(method, target, bytes.NewBufferString(body))
	if err != nil {
		t.Fatal(err)
	}
	if body != "" {
		req.Header.Set("Content-Type", "application/json")
	}
	route, params, err := router.FindRoute(req)
	if err != nil {
		t.Fatalf("%s %s: %v", method, target, err)
	}
	in := &openapi3filter.RequestValidationInput{
		Request: req, PathParams: params, Route: route,
		Options: &openapi3filter.Options{
			AuthenticationFunc:    openapi3filter.NoopAuthenticationFunc,
			IncludeResponseStatus: true,
		},
	}
	reqErr = openapi3filter.ValidateRequest(t.Context(), in)
	respErr = openapi3filter.ValidateResponse(t.Context(), &openapi3filter.ResponseValidationInput{
		RequestValidationInput: in, Status: r.code, Header: r.header, Options: in.Options,
		Body: io.NopCloser(bytes.NewBufferString(r.body)),
	})
	return route.Operation.OperationID, reqErr, respErr
}

// Every answer of the running door is one the document describes, the document
// takes the requests that the door takes, and no described answer stays unseen.
func TestOpenAPI(t *testing.T) {
	w := newWorld(t, nil)
	served := w.send(t, "tokyo", "GET", etsi014.OpenAPIPath, "")
	if served.code != 200 || served.body != string(etsi014.OpenAPI()) {
		t.Fatalf("served %d, %d bytes", served.code, len(served.body))
	}
	doc, router := loadOpenAPI(t, []byte(served.body))
	w.kme.Stock, w.kme.Retry = 100, time.Second
	var fail error
	w.kme.Fail = func() error { return fail }
	seen := map[string]bool{}
	ask := func(sae, method, target, body string, code int) reply {
		t.Helper()
		r := w.send(t, sae, method, target, body)
		op, reqErr, respErr := check(t, router, method, target, body, r)
		seen[fmt.Sprint(op, " ", r.code)] = true
		if r.code != code || respErr != nil || r.code == 200 && reqErr != nil {
			t.Errorf("%s %s %s %s: got %d %s\nrequest: %v\nanswer: %v", sae, method, target, body,
				r.code, r.body, reqErr, respErr)
		}
		return r
	}
	const status = "/api/v1/keys/kochi/status"
	ask("tokyo", "GET", etsi014.OpenAPIPath, "", 200)
	ask("nobody", "GET", etsi014.OpenAPIPath, "", 401)
	ask("tokyo", "GET", status, "", 200)
	ask("tokyo", "GET", status+"?a;b", "", 400)
	ask("tokyo", "GET", enc+"?number=3&size=64&other=1", "", 200)
	keys := decode(t, ask("tokyo", "POST", enc, `{"number":4,"size":512,
		"additional_slave_SAE_IDs":["osaka"],"extension_optional":[{"acme_x":1}]}`, 200))
	ask("tokyo", "POST", enc, "", 200)
	ask("tokyo", "POST", enc, `{"extension_mandatory":[{"acme_x":1}]}`, 400)
	ask("tokyo", "GET", enc+"?size=257", "", 400)
	ask("kochi", "GET", dec+"?key_ID="+keys.Keys[0].ID, "", 200)
	ask("kochi", "GET", dec+"?key_ID="+keys.Keys[0].ID, "", 400)
	body := `{"key_IDs":[{"key_ID":"` + keys.Keys[1].ID + `","key_ID_extension":{}}]}`
	ask("kochi", "POST", dec, body, 200)
	ask("kochi", "POST", dec, body, 400)
	for _, sae := range []string{"nobody", "tokyo"} {
		ask(sae, "POST", dec, body, 401)
		ask(sae, "GET", dec+"?key_ID="+keys.Keys[1].ID, "", 401)
	}
	ask("nobody", "GET", status, "", 401)
	ask("nobody", "GET", enc, "", 401)
	ask("nobody", "POST", enc, "", 401)
	ask("tokyo", "GET", enc+"?number=128", "", 503) // carries Retry-After and missing_bits
	ask("tokyo", "POST", enc, `{"number":128}`, 503)
	fail = etsi014.ErrDown
	ask("tokyo", "GET", status, "", 503)
	ask("kochi", "GET", dec+"?key_ID="+aUUID, "", 503)
	ask("kochi", "POST", dec, body, 503)

	for _, item := range doc.Paths.Map() {
		for _, op := range item.Operations() {
			for code := range op.Responses.Map() {
				if !seen[op.OperationID+" "+code] {
					t.Errorf("%s %s is described and was not seen", op.OperationID, code)
				}
			}
		}
	}
}

// The check above is able to fail: the document refuses requests that the door
// refuses, and answers that are not the standard's.
func TestOpenAPIIsStrict(t *testing.T) {
	_, router := loadOpenAPI(t, etsi014.OpenAPI())
	good := reply{200, http.Header{
		"Content-Type": {"application/json"}, "Cache-Control": {"no-store"},
	}, `{"keys":[{"key_ID":"` + aUUID + `","key":"AAAA"}]}`}
	if _, reqErr, respErr := check(t, router, "POST", enc, `{}`, good); reqErr != nil ||
		respErr != nil {
		t.Fatal(reqErr, respErr)
	}
	for _, tc := range []struct{ method, target, body string }{
		{"GET", enc + "?number=0", ""}, {"GET", enc + "?number=x", ""},
		{"GET", enc + "?number=1025", ""}, {"GET", enc + "?size=4104", ""},
		{"GET", enc + "?size=257", ""}, {"GET", dec, ""}, {"GET", dec + "?key_ID=x", ""},
		{"POST", enc, `[]`}, {"POST", enc, `{"number":"1"}`}, {"POST", enc, `{"size":1.5}`},
		{"POST", enc, `{"additional_slave_SAE_IDs":["a","a"]}`},
		{"POST", enc, `{"extension_mandatory":["x"]}`}, {"POST", dec, `{}`},
		{"POST", dec, `{"key_IDs":[]}`}, {"POST", dec, `{"key_IDs":["` + aUUID + `"]}`},
	} {
		if _, reqErr, _ := check(t, router, tc.method, tc.target, tc.body, good); reqErr == nil {
			t.Errorf("the document takes %v", tc)
		}
	}
	for _, body := range []string{
		`{}`, `{"keys":[]}`, `{"Keys":[{"key_ID":"` + aUUID + `","key":"AAAA"}]}`,
		`{"keys":[{"key_ID":"BC490419-7d60-487f-adc1-4ddcc177c139","key":"AAAA"}]}`,
		`{"keys":[{"key_ID":"` + aUUID + `","key":"AAA"}]}`,
		`{"keys":[{"key_ID":"` + aUUID + `","key":"__=="}]}`,
		`{"keys":[{"key_ID":"` + aUUID + `","key":"AAAA"}],"more":1}`,
	} {
		r := good
		r.body = body
		if _, _, respErr := check(t, router, "POST", enc, `{}`, r); respErr == nil {
			t.Errorf("the document takes the answer %s", body)
		}
	}
	noStore := good
	noStore.header = http.Header{"Content-Type": {"application/json"}}
	if _, _, respErr := check(t, router, "POST", enc, `{}`, noStore); respErr == nil {
		t.Error("the document takes an answer that caches may keep")
	}
	for _, code := range []int{201, 404, 500} {
		r := good
		r.code = code
		if _, _, respErr := check(t, router, "POST", enc, `{}`, r); respErr == nil {
			t.Errorf("the document takes code %d", code)
		}
	}
}

// A caller's change of the document reaches nobody.
func TestOpenAPIIsACopy(t *testing.T) {
	clear(etsi014.OpenAPI())
	if !json.Valid(etsi014.OpenAPI()) {
		t.Error("the document was changed")
	}
	w := newWorld(t, nil)
	for range 2 { // the door wipes what it has written
		if r := w.send(t, "tokyo", "GET", etsi014.OpenAPIPath, ""); !json.Valid([]byte(r.body)) {
			t.Error("the served document is damaged")
		}
	}
	if r := w.send(t, "tokyo", "POST", etsi014.OpenAPIPath, ""); r.code != 405 {
		t.Errorf("POST: got %d", r.code)
	}
}
