package daemon

import (
	"bytes"
	"fmt"
	"testing"
)

// TestShortageSaysWhatIsMissing: more keys than there are is a 503 that tells
// the difference in bits and when to ask again, to the letter; it costs none.
func TestShortageSaysWhatIsMissing(t *testing.T) {
	l := newLit(t, 4, 1024, nil)
	c := l.client(t, "sae-tokyo", l.tokyoDoor)
	k := l.talk(t, "sae-tokyo", l.tokyoDoor)
	st, err := c.Status(t.Context(), "sae-kochi")
	if err != nil || st.StoredKeys == 0 || st.StoredKeys > 100 {
		t.Fatalf("%d keys, %v", st.StoredKeys, err)
	}
	got, _ := k.ask(t, fmt.Sprintf("%s?number=%d", encPath, st.StoredKeys+5), 503)
	want := `{"message":"not enough key material","details":[{"missing_bits":"1280"}]}`
	if !bytes.HasSuffix(got, []byte(want)) || !bytes.Contains(got, []byte("Retry-After: 1\r\n")) {
		t.Errorf("got %q, want %s", got, want)
	}
	k.ask(t, fmt.Sprintf("%s?number=%d", encPath, st.StoredKeys), 200) // all are still there
}
