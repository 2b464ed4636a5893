// Package docs_test holds what docs/architecture.md promises against the code.
package docs_test

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const (
	module = "github.com/quietline/quietline"
	root   = ".."
	page   = "architecture.md"
)

// section returns the text under a level-two heading of the page.
func section(t *testing.T, heading string) string {
	t.Helper()
	b, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	_, after, found := strings.Cut(string(b), "\n## "+heading+"\n")
	if !found {
		t.Fatalf("%s has no section %q", page, heading)
	}
	text, _, _ := strings.Cut(after, "\n## ")
	return text
}

// rows returns the cells of the first table of a text, header left out.
func rows(text string) [][]string {
	var out [][]string
	for _, line := range strings.Split(text, "\n") {
		if !strings.HasPrefix(line, "|") {
			if out != nil {
				break
			}
			continue
		}
		cells := strings.Split(strings.Trim(line, "|"), "|")
		for i := range cells {
			cells[i] = strings.TrimSpace(cells[i])
		}
		out = append(out, cells)
	}
	if len(out) < 3 {
		return nil
	}
	return out[2:]
}

// importTable is the page's table: which tree may import which of ours.
func importTable(t *testing.T) map[string][]string {
	t.Helper()
	table := map[string][]string{}
	for _, cells := range rows(section(t, "Who may import whom")) {
		tree := strings.Trim(cells[0], "`")
		var may []string
		for _, word := range strings.Split(cells[1], ",") {
			if word = strings.Trim(strings.TrimSpace(word), "`"); word != "–" {
				may = append(may, word)
			}
		}
		table[tree] = may
	}
	if len(table) < 7 {
		t.Fatalf("import table has %d rows: %v", len(table), table)
	}
	return table
}

// goFiles calls f for each Go file of the repository with its folder's path
// inside it.
func goFiles(t *testing.T, f func(dir, file string)) {
	t.Helper()
	err := filepath.WalkDir(root, func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && (d.Name() == "testdata" || d.Name() == "node_modules" ||
			strings.HasPrefix(d.Name(), ".") && d.Name() != "..") {
			return filepath.SkipDir
		}
		if strings.HasSuffix(name, ".go") {
			rel, err := filepath.Rel(root, name)
			if err != nil {
				return err
			}
			f(path.Dir(filepath.ToSlash(rel)), name)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// forbidden says why a folder of the repository may not import a package, or
// "".
func forbidden(table map[string][]string, dir, imported string) string {
	inside, ours := strings.CutPrefix(imported, module+"/")
	if !ours {
		return ""
	}
	from, _, _ := strings.Cut(dir, "/")
	to, _, _ := strings.Cut(inside, "/")
	may, known := table[from]
	switch {
	case !known:
		return fmt.Sprintf("folder %s has no row in the import table", from)
	case from == to, slices.Contains(may, to), slices.Contains(may, "all"):
		return ""
	}
	return fmt.Sprintf("%s may import only %v", from, may)
}

// TestImportsFollowTheTable parses files itself: the test cache would hide a
// bad import from a call of go list.
func TestImportsFollowTheTable(t *testing.T) {
	table := importTable(t)
	files := 0
	goFiles(t, func(dir, file string) {
		if dir == "docs" {
			return
		}
		files++
		f, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.ImportsOnly)
		if err != nil {
			t.Error(err)
			return
		}
		for _, spec := range f.Imports {
			imported, err := strconv.Unquote(spec.Path.Value)
			if err != nil {
				t.Error(err)
				continue
			}
			if why := forbidden(table, dir, imported); why != "" {
				t.Errorf("%s imports %s: %s", file, imported, why)
			}
		}
	})
	if files < 20 {
		t.Errorf("read %d Go files only: the walk does not see the repository", files)
	}
}

func TestForbiddenCanFail(t *testing.T) {
	table := importTable(t)
	for _, c := range []struct{ dir, imported string }{
		{"secret", module + "/hw"},
		{"etsi014/identity", module + "/kms"},
		{"tunnel/rekey", module + "/etsi014"},
		{"hw/distill", module + "/simulator"},
		{"simulator", module + "/kms/peer"},
		{"kms/boltstore", module + "/tunnel"},
		{"pkg/util", module + "/secret"},
	} {
		if forbidden(table, c.dir, c.imported) == "" {
			t.Errorf("%s may import %s", c.dir, c.imported)
		}
	}
}

// heavy dependencies stand in one package tree each.
func TestHeavyDependenciesStandInOneTree(t *testing.T) {
	allowed := map[string]string{}
	for _, cells := range rows(section(t, "Dependencies")) {
		if len(cells) < 3 || cells[1] == "any" {
			continue
		}
		allowed[strings.Trim(cells[0], "`")] = strings.Trim(cells[1], "`")
	}
	goFiles(t, func(dir, file string) {
		if strings.HasSuffix(file, "_test.go") {
			return
		}
		f, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.ImportsOnly)
		if err != nil {
			t.Error(err)
			return
		}
		for _, spec := range f.Imports {
			imported, _ := strconv.Unquote(spec.Path.Value)
			for dep, tree := range allowed {
				if (imported == dep || strings.HasPrefix(imported, dep+"/")) &&
					dir != tree && !strings.HasPrefix(dir, tree+"/") {
					t.Errorf("%s imports %s, which belongs to %s alone", file, dep, tree)
				}
			}
		}
	})
}

// modulesOf reads the direct requirements of go.mod.
func modulesOf(t *testing.T) []string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(root, "go.mod"))
	if err != nil {
		t.Fatal(err)
	}
	var direct []string
	for _, m := range regexp.MustCompile(`(?m)^\t(\S+) v\S+$`).FindAllStringSubmatch(string(b), -1) {
		direct = append(direct, m[1])
	}
	return direct
}

func TestEveryDirectDependencyHasItsReason(t *testing.T) {
	text := section(t, "Dependencies")
	direct := modulesOf(t)
	if len(direct) < 5 {
		t.Fatalf("go.mod has %d direct requirements: %v", len(direct), direct)
	}
	for _, m := range direct {
		if !strings.Contains(text, "`"+m+"`") {
			t.Errorf("%s is required by go.mod and has no reason in %s", m, page)
		}
	}
}

// declared lists "folder.Func" and "folder.Type.Method" of the repository.
func declared(t *testing.T) map[string]bool {
	t.Helper()
	names := map[string]bool{}
	goFiles(t, func(dir, file string) {
		if strings.HasSuffix(file, "_test.go") {
			return
		}
		f, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.SkipObjectResolution)
		if err != nil {
			t.Error(err)
			return
		}
		for _, d := range f.Decls {
			if fn, ok := d.(*ast.FuncDecl); ok {
				names[dir+"."+receiver(fn)+fn.Name.Name] = true
			}
		}
	})
	return names
}

func receiver(fn *ast.FuncDecl) string {
	if fn.Recv == nil {
		return ""
	}
	typ := fn.Recv.List[0].Type
	if star, ok := typ.(*ast.StarExpr); ok {
		typ = star.X
	}
	if id, ok := typ.(*ast.Ident); ok {
		return id.Name + "."
	}
	return ""
}

// named matches `folder/sub.Func` and `folder.Type.Method` in the flow tables.
var named = regexp.MustCompile("`([a-z0-9/]+\\.[A-Za-z0-9_.]+)`")

func TestEachArrowNamesAFunctionThatExists(t *testing.T) {
	names := declared(t)
	for _, flow := range []string{"From photon to packet", "A packet out", "A packet in", "Reading the source"} {
		found := named.FindAllStringSubmatch(section(t, flow), -1)
		if len(found) < 4 {
			t.Errorf("section %q names %d functions", flow, len(found))
		}
		for _, m := range found {
			if !names[m[1]] {
				t.Errorf("section %q names %s, which does not exist", flow, m[1])
			}
		}
	}
}

func TestEveryPackageHasItsRow(t *testing.T) {
	table := map[string]bool{}
	for _, cells := range rows(section(t, "Rooms")) {
		table[strings.Trim(cells[0], "`")] = true
	}
	goFiles(t, func(dir, file string) {
		if dir != "docs" && !table[dir] {
			t.Errorf("%s has no row under Rooms", dir)
			table[dir] = true
		}
	})
}

// TestEveryPackageSaysWhatItIsFor: one package comment each, in one file.
func TestEveryPackageSaysWhatItIsFor(t *testing.T) {
	comments := map[string]int{}
	goFiles(t, func(dir, file string) {
		if strings.HasSuffix(file, "_test.go") {
			return
		}
		f, err := parser.ParseFile(token.NewFileSet(), file, nil,
			parser.ParseComments|parser.PackageClauseOnly)
		if err != nil {
			t.Error(err)
			return
		}
		n := comments[dir]
		if f.Doc != nil {
			n++
		}
		comments[dir] = n
	})
	for dir, n := range comments {
		if n != 1 {
			t.Errorf("%s has %d package comments, want 1", dir, n)
		}
	}
}

// TestSizes holds the house rules that a machine can hold.
func TestSizes(t *testing.T) {
	const maxFile, maxFunc = 500, 100
	goFiles(t, func(dir, file string) {
		fset := token.NewFileSet()
		f, err := parser.ParseFile(fset, file, nil, parser.SkipObjectResolution)
		if err != nil {
			t.Error(err)
			return
		}
		test := strings.HasSuffix(file, "_test.go")
		if n := fset.File(f.FileStart).LineCount(); n > maxFile && !test {
			t.Errorf("%s has %d lines, at most %d", file, n, maxFile)
		}
		for _, d := range f.Decls {
			fn, ok := d.(*ast.FuncDecl)
			if !ok || test {
				continue
			}
			if n := fset.Position(fn.End()).Line - fset.Position(fn.Pos()).Line + 1; n > maxFunc {
				t.Errorf("%s: %s has %d lines, at most %d", file, fn.Name.Name, n, maxFunc)
			}
		}
	})
}

// link matches a Markdown link to a file of the repository.
var link = regexp.MustCompile(`\]\(([^)#:]+)(#[^)]*)?\)`)

func TestLinksLeadSomewhere(t *testing.T) {
	pages, err := filepath.Glob("*.md")
	if err != nil {
		t.Fatal(err)
	}
	pages = append(pages, filepath.Join(root, "README.md"), filepath.Join(root, "SECURITY.md"))
	found := 0
	for _, page := range pages {
		text, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range link.FindAllStringSubmatch(string(text), -1) {
			found++
			if _, err := os.Stat(filepath.Join(filepath.Dir(page), m[1])); err != nil {
				t.Errorf("%s links to %s, which is not there", page, m[1])
			}
		}
	}
	if found < 10 {
		t.Errorf("found %d links only", found)
	}
}
