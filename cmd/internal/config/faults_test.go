package config_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/quietline/quietline/cmd/internal/config"
)

// TestFaults changes one thing of the example at a time. Each row is a text
// of the file, what stands there instead, and what the fault must say; the
// line is found by the change itself.
func TestFaults(t *testing.T) {
	data, err := os.ReadFile(filepath.Join(examples, "site-tokyo.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	tests := []struct{ name, old, new, key, text string }{
		{"version", "version: 1", "version: 2", "version", "2 is not a version"},
		{"number", "version: 1", "version: one", "version", `"one" is not a whole number`},
		{"quoted number", "version: 1", `version: "1"`, "version", "not a whole number"},
		{"unknown key", "site: tokyo", "sight: tokyo", "sight",
			"unknown key; known here: version, site"},
		{"name", "site: tokyo", "site: ../tokyo", "site", "is not a name"},
		{"empty", "site: tokyo", "site:", "site", "is empty; expected a text"},
		{"bool", "lab: true", "lab: 1", "lab", `"1" is not true or false`},
		{"lab", "lab: true", "lab: false", "links[0].simulator", "set lab: true"},
		{"group", "lab: true", "lab: {a: b}", "lab", "is a group of keys; expected true or false"},
		{"listen", "listen: 10.1.0.1:8443", "listen: 10.1.0.1", "kme.listen", "is not host:port"},
		{"port", "listen: 10.1.0.1:8443", "listen: 10.1.0.1:84433", "kme.listen", "has no port number"},
		{"same door", "peer_listen: 192.0.2.1:8444", "peer_listen: 10.1.0.1:8443",
			"kme.peer_listen", "same address as listen"},
		{"same root", "peer_ca: pki/kme-ca.crt", "peer_ca: pki/sae-ca.crt", "kme.peer_ca", "use two"},
		{"same root for a peer", "ca: pki/peers/kochi.crt", "ca: pki/sae-ca.crt", "peers[0].ca", "use two"},
		{"metrics", "127.0.0.1:9461", "0.0.0.0:9461", "kme.metrics", "is not loopback"},
		{"metrics name", "127.0.0.1:9461", "example.org:9461", "kme.metrics", "is not loopback"},
		{"long socket", "control: /run/quietline/kme.sock", "control: /" + strings.Repeat("x", 107),
			"kme.control", "at most 107"},
		{"self peer", "- kme: kme-kochi", "- kme: kme-tokyo", "peers[0].kme", "own key manager"},
		{"driver", "driver: unix:///run", "driver: https://run", "links[0].driver", `scheme "https"`},
		{"driver form", "driver: unix:///run", "driver: /run", "links[0].driver", "not a driver URL"},
		{"role", "role: alice", "role: eve", "links[0].simulator.role", "expected alice or bob"},
		{"preset", "preset: metro ", "preset: mars ", "links[0].simulator.preset", "known are "},
		{"eve", "eve: 0 ", "eve: 1.5 ", "links[0].simulator.eve", "expected 0 to 1"},
		{"eve nan", "eve: 0 ", "eve: NaN ", "links[0].simulator.eve", "expected 0 to 1"},
		{"fibre", "listen: unix:///run/quietline/fibre.sock", "{}", "links[0].simulator.fibre",
			"exactly one"},
		{"sae", "- id: line-tokyo", `- id: "a\tb"`, "saes[0].id", "is not an SAE ID"},
		{"sae kme", "kme: kme-tokyo\n", "kme: kme-osaka\n", "saes[0].kme", "neither kme.id nor"},
		{"identity", "uri: urn:quietline:sae:line-tokyo", "{}", "saes[0].identity", "exactly one"},
		{"pin", "uri: urn:quietline:sae:line-tokyo", "pin: abc", "saes[0].identity.pin", "not a SHA-256"},
		{"two root keys", "root_key: secrets/root.key", "root_credential: root\n  root_key: x",
			"kme.root_credential", "expected one of the two"},
		{"root credential", "root_key: secrets/root.key", "root_credential: ../root",
			"kme.root_credential", "is not a name"},
		{"half a pair", "second_key: pki/kme-rsa.key", "", "kme.second_certificate", "no second_key"},
		{"half a pair", "second_certificate: pki/kme-rsa.crt", "", "kme.second_key",
			"no second_certificate"},
		{"keys", "max_keys: 128", "max_keys: 1025", "kme.max_keys", "1025 is outside 1 to 1024"},
		{"no keys", "max_keys: 128", "max_keys: 0", "kme.max_keys", "0 is outside 1 to 1024"},
		{"connections", "max_connections: 16384", "max_connections: 0", "kme.max_connections",
			"0 is outside 16 to 65536"},
		{"connection age", "max_connection_age: 1h", "max_connection_age: 1s",
			"kme.max_connection_age", "1s is outside 1m to 24h"},
		{"profile", "profile: default", "profile: cisco", "saes[0].profile",
			"is not a profile; known are arnika, default, fortigate, junos, strict, strongswan"},
		{"reread", "reread_window: 0s", "reread_window: 2m", "saes[0].reread_window",
			"2m0s is outside 1s to 1m"},
		{"short reread", "reread_window: 0s", "reread_window: 10ms", "saes[0].reread_window",
			"10ms is outside 1s to 1m"},
		{"reread there", "kme: kme-kochi\n\nlines", "kme: kme-kochi\n    reread_window: 2s\nlines",
			"saes[3].reread_window", `own key manager "kme-kochi"`},
		{"calls", "requests_per_second: 50", "requests_per_second: 0",
			"saes[0].limits.requests_per_second", "0 is not above 0 to 1e+06; leave it out"},
		{"calls nan", "requests_per_second: 50", "requests_per_second: NaN",
			"saes[0].limits.requests_per_second", "NaN is not above 0"},
		{"key rate", "keys_per_second: 200", "keys_per_second: -1",
			"saes[0].limits.keys_per_second", "-1 is not above 0"},
		{"share", "share: 0.9", "share: 90", "saes[0].limits.share", "90 is not above 0 to 1;"},
		{"share window", "share_window: 1m", "share_window: 1ms", "saes[0].limits.share_window",
			"1ms is outside 1s to 24h"},
		{"window alone", "share: 0.9 ", "", "saes[0].limits.share_window", "has no share"},
		{"reserve", "reserve: 1000", "reserve: 2000000", "saes[0].limits.reserve",
			"2000000 is outside 1 to 1048576"},
		{"limits there", "kme: kme-kochi\n\nlines", "kme: kme-kochi\n    limits: {share: 1}\nlines",
			"saes[3].limits", `own key manager "kme-kochi"`},
		{"policy name", "policy: qkd-strict", "policy: OTP-strict", "lines[0].policy",
			`"OTP-strict" is not a policy; known are otp-strict, otp-preferred, qkd-strict`},
		{"pad", "pad_hold: 1048576", "pad_hold: 1024", "lines[0].pad_hold", "outside 65536 to 67108864"},
		{"port", "ports: [2575]", "ports: [0]", "lines[0].classes[0].ports[0]", "0 is outside 1 to 65535"},
		{"dscp", "dscp: [46]", "dscp: [64]", "lines[0].classes[1].dscp[0]", "64 is outside 0 to 63"},
		{"pad SAE", "sae: pad-tokyo", "sae: line-tokyo", "lines[0].keys.pad.sae", "different SAEs"},
		{"pad SAE unknown", "sae: pad-tokyo", "sae: pad-x", "lines[0].keys.pad.sae", "is not an SAE of"},
		{"pad SAE twice", "peer_sae: pad-kochi", "peer_sae: pad-tokyo", "lines[0].keys.pad.peer_sae",
			"this end's own SAE"},
		{"policy", "policy: qkd-strict", "policy: fast", "lines[0].policy", `"fast" is not a policy`},
		{"endpoint", "local: 192.0.2.1:4500", "local: tokyo:4500", "lines[0].endpoints[0].local",
			"is not an IP address with port"},
		{"empty endpoint", "local: 192.0.2.1:4500", `local: ""`, "lines[0].endpoints[0].local",
			"is not an IP address with port"},
		{"IP version", "remote: 192.0.2.2:4500", `remote: "[2001:db8::2]:4500"`,
			"lines[0].endpoints[0].remote", "same IP version"},
		{"no remote", "remote: 192.0.2.2:4500", "remote: 0.0.0.0:4500",
			"lines[0].endpoints[0].remote", "no address to send to"},
		{"prefix", "[10.9.0.1/30]", "[10.9.0.1]", "lines[0].tun.addresses[0]", "prefix length"},
		{"mtu", "mtu: 1400", "mtu: 576", "lines[0].tun.mtu", "outside 1280 to 9000"},
		{"mtu zero", "mtu: 1400", "mtu: 0", "lines[0].tun.mtu", "outside 1280 to 9000"},
		{"interface", "name: ql0", "name: ql0-to-kochi-main", "lines[0].tun.name", "1 to 15"},
		{"duration", "epoch_life: 120s", "epoch_life: 60", "lines[0].epoch_life", "is not a duration"},
		{"life", "epoch_life: 120s", "epoch_life: 2h", "lines[0].epoch_life", "outside 1s to 1h"},
		{"life zero", "epoch_life: 120s", "epoch_life: 0s", "lines[0].epoch_life", "outside 1s to 1h"},
		{"hold", "hold_max: 600s", "hold_max: 30s", "lines[0].hold_max", "not longer than epoch_life"},
		{"hold range", "hold_max: 600s", "hold_max: 25h", "lines[0].hold_max", "more than 24h"},
		{"http", "[https://10.1.0.1:8443]", "[http://10.1.0.1:8443]", "lines[0].keys.kmes[0]",
			"expected https://host:port"},
		{"no kme", "[https://10.1.0.1:8443]", "[]", "lines[0].keys.kmes", "at least one"},
		{"three kmes", "[https://10.1.0.1:8443]", "[https://a:1, https://b:1, https://c:1]",
			"lines[0].keys.kmes[2]", "at most two"},
		{"other kme", "      sae: line-tokyo", "      kme: kme-kochi\n      sae: line-tokyo",
			"lines[0].keys.kme", "not this site's"},
		{"own sae", "      sae: line-tokyo", "      sae: line-osaka", "lines[0].keys.sae", "add it to saes"},
		{"peer sae", "peer_sae: line-kochi", "peer_sae: line-osaka", "lines[0].keys.peer_sae",
			"not one of saes"},
		{"same sae", "peer_sae: line-kochi", "peer_sae: line-tokyo", "lines[0].keys.peer_sae",
			"own SAE"},
		{"shared socket", "control: /run/quietline/line-tokyo-kochi.sock",
			"control: /run/quietline/kme.sock", "lines[0].control", "is taken by kme.control in line"},
		{"alias", "site: tokyo", "site: &a tokyo", "site", "anchors and aliases"},
		{"twice", "lab: true", "site: kochi", "site",
			"stands a second time; the first is in line 14"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			before, after, ok := strings.Cut(string(data), tt.old)
			if !ok {
				t.Fatalf("the example has no %q", tt.old)
			}
			_, err := config.Parse("dir/site.yaml", []byte(before+tt.new+after))
			var faults *config.Faults
			if !errors.As(err, &faults) {
				t.Fatalf("err = %v, want faults", err)
			}
			line := strings.Count(before, "\n") + 1
			for _, f := range faults.List {
				near := f.Line == line || tt.name == "lab" || tt.new == "{}" ||
					tt.name == "own sae" || tt.name == "half a pair" ||
					tt.name == "window alone" || tt.name == "limits there" ||
					tt.name == "reread there"
				if f.Key == tt.key && near && strings.Contains(f.Text, tt.text) {
					return
				}
			}
			t.Errorf("no fault at line %d, %s with %q in:\n%v", line, tt.key, tt.text, err)
		})
	}
}

// TestAllAtOnce holds the exact report of a file with several faults.
func TestAllAtOnce(t *testing.T) {
	const file = `version: 1
site: tokyo
speed: fast
lines:
  - id: a
    policy: otp
    endpoints:
      - local: 127.0.0.1:1
    tun: {name: ql0}
  - id: a
    policy: pqc-only
    link_secret: s
    static_key: k
    peer_bundle: b
    endpoints: [{local: 127.0.0.1:1, remote: 127.0.0.1:2}]
    tun: {name: ql1}
`
	const want = `site.yaml:1: state: is missing; it is required
site.yaml:3: speed: unknown key; known here: version, site, lab, state, kme, peers, links, saes, lines
site.yaml:5: lines[0].link_secret: is missing; it is required
site.yaml:5: lines[0].static_key: is missing; it is required
site.yaml:5: lines[0].peer_bundle: is missing; it is required
site.yaml:6: lines[0].policy: "otp" is not a policy; known are otp-strict, otp-preferred, qkd-strict, qkd-required, qkd-preferred, pqc-only
site.yaml:8: lines[0].endpoints[0].remote: is missing; it is required
site.yaml:10: lines[1].id: "a" is taken by lines[0].id in line 5; each line is used once`
	_, err := config.Parse("dir/site.yaml", []byte(file))
	if err == nil {
		t.Fatal("accepted")
	}
	if diff := cmp.Diff(want, err.Error()); diff != "" {
		t.Errorf("faults (-want +got):\n%s", diff)
	}
}

func TestNotASite(t *testing.T) {
	for _, tt := range []struct{ name, file, want string }{
		{"empty", "", "site.yaml:1: the file is empty; start from docs/examples/site-tokyo.yaml"},
		{"comment", "# only\n",
			"site.yaml:1: the file is empty; start from docs/examples/site-tokyo.yaml"},
		{"list", "- a\n", "site.yaml:1: is a list; expected a group of keys"},
		{"second", "version: 1\n---\na: b\n",
			"site.yaml:2: a second document begins here; a site is one document"},
		{"syntax", "version: 1\nsite: [a\n",
			"site.yaml:1: not YAML, here or in the next line: did not find"},
		{"large", strings.Repeat("#", 1<<20+1),
			"site.yaml:1: 1048577 bytes, at most 1048576 are read"},
		{"long state", "version: 1\nsite: x\nstate: /" + strings.Repeat("s", 120) +
			"\nlines: [{id: a}]\n", "site.yaml:3: state: is too long a path:"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := config.Parse("site.yaml", []byte(tt.file))
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got  %v\nwant %s", err, tt.want)
			}
		})
	}
}

func TestRootKeyOrCredential(t *testing.T) {
	data, err := os.ReadFile(filepath.Join(examples, "site-tokyo.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	const line = "root_key: secrets/root.key"
	with := func(text string) []byte {
		return []byte(strings.Replace(string(data), line, text, 1))
	}
	if !strings.Contains(string(data), line) {
		t.Fatal("the example has no root key")
	}
	s, err := config.Parse("f", with("root_credential: root"))
	if err != nil || s.KME.RootCredential != "root" || s.KME.RootKey != "" {
		t.Errorf("a credential: %v", err)
	}
	_, err = config.Parse("f", with(""))
	if err == nil || !strings.Contains(err.Error(), "one of root_key and root_credential") {
		t.Errorf("neither: %v", err)
	}
}

// TestPadNeedsItsSAE: no policy with one-time pad goes without an SAE for it.
func TestPadNeedsItsSAE(t *testing.T) {
	data, err := os.ReadFile(filepath.Join(examples, "site-kochi.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	for _, policy := range []string{"otp-strict", "otp-preferred"} {
		text := strings.Replace(string(data), "policy: qkd-strict", "policy: "+policy, 1)
		_, err := config.Parse("site.yaml", []byte(text))
		if want := "lines[0].keys.pad: is missing; policy " + policy; err == nil ||
			!strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", policy, err)
		}
	}
}

// TestDefaultPolicy: want of a word for the policy is no want of QKD.
func TestDefaultPolicy(t *testing.T) {
	data, err := os.ReadFile(filepath.Join(examples, "site-kochi.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	s, err := config.Parse("site.yaml", []byte(strings.Replace(string(data), "    policy: qkd-strict\n", "", 1)))
	if err != nil || s.Lines[0].Policy != "qkd-preferred" || s.Lines[0].PadHold != 1<<20 {
		t.Errorf("%+v, %v", s, err)
	}
}
