package daemon

import (
	"bufio"
	"context"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/etsi014/identity"
	"github.com/quietline/quietline/secret"
	"github.com/quietline/quietline/secret/memscan"
)

// drawVeil hides keys on their way from the process that draws to the one that
// is searched, so that the telling itself makes no copy.
const drawVeil = 0x5a

// drawAndWait is the SAEs of the memory test, in a process of their own: it
// draws at one door, fetches at the other, tells the keys veiled, and keeps
// both connections until its input ends.
func drawAndWait() int {
	if err := draw(strings.Split(os.Getenv("QUIETLINE_TEST_DRAW"), "|")); err != nil {
		fmt.Println(err)
		return 1
	}
	_, _ = io.Copy(io.Discard, os.Stdin)
	return 0
}

func draw(args []string) error {
	dir, tokyo, kochi := args[0], args[1], args[2]
	client := func(sae, door string) (*etsi014.Client, error) {
		live, err := identity.Open(identity.Config{CA: filepath.Join(dir, "sae-ca"),
			Pairs: []identity.Pair{{Cert: filepath.Join(dir, sae+".crt"),
				Key: filepath.Join(dir, sae+".key")}}})
		if err != nil {
			return nil, err
		}
		return etsi014.NewClient(etsi014.ClientConfig{URLs: []string{"https://" + door},
			TLS: live.Client})
	}
	a, err := client("sae-tokyo", tokyo)
	if err != nil {
		return err
	}
	b, err := client("sae-kochi", kochi)
	if err != nil {
		return err
	}
	ctx := context.Background()
	drawn, err := a.Keys(ctx, etsi014.KeyRequest{Targets: []etsi014.SAEID{"sae-kochi"}, Number: 8,
		SizeBits: 256})
	if err != nil {
		return err
	}
	req := etsi014.IDRequest{Initiator: "sae-tokyo"}
	for _, k := range drawn.Keys {
		req.IDs = append(req.IDs, k.ID)
	}
	if _, err := b.KeysByID(ctx, req); err != nil {
		return err
	}
	for _, k := range drawn.Keys {
		veiled := append([]byte(nil), k.Bits.Expose()...)
		for i := range veiled {
			veiled[i] ^= drawVeil
		}
		fmt.Println("key", hex.EncodeToString(veiled))
	}
	fmt.Println("done")
	return nil
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

// kept is how many base64 copies of a key net/http may hold in this test, two
// for each of the two answers that carried it: it copies an answer into the
// response's buffer (2 KiB, pooled) and from there into the connection's (4
// KiB). It wipes neither, and keeps both in its pools for the next response
// and the next connection, so that they outlive this one. A handler cannot
// reach them. An answer too long for a buffer passes it by. crypto/tls seals in
// place and adds none.
const kept = 4

// TestDeliveredKeysLeaveMemory searches the process of two key managers for
// keys that both have delivered over mutual TLS: none is left raw, and none in
// base64 but for what net/http keeps.
func TestDeliveredKeysLeaveMemory(t *testing.T) {
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
	lines := bufio.NewScanner(out)
	for lines.Scan() && lines.Text() != "done" {
		word, veiled, _ := strings.Cut(lines.Text(), " ")
		if word != "key" {
			t.Fatalf("drawing: %s", lines.Text())
		}
		needles = append(needles, needle(t, veiled))
	}
	if len(needles) != 8 {
		t.Fatalf("%d keys were drawn, want 8", len(needles))
	}
	t.Logf("while the connections live: %s", copies(t, needles, kept))
	if err := in.Close(); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	t.Logf("after: %s", copies(t, needles, kept))
}

// copies counts what is left of keys: no raw copy, and base64 ones up to most
// for each.
func copies(t *testing.T, needles []memscan.Needle, most int) string {
	t.Helper()
	report, err := memscan.Scan(needles...)
	if err != nil {
		t.Fatal(err)
	}
	for i, c := range report.Counts {
		if c.Raw > 0 || c.Base64 > most {
			t.Errorf("key %d: %d raw and %d base64 copies, at most 0 and %d are right: %s", i, c.Raw,
				c.Base64, most, c.Where)
		}
	}
	raw, text := report.Total()
	return fmt.Sprintf("%d raw and %d base64 copies of %d keys in %d bytes", raw, text, len(needles),
		report.Scanned)
}
