package enrol

import (
	"os"

	"github.com/quietline/quietline/secret"
	"github.com/quietline/quietline/tunnel/bundle"
)

// step is called after each durable change of an enrolment. Only the test that
// kills the process at every one of them puts something else here.
var step = func() {}

func writeFile(path string, text []byte) error {
	err := secret.WriteFile(path, text)
	step()
	return err
}

func writeSecret(path string, b secret.Bytes) error {
	err := bundle.WriteSecret(path, b)
	step()
	return err
}

func removeFile(path string) error {
	err := os.Remove(path)
	step()
	return err
}
