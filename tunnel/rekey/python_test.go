package rekey

import (
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestVectorsInPython lets a reader in another language, with its own ML-KEM,
// curves and AES-GCM, open every vector and stop at every fault.
func TestVectorsInPython(t *testing.T) {
	python, err := exec.LookPath("python3")
	if err != nil {
		t.Skip("python3 is not installed")
	}
	files, err := filepath.Glob(filepath.Join(vectorFolder, "*.json"))
	if err != nil || len(files) != 2*len(vectorCases) {
		t.Fatalf("%d vectors, %v", len(files), err)
	}
	read := func(args ...string) (string, error) {
		out, err := exec.Command(python, append([]string{"testdata/reader.py"}, args...)...).CombinedOutput()
		return string(out), err
	}
	changes := map[string][2]string{}
	if os.Getenv("QUIETLINE_LONG") == "1" {
		files = append(files, "--faults")
	}
	if out, err := read(files...); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	// The reader itself must be able to fail.
	last := filepath.Join(vectorFolder, vectorCases[4].file(XWing, 4))
	good, err := os.ReadFile(last)
	if err != nil {
		t.Fatal(err)
	}
	v := readVector(t, last)
	changes["KeyIR"] = [2]string{v.Out.KeyIR, strings.Repeat("0", 64)}
	if os.Getenv("QUIETLINE_LONG") == "1" {
		maps.Copy(changes, map[string][2]string{
			"c1":     {v.SeedR, v.SeedI},
			"c4":     {v.Messages[len(v.Messages)-1].Plain, strings.Repeat("0", 32)},
			"mac1":   {v.LinkSecret, strings.Repeat("ab", 32)},
			"noqkd2": {`"Mode": 2`, `"Mode": 1`},
		})
	}
	for name, change := range changes {
		path := filepath.Join(t.TempDir(), "bad.json")
		bad := strings.ReplaceAll(string(good), change[0], change[1])
		if err := os.WriteFile(path, []byte(bad), 0o600); err != nil {
			t.Fatal(err)
		}
		if out, err := read(path); err == nil || !strings.Contains(out, "stops at") {
			t.Errorf("%s changed: %v\n%s", name, err, out)
		}
	}
}
