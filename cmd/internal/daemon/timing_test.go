package daemon

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"net/http"
	"slices"
	"testing"
	"time"

	"github.com/quietline/quietline/etsi014"
)

// asked is one way to be refused, or to be served, over and over.
type asked struct {
	name string
	code int
	next func() string // target of a GET
}

// talk is one connection of an SAE.
type talk struct {
	c *tls.Conn
	r *bufio.Reader
}

func (l *lit) talk(t *testing.T, sae, door string) *talk {
	t.Helper()
	cfg := l.certificates(t, sae).Client()
	c, err := tls.Dial("tcp", door, cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return &talk{c, bufio.NewReader(c)}
}

// ask returns the whole answer without its date, and how long it took.
func (k *talk) ask(t *testing.T, target string, code int) (answer []byte, took time.Duration) {
	t.Helper()
	start := time.Now()
	if _, err := fmt.Fprintf(k.c, "GET %s HTTP/1.1\r\nHost: kme\r\n\r\n", target); err != nil {
		t.Fatal(err)
	}
	resp, err := http.ReadResponse(k.r, nil)
	if err != nil {
		t.Fatal(err)
	}
	body, err := io.ReadAll(resp.Body)
	took = time.Since(start)
	if err != nil || resp.StatusCode != code {
		t.Fatalf("%s: %s %s %v, want %d", target, resp.Status, body, err, code)
	}
	var b bytes.Buffer
	resp.Header.Del("Date")
	fmt.Fprintln(&b, resp.Status)
	_ = resp.Header.Write(&b) // into memory: it cannot fail
	b.Write(body)
	return b.Bytes(), took
}

// welch is the t statistic of two samples of unequal variance (B. L. Welch,
// Biometrika 34, 1947), of the logarithms of the faster nine tenths: what the
// machine does meanwhile falls into the last.
func welch(a, b []time.Duration) float64 {
	part := func(s []time.Duration) (mean, variance, n float64) {
		s = slices.Sorted(slices.Values(s))
		s = s[:len(s)*9/10]
		for _, d := range s {
			mean += math.Log(float64(d))
		}
		n = float64(len(s))
		mean /= n
		for _, d := range s {
			variance += (math.Log(float64(d)) - mean) * (math.Log(float64(d)) - mean)
		}
		return mean, variance / (n - 1), n
	}
	ma, va, na := part(a)
	mb, vb, nb := part(b)
	return (ma - mb) / math.Sqrt(va/na+vb/nb)
}

// TestRefusalsAreAlike: refusals of one code differ in no byte and in no time
// that can be told apart, whatever the reason. What the code tells, by the
// standard, is told.
func TestRefusalsAreAlike(t *testing.T) {
	const each = 500
	// Six standard errors: chance alone comes so far once in a thousand million
	// runs, and a difference has to show three times.
	const most, tries = 6, 3
	l := newLit(t, 16, 16<<10, nil)
	mine := l.talk(t, "sae-kochi", l.kochiDoor)
	drawer := l.client(t, "sae-tokyo", l.tokyoDoor)
	draw := func(target etsi014.SAEID, n int) (ids []etsi014.KeyID) {
		keys, err := drawer.Keys(t.Context(), etsi014.KeyRequest{Targets: []etsi014.SAEID{target},
			Number: n})
		if err != nil {
			t.Fatal(err)
		}
		defer keys.Clear()
		for _, k := range keys.Keys {
			ids = append(ids, k.ID)
		}
		return ids
	}
	dec := func(initiator string, id func() etsi014.KeyID) func() string {
		return func() string {
			return fmt.Sprintf("/api/v1/keys/%s/dec_keys?key_ID=%v", initiator, id())
		}
	}
	rng := rand.New(rand.NewPCG(1, 4))
	unknown := func() (id etsi014.KeyID) {
		for i := range id {
			id[i] = byte(rng.Uint32())
		}
		return id
	}
	same := func(id etsi014.KeyID) func() etsi014.KeyID { return func() etsi014.KeyID { return id } }
	own := draw("sae-kochi", 2)
	spent, waiting, foreign := own[0], own[1], draw("other-kochi", 1)[0]
	mine.ask(t, dec("sae-tokyo", same(spent))(), 200)
	ways := []asked{
		{"no such key", 400, dec("sae-tokyo", unknown)},
		{"a key that was collected", 400, dec("sae-tokyo", same(spent))},
		{"no such key, and no such SAE", 400, dec("sae-none99", unknown)},
		{"a key for another SAE", 401, dec("sae-tokyo", same(foreign))},
		{"a key of another SAE", 401, dec("sae-kyoto", same(waiting))},
		{"no SAE of ours, a key for another SAE", 401, dec("sae-none9", same(foreign))},
	}
	for i, a := range ways {
		for _, b := range ways[:i] {
			x, _ := mine.ask(t, a.next(), a.code)
			if y, _ := mine.ask(t, b.next(), b.code); a.code == b.code && !bytes.Equal(x, y) {
				t.Errorf("%s: %q; %s: %q", a.name, x, b.name, y)
			}
		}
	}
	for try := 1; ; try++ {
		took := measureAlike(t, mine, ways, each, rng)
		var told []string
		for i, a := range ways {
			for j, b := range ways[:i] {
				if w := welch(took[i], took[j]); a.code == b.code && math.Abs(w) > most {
					told = append(told, fmt.Sprintf("%s and %s: %.1f standard errors", a.name, b.name, w))
				}
			}
		}
		if len(told) == 0 {
			break
		}
		t.Logf("try %d: %q", try, told)
		if try == tries {
			t.Errorf("refusals of one code can be told apart by their time: %q", told)
			break
		}
	}
	// The positive control: a key that is delivered takes a commit more.
	keys := draw("sae-kochi", 60)
	good := asked{"a key", 200, dec("sae-tokyo", func() (id etsi014.KeyID) {
		id, keys = keys[0], keys[1:]
		return id
	})}
	took := measureAlike(t, mine, []asked{ways[0], good}, len(keys), rng)
	if w := welch(took[1], took[0]); w < most {
		t.Errorf("a delivery cannot be told from a refusal: %.1f standard errors: the test is blind", w)
	}
}

// measureAlike asks in every way so many times, in an order of chance.
func measureAlike(t *testing.T, k *talk, ways []asked, each int, rng *rand.Rand,
) [][]time.Duration {
	t.Helper()
	took := make([][]time.Duration, len(ways))
	for range each {
		for _, i := range rng.Perm(len(ways)) {
			target := ways[i].next()
			_, d := k.ask(t, target, ways[i].code)
			took[i] = append(took[i], d)
		}
	}
	return took
}

// TestWelch: the statistic itself.
func TestWelch(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 5))
	sample := func(by time.Duration) (s []time.Duration) {
		for range 500 {
			s = append(s, 100*time.Microsecond+by+time.Duration(rng.IntN(50_000)))
		}
		return s
	}
	if w := welch(sample(0), sample(0)); math.Abs(w) > 4 {
		t.Errorf("two samples of one kind: %.1f", w)
	}
	if w := welch(sample(10*time.Microsecond), sample(0)); w < 6 {
		t.Errorf("10 us more: %.1f", w)
	}
}
