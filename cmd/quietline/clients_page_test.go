package main

import (
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/quietline/quietline/cmd/internal/boxes"
	"github.com/quietline/quietline/etsi014"
	"github.com/quietline/quietline/etsi014/etsitest"
	"github.com/quietline/quietline/etsi014/identity"
)

// TestClientsPagePastes pastes docs/clients.md into a shell, against a real
// door; only the KME's address is another.
func TestClientsPagePastes(t *testing.T) {
	for _, program := range []string{"bash", "curl", "python3", "node"} {
		if _, err := exec.LookPath(program); err != nil {
			if os.Getenv("CI") != "" {
				t.Fatal(err)
			}
			t.Skipf("%v; install it to run this test (CI does)", err)
		}
	}
	dir, ca := t.TempDir(), etsitest.NewCA(t, "site CA")
	cert, key := etsitest.WriteFiles(t, dir, "kme", ca.Issue(t, etsitest.Leaf{
		CN: "kme", Server: true, IPs: []net.IP{net.IPv4(127, 0, 0, 1)}, To: later(),
	}))
	etsitest.WriteFile(t, filepath.Join(dir, "kme-ca.crt"), ca.PEM())
	cfg := identity.Config{Pairs: []identity.Pair{{Cert: cert, Key: key}},
		CA: filepath.Join(dir, "kme-ca.crt")}
	for file, sae := range map[string]etsi014.SAEID{"app": "app", "other": "other-app"} {
		etsitest.WriteFiles(t, dir, file, ca.Issue(t, etsitest.Leaf{
			CN: file, URIs: []string{identity.DefaultURI(sae)}, To: later(),
		}))
		cfg.Rules = append(cfg.Rules, identity.Rule{SAE: sae})
	}
	for _, client := range []string{"python/quietline014.py", "javascript/quietline014.mjs"} {
		text, err := os.ReadFile("../../etsi014/clients/" + client)
		if err != nil {
			t.Fatal(err)
		}
		etsitest.WriteFile(t, filepath.Join(dir, filepath.Base(client)), text)
	}
	url := "https://" + serveDoor(t, cfg, &etsitest.KME{Stock: 10})
	page, err := os.ReadFile("../../docs/clients.md")
	if err != nil {
		t.Fatal(err)
	}
	const yours = "https://kme.example:8443"
	script := shellBlocks(string(page))
	if strings.Count(script, yours) != 1 {
		t.Fatalf("the page names the KME %d times", strings.Count(script, yours))
	}
	cmd := exec.CommandContext(t.Context(), "bash", "-eu")
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "PYTHONDONTWRITEBYTECODE=1")
	cmd.Stdin = strings.NewReader(strings.Replace(script, yours, url, 1))
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, want := range []string{`"stored_key_count":10`, "curl: same key", "quietline: same key",
		"ok   KME certificate: ", `"openapi"`, "PASS status-200 (6.1): ", "0 warned, 0 failed",
		"Python: same keys", "JavaScript: same keys"} {
		if !strings.Contains(string(out), want) {
			t.Errorf("the output lacks %q", want)
		}
	}
}

// shellBlocks are the page's blocks marked sh, in their order.
func shellBlocks(page string) string {
	var b strings.Builder
	inside := false
	for _, line := range strings.Split(page, "\n") {
		switch {
		case line == "```sh":
			inside = true
		case strings.HasPrefix(line, "```"):
			inside = false
		case inside:
			b.WriteString(line + "\n")
		}
	}
	return b.String()
}

// TestEveryBoxHasAProfileAtTheDoor: the texts tell the operator to use it.
func TestEveryBoxHasAProfileAtTheDoor(t *testing.T) {
	profiles := etsi014.Profiles()
	for _, b := range boxes.List() {
		if _, ok := profiles[b.Name]; !ok {
			t.Errorf("the door has no profile %q", b.Name)
		}
	}
}
