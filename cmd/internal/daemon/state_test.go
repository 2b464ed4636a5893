package daemon

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestOpenState(t *testing.T) {
	for _, tt := range []struct {
		name, schema string
		want         error
	}{
		{"ours", "1\n", nil},
		{"newer", "2\n", ErrNewerState},
		{"zero", "0\n", ErrState},
		{"junk", "\x00\xff", ErrState},
		{"empty", "", ErrState},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, "schema")
			if err := os.WriteFile(path, []byte(tt.schema), 0o600); err != nil {
				t.Fatal(err)
			}
			if err := openState(dir); !errors.Is(err, tt.want) {
				t.Errorf("err = %v, want %v", err, tt.want)
			}
			if data, _ := os.ReadFile(path); string(data) != tt.schema {
				t.Errorf("schema now holds %q", data)
			}
		})
	}
}

func TestOpenStateMakesIt(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a", "b")
	for range 2 { // the second daemon of the site finds it
		if err := openState(dir); err != nil {
			t.Fatal(err)
		}
	}
	info, err := os.Stat(dir)
	if err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("mode %v, %v, want 0700", info.Mode(), err)
	}
	data, err := os.ReadFile(filepath.Join(dir, "schema"))
	if err != nil || strings.TrimSpace(string(data)) != "1" {
		t.Errorf("schema %q, %v", data, err)
	}
}

func TestOpenStateRefusesAFolderOfEverybody(t *testing.T) {
	dir := t.TempDir()
	for mode, want := range map[os.FileMode]error{0o777: ErrOpenState, 0o702: ErrOpenState, 0o755: nil} {
		if err := os.Chmod(dir, mode); err != nil {
			t.Fatal(err)
		}
		if err := openState(dir); !errors.Is(err, want) {
			t.Errorf("mode %#o: err = %v, want %v", mode, err, want)
		}
	}
}
