package secret_test

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/quietline/quietline/secret"
)

var known = []byte("KNOWN-SECRET-0123456789abcdef!!!")

// printedForms is every way we know by which a value ends up in text.
func printedForms(t *testing.T, v any) map[string]string {
	t.Helper()
	forms := map[string]string{}
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "%d"} {
		forms[verb] = fmt.Sprintf(verb, v)
	}
	j, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	forms["json"] = string(j)
	var log bytes.Buffer
	slog.New(slog.NewTextHandler(&log, nil)).Info("a", "v", v)
	slog.New(slog.NewJSONHandler(&log, nil)).Info("a", "v", v)
	forms["slog"] = log.String()
	return forms
}

func TestNoPrintedFormShowsTheBytes(t *testing.T) {
	type nested struct {
		Shown  secret.Bytes
		hidden secret.Bytes
		list   []secret.Bytes
	}
	s := secret.Copy(known)
	for name, v := range map[string]any{
		"value":   s,
		"pointer": &s,
		"struct":  nested{Shown: s, hidden: s, list: []secret.Bytes{s}},
		"slice":   []secret.Bytes{s},
		"map":     map[string]secret.Bytes{"k": s},
	} {
		for form, text := range printedForms(t, v) {
			for _, leak := range []string{
				string(known), hex.EncodeToString(known[:8]),
				strings.ToUpper(hex.EncodeToString(known[:8])), "75 78 79 87",
			} {
				if strings.Contains(text, leak) {
					t.Errorf("%s printed with %s shows the secret: %s", name, form, text)
				}
			}
		}
	}
	// The check itself must be able to fail.
	if !strings.Contains(printedForms(t, known)["%s"], string(known)) {
		t.Fatal("a plain slice does not print its bytes: the test cannot fail")
	}
}

func TestClearReachesEveryCopyOfTheValue(t *testing.T) {
	raw := bytes.Clone(known)
	s := secret.Own(raw)
	other := s
	s.Clear()
	s.Clear()
	if !bytes.Equal(raw, make([]byte, len(raw))) {
		t.Errorf("owned bytes after Clear = %x, want zeros", raw)
	}
	if other.Len() != 0 || other.Expose() != nil {
		t.Error("a copy of the value still shows bytes after Clear")
	}
	var zero secret.Bytes
	zero.Clear()
	if zero.Len() != 0 {
		t.Error("zero value is not empty")
	}
}

func TestCopyLeavesTheOriginal(t *testing.T) {
	raw := bytes.Clone(known)
	s := secret.Copy(raw)
	s.Clear()
	if !bytes.Equal(raw, known) {
		t.Error("clearing the copy changed the original")
	}
}

func TestWriteFileThenReadFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "root.key")
	for _, want := range [][]byte{known, []byte("shorter")} {
		if err := secret.WriteFile(path, want); err != nil {
			t.Fatal(err)
		}
		got, err := secret.ReadFile(path, 64)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got.Expose(), want) {
			t.Errorf("read %q, want %q", got.Expose(), want)
		}
	}
	names, err := os.ReadDir(filepath.Dir(path))
	if err != nil {
		t.Fatal(err)
	}
	if len(names) != 1 {
		t.Errorf("folder holds %v: a temporary file was left behind", names)
	}
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if info.Mode().Perm() != 0o600 {
		t.Errorf("mode %04o, want 0600", info.Mode().Perm())
	}
}

func TestReadFileRefuses(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "k")
	if err := secret.WriteFile(path, known); err != nil {
		t.Fatal(err)
	}
	if _, err := secret.ReadFile(path, 8); err == nil || !strings.Contains(err.Error(), "at most 8") {
		t.Errorf("oversized file: %v", err)
	}
	for _, mode := range []os.FileMode{0o640, 0o604, 0o660, 0o666} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		_, err := secret.ReadFile(path, 64)
		if !errors.Is(err, secret.ErrExposed) || !strings.Contains(err.Error(), "chmod 600") {
			t.Errorf("mode %04o: %v, want ErrExposed with the way out", mode, err)
		}
	}
	if _, err := secret.ReadFile(filepath.Join(dir, "absent"), 64); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("absent file: %v", err)
	}
}

func TestWriteFileKeepsTheOldBytesWhenItCannotWrite(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "taken")
	if err := os.Mkdir(path, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := secret.WriteFile(path, known); err == nil {
		t.Fatal("writing over a folder succeeded")
	}
	names, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	if len(names) != 1 {
		t.Errorf("folder holds %v: a temporary file was left behind", names)
	}
}

// TestNewIsNeverOnTheStack: a goroutine's stack is copied when it grows.
func TestNewIsNeverOnTheStack(t *testing.T) {
	if n := testing.AllocsPerRun(100, func() {
		s := secret.New(32)
		s.Expose()[0] = 1
		s.Clear()
	}); n < 3 { // bytes, buffer, pointer to it
		t.Errorf("%v allocations for a secret that does not escape: it is on the stack", n)
	}
	if n := testing.AllocsPerRun(100, func() {
		s := secret.Copy(known[:16])
		s.Clear()
	}); n < 3 {
		t.Errorf("%v allocations for a copy: it is on the stack", n)
	}
}
