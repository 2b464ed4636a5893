package metrics_test

import (
	"context"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus/testutil/promlint"

	"github.com/quietline/quietline/cmd/internal/control"
	"github.com/quietline/quietline/cmd/internal/metrics"
)

func p[T any](v T) *T { return &v }

// daemons has a status of each daemon with every value set.
var daemons = []control.Status{
	{Daemon: "kme", ID: "kme-tokyo", Version: "v1", Simulated: true, Certificates: []control.Certificate{
		{File: "pki/kme-door.pem", Left: p(86400.0), Fault: "no route"}}, KME: &control.KME{
		Serving: true, KeysDrawn: 3, KeysFetched: 2, Refused: 1, Alarms: []string{"disk is old"},
		Calls: []control.Calls{{Call: "enc_keys", Code: 200, Count: 4, Seconds: 0.5}},
		Peers: []control.Peer{{KME: "kme-kochi", Up: true, RTT: p(0.02)}},
		Links: []control.Link{{ID: "tokyo-kochi", Up: true, Simulated: true, QBER: p(0.015),
			Stored: 80, Drawable: 40, Ingested: 800, Delivered: 160, Void: 8, Expired: 16,
			Burnt: 24, Tag: 32}},
	}},
	{Daemon: "line", ID: "a", Version: "v1", Line: &control.Line{Policy: "qkd-strict",
		Level: "QKD", Epoch: 7, Age: p(1.5), LastKey: p(1.5), Rekeys: 6, Stock: p(12),
		RekeyFailures: 2, KeyFailures: map[string]uint64{"empty": 1}, Alarms: 1,
		KeysDrawn: 4, KeysCollected: 3, Peer: true,
		Sent:  control.Traffic{Packets: 1, Bytes: 2, OuterBytes: 3},
		Drops: map[string]uint64{"blocked": 5}}},
	{Daemon: "sim", ID: "tokyo-kochi", Version: "v1", Simulated: true, Sim: &control.Sim{
		Role: "alice", Preset: "metro", FibreUp: true, Eve: 0.25, Up: true, QBER: p(0.02), Blocks: 9,
		SecretBits: 800, AuthBits: p(int64(1600)), AuthUsed: 80}},
}

func scrape(t *testing.T, s control.Status) string {
	t.Helper()
	w := httptest.NewRecorder()
	metrics.Handler(func() control.Status { return s }).
		ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
	if w.Code != http.StatusOK {
		t.Fatalf("%d: %s", w.Code, w.Body)
	}
	return w.Body.String()
}

func TestValues(t *testing.T) {
	want := [][]string{
		{
			`quietline_build_info{daemon="kme",id="kme-tokyo",version="v1"} 1`,
			`quietline_simulated 1`,
			`quietline_pki_certificate_left_seconds{file="pki/kme-door.pem"} 86400`,
			`quietline_pki_certificate_fault{file="pki/kme-door.pem"} 1`,
			`quietline_kms_serving 1`,
			`quietline_kms_peer_up{peer_kme="kme-kochi"} 1`,
			`quietline_kms_peer_rtt_seconds{peer_kme="kme-kochi"} 0.02`,
			`quietline_kms_link_up{link="tokyo-kochi"} 1`,
			`quietline_kms_link_simulated{link="tokyo-kochi"} 1`,
			`quietline_kms_link_qber_ratio{link="tokyo-kochi"} 0.015`,
			`quietline_kms_stored_bytes{link="tokyo-kochi"} 10`,
			`quietline_kms_drawable_bytes{link="tokyo-kochi"} 5`,
			`quietline_kms_key_bytes_total{fate="ingested",link="tokyo-kochi"} 100`,
			`quietline_kms_key_bytes_total{fate="tag",link="tokyo-kochi"} 4`,
			`quietline_kms_keys_total{role="drawn"} 3`,
			`quietline_kms_keys_total{role="fetched"} 2`,
			`quietline_kms_refused_calls_total 1`,
			`quietline_etsi014_requests_total{call="enc_keys",code="200"} 4`,
			`quietline_etsi014_request_seconds_total{call="enc_keys",code="200"} 0.5`,
			`quietline_kms_alarms 1`,
		}, {
			`quietline_simulated 0`,
			`quietline_tunnel_level{level="QKD",line="a"} 1`,
			`quietline_tunnel_level{level="BLOCKED",line="a"} 0`,
			`quietline_tunnel_policy_info{line="a",policy="qkd-strict"} 1`,
			`quietline_tunnel_epoch{line="a"} 7`,
			`quietline_tunnel_epoch_age_seconds{line="a"} 1.5`,
			`quietline_tunnel_stock_keys{line="a"} 12`,
			`quietline_tunnel_rekeys_total{line="a"} 6`,
			`quietline_tunnel_rekey_failures_total{line="a"} 2`,
			`quietline_tunnel_key_failures_total{line="a",reason="empty"} 1`,
			`quietline_tunnel_alarms_total{line="a"} 1`,
			`quietline_tunnel_keys_total{line="a",role="collected"} 3`,
			`quietline_tunnel_packets_total{dir="sent",line="a"} 1`,
			`quietline_tunnel_outer_bytes_total{dir="sent",line="a"} 3`,
			`quietline_tunnel_drops_total{line="a",reason="blocked"} 5`,
		}, {
			`quietline_simulated 1`,
			`quietline_simulator_eve_ratio{link="tokyo-kochi"} 0.25`,
			`quietline_simulator_fibre_up{link="tokyo-kochi"} 1`,
			`quietline_simulator_secret_bytes_total{link="tokyo-kochi"} 100`,
			`quietline_simulator_auth_left_bytes{link="tokyo-kochi"} 200`,
			`quietline_simulator_auth_used_bytes_total{link="tokyo-kochi"} 10`,
		},
	}
	for i, s := range daemons {
		text := scrape(t, s)
		for _, line := range want[i] {
			if !strings.Contains(text, line+"\n") {
				t.Errorf("%s: no %s in\n%s", s.Daemon, line, text)
			}
		}
	}
}

// TestUnknownIsAbsent: what is not known leaves a gap, not a zero.
func TestUnknownIsAbsent(t *testing.T) {
	text := scrape(t, control.Status{KME: &control.KME{Links: []control.Link{{ID: "a"}}}})
	if strings.Contains(text, "qber") {
		t.Errorf("a QBER that nobody knows:\n%s", text)
	}
}

var name = regexp.MustCompile(`^# TYPE (quietline_\S+) `)

// TestLint holds the names, units and help texts to the conventions of
// Prometheus, and ours to their rooms.
func TestLint(t *testing.T) {
	for _, s := range daemons {
		text := scrape(t, s)
		problems, err := promlint.New(strings.NewReader(text)).Lint()
		if err != nil {
			t.Fatal(err)
		}
		for _, problem := range problems {
			t.Errorf("%s: %s: %s", s.Daemon, problem.Metric, problem.Text)
		}
		for line := range strings.Lines(text) {
			m := name.FindStringSubmatch(line)
			if m == nil {
				continue
			}
			room := strings.SplitN(m[1], "_", 3)[1]
			if !strings.Contains(" build simulated pki kms etsi014 tunnel simulator ", " "+room+" ") {
				t.Errorf("%s names no room", m[1])
			}
			if strings.Contains(m[1], "bits") || strings.Contains(m[1], "percent") {
				t.Errorf("%s is not in base units", m[1])
			}
		}
	}
}

// TestListen scrapes over both kinds of address.
func TestListen(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "metrics.sock")
	for _, address := range []string{"127.0.0.1:0", "unix://" + socket} {
		s, err := metrics.Listen(address, func() control.Status { return daemons[0] }, nil)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- s.Run(ctx) }()
		client := http.Client{Transport: &http.Transport{
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				return new(net.Dialer).DialContext(ctx, s.Addr().Network(), s.Addr().String())
			},
		}}
		res, err := client.Get("http://metrics/metrics")
		if err != nil {
			t.Fatalf("scrape %s: %v", address, err)
		}
		body, err := io.ReadAll(res.Body)
		_ = res.Body.Close()
		if err != nil || !strings.Contains(string(body), "quietline_simulated 1\n") {
			t.Errorf("scrape %s: %v\n%s", address, err, body)
		}
		cancel()
		if err := <-done; err != nil {
			t.Errorf("run %s: %v", address, err)
		}
	}
}
