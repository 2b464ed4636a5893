package line

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"

	"github.com/quietline/quietline/tunnel/rekey"
)

// TestEventsAreLoggedInWords: a log is read by people, who do not know levels
// by number.
func TestEventsAreLoggedInWords(t *testing.T) {
	for _, e := range []rekey.Event{
		{Kind: "rekey", Level: rekey.QKD, Reason: "epoch 7"},
		{Kind: "alarm", Level: rekey.Blocked, Reason: "key manager has no key"},
	} {
		var b bytes.Buffer
		o := &owner{Line: &Line{log: slog.New(slog.NewJSONHandler(&b, nil))}}
		o.event(e)
		for _, want := range []string{`"msg":"` + e.Kind, `"level":"` + e.Level.String(), e.Reason} {
			if !strings.Contains(b.String(), want) {
				t.Errorf("%s is not in %s", want, b.String())
			}
		}
	}
}
