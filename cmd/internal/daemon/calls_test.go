package daemon

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/quietline/quietline/cmd/internal/control"
	"github.com/quietline/quietline/etsi014"
)

func TestCallCounter(t *testing.T) {
	var c callCounter
	if got := c.list(); got == nil || len(got) != 0 {
		t.Errorf("before the first call: %v, want an empty list for JSON", got)
	}
	for _, o := range []etsi014.Observation{
		{Call: "status", Code: 200, Took: time.Second},
		{Call: "enc_keys", Code: 503, Took: time.Second},
		{Call: "enc_keys", Code: 200, Took: time.Second},
		{Call: "enc_keys", Code: 200, Took: 2 * time.Second},
		{Code: 404},
	} {
		c.observe(o)
	}
	want := []control.Calls{
		{Call: "enc_keys", Code: 200, Count: 2, Seconds: 3},
		{Call: "enc_keys", Code: 503, Count: 1, Seconds: 1},
		{Call: "other", Code: 404, Count: 1},
		{Call: "status", Code: 200, Count: 1, Seconds: 1},
	}
	if diff := cmp.Diff(want, c.list()); diff != "" {
		t.Errorf("calls (-want +got):\n%s", diff)
	}
}
