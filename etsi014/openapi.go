package etsi014

import (
	"bytes"
	_ "embed" // for the document below
	"net/http"
)

//go:embed openapi.json
var openAPI []byte

// OpenAPI is the door's description of itself, an OpenAPI 3.0.3 document in
// JSON. A [Handler] serves it to enrolled SAEs at OpenAPIPath. The slice is
// the caller's.
func OpenAPI() []byte { return bytes.Clone(openAPI) }

// OpenAPIPath is where the document stands; it is no path of the standard.
const OpenAPIPath = "/api/v1/openapi.json"

// describe answers a request for the document.
func describe(x *exchange) (answer, error) {
	if x.r.Method != http.MethodGet {
		x.w.Header().Set("Allow", "GET")
		return answer{}, errMethod
	}
	return answer{code: http.StatusOK, body: OpenAPI()}, nil // a copy: write wipes it
}
