package daemon

import (
	"bufio"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/quietline/quietline/etsi014/identity"
	"github.com/quietline/quietline/secret"
	"github.com/quietline/quietline/secret/memscan"
)

// drawVeil hides keys on their way from the process that draws to the one that
// is searched, so that the telling itself makes no copy.
const drawVeil = 0x5a

// drawAndWait is the SAEs of the memory test, in a process of their own: it
// draws at one door, fetches at the other, tells the keys veiled, and keeps
// half of the connections until its input ends.
func drawAndWait() int {
	if err := draw(strings.Split(os.Getenv("QUIETLINE_TEST_DRAW"), "|")); err != nil {
		fmt.Println(err)
		return 1
	}
	_, _ = io.Copy(io.Discard, os.Stdin)
	return 0
}

// way is a way to ask for keys.
type way struct {
	method string
	number int
	size   int  // bits
	also   bool // for a second SAE too
}

// ways are one and many, by GET and by POST, short keys and such of several
// slots, over more than one segment, for one SAE and for two.
var ways = []way{{"GET", 1, 256, false}, {"POST", 1, 256, false}, {"POST", 8, 256, false},
	{"POST", 128, 256, false}, {"GET", 3, 128, false}, {"POST", 4, 1024, false},
	{"POST", 2, 256, true}, {"POST", 2, 520, true}}

// draw asks for keys in every way, over connections that it closes and others
// that it keeps.
func draw(args []string) error {
	dir, tokyo, kochi := args[0], args[1], args[2]
	for _, w := range ways {
		for _, fate := range []string{"closed", "kept"} {
			a, err := speaker(dir, "sae-tokyo")
			if err != nil {
				return err
			}
			b, err := speaker(dir, "sae-kochi")
			if err != nil {
				return err
			}
			targets := []*http.Client{b}
			if w.also {
				c, err := speaker(dir, "other-kochi")
				if err != nil {
					return err
				}
				targets = append(targets, c)
			}
			if err := pass(a, targets, tokyo, kochi, w, fate); err != nil {
				return err
			}
			if fate == "closed" {
				for _, c := range append(targets, a) {
					c.CloseIdleConnections()
				}
			}
		}
	}
	fmt.Println("done")
	return nil
}

// speaker is an SAE that speaks plain HTTPS.
func speaker(dir, sae string) (*http.Client, error) {
	live, err := identity.Open(identity.Config{CA: filepath.Join(dir, "sae-ca"),
		Pairs: []identity.Pair{{Cert: filepath.Join(dir, sae+".crt"),
			Key: filepath.Join(dir, sae+".key")}}})
	if err != nil {
		return nil, err
	}
	return &http.Client{Transport: &http.Transport{TLSClientConfig: live.Client()}}, nil
}

// container is table 10, as far as this test reads it.
type container struct {
	Keys []struct {
		ID  string `json:"key_ID"`
		Key []byte `json:"key"`
	} `json:"keys"`
}

// pass draws keys at one door, fetches them at the other and tells them.
func pass(a *http.Client, targets []*http.Client, tokyo, kochi string, w way, fate string) error {
	var drawn container
	query := fmt.Sprintf("?number=%d&size=%d", w.number, w.size)
	body := fmt.Sprintf(`{"number":%d,"size":%d}`, w.number, w.size)
	if w.also {
		body = strings.Replace(body, "{", `{"additional_slave_SAE_IDs":["other-kochi"],`, 1)
	}
	if err := ask(a, w.method, "https://"+tokyo+encPath, query, body, &drawn); err != nil {
		return err
	}
	var ids []string
	for _, k := range drawn.Keys {
		ids = append(ids, `{"key_ID":"`+k.ID+`"}`)
	}
	query, body = "?key_ID="+drawn.Keys[0].ID, `{"key_IDs":[`+strings.Join(ids, ",")+`]}`
	method := w.method
	if len(ids) > 1 {
		method = "POST" // a GET names one key
	}
	for _, b := range targets {
		var got container
		if err := ask(b, method, "https://"+kochi+decPath, query, body, &got); err != nil {
			return err
		}
		if !reflect.DeepEqual(drawn, got) {
			return errors.New("the two sites hold different keys")
		}
	}
	for _, k := range drawn.Keys {
		for i := range k.Key {
			k.Key[i] ^= drawVeil
		}
		fmt.Println(fate, hex.EncodeToString(k.Key))
	}
	return nil
}

// ask sends a request with the query of a GET or the body of a POST.
func ask(c *http.Client, method, url, query, body string, to *container) error {
	if method == "GET" {
		url, body = url+query, ""
	}
	req, err := http.NewRequest(method, url, strings.NewReader(body))
	if err != nil {
		return err
	}
	resp, err := c.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body) // to the end, so that the connection is kept
	if err != nil || resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s %s: %s %s %w", method, url, resp.Status, text, err)
	}
	return json.Unmarshal(text, to)
}

// needle unveils a key byte by byte into pages that are given back.
func needle(t *testing.T, veiled string) memscan.Needle {
	t.Helper()
	b, err := hex.DecodeString(veiled)
	if err != nil {
		t.Fatal(err)
	}
	key, err := secret.NewLocked(len(b))
	if err != nil {
		t.Fatal(err)
	}
	defer key.Clear()
	for i := range b {
		key.Expose()[i] = b[i] ^ drawVeil
	}
	return memscan.Hide(key.Expose())
}

// alive is how many base64 copies of a key may be there while the connection
// lives that carried it; none may be after. The door sends keys past net/http's
// buffers, so that there is none: one is what the goal allows.
const alive = 1

// TestDeliveredKeysLeaveMemory searches the process of two key managers for
// keys that both have delivered over mutual TLS: none is left raw, and none in
// base64.
func TestDeliveredKeysLeaveMemory(t *testing.T) {
	if raced {
		t.Skip("under the race detector sync.Pool drops buffers at random, crypto/tls's among them")
	}
	// In a process of its own: other tests draw the same lamp's keys, and their
	// SAEs keep them in this one.
	if os.Getenv("QUIETLINE_TEST_SEARCH") == "" {
		again := exec.Command("/proc/self/exe", "-test.run=^TestDeliveredKeysLeaveMemory$", "-test.v")
		again.Env = append(os.Environ(), "QUIETLINE_TEST_SEARCH=1")
		out, err := again.CombinedOutput()
		for line := range strings.Lines(string(out)) {
			if err != nil || strings.Contains(line, " copies") {
				t.Log(strings.TrimSpace(line))
			}
		}
		if err != nil || !strings.Contains(string(out), "--- PASS") {
			t.Errorf("search: %v", err)
		}
		return
	}
	l := newLit(t, 16, 4096, nil)
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), "QUIETLINE_TEST_DRAW="+
		strings.Join([]string{filepath.Dir(l.tokyo.State), l.tokyoDoor, l.kochiDoor}, "|"))
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var needles []memscan.Needle
	var most []int
	lines := bufio.NewScanner(out)
	for lines.Scan() && lines.Text() != "done" {
		word, veiled, _ := strings.Cut(lines.Text(), " ")
		if word != "kept" && word != "closed" {
			t.Fatalf("drawing: %s", lines.Text())
		}
		needles = append(needles, needle(t, veiled))
		most = append(most, map[string]int{"kept": alive, "closed": 0}[word])
	}
	want := 0
	for _, w := range ways {
		want += 2 * w.number
	}
	if len(needles) != want {
		t.Fatalf("%d keys were drawn, want %d", len(needles), want)
	}
	t.Logf("while the connections live: %s", copies(t, needles, most))
	if err := in.Close(); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	t.Logf("after: %s", copies(t, needles, make([]int, len(needles))))
}

// copies counts what is left of keys: no raw copy, and base64 ones up to most
// for each.
func copies(t *testing.T, needles []memscan.Needle, most []int) string {
	t.Helper()
	report, err := memscan.Scan(needles...)
	if err != nil {
		t.Fatal(err)
	}
	for i, c := range report.Counts {
		if c.Raw > 0 || c.Base64 > most[i] {
			t.Errorf("key %d: %d raw and %d base64 copies, at most 0 and %d are right: %s", i, c.Raw,
				c.Base64, most[i], c.Where)
		}
	}
	raw, text := report.Total()
	return fmt.Sprintf("%d raw and %d base64 copies of %d keys in %d bytes", raw, text, len(needles),
		report.Scanned)
}
