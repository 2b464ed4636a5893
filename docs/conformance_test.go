package docs_test

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/quietline/quietline/etsi014/probe"
)

// codeSpan is a word in backquotes; testName is a folder and a test in it.
var (
	codeSpan = regexp.MustCompile("`([^`]+)`")
	testName = regexp.MustCompile(`^([a-z0-9/]+)\.((?:Test|Fuzz)\w+)$`)
	caseName = regexp.MustCompile(`^[a-z0-9]+(-[a-z0-9.]+)+$|^[a-z]+-(?:[a-z]+-)?\*$`)
)

// TestConformanceNamesTests: every row of docs/conformance.md names tests, and
// each of them exists.
func TestConformanceNamesTests(t *testing.T) {
	text, err := os.ReadFile("conformance.md")
	if err != nil {
		t.Fatal(err)
	}
	seen := 0
	for line := range strings.Lines(string(text)) {
		cells := strings.Split(strings.Trim(strings.TrimSpace(line), "|"), "|")
		last := strings.TrimSpace(cells[len(cells)-1])
		row := strings.HasPrefix(line, "|") && last != "tests" && !strings.HasPrefix(last, "---")
		if row {
			seen++
		}
		found := 0
		for _, m := range codeSpan.FindAllStringSubmatch(line, -1) {
			if exists, is := isTest(t, m[1]); is && !exists {
				t.Errorf("%s does not exist: %.60s", m[1], line)
			} else if is && strings.Contains(last, m[0]) {
				found++
			}
		}
		if row && found == 0 {
			t.Errorf("no test: %s", line)
		}
		if row && found != strings.Count(last, "`")/2 {
			t.Errorf("among the tests is something else: %s", last)
		}
	}
	if seen < 40 {
		t.Errorf("%d rows", seen)
	}
}

// isTest says whether a word is the name of a test or of a case, and whether
// there is one.
func isTest(t *testing.T, word string) (exists, is bool) {
	t.Helper()
	if m := testName.FindStringSubmatch(word); m != nil {
		files, err := filepath.Glob(filepath.Join(root, m[1], "*_test.go"))
		if err != nil {
			t.Fatal(err)
		}
		return slices.ContainsFunc(files, func(file string) bool {
			code, err := os.ReadFile(file)
			return err == nil && strings.Contains(string(code), "\nfunc "+m[2]+"(")
		}), true
	}
	if !caseName.MatchString(word) {
		return false, false
	}
	return slices.ContainsFunc(probe.Cases(), func(c probe.Case) bool {
		start, many := strings.CutSuffix(word, "*")
		return c.Name == word || many && strings.HasPrefix(c.Name, start)
	}), true
}
