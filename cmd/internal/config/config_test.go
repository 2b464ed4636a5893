package config_test

import (
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"go.yaml.in/yaml/v3"

	"github.com/quietline/quietline/cmd/internal/config"
)

const examples = "../../../docs/examples"

var compare = cmp.Options{
	cmpopts.EquateComparable(netip.AddrPort{}, netip.Prefix{}),
	cmpopts.EquateEmpty(),
}

// TestExamples loads every example, and holds that both ends of the pair
// agree in what must be equal.
func TestExamples(t *testing.T) {
	files, err := filepath.Glob(filepath.Join(examples, "*.yaml"))
	if err != nil || len(files) < 2 {
		t.Fatalf("found %d examples, %v", len(files), err)
	}
	sites := make(map[string]*config.Site)
	for _, file := range files {
		s, err := config.Load(file)
		if err != nil {
			t.Errorf("load: %v", err)
			continue
		}
		sites[s.Site] = s
	}
	a, b := sites["tokyo"], sites["kochi"]
	if a == nil || b == nil {
		t.Fatal("tokyo or kochi is missing")
	}
	if a.Links[0].ID != b.Links[0].ID || a.Links[0].Simulator.Preset != b.Links[0].Simulator.Preset {
		t.Error("the two ends of the link differ")
	}
	if a.Lines[0].ID != b.Lines[0].ID || a.Lines[0].Policy != b.Lines[0].Policy ||
		a.Lines[0].Endpoints[0].Local != b.Lines[0].Endpoints[0].Remote {
		t.Error("the two ends of the line differ")
	}
}

// TestExampleIsComplete holds that the commented example shows every key there
// is, so that nobody has to read the source.
func TestExampleIsComplete(t *testing.T) {
	full := fill(t)
	data, err := os.ReadFile(filepath.Join(examples, "site-tokyo.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	var shown, known yaml.Node
	if err := yaml.Unmarshal(data, &shown); err != nil {
		t.Fatal(err)
	}
	if err := yaml.Unmarshal(full, &known); err != nil {
		t.Fatal(err)
	}
	have := make(map[string]bool)
	for _, key := range keys(&shown, "") {
		have[key] = true
	}
	for _, key := range keys(&known, "") {
		switch last := key[strings.LastIndex(key, ".")+1:]; last {
		case "dns", "cn", "pin", "connect":
			continue // alternatives, named in a comment or shown by the other site
		}
		if !have[key] {
			t.Errorf("site-tokyo.yaml does not show %s", key)
		}
	}
}

// fill renders a site with every key set.
func fill(t *testing.T) []byte {
	t.Helper()
	ap, prefix := netip.MustParseAddrPort("192.0.2.1:1"), netip.MustParsePrefix("10.0.0.0/8")
	ch := config.Channel{Listen: "x", Connect: "x"}
	s := config.Site{
		Version: 1, Site: "x", Lab: true, State: "x",
		KME: &config.KME{ID: "x", Listen: "x", Certificate: "x", Key: "x", ClientCA: "x",
			SecondCertificate: "x", SecondKey: "x", ClientCRL: "x", ClientDeny: "x",
			MaxKeys: 1, MaxConnections: 1, MaxConnectionAge: 1,
			PeerListen: "x", PeerCertificate: "x", PeerKey: "x", PeerCA: "x", RootKey: "x",
			Control: "x", Metrics: "x"},
		Peers: []config.Peer{{KME: "x", Address: "x"}},
		Links: []config.Link{{ID: "x", Peer: "x", Driver: "x", Simulator: &config.Simulator{
			Role: "x", Preset: "x", Fibre: ch, Classical: ch, AuthSeed: "x", Eve: 1,
			Control: "x", Metrics: "x"}}},
		SAEs: []config.SAE{{ID: "x", KME: "x", Profile: "x", RereadWindow: 1,
			Limits: config.SAELimits{RequestsPerSecond: 1, KeysPerSecond: 1, Share: 1, ShareWindow: 1,
				Reserve: 1},
			Identity: config.Identity{URI: "x", DNS: "x", CN: "x", Pin: "x"}}},
		Lines: []config.Line{{ID: "x", Policy: "x", LinkSecret: "x", StaticKey: "x",
			PeerBundle: "x", Endpoints: []config.Endpoint{{Local: ap, Remote: ap}},
			TUN: config.TUN{Name: "x", Addresses: []netip.Prefix{prefix},
				Routes: []netip.Prefix{prefix}, MTU: 1},
			EpochLife: 1, HoldMax: 1,
			Unguarded: true, PadHold: 1, Classes: []config.Class{{Name: "x", To: []netip.Prefix{prefix},
				Ports: []int{1}, DSCP: []int{1}, Pad: true, Urgent: true}},
			Keys: &config.Keys{KMEs: []string{"x"}, Certificate: "x", Key: "x", CA: "x",
				SAE: "x", PeerSAE: "x", Pad: &config.PadKeys{Certificate: "x", Key: "x",
					SAE: "x", PeerSAE: "x"}},
			Control: "x", Metrics: "x"}},
	}
	out, err := s.YAML()
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func keys(n *yaml.Node, key string) []string {
	var list []string
	switch n.Kind {
	case yaml.MappingNode:
		for i := 0; i+1 < len(n.Content); i += 2 {
			path := key + "." + n.Content[i].Value
			list = append(append(list, path), keys(n.Content[i+1], path)...)
		}
	default:
		for _, c := range n.Content {
			list = append(list, keys(c, key)...)
		}
	}
	return list
}

func TestDefaultsAndPaths(t *testing.T) {
	s, err := config.Load(filepath.Join(examples, "site-kochi.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	dir, err := filepath.Abs(examples)
	if err != nil {
		t.Fatal(err)
	}
	got := []string{s.KME.Control, s.Links[0].Simulator.Control, s.Lines[0].Control,
		s.KME.RootKey, s.Links[0].Driver}
	want := []string{"/var/lib/quietline/kme.sock", "/var/lib/quietline/sim-tokyo-kochi.sock",
		"/var/lib/quietline/line-tokyo-kochi.sock", filepath.Join(dir, "secrets/root.key"),
		"unix:///run/quietline/tokyo-kochi.sock"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("paths (-want +got):\n%s", diff)
	}
	if s.Lines[0].EpochLife != 2*time.Minute || s.Lines[0].HoldMax != 10*time.Minute {
		t.Errorf("epoch_life %v, hold_max %v", s.Lines[0].EpochLife, s.Lines[0].HoldMax)
	}
}

func TestYAMLReadsBack(t *testing.T) {
	for _, name := range []string{"site-tokyo.yaml", "site-kochi.yaml"} {
		want, err := config.Load(filepath.Join(examples, name))
		if err != nil {
			t.Fatal(err)
		}
		text, err := want.YAML()
		if err != nil {
			t.Fatal(err)
		}
		got, err := config.Parse("elsewhere/site.yaml", text)
		if err != nil {
			t.Fatalf("parse what was written: %v\n%s", err, text)
		}
		if diff := cmp.Diff(want, got, compare); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
}

func TestNetwork(t *testing.T) {
	for _, tt := range [][3]string{
		{"unix:///run/a.sock", "unix", "/run/a.sock"},
		{"unix:/run/a.sock", "unix", "/run/a.sock"},
		{"127.0.0.1:80", "tcp", "127.0.0.1:80"},
	} {
		if n, a := config.Network(tt[0]); n != tt[1] || a != tt[2] {
			t.Errorf("Network(%q) = %q, %q", tt[0], n, a)
		}
	}
}

func TestLoadMissingFile(t *testing.T) {
	_, err := config.Load(filepath.Join(t.TempDir(), "site.yaml"))
	if !errors.Is(err, os.ErrNotExist) {
		t.Errorf("err = %v, want %v", err, os.ErrNotExist)
	}
}

// FuzzParse: no bytes may crash the reader, a refusal names a fault, and what
// is accepted reads back equal from its own rendering.
func FuzzParse(f *testing.F) {
	for _, name := range []string{"site-tokyo.yaml", "site-kochi.yaml"} {
		data, err := os.ReadFile(filepath.Join(examples, name))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	for _, s := range []string{"", "version: 1\n", "a: &a [*a]\n", "- x\n", "version: [1\n",
		"site: !!binary aGk=\n", "? {a: b}\n: c\n", "lines: [{tun: {mtu: 0x10}}]\n", "---\n---\n",
		"version: 1\nsite: x\nstate: /s\n", "<<: {version: 1}\n"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		s, err := config.Parse("/x/site.yaml", data)
		if err != nil {
			var faults *config.Faults
			if !errors.As(err, &faults) || len(faults.List) == 0 || s != nil {
				t.Fatalf("refused with %#v and %v", err, s)
			}
			return
		}
		text, err := s.YAML()
		if err != nil {
			t.Fatal(err)
		}
		again, err := config.Parse("/x/site.yaml", text)
		if err != nil {
			t.Fatalf("read back: %v\n%s", err, text)
		}
		if diff := cmp.Diff(s, again, compare); diff != "" {
			t.Fatalf("read back (-first +second):\n%s", diff)
		}
	})
}
