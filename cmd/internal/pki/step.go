package pki

import (
	"os"
	"path/filepath"

	"github.com/quietline/quietline/secret"
)

// Step is called before and after each durable change that this package makes.
// Only tests that kill the process at every one of them put something here.
var Step = func() {}

// write replaces a file durably: a reader finds the old one or the new one.
func write(path string, text []byte, mode os.FileMode) error {
	Step()
	defer Step()
	return secret.WriteFileMode(path, text, mode)
}

func remove(path string) error {
	Step()
	defer Step()
	if err := os.Remove(path); err != nil {
		return err
	}
	return secret.SyncDir(filepath.Dir(path))
}
