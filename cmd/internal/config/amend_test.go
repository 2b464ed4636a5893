package config

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const amendBase = `# of the hospital
version: 1
site: tokyo # ours
state: state
kme:
  id: kme-tokyo
  listen: 127.0.0.1:8443
  certificate: a.pem
  key: a.pem
  client_ca: sae.crt
  peer_listen: 192.0.2.1:8444 # the wide-area side
  peer_certificate: p.pem
  peer_key: p.pem
  peer_ca: peers.crt
  root_key: root.key
# filled by enrolment
peers: []
saes:
  - id: line-tokyo # this end
    kme: kme-tokyo
    identity:
      uri: urn:quietline:sae:line-tokyo
`

func kochi(address string) *Site {
	return &Site{
		Peers: []Peer{{KME: "kme-kochi", Address: address}},
		Links: []Link{{ID: "tokyo-kochi", Peer: "kme-kochi", Driver: "unix:///dev/qkd"}},
		SAEs:  []SAE{{ID: "line-kochi", KME: "kme-kochi"}},
	}
}

func TestAmend(t *testing.T) {
	once, err := Amend("/x/site.yaml", []byte(amendBase), kochi("192.0.2.2:8444"))
	if err != nil {
		t.Fatal(err)
	}
	for _, comment := range []string{"# of the hospital", "# ours", "# the wide-area side", "# this end", "# filled by enrolment"} {
		if !strings.Contains(string(once), comment) {
			t.Errorf("the comment %q is lost", comment)
		}
	}
	s, err := Parse("/x/site.yaml", once)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(kochi("192.0.2.2:8444").Peers, s.Peers); d != "" {
		t.Error(d)
	}
	if len(s.SAEs) != 2 || len(s.Links) != 1 {
		t.Errorf("%d SAEs, %d links", len(s.SAEs), len(s.Links))
	}
	again, err := Amend("/x/site.yaml", once, kochi("192.0.2.2:8444"))
	if err != nil || string(again) != string(once) {
		t.Errorf("a repeated change changes the file: %v\n%s", err, again)
	}
	moved, err := Amend("/x/site.yaml", once, kochi("192.0.2.9:1"))
	if err != nil {
		t.Fatal(err)
	}
	if s, err := Parse("/x/site.yaml", moved); err != nil || len(s.Peers) != 1 || s.Peers[0].Address != "192.0.2.9:1" {
		t.Errorf("%+v, %v", s.Peers, err)
	}
	gone, err := Remove("/x/site.yaml", once, "kme-kochi")
	if err != nil {
		t.Fatal(err)
	}
	if s, err := Parse("/x/site.yaml", gone); err != nil || len(s.Peers)+len(s.Links) != 0 || len(s.SAEs) != 1 {
		t.Errorf("%+v, %v", s, err)
	}
	if !strings.Contains(string(gone), "# this end") {
		t.Error("a comment is lost")
	}
}

func TestAmendRefuses(t *testing.T) {
	for name, tc := range map[string]struct {
		text string
		add  *Site
	}{
		"not YAML":      {"a: [", kochi("192.0.2.2:1")},
		"no mapping":    {"- a", kochi("192.0.2.2:1")},
		"empty":         {"", kochi("192.0.2.2:1")},
		"faulty result": {amendBase, &Site{Peers: []Peer{{KME: "kme-kochi", Address: "nowhere"}}}},
		"own name":      {amendBase, &Site{Peers: []Peer{{KME: "kme-tokyo", Address: "192.0.2.2:1"}}}},
	} {
		if out, err := Amend("/x/site.yaml", []byte(tc.text), tc.add); err == nil {
			t.Errorf("%s is taken:\n%s", name, out)
		}
	}
}
