package main

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"github.com/quietline/quietline/tunnel/bench"
)

func TestBench(t *testing.T) { script(t, "bench") }

// What is missing is told with the way to get it, before anything is built.
func TestBenchNeeds(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	for want, args := range map[string][]string{
		"iperf3: apt-get install iperf3":           {"bench", "line"},
		"go install golang.zx2c4.com/wireguard@v0": {"bench", "line", "--only", "wireguard-go"},
	} {
		var out, errs bytes.Buffer
		code := run(args, &out, &errs)
		if code != exitFailure || out.Len() > 0 || !strings.Contains(errs.String(), want) {
			t.Errorf("exit %d: %s%s", code, out.String(), errs.String())
		}
	}
}

func TestBenchProgress(t *testing.T) {
	var b bytes.Buffer
	tell := benchProgress(&b)
	tell(0, "quietline", bench.Figures{bench.TCP1: 6.54321, bench.UDP64: 201234.5}, nil)
	tell(1, "openvpn", nil, errors.New("no answer"))
	const want = "round 1 quietline     6.54 Gbit/s, 201234 small packets/s\n" +
		"round 2 openvpn       no answer\n"
	if b.String() != want {
		t.Errorf("got %q, want %q", b.String(), want)
	}
}
