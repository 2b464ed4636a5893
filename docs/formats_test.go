package docs_test

import (
	"bytes"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// A format is described once, in the comment beside the code that writes it.
// formats.md shows these comments; this list says which and in what order. An
// ident names a declaration of the package; without one it is the package
// comment, from the heading on if there is one.
var formats = []struct {
	title, dir, ident, heading string
}{
	{"A line's datagrams", "tunnel/wire", "", ""},
	{"Handshake: every datagram", "tunnel/rekey", "headerSize", ""},
	{"Handshake: the four messages", "tunnel/rekey", "kindM1", ""},
	{"Handshake: what both ends tell", "tunnel/rekey", "intro", ""},
	{"Handshake: sealed part of M1", "tunnel/rekey", "hello", ""},
	{"Handshake: sealed part of M2", "tunnel/rekey", "welcome", ""},
	{"Handshake: sealed part of M3", "tunnel/rekey", "choice", ""},
	{"Handshake: sealed part of M4", "tunnel/rekey", "verdict", ""},
	{"One-time pad: record", "tunnel/pad", "", ""},
	{"One-time pad: messages", "tunnel/pad", "kindAnnounce", ""},
	{"Line bundle", "tunnel/bundle", "", ""},
	{"Key manager to key manager: the channel", "kms/node", "greeting", ""},
	{"Key manager to key manager", "kms/peer", "kHello", ""},
	{"Store file", "kms/boltstore", "", ""},
	{"Store journal", "kms/boltstore", "journalMagic", ""},
	{"Store journal: what a commit writes", "kms/boltstore", "deleted", ""},
	{"Sealing and the epoch file", "kms/keyring", "", ""},
	{"Root key under a passphrase", "kms/keyring", "SealedRoot", ""},
	{"Audit log", "kms/audit", "", ""},
	{"Device to key manager", "hw/socket", "", "# Messages"},
	{"Classical channel of a QKD link", "hw/distill", "", "# Messages"},
	{"Simulated fibre", "simulator", "", "# Two connections"},
	{"Control socket", "cmd/internal/control", "", ""},
}

const formatsPage = "formats.md"

// TestFormatsPageIsWhatTheCodeSays; QUIETLINE_UPDATE=1 writes the page anew.
func TestFormatsPageIsWhatTheCodeSays(t *testing.T) {
	var want bytes.Buffer
	want.WriteString("# Formats\n\nEvery byte on wire and disk, as the comment beside the code says it. " +
		"Made from these comments by\n`QUIETLINE_UPDATE=1 go test ./docs -run Formats`; " +
		"the test fails when page and code part. Public API: [ETSI GS QKD 014](conformance.md).\n")
	for _, f := range formats {
		text := comment(t, f.dir, f.ident)
		if f.heading != "" {
			_, after, found := strings.Cut(text, f.heading+"\n")
			if !found {
				t.Errorf("%s: its package comment has no %q", f.dir, f.heading)
			}
			text, _, _ = strings.Cut(after, "\n# ")
		}
		if strings.TrimSpace(text) == "" {
			t.Errorf("%s %s has no comment", f.dir, f.ident)
		}
		where := f.dir
		if f.ident != "" {
			where += ", " + f.ident
		}
		fmt.Fprintf(&want, "\n## %s\n\n`%s`\n\n```\n%s\n```\n", f.title, where, strings.Trim(text, "\n"))
	}
	if os.Getenv("QUIETLINE_UPDATE") != "" {
		if err := os.WriteFile(formatsPage, want.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(formatsPage)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want.Bytes()) {
		t.Errorf("%s differs from the comments in the code; run: QUIETLINE_UPDATE=1 go test ./docs -run Formats", formatsPage)
	}
}

// comment is the package comment of a folder, or that of a declaration in it.
func comment(t *testing.T, dir, ident string) string {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(root, dir, "*.go"))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		f, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.ParseComments|parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		if ident == "" {
			if f.Doc != nil {
				return f.Doc.Text()
			}
			continue
		}
		for _, d := range f.Decls {
			if g, ok := d.(*ast.GenDecl); ok && declares(g, ident) {
				return g.Doc.Text()
			}
		}
	}
	return ""
}

// declares tells whether a declaration's first name is ident.
func declares(g *ast.GenDecl, ident string) bool {
	if len(g.Specs) == 0 {
		return false
	}
	switch s := g.Specs[0].(type) {
	case *ast.ValueSpec:
		return s.Names[0].Name == ident
	case *ast.TypeSpec:
		return s.Name.Name == ident
	}
	return false
}
