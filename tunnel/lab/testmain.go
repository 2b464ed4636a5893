package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
)

// refusal is why the tests of this process run outside; empty inside.
var refusal string

// Main runs the tests of a package inside a lab with TUN devices, and
// returns the exit code:
//
//	func TestMain(m *testing.M) { os.Exit(lab.Main(m)) }
//
// Where the kernel refuses, the tests run outside, and those that call [Need]
// are skipped with the reason.
func Main(m interface{ Run() int }) int {
	if Inside() {
		return m.Run()
	}
	code, err := Reexec(context.Background(), Options{TUN: true})
	if err == nil {
		return code
	}
	var limit *LimitError
	if !errors.As(err, &limit) {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	refusal = strings.ReplaceAll(err.Error(), "\n", " ")
	return m.Run()
}

// Need skips a test that cannot run outside, and says why. With CI=true in the
// environment it fails the test instead: there a skip would hide a hole.
func Need(t interface {
	Helper()
	Skip(args ...any)
	Fatal(args ...any)
}) {
	t.Helper()
	switch {
	case Inside():
	case refusal == "":
		t.Fatal("the package's TestMain does not call lab.Main")
	case os.Getenv("CI") == "true":
		t.Fatal("CI=true, but this test cannot run:", refusal)
	default:
		t.Skip("needs namespaces:", refusal)
	}
}
