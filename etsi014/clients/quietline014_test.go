package clients

import (
	"bufio"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/quietline/quietline/etsi014/etsitest"
)

type container struct {
	Keys []struct {
		ID  string `json:"key_ID"`
		Key []byte `json:"key"`
	} `json:"keys"`
}

// keys reads what enc or dec printed with --json.
func keys(t *testing.T, r result) (ids []string, bits [][]byte) {
	t.Helper()
	if r.code != 0 || r.stderr != "" {
		t.Fatalf("exit %d: %s", r.code, r.stderr)
	}
	var c container
	if err := json.Unmarshal([]byte(r.out), &c); err != nil {
		t.Fatal(err)
	}
	for _, k := range c.Keys {
		ids, bits = append(ids, k.ID), append(bits, k.Key)
	}
	return ids, bits
}

// idFlags is --id for each key_ID.
func idFlags(ids []string) (flags []string) {
	for _, id := range ids {
		flags = append(flags, "--id", id)
	}
	return flags
}

func TestDrawAndCollect(t *testing.T) {
	each(t, func(t *testing.T, l language) {
		w := newWorld(t)
		r := w.run(t, l, tokyo, "status", "--url", w.url, "--peer", kochi, "--json")
		var status map[string]any
		if err := json.Unmarshal([]byte(r.out), &status); err != nil {
			t.Fatalf("%v: %s", err, r.stderr)
		}
		if len(status) != 11 || status["stored_key_count"] != 100.0 || status["slave_SAE_ID"] != kochi {
			t.Errorf("status %v", status)
		}
		ids, drawn := keys(t, w.run(t, l, tokyo, "enc", "--url", w.url, "--peer", kochi,
			"--number", "3", "--size", "4096", "--json"))
		if len(ids) != 3 || len(drawn[0]) != 512 {
			t.Fatalf("%d keys, the first of %d bytes", len(ids), len(drawn[0]))
		}
		slices.Reverse(ids)
		slices.Reverse(drawn)
		again := idFlags(ids)
		again[1] = strings.ToUpper(again[1])
		got, collected := keys(t, w.run(t, l, kochi, "dec", append(again, "--url", w.url,
			"--peer", tokyo, "--json")...))
		if !slices.Equal(got, ids) {
			t.Error("collected in another order than asked")
		}
		for i := range drawn {
			if string(drawn[i]) != string(collected[i]) {
				t.Errorf("key %d differs", i)
			}
		}
	})
}

func TestTextAndMulticast(t *testing.T) {
	each(t, func(t *testing.T, l language) {
		w := newWorld(t)
		// All lengths of padding, in the text form.
		for _, bits := range []string{"64", "72", "80"} {
			r := w.run(t, l, tokyo, "enc", "--url", w.url, "--peer", kochi, "--also", osaka,
				"--size", bits)
			id, text, _ := strings.Cut(strings.TrimSpace(r.out), " ")
			bytes, err := base64.StdEncoding.Strict().DecodeString(text)
			if err != nil || fmt.Sprint(8*len(bytes)) != bits || len(id) != 36 {
				t.Fatalf("%d bytes for %s bits: %v %s", len(bytes), bits, err, r.stderr)
			}
			_, same := keys(t, w.run(t, l, kochi, "dec", "--url", w.url, "--peer", tokyo,
				"--id", id, "--json"))
			// A fault of the client's decoder would show at both of its ends.
			if string(same[0]) != string(bytes) || string(w.collect(t, osaka, tokyo, id)) != string(bytes) {
				t.Errorf("the three have different keys of %s bits", bits)
			}
		}
	})
}

func TestRefusals(t *testing.T) {
	each(t, func(t *testing.T, l language) {
		w := newWorld(t)
		ids, _ := keys(t, w.run(t, l, tokyo, "enc", "--url", w.url, "--peer", kochi, "--json"))
		unknown := "00000000-0000-4000-8000-000000000000"
		for _, c := range []struct {
			name, sae string
			args      []string
			want      []string
		}{
			{"unknown ID", kochi, []string{"dec", "--peer", tokyo, "--id", unknown},
				[]string{"400: one or more keys specified are not found on KME"}},
			{"one of two unknown", kochi, append([]string{"dec", "--peer", tokyo, "--id", unknown},
				idFlags(ids)...), []string{"400: one or more keys"}},
			{"another SAE's", osaka, append([]string{"dec", "--peer", tokyo}, idFlags(ids)...),
				[]string{"401: caller is not entitled"}},
			{"size", tokyo, []string{"enc", "--peer", kochi, "--size", "127"},
				[]string{"400: size shall be a multiple of 8"}},
			{"not that many", tokyo, []string{"enc", "--peer", kochi, "--number", "101"},
				[]string{"503: not enough key material", "hint: come again in 7 s"}},
			{"no UUID", kochi, []string{"dec", "--peer", tokyo, "--id", "x"}, []string{"must be UUIDs"}},
		} {
			r := w.run(t, l, c.sae, c.args[0], append(c.args[1:], "--url", w.url)...)
			if r.code != 1 || r.out != "" {
				t.Errorf("%s: exit %d, printed %d bytes", c.name, r.code, len(r.out))
			}
			for _, want := range c.want {
				if !strings.Contains(r.stderr, want) {
					t.Errorf("%s: %q lacks %q", c.name, r.stderr, want)
				}
			}
		}
		// None of it took the key away.
		_, got := keys(t, w.run(t, l, kochi, "dec", append(idFlags(ids), "--url", w.url,
			"--peer", tokyo, "--json")...))
		if len(got) != 1 || w.kme.Left() != 99 {
			t.Errorf("%d keys collected, %d left", len(got), w.kme.Left())
		}
	})
}

// TestLostAnswerIsNotRepeated: after a request left, nobody else is asked.
func TestLostAnswerIsNotRepeated(t *testing.T) {
	each(t, func(t *testing.T, l language) {
		w := newWorld(t)
		for name, answer := range map[string]string{
			"dies before answering": "",
			"dies in the header":    "HTTP/1.1 200 OK\r\nContent-Le",
			"dies in the body":      "HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{\"keys\":[",
			"dies in a chunk":       "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\n{",
			"answers too much":      "HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n{",
		} {
			url, requests := w.script(t, answer)
			verbs := []string{"enc"}
			if answer == "" {
				verbs = append(verbs, "dec")
			}
			for _, verb := range verbs {
				requests.Store(0)
				args := []string{"--url", url, "--url", w.url, "--peer", kochi}
				if verb == "dec" {
					args = append(args, "--id", "00000000-0000-4000-8000-000000000000")
				}
				r := w.run(t, l, tokyo, verb, args...)
				if r.code != 1 || !strings.Contains(r.stderr, "answer was lost") ||
					!strings.Contains(r.stderr, "hint: the request had left") {
					t.Errorf("%s, %s: exit %d, %q", name, verb, r.code, r.stderr)
				}
				if n := requests.Load(); n != 1 {
					t.Errorf("%s, %s: asked %d times", name, verb, n)
				}
			}
		}
		if w.conns.Load() != 0 || w.kme.Left() != 100 {
			t.Errorf("the second KME was asked: %d connections, %d keys left", w.conns.Load(), w.kme.Left())
		}
		// Status burns nothing and goes on to the second address.
		url, _ := w.script(t, "")
		r := w.run(t, l, tokyo, "status", "--url", url, "--url", w.url, "--peer", kochi)
		if r.code != 0 || !strings.Contains(r.out, "stored_key_count: 100") {
			t.Errorf("status: exit %d, %q", r.code, r.stderr)
		}
	})
}

// TestFailOver: where no connection comes up, the second address serves.
func TestFailOver(t *testing.T) {
	each(t, func(t *testing.T, l language) {
		w := newWorld(t)
		closed := listen(t)
		_ = closed.Close()
		hangUp, _ := serve(t, nil, func(net.Conn) {})
		notTLS, _ := serve(t, nil, func(c net.Conn) { _, _ = io.WriteString(c, "220 hello\r\n") })
		cert := etsitest.NewCA(t, "another CA").Issue(t, etsitest.Leaf{
			CN: "kme", Server: true, IPs: []net.IP{net.IPv4(127, 0, 0, 1)},
		})
		shake := func(c net.Conn) { _, _ = c.Read(make([]byte, 1)) }
		foreign, _ := serve(t, &cert, shake)
		other := w.ca.Issue(t, etsitest.Leaf{CN: "kme", Server: true, DNS: []string{"kme.example"}})
		misnamed, _ := serve(t, &other, shake)
		left := 100
		for name, url := range map[string]string{
			"nobody listens": "https://" + closed.Addr().String(), "hangs up": hangUp,
			"no TLS": notTLS, "another CA": foreign, "another name": misnamed,
		} {
			ids, _ := keys(t, w.run(t, l, tokyo, "enc", "--url", url, "--url", w.url,
				"--peer", kochi, "--json"))
			left--
			if len(ids) != 1 || w.kme.Left() != left {
				t.Errorf("%s: %d keys, %d left, want %d", name, len(ids), w.kme.Left(), left)
			}
			r := w.run(t, l, tokyo, "enc", "--url", url, "--peer", kochi)
			if r.code != 1 || !strings.Contains(r.stderr, "reach KME") ||
				strings.Contains(r.stderr, "had left") {
				t.Errorf("%s alone: exit %d, %q", name, r.code, r.stderr)
			}
		}
	})
}

func TestBadAnswers(t *testing.T) {
	const id = "11111111-1111-4111-8111-111111111111"
	good := `{"keys":[{"key_ID":"` + id + `","key":"AAECAwQFBgc="}]}`
	each(t, func(t *testing.T, l language) {
		w := newWorld(t)
		ask := func(body string) result {
			url, _ := w.script(t, fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s",
				len(body), body))
			return w.run(t, l, tokyo, "enc", "--url", url, "--peer", kochi, "--size", "64", "--json")
		}
		for name, body := range map[string]string{
			"not JSON": "<html>", "null": "null", "no keys": "{}",
			"no list":      `{"keys":7}`,
			"short list":   `{"keys":[]}`,
			"too many":     strings.Replace(good, "]", `,{"key_ID":"`+id+`","key":"AAECAwQFBgc="}]`, 1),
			"other size":   strings.Replace(good, "AAEC", "AAECAAEC", 1),
			"base64url":    strings.Replace(good, "AAEC", "A-E_", 1),
			"no padding":   strings.Replace(good, "=", "", 1),
			"much padding": strings.Replace(good, "gc=", "===", 1),
			"key a number": strings.Replace(good, `"AAECAwQFBgc="`, "0", 1),
			"key empty":    strings.Replace(good, "AAECAwQFBgc=", "", 1),
			"no UUID":      strings.Replace(good, "1111", "zzzz", 1),
			"cut":          good[:len(good)-1],
		} {
			r := ask(body)
			if r.code != 1 || !strings.Contains(r.stderr, "answer is not valid") || r.out != "" {
				t.Errorf("%s: exit %d, %q", name, r.code, r.stderr)
			}
			if strings.Contains(r.stderr, "AwQF") || strings.Contains(r.stderr, "Traceback") {
				t.Errorf("%s: %q", name, r.stderr)
			}
		}
		// Escapes, blanks and extensions are allowed, also one named key.
		odd := `{ "key_container_extension": {"key": "AAAA"}, "keys" : [ {"key" :` + "\n" +
			`"\/\/79\/Pv6+fg=", ` +
			`"key_extension":{"x":"\"key\":\"y\""}, "key_ID":"` + strings.ToUpper(id) + `"} ] }`
		ids, bits := keys(t, ask(odd))
		want := []byte{0xff, 0xfe, 0xfd, 0xfc, 0xfb, 0xfa, 0xf9, 0xf8}
		if diff := cmp.Diff([][]byte{want}, bits); diff != "" || ids[0] != id {
			t.Errorf("%v %s", ids, diff)
		}
		// What a proxy or another KME answers.
		for want, answer := range map[string]string{
			"502: Bad Gateway":  "HTTP/1.1 502 Bad Gateway\r\nContent-Length: 3\r\n\r\n<p>",
			"401: Unauthorized": "HTTP/1.1 401 Unauthorized\r\nConnection: close\r\n\r\n",
			"503: no": "HTTP/1.1 503 x\r\nTransfer-Encoding: chunked\r\n\r\n" +
				"10\r\n{\"message\":\"no\"}\r\n0\r\n\r\n",
			"302: Found": "HTTP/1.1 302 Found\r\nLocation: " + w.url +
				"/api/v1/keys/x\r\nContent-Length: 0\r\n\r\n",
		} {
			url, _ := w.script(t, answer)
			r := w.run(t, l, tokyo, "enc", "--url", url, "--peer", kochi)
			if r.code != 1 || !strings.Contains(r.stderr, want) {
				t.Errorf("exit %d, %q, want %q", r.code, r.stderr, want)
			}
		}
	})
}

func TestTimeout(t *testing.T) {
	each(t, func(t *testing.T, l language) {
		w := newWorld(t)
		cert, release := w.door(t), make(chan struct{})
		defer close(release)
		silent := func(first string) string {
			url, _ := serve(t, &cert, func(c net.Conn) {
				_, _ = io.WriteString(c, first)
				<-release
			})
			return url
		}
		for name, first := range map[string]string{
			"no answer": "", "half an answer": "HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{",
		} {
			r := w.run(t, l, tokyo, "enc", "--url", silent(first), "--url", w.url, "--peer", kochi,
				"--timeout", "2")
			if r.code != 1 || !strings.Contains(r.stderr, "no answer in ") {
				t.Errorf("%s: exit %d, %q", name, r.code, r.stderr)
			}
		}
		if w.kme.Left() != 100 {
			t.Error("a second KME was asked")
		}
	})
}

func TestWrongUse(t *testing.T) {
	each(t, func(t *testing.T, l language) {
		w := newWorld(t)
		for _, args := range [][]string{
			{}, {"draw"}, {"enc"}, {"enc", "--url", w.url}, {"enc", "--number", "many"},
			append([]string{"dec", "--url", w.url, "--peer", tokyo}, w.flags[kochi]...),
		} {
			if r := start(t, l, append([]string{l.file}, args...)); r.code != 2 || r.out != "" {
				t.Errorf("%v: exit %d, %q", args, r.code, r.stderr)
			}
		}
		flags := append([]string{l.file, "enc", "--peer", kochi, "--url"}, "http://127.0.0.1:1")
		if r := start(t, l, append(flags, w.flags[tokyo]...)); r.code != 1 ||
			!strings.Contains(r.stderr, "is no base URL like https://host:port") {
			t.Errorf("http: exit %d, %q", r.code, r.stderr)
		}
	})
}

// TestAsModule runs a program that keeps clients open: connections are kept,
// closed ones are not used, keys hide themselves and can be wiped.
func TestAsModule(t *testing.T) {
	each(t, func(t *testing.T, l language) {
		w := newWorld(t)
		setup, err := json.Marshal(map[string]any{
			"module": l.file, "url": w.url, "tokyo": w.flags[tokyo], "kochi": w.flags[kochi],
			"tokyoID": tokyo, "kochiID": kochi,
		})
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.CommandContext(t.Context(), l.interpreter, l.driver, string(setup))
		cmd.Env = append(os.Environ(), "PYTHONDONTWRITEBYTECODE=1")
		cmd.Stderr = os.Stderr
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
		steps := bufio.NewScanner(out)
		next := func() string {
			t.Helper()
			if !steps.Scan() {
				_ = cmd.Wait()
				t.Fatalf("the driver ended early: %v", steps.Err())
			}
			return steps.Text()
		}
		key, err := hex.DecodeString(next()) // what was drawn, for the next step alone
		if err != nil || len(key) != 32 {
			t.Fatalf("%d bytes, %v", len(key), err)
		}
		printed, decimal := next(), strings.Trim(fmt.Sprint(key[:8]), "[]")
		for _, form := range []string{
			string(key), hex.EncodeToString(key), base64.StdEncoding.EncodeToString(key),
			decimal, strings.ReplaceAll(decimal, " ", ", "), strings.ReplaceAll(decimal, " ", ","),
			`\x`, "Buffer", // how Python and Node show bytes
		} {
			if strings.Contains(printed, form) {
				t.Errorf("printed forms show the key: %s", printed)
			}
		}
		if got := next(); got != "wiped" {
			t.Errorf("after clear: %s", got)
		}
		if n := w.conns.Load(); n != 2 {
			t.Errorf("%d connections for two clients", n)
		}
		left := w.kme.Left()
		w.server.SetKeepAlivesEnabled(false) // closes what is idle
		_, _ = io.WriteString(in, "go on\n")
		if got := next(); got != "drawn" {
			t.Errorf("after the KME closed idle connections: %s", got)
		}
		if got := w.kme.Left(); got != left-1 {
			t.Errorf("%d keys left, want %d", got, left-1)
		}
		if got := next(); got != "many threads: 20 keys, all different" {
			t.Error(got)
		}
		if err := cmd.Wait(); err != nil {
			t.Error(err)
		}
	})
}
