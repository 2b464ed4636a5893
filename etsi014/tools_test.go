package etsi014_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"testing"
)

// syncBuffer is a log that several goroutines write.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// recorder keeps an answer and, unlike httptest's, the very slice that was
// written, so that a test can see it wiped.
type recorder struct {
	code   int
	header http.Header
	slices [][]byte
	copies bytes.Buffer
	fail   error
}

func newRecorder() *recorder { return &recorder{header: http.Header{}} }

func (r *recorder) Header() http.Header  { return r.header }
func (r *recorder) WriteHeader(code int) { r.code = code }
func (r *recorder) Flush()               {}

func (r *recorder) Write(p []byte) (int, error) {
	if r.fail != nil {
		return 0, r.fail
	}
	r.slices = append(r.slices, p)
	return r.copies.Write(p)
}

func hexText(s string) string { return fmt.Sprintf("%x", s) }

// decimalText is how fmt prints the bytes of s.
func decimalText(s string) string { return strings.Trim(fmt.Sprint([]byte(s)), "[]") }

// printed is every form in which a value could reach a person.
func printed(t testing.TB, v any) []string {
	t.Helper()
	var list []string
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "%d", "%o", "%c"} {
		list = append(list, fmt.Sprintf(verb, v))
	}
	if b, err := json.Marshal(v); err == nil {
		list = append(list, string(b))
	}
	var text, js syncBuffer
	slog.New(slog.NewTextHandler(&text, nil)).Info("x", "v", v)
	slog.New(slog.NewJSONHandler(&js, nil)).Info("x", "v", v)
	return append(list, text.String(), js.String())
}
